"""Scheme: how a KV cache is stored, as data. What it costs: `porter.kv.layout`; what it computes:
`porter.kv.cache`; its names and text form: `porter.kv.names`.

Each side, keys and values, is stored by itself. A token is a vector of D channels for each KV head. Keys are
those after the rotary embedding.

    element             what a code means                                       step (scale) of a group
    fp32 fp16 bf16      the value, kept                                         none
    int8 int4 int3 int2 two's complement, value = code * step                   absmax / (2^(b-1) - 1)
    uint4 uint3 uint2   value = code * step + minimum                           (max - min) / (2^b - 1)
    e4m3fn              value = code * step                                     absmax / 448
    lloyd4 … lloyd1     value = centroid[code] * step (Lloyd-Max for N(0,1))    norm / sqrt(channels)

A step is computed in float32, raised to the smallest normal number of the type that it is stored in, lowered
to its largest, and rounded to it; codes are then rounded to nearest, ties to even, against what is stored,
and saturate. A minimum is rounded to the same type.

Where the published codes of a scheme disagree, this is what holds here:

- Symmetric levels are those of InnerQ's accuracy code, step = absmax / (2^(b-1) - 1), so that two bits are
  {-1, 0, 1}: the published scores come from it, and the largest value is met exactly. Its CUDA kernels divide
  by 2^(b-1), which clips the largest positive value (at two bits to its half).
- `hybrid` is that of the CUDA kernels: the asymmetric choice has all 2^b levels, and the mode is the sign of
  the stored step (negative: asymmetric). At the same bytes its error is never larger than with the 2^(b-1)
  levels and the extra mask bit of the accuracy code.
- The recent window never shrinks below `recent` tokens: a group is rounded once it is complete and all of it
  is older. InnerQ's and KIVI's PyTorch flush the window itself.
- Key normalization is static, from calibration, not from the first prefill: then it is a constant that folds
  into weights or the query, and the cache does not depend on how a prompt was cut.
- TurboQuant's mixed rates: D=128 has 32 channels of b+1 bits and 96 of b, which are 2.25 and 3.25 bits of
  codes. Each set is a quantizer of its own, with its own rotation and fp16 norm, and with these two norms the
  rates are the 2.5 and 3.5 of their names. Which channels are in the first set is for calibration to choose
  (those of the largest mean square: keys have outlier channels, and a set's norm follows them); without one
  they are the first.

Sources: KIVI 2402.02750; InnerQ 2602.23200; TurboQuant 2504.19874; QJL 2406.03482; TriAxialKV 2605.17170;
certified attention 2605.20868.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from porter.errors import PassError

KEPT = ("fp32", "fp16", "bf16")
SYMMETRIC = ("int8", "int4", "int3", "int2")
ASYMMETRIC = ("uint4", "uint3", "uint2")
CODEBOOK = ("lloyd4", "lloyd3", "lloyd2", "lloyd1")
ELEMENTS = (*KEPT, *SYMMETRIC, *ASYMMETRIC, "e4m3fn", *CODEBOOK)
STATIC = ("tensor", "head", "channel")


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored.

    `element`: see the table above. A group has one step: `group` consecutive channels of a token (`along`
    channels; 0: all of them; the last is smaller where D does not divide), or `group` consecutive tokens of a
    channel (`along` tokens). `scale`: the stored type of steps, minimums and norms, fp32 or fp16.

    `hybrid`: each group is symmetric or asymmetric, whichever has the smaller L1 error (a tie: symmetric).
    `static`: steps are constants from calibration, one for the `tensor`, each `head`, or each `channel` of
    each head; "" means that each group's is computed. `mixed`: a quarter of the channels have one bit more.
    `residual`: the sign of each rotated channel of what the codes leave (QJL), with its norm. `rotate`: the
    vectors are rotated first (`porter.kv.rotation`); scores stay the same since the query is rotated too, and
    the output is rotated back. `more`: the element of tokens whose tag has earned it (TriAxialKV), or "".

    Raises PassError PORT-0271 when the fields do not go together.
    """

    element: str = "fp16"
    along: str = "channels"
    group: int = 0
    scale: str = "fp32"
    hybrid: bool = False
    static: str = ""
    mixed: bool = False
    residual: bool = False
    rotate: bool = False
    more: str = ""

    def __post_init__(self) -> None:
        for wrong, what in self._faults():
            if wrong:
                raise PassError("PORT-0271", what, where=self.element, hint="see porter/kv/scheme.py")

    def _faults(self) -> list[tuple[bool, str]]:
        """Every rule, and whether it is broken."""
        book, tokens = self.element in CODEBOOK, self.along == "tokens"
        plain = not (self.group or self.hybrid or self.static or self.more or tokens)
        return [
            (self.element not in ELEMENTS, f"there is no cache element {self.element!r}"),
            (self.along not in ("channels", "tokens"), "groups are along channels or tokens"),
            (self.scale not in ("fp16", "fp32"), "scales are fp16 or fp32"),
            (self.group < 0 or (tokens and self.group < 1), "groups along tokens need a size"),
            (not self.coded and not plain, "what is kept as floats has no groups"),
            (self.static not in ("", *STATIC), f"static scales are for one of {', '.join(STATIC)}"),
            (bool(self.static) and (self.element not in (*SYMMETRIC, "e4m3fn") or bool(self.group)),
             "static scales are for int or e4m3fn elements without groups"),
            (self.hybrid and not {self.element, self.more or "int4"} <= {*SYMMETRIC[1:]},
             "hybrid groups are of int4, int3 or int2"),
            (self.hybrid and bool(self.static), "hybrid groups have no static scales"),
            (book and not (plain and self.rotate), "a codebook is for whole rotated tokens"),
            (self.mixed and self.element not in CODEBOOK[1:], "mixed rates are of lloyd3, lloyd2 or lloyd1"),
            (self.residual and not book, "a residual is that of a codebook"),
            (bool(self.more) and (self.more not in ASYMMETRIC + SYMMETRIC or tokens or bool(self.static)),
             "tokens with more bits have integers in groups along channels"),
        ]  # fmt: skip

    @property
    def coded(self) -> bool:
        """Whether there are codes and steps at all."""
        return self.element not in KEPT

    @property
    def bits(self) -> int:
        """Bits of a code (of a channel with the lower rate, where rates are mixed)."""
        return {"fp32": 32, "fp16": 16, "bf16": 16, "e4m3fn": 8}.get(self.element) or int(self.element[-1])

    @property
    def minimums(self) -> bool:
        """Whether groups have a minimum beside their step."""
        return self.element in ASYMMETRIC or self.hybrid

    @property
    def bounded(self) -> bool:
        """Whether a step bounds the error of its group whatever the values."""
        plain = not (self.hybrid or self.static or self.more)
        return self.element in SYMMETRIC and self.along == "channels" and self.scale == "fp32" and plain

    @property
    def flush(self) -> int:
        """How many tokens are rounded together."""
        return self.group if self.along == "tokens" else 1

    def extra(self, head_size: int) -> int:
        """How many channels have one bit more: a quarter, rounded to a multiple of 8 (ties to an even one);
        below 32 channels a quarter, rounded down."""
        return (8 * round(head_size / 32) if head_size >= 32 else head_size // 4) if self.mixed else 0

    def sets(self, head_size: int) -> list[tuple[int, int]]:
        """(channels, bits of each) of a codebook's sets, in the order in which they are stored."""
        extra = self.extra(head_size)
        return [(n, b) for n, b in ((extra, self.bits + 1), (head_size - extra, self.bits)) if n]


@dataclass(frozen=True)
class Scheme:
    """Both sides, and what they share.

    `recent` newest and `sink` first tokens of each row stay in `high` precision; so do the first `keep_first`
    and last `keep_last` layers. `normalize`: keys are divided by a constant of each channel, and queries
    multiplied by it. `share`: the share of tokens that may have `more` bits; where `bits` is above 0, as many
    as a budget of so many bits per cached number allows, which is found for a model
    (`porter.kv.triaxial.within`). `copy`: the type of an exact copy beside the codes, from which a head's
    step is computed again whose error may be more than `tolerance` times the norm of its output, or "". The
    bound (`porter.kv.bounds`) is for symmetric integers in groups along channels with fp32 steps: appending a
    token touches that token alone, and nothing is ever clipped. `layers`: keys and values of each layer by
    itself, in place of `key` and `value`.
    Raises PassError PORT-0271.
    """

    key: Side = field(default_factory=Side)
    value: Side = field(default_factory=Side)
    recent: int = 0
    sink: int = 0
    high: str = "fp16"
    normalize: bool = False
    keep_first: int = 0
    keep_last: int = 0
    share: float = 0.0
    bits: float = 0.0
    copy: str = ""
    tolerance: float = 0.0
    layers: tuple[tuple[Side, Side], ...] = ()

    def __post_init__(self) -> None:
        counts = (self.recent, self.sink, self.keep_first, self.keep_last)
        faults = [
            (min(counts) < 0, "windows and kept layers are counts from 0"),
            (self.high not in KEPT or self.copy not in ("", *KEPT), f"high and copy are {', '.join(KEPT)}"),
            (not 0 <= self.share <= 1, "share is between 0 and 1"),
            (bool(self.key.more) != bool(self.value.more), "both sides give tokens more bits, or neither"),
            (max(self.share, self.bits) > 0 and not self.key.more,
             "share and bits are for tokens with more bits"),
            (not 0 <= self.bits <= 32, "a budget is between 0 and 32 bits"),
            (bool(self.copy) and not (self.key.bounded and self.value.bounded),
             "an exact copy is for symmetric integers along channels with fp32 steps that are not static"),
            (bool(self.copy) and self.recent + self.sink > 0,
             "there are no windows beside an exact copy"),
            (not 0 <= self.tolerance <= 1e6, "tolerance is between 0 and 1e6"),
            (self.tolerance > 0 and not self.copy, "tolerance is for a scheme with an exact copy"),
            (bool(self.layers) and (self.copy != "" or any(side.more for side in self.sides)),
             "layers of their own have no tags and no exact copy"),
        ]  # fmt: skip
        for wrong, what in faults:
            if wrong:
                raise PassError("PORT-0271", what, hint="see porter/kv/scheme.py")

    @property
    def tagged(self) -> bool:
        """Whether tokens have tags that decide their bits."""
        return bool(self.key.more)

    def side(self, name: str) -> Side:
        """`key` or `value`."""
        return {"key": self.key, "value": self.value}[name]

    @property
    def sides(self) -> tuple[Side, ...]:
        """All that a layer's keys or values may be stored as."""
        return tuple(side for layer in self.layers for side in layer) or (self.key, self.value)

    def ring(self, side: Side) -> int:
        """Slots for the newest tokens: `recent`, and a group more along tokens, where a group is written
        whole before it is read; it never wraps when `recent` is a multiple of it."""
        return self.recent + (side.flush if side.along == "tokens" else 0)

    def windowed(self, side: Side) -> bool:
        """Whether tokens pass through high precision: codes are then made from what that holds."""
        return side.coded and self.sink + self.ring(side) > 0

    def rounded(self, side: Side, tokens: int) -> int:
        """How many of `tokens` tokens are codes; they follow the sinks."""
        return max(0, tokens - self.sink - self.recent) // side.flush * side.flush if side.coded else 0

    def layer(self, index: int, layers: int) -> Scheme:
        """The scheme of one of `layers` layers: a kept one has both sides in high precision. Raises PassError
        PORT-0271 where layers have sides of their own, and are not so many."""
        if self.layers and len(self.layers) != layers:
            what = f"the scheme has {len(self.layers)} layers, and the model's cache {layers}"
            raise PassError("PORT-0271", what, hint="give each layer its keys and values")
        if self.keep_first <= index < layers - self.keep_last:
            key, value = self.layers[index] if self.layers else (self.key, self.value)
            return replace(self, keep_first=0, keep_last=0, key=key, value=value, layers=())
        return Scheme(Side(self.high), Side(self.high), high=self.high)

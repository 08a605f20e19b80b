"""Attention's products on codes of 2 to 4 bits as they are: 8-bit integers, 32 of them an instruction.

Decoding to float32 and multiplying there costs more than reading what the codes save. Here a tile of codes is
spread to bytes, and the other factor is rounded to 8 bits with a scale of its own:

    keys      q · k = Σ_groups scale_q scale_k Σ_32 (q's integer) (code - bias)          `packed_keys`
    values    Σ_t w_t v_t = scale_w Σ_32 tokens (w's integer) (code - bias) · scale_v    `packed_values`

A query is rounded over 32 channels to -127 … 127, weights over a tile of 32 tokens to 0 … 255, each against
the largest of them. Sums of integers are exact. What the rounding adds to an error that the codes already
have: the rounded factor is off by at most half a unit of 127 or 255, an element of the cache by half a step;
by root mean squares that is some 3 % of the error of 3-bit codes in the result, and 8 % of that of 4-bit ones
(`tests/porter/lower/kernels/test_packed.py` holds it to its bound).

A group's step is applied to sums where the group lies along what is summed (InnerQ, 2602.23200). Where it
does not (KIVI, 2402.02750), the factor is multiplied by the steps first, and rounded after that, for each
tile of keys, or each group of channels of values. A minimum adds itself times the sum of the factor.

All of it needs whole tiles of codes; the rest (sinks, the window) takes the way of floats.
"""

from __future__ import annotations

from dataclasses import dataclass

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, i64, tirx
from porter.lower.kernels.stored import Source, Stored

TILE = 32  # tokens
CHUNK = 32  # channels


@dataclass(frozen=True)
class Codes:
    """The codes of a side that can be multiplied as they are."""

    stored: Stored

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.stored.side.bits

    @property
    def width(self) -> int:
        """Channels."""
        return self.stored.width

    @property
    def chunks(self) -> int:
        """Groups of 32 channels."""
        return self.width // CHUNK

    @property
    def signed(self) -> bool:
        """Are codes two's complement? With the top bit turned they are above theirs by `bias`."""
        return self.stored.side.element.startswith("int")

    @property
    def bias(self) -> int:
        """What is taken off codes without a sign: it makes them signed again. Those of 4 bits that have none
        are centred so too, with minimums that are higher by as many steps: else what rounding the other
        factor is off by would be multiplied by up to 15."""
        return 1 << (self.bits - 1) if self.signed or self.bits == 4 else 0

    @property
    def lifted(self) -> int:
        """By how many steps minimums are higher for it."""
        return 0 if self.signed else self.bias

    @property
    def along_tokens(self) -> bool:
        """Do groups lie along tokens?"""
        return self.stored.side.along == "tokens"

    def turned(self, packed: Expr, first: int) -> Expr:
        """uint8x32 of packed codes with their top bits turned, where they are signed; each half of 16 bytes
        begins at byte `first` of a row."""
        if not self.signed:
            return packed
        top = sum(1 << i for i in range(self.bits - 1, 24, self.bits))  # of 3 bytes: then it repeats
        half = [(top >> (8 * ((first + i) % 3))) & 255 for i in range(16)]
        return vec.flipped(packed, vec.repeated(half))

    def coded(self, token: Expr) -> Expr:
        """The place of a token among the codes, which begin behind the sinks."""
        return token - i64(self.stored.scheme.sink)

    def whole(self, first: Expr, total: Expr) -> Expr:
        """Is the tile from token `first` on one of codes alone?"""
        sink = i64(self.stored.scheme.sink)
        done = sink + self.stored.rounded(total)
        return tirx.all(first >= sink, first + i64(TILE) <= done)


def codes_of(source: Source) -> Codes | None:
    """The codes of a source, where there are any that this knows. (The bounds of certified attention, which
    has an exact copy, know nothing of rounded factors.)"""
    if not (vec.available() and isinstance(source, Stored)) or source.scheme.copy:
        return None
    side = source.side
    packed = side.element[-1] in "234" and side.element.rstrip("234") in ("int", "uint")
    if not packed or side.static or side.more:
        return None
    if source.width % (2 * CHUNK) or side.group % CHUNK:
        return None
    if source.scheme.rounded(side, source.capacity) < TILE or (side.hybrid and not _signs_fit(source)):
        return None
    return Codes(source)


def _signs_fit(source: Stored) -> bool:
    """Hybrid groups: those of values along tokens, whose signs hold for whole tiles, and of 2 bits."""
    return source.name == "value" and source.side.bits == 2 and source.side.along == "tokens"

"""AppendCache and ReadCache: model-local functions that write and read one side of a scheme's buffers.

- `AppendCache_…{scheme, side}(buffers…, new float32 [B,H,S,D], past_lengths int64 [B][, beside]) -> buffers…`
- `ReadCache_…{scheme, side}(buffers…, total_lengths int64 [B][, beside]) -> float32 [B,H,C,D]`

`buffers` are those of `porter.kv.layout`, in its order, e4m3fn codes as bytes (uint8); `beside` is the step
of static steps, float32 [1 or H, 1, 1 or D], or the slots of a tagged scheme with those of the new tokens
(`porter.kvgraph.tagged`). All S tokens of each row are real ones. What comes out equals
`porter.kv.cache.Cache.state` byte for byte; tokens are read in their own order, and what lies past the total
length is finite.

The bodies are plain ONNX, so that any runtime can run them; porter's importer knows them by the prefix of
their names, and what they do by `scheme`, the text of the layer's scheme, and `side`, `key` or `value`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.formats.wide import WIDE
from porter.kv import layout
from porter.kv.layout import Buffer
from porter.kv.names import text_of
from porter.kv.scheme import Scheme, Side
from porter.kvgraph import body, tagged
from porter.kvgraph.body import Body
from porter.kvgraph.rounding import Parts, Rounding

APPEND, READ = "AppendCache_", "ReadCache_"


@dataclass(frozen=True)
class Cached:
    """One coded side, `key` or `value`, of a layer's cache: H heads of `size` channels, C tokens.

    Raises PassError PORT-0274 for what is not to be had in a graph.
    """

    scheme: Scheme
    name: str
    heads: int
    size: int
    capacity: int

    def __post_init__(self) -> None:
        wide = [self.scheme.high] if self.scheme.windowed(self.side) else []
        wide += [self.scheme.copy] if self.scheme.copy else []
        for wrong, what in (
            ("bf16" in wide, "ONNX Runtime takes no bf16 tensors, so windows and copies are fp16 or fp32"),
        ):
            if wrong:
                raise PassError("PORT-0274", what, where=text_of(self.scheme), hint="see docs/errors")

    @property
    def side(self) -> Side:
        """How it is stored."""
        return self.scheme.side(self.name)

    @cached_property
    def buffers(self) -> list[Buffer]:
        """The planned buffers of a batch of 1, their names without the side: `_codes`, `_scale`, …"""
        planned = layout.buffers(self.scheme, self.size, self.heads, self.capacity)
        mine = [b for b in planned if b.name.startswith(f"{self.name}_")]
        bytes_ = {np.dtype(layout.code_type("e4m3fn")): np.dtype(np.uint8)}
        return [Buffer(b.name.removeprefix(self.name), b.shape, bytes_.get(b.dtype, b.dtype)) for b in mine]

    @property
    def beside(self) -> list[str]:
        """What the functions take besides: static steps, or slots."""
        return ["step"] if self.side.static else ["slots"] if self.scheme.tagged else []

    @property
    def rounded(self) -> int:
        """Q: the tokens that are codes when the cache is full."""
        return self.scheme.rounded(self.side, self.capacity)

    @property
    def window(self) -> int:
        """W: the slots in high precision."""
        ring = self.scheme.ring(self.side)
        return min(self.capacity, self.scheme.sink + ring) if self.scheme.windowed(self.side) else 0

    def function_name(self, prefix: str) -> str:
        """The prefix, the side, and what tells one body from another."""
        about = f"{text_of(self.scheme)} {self.name} {self.heads} {self.size} {self.capacity}"
        return f"{prefix}{self.name}_{hashlib.sha256(about.encode()).hexdigest()[:12]}"

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes of a call."""
        return {"scheme": text_of(self.scheme), "side": self.name}


def append_function(cached: Cached, opset: int) -> ir.Function:
    """The function that adds S tokens to each row."""
    b, named = Body(), [f"past{b.name}" for b in cached.buffers]
    past = {buffer.name[1:]: name for buffer, name in zip(cached.buffers, named, strict=True)}
    present = _Append(b, cached, past, *cached.beside).outputs()
    return b.function(
        cached.function_name(APPEND),
        [*named, "new", "past_lengths", *cached.beside],
        {f"present_{name}": present[name] for name in past},
        list(cached.attributes),
        opset,
    )


def read_function(cached: Cached, opset: int) -> ir.Function:
    """The function that answers all tokens as floats."""
    b, named = Body(), [f"present{b.name}" for b in cached.buffers]
    parts = {buffer.name[1:]: name for buffer, name in zip(cached.buffers, named, strict=True)}
    tokens = _read(b, cached, parts, *cached.beside)
    inputs = [*named, "total_lengths", *cached.beside]
    return b.function(cached.function_name(READ), inputs, {"tokens": tokens}, list(cached.attributes), opset)


def _rounded(b: Body, cached: Cached, lengths: str) -> str:
    """`Scheme.rounded` of each row, int64 [B]."""
    scheme, flush = cached.scheme, cached.side.flush
    kept = scheme.sink + scheme.recent
    if not kept and flush == 1:
        return lengths
    left = b.op("Max", b.op("Sub", lengths, b.integer(kept)), b.integer(0))
    return b.op("Sub", left, b.op("Mod", left, b.integer(flush))) if flush > 1 else left


def _column(b: Body, per_row: str) -> str:
    """[B] -> [B,1]."""
    return b.op("Unsqueeze", per_row, b.ints(1))


def _where(b: Body, mask: str, new: str, old: str) -> str:
    """new where mask bool [B,T], else old, both [B,H,T,…]."""
    return b.op("Where", b.op("Unsqueeze", mask, b.ints(1, 3)), new, old)


def _rows(b: Body, x: str, index: str, last: str) -> str:
    """Tokens index int64 [B,N] of each row of x [B,H,T,…] -> [B,H,N,…]; an index is taken into 0 … last."""
    inside = b.op("Min", b.op("Max", index, b.integer(0)), last)
    swapped = b.op("Transpose", x, perm=[0, 2, 1, 3])
    taken = b.op("GatherND", swapped, b.op("Unsqueeze", inside, b.ints(2)), batch_dims=1)
    return b.op("Transpose", taken, perm=[0, 2, 1, 3])


class _Append:
    """The nodes of one AppendCache: the batched form of `porter.kv.cache.Cache._append`."""

    def __init__(self, b: Body, cached: Cached, past: Parts, beside: str = "") -> None:
        self.b, self.cached, self.scheme, self.past = b, cached, cached.scheme, past
        self.rounding = Rounding(b, cached.side, cached.size, beside if cached.side.static else "")
        self.start = "past_lengths"
        self.count = b.size("new", 2)
        self.end = b.op("Add", self.start, self.count)

    def outputs(self) -> Parts:
        """The buffers after the tokens."""
        b, new, present = self.b, "new", {}
        if self.scheme.copy:
            copied = self._narrow(new, self.scheme.copy)
            present["copy"] = b.op("TensorScatter", self.past["copy"], copied, self.start, axis=2)
            new = b.cast(copied, body.FLOAT)
        if self.scheme.tagged and not self.cached.window:
            return present | self._codes(new)
        if not self.cached.window:
            parts = self.rounding.encode(new)
            return present | {
                n: b.op("TensorScatter", self.past[n], parts[n], self.start, axis=2) for n in parts
            }
        high = self._narrow(new, self.scheme.high)
        if self.cached.rounded:
            present |= self._codes(b.cast(high, body.FLOAT))
        return present | {"window": self._window(high)}

    def _narrow(self, x: str, name: str) -> str:
        """x in fp16 or fp32, saturating."""
        b, largest = self.b, WIDE[name].largest
        inside = b.op("Min", b.op("Max", x, b.number(-largest)), b.number(largest))
        return b.cast(inside, body.HALF) if name == "fp16" else inside

    def _window(self, new: str) -> str:
        """Each slot holds the last token that it is for, where that is a new one."""
        b, sink, ring = self.b, self.scheme.sink, self.scheme.ring(self.cached.side)
        slots = np.arange(self.cached.window)
        token = b.constant(slots[None], np.int64)
        last = _column(b, b.op("Sub", self.end, b.integer(1)))
        if ring and self.cached.window > sink:
            behind = b.op("Mod", b.op("Sub", last, b.constant(slots[None], np.int64)), b.integer(ring))
            token = b.op("Where", b.constant(slots[None] < sink, np.bool_), token, b.op("Sub", last, behind))
        index = b.op("Sub", token, _column(b, self.start))
        # A ring's slot that no token had yet comes out below the sinks.
        floor = b.constant(np.where(slots < sink, 0, sink)[None], np.int64)
        real = b.op("And", b.op("LessOrEqual", token, last), b.op("GreaterOrEqual", token, floor))
        fresh = b.op("And", real, b.op("GreaterOrEqual", index, b.integer(0)))
        return _where(b, fresh, _rows(b, new, index, self._newest()), self.past["window"])

    def _codes(self, new: str) -> Parts:
        """Codes of the tokens whose group is complete and old enough now."""
        b, flush = self.b, self.cached.side.flush
        done, ready = (_column(b, _rounded(b, self.cached, n)) for n in (self.start, self.end))
        if self.scheme.tagged:
            return self._tagged(new, done, ready)
        parts = self.rounding.encode(self._waiting(new, done))
        groups = {"codes": 1, "scale": flush, "min": flush}
        return {
            name: self._placed(name, part, *self._in_groups((done, ready), groups.get(name, 1)))
            for name, part in parts.items()
        }

    def _tagged(self, new: str, done: str, ready: str) -> Parts:
        """The same for tokens that have slots, each a group of its own."""
        b, scheme = self.b, self.scheme
        places = b.op("Add", done, b.op("Unsqueeze", b.counted(self.count), b.ints(0)))
        slots = tagged.slots_at(b, places, self.cached.capacity - scheme.sink)
        held = tagged.pools(scheme, self.cached.name, self.cached.capacity)
        real = b.op("Less", places, ready)
        return tagged.write(b, held, self.cached.size, self.past, self._waiting(new, done), slots, real)

    def _waiting(self, new: str, done: str) -> str:
        """The tokens from `done` int64 [B,1] on, whole groups for at least S of them, from the window and the
        new ones."""
        b, flush, sink, ring = self.b, self.cached.side.flush, self.scheme.sink, self._ring
        count = self.count
        if flush > 1:
            more = b.op("Add", count, b.integer(flush - 1))
            count = b.op("Sub", more, b.op("Mod", more, b.integer(flush)))
        after = b.op("Add", done, b.op("Unsqueeze", b.counted(count), b.ints(0)))  # the sinks
        index = b.op("Sub", b.op("Add", after, b.integer(sink)), _column(b, self.start))
        fresh = _rows(b, new, index, self._newest())
        if not ring:
            return fresh
        slot = b.op("Add", b.op("Mod", after, b.integer(ring)), b.integer(sink))
        window = b.cast(self.past["window"], body.FLOAT)
        held = _rows(b, window, slot, b.integer(self.cached.window - 1))
        return _where(b, b.op("GreaterOrEqual", index, b.integer(0)), fresh, held)

    def _placed(self, name: str, part: str, first: str, end: str, count: str) -> str:
        """The buffer with `part` in places first to end - 1 (int64 [B,1]); it holds `count` of them."""
        b = self.b
        places = b.op("Unsqueeze", b.counted(count), b.ints(0))
        index = b.op("Sub", places, first)
        written = b.op("And", b.op("GreaterOrEqual", index, b.integer(0)), b.op("Less", places, end))
        last = b.op("Sub", b.size(part, 2), b.integer(1))
        return _where(b, written, _rows(b, part, index, last), self.past[name])

    def _in_groups(self, bounds: tuple[str, str], flush: int) -> tuple[str, str, str]:
        b, count = self.b, self.b.integer(self.cached.rounded // flush)
        first, end = bounds if flush == 1 else (b.op("Div", x, b.integer(flush)) for x in bounds)
        return first, end, count

    @property
    def _ring(self) -> int:
        return self.scheme.ring(self.cached.side)

    def _newest(self) -> str:
        return self.b.op("Sub", self.count, self.b.integer(1))


def _read(b: Body, cached: Cached, parts: Parts, beside: str = "") -> str:
    """All tokens of the buffers: sinks, codes, then what is in the ring."""
    scheme, side, capacity = cached.scheme, cached.side, cached.capacity
    if not cached.rounded:
        return b.cast(parts["window"], body.FLOAT)  # which holds them all, each in its own place
    if scheme.tagged:
        held = tagged.pools(scheme, cached.name, capacity)
        floats, place, last = tagged.read(b, held, cached.size, parts)
        codes = _rows(b, floats, place, last)
    else:
        codes = Rounding(b, side, cached.size, beside).decode(parts)
    if not cached.window:
        return codes
    sink, ring = scheme.sink, scheme.ring(side)
    window = b.cast(parts["window"], body.FLOAT)
    rest = capacity - sink
    if ring:
        if missing := rest - cached.rounded:
            codes = b.op("Pad", codes, b.ints(0, missing), b.number(0), b.ints(2))
        slots = sink + np.arange(rest) % ring
        held = b.op("Gather", window, b.ints(*slots), axis=2)
        ready = _column(b, _rounded(b, cached, "total_lengths"))
        codes = _where(b, b.op("Less", b.ints(*range(rest)), ready), codes, held)
    return b.op("Concat", b.part(window, 0, sink, 2), codes, axis=2) if sink else codes

"""Append tokens to one side of a stored cache (`porter.kv.cache`), of blocks that a schedule may move.

    new tokens, and those of the window that are now old enough -> steps -> codes -> bytes -> where they go

Each buffer that is written has blocks of its own: `fresh` (tokens to be rounded), `step`, `low`, `code`,
`pack`, and the block that puts them into the cache. Rounding is that of `porter.lower.kernels.grouping`.
What a window holds is read here and written by a kernel of its own, after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.kv import codebook
from porter.lower.blocks.caches import wide
from porter.lower.blocks.define import (
    Expr,
    Spec,
    T,
    block,
    choose,
    define,
    i64,
    marked,
    scratch,
    store,
    tirx,
)
from porter.lower.blocks.norm import root_mean_square
from porter.lower.kernels.grouping import Grouping, code_of, kept, widened
from porter.lower.kernels.rows import WIDE
from porter.lower.kernels.steps import stored_step
from porter.lower.kernels.stored import Stored

KEPT = ("_window", "_copy")  # buffers of tokens as floats
Token = Callable[[Expr, Expr, Expr, Expr], Expr]  # (batch, head, number, channel) -> float32


def encode(spec: Stored, heads: int) -> tirx.PrimFunc:
    """The side's buffers of codes, steps and minimums, in order, then (its window,) new [b, heads, s, width]
    float32, starts [b] int64 (, static steps); the first are written in place.

    Token t of `new` is token starts[b] + t. Tokens past the capacity are dropped; with a start below 0
    nothing is written.
    """
    plan = [(f"c{suffix}", ("b", *shape), dtype) for suffix, shape, dtype in spec.planned(heads)]
    held = [entry for entry in plan if entry[0] == "c_window"]
    buffers: list[Spec] = [
        *(entry for entry in plan if entry[0][1:] not in KEPT),
        *held,
        ("new", ("b", heads, "s", spec.width), "float32"),
        ("starts", ("b",), "int64"),
        *spec.step("c", heads),
    ]
    names = [n for n, _, _ in buffers]

    def body(*args, b, s):
        _Encode(spec, dict(zip(names, args, strict=True)), heads, b, s).emit()

    name = f"encode_{spec.name}_{spec.label}_h{heads}_c{spec.capacity}_d{spec.width}"
    return define(name, buffers, body).with_attr(marked("append"))


def keep(spec: Stored, heads: int, suffix: str) -> tirx.PrimFunc:
    """The window (its sinks and newest tokens) or the exact copy, new [b, heads, s, width] float32, starts
    [b] int64: written in place, as floats of the buffer's type."""
    (entry,) = (e for e in spec.planned(heads) if e[0] == suffix)
    _, shape, dtype = entry

    def body(cache, new, starts, b, s):
        tokens = scratch("kept", [b, heads, s, spec.width], dtype)
        with block("keep_cast", [b, heads, s, spec.width]) as at:
            store(tokens, widened(_copied(spec, new[tuple(at)]), dtype), *at)
        with block("keep", [b, heads, s, spec.width]) as (n, h, t, d):
            token, end = starts[n] + t, tirx.min(starts[n] + s, i64(spec.capacity))
            inside, slot = tirx.all(starts[n] >= i64(0), token < end), token
            if suffix == "_window":
                sink = i64(spec.scheme.sink)
                newest = end - i64(spec.scheme.ring(spec.side))
                inside = tirx.all(inside, tirx.any(token < sink, token >= newest))
                slot = tirx.Select(token < sink, token, spec.slot(token))
            with T.If(inside), T.Then():
                store(cache, tokens[n, h, t, d], n, h, slot, d)

    buffers: list[Spec] = [
        ("cache", ("b", *shape), dtype),
        ("new", ("b", heads, "s", spec.width), "float32"),
        ("starts", ("b",), "int64"),
    ]
    name = f"keep{suffix}_{spec.name}_h{heads}_c{spec.capacity}_d{spec.width}"
    return define(name, buffers, body).with_attr(marked("append"))


def _copied(spec: Stored, value: Expr) -> Expr:
    """A new token's number as the exact copy holds it."""
    copy = spec.scheme.copy
    return kept(value, WIDE[copy]) if copy else value


@dataclass(frozen=True)
class _Encode:
    """The body. Number i of a row's tokens is token `done` + i after the sinks, where `done` were codes
    before."""

    spec: Stored
    at: dict[str, tirx.Buffer]
    heads: int
    batch: Expr
    steps: Expr

    def emit(self) -> None:
        side, channel, byte = self.spec.side, 0, 0
        if side.element.startswith("lloyd"):
            for i, (size, bits) in enumerate(side.sets(self.spec.width)):
                part = _Set(self, channel, size, bits, byte, i)
                part.emit()
                channel, byte = channel + size, byte + -(-size * bits // 8)
            return
        self._codes()
        for suffix, block_of in (("_scale", self._step), ("_min", self._low)):
            if f"c{suffix}" in self.at:
                self._send(suffix, block_of(self.fresh()))

    @property
    def count(self) -> Expr:
        """The most tokens that one call may round: whole groups."""
        flush = self.spec.side.flush
        return (self.steps + i64(flush - 1)) // i64(flush) * i64(flush) if flush > 1 else self.steps

    def place(self, b: Expr, i: Expr) -> tuple[Expr, Expr]:
        """(place of number i among the codes, whether it is one)."""
        start = self.at["starts"][b]
        end = tirx.min(start + self.steps, i64(self.spec.capacity))
        at = self.spec.rounded(start) + i
        return at, tirx.all(start >= i64(0), at < self.spec.rounded(end))

    def fresh(self) -> Token:
        """The tokens to be rounded, rounded as the window rounds them."""
        spec, new, width = self.spec, self.at["new"], self.spec.width
        if not spec.scheme.windowed(spec.side):
            if not spec.scheme.copy:
                return lambda b, h, i, d: new[b, h, i, d]
            return lambda b, h, i, d: _copied(spec, new[b, h, i, d])
        window, high = self.at["c_window"], WIDE[spec.scheme.high]
        fresh = scratch("fresh", [self.batch, self.heads, self.count, width])
        with block("fresh", [self.batch, self.heads, self.count, width]) as (b, h, i, d):
            T.reads(self.at["starts"][b], window[b, h, 0 : window.shape[2], d], new[b, h, 0 : self.steps, d])
            start = self.at["starts"][b]
            after = spec.rounded(start) + i
            before = start - i64(spec.scheme.sink)  # tokens that were there, after the sinks
            last = tirx.max(self.steps - i64(1), i64(0))
            given = new[b, h, tirx.max(tirx.min(after - before, last), i64(0)), d]
            slot = i64(spec.scheme.sink) + after % i64(spec.scheme.ring(spec.side) or 1)
            held = window[b, h, tirx.min(slot, window.shape[2] - i64(1)), d]
            # No condition: TVM would size buffers by it.
            value = tirx.Select(after < before, wide(held), kept(given, high))
            store(fresh, value, b, h, i, d)
        return lambda b, h, i, d: fresh[b, h, i, d]

    def _groups(self) -> list[Expr | int]:
        """The shape of steps after batch and heads."""
        side, width = self.spec.side, self.spec.width
        if side.along == "tokens":
            return [self.count // i64(side.group), width]
        return [self.count, -(-width // (side.group or width))]

    def _group(self, i: Expr, d: Expr) -> tuple[Expr, Expr]:
        """That of number i's channel d."""
        side = self.spec.side
        if side.along == "tokens":
            return i // i64(side.group), d
        return i, d // i64(side.group) if 0 < side.group < self.spec.width else i64(0)

    def _step(self, fresh: Token) -> tirx.Buffer:
        return self._grouped("step", fresh, lambda found: found.step)

    def _low(self, fresh: Token) -> tirx.Buffer:
        return self._grouped("low", fresh, lambda found: found.low)

    def _grouped(self, name: str, fresh: Token, which: Callable[[Grouping], Expr]) -> tirx.Buffer:
        """A number of each group, in its stored type."""
        side, width, dtype = self.spec.side, self.spec.width, str(self.at["c_scale"].dtype)
        shape = [self.batch, self.heads, *self._groups()]
        out, tokens = scratch(name, shape, dtype), side.along == "tokens"
        size = side.group or width
        with block(name, shape) as (b, h, x, y):

            def value(k: Expr) -> Expr:
                if tokens:
                    return fresh(b, h, x * i64(size) + k, y)
                channel = y * i64(size) + k
                # What is repeated changes neither the largest nor the smallest of a shorter last group.
                return fresh(b, h, x, channel if width % size == 0 else tirx.min(channel, i64(width - 1)))

            count = size
            if not tokens and width % size and side.hybrid:  # but it does a sum of errors
                count = tirx.min(i64(size), i64(width) - y * i64(size))
            found = Grouping(side, dtype, count, value, _room).emit()
            store(out, tirx.Cast(dtype, which(found)), b, h, x, y)
        return out

    def _codes(self) -> None:
        side, width = self.spec.side, self.spec.width
        fresh = self.fresh()
        step = None if side.static else self._step(fresh)
        low = self._low(fresh) if side.minimums else None
        dtype = str(self.at["c_codes"].dtype) if side.bits == 8 else "uint8"
        codes = scratch("codes", [self.batch, self.heads, self.count, width], dtype)
        with block("code", [self.batch, self.heads, self.count, width]) as (b, h, i, d):
            group = (b, h, *self._group(i, d))
            mine = self._static(h, d) if step is None else wide(step[group])
            least = tirx.FloatImm("float32", 0.0) if low is None else wide(low[group])
            code = _alone(code_of(side, fresh(b, h, i, d), mine, least))
            store(codes, _cut(code, side.bits, dtype), b, h, i, d)
        self.send_codes(codes, width, side.bits, 0)

    def _static(self, h: Expr, d: Expr) -> Expr:
        """A constant step."""
        kind, step = self.spec.side.static, self.at["c_step"]
        return step[i64(0) if kind == "tensor" else h, i64(0), d if kind == "channel" else i64(0)]

    def send_codes(self, codes: tirx.Buffer, width: int, bits: int, byte: int) -> None:
        """Codes [b, h, i, width], packed, to a token's bytes from `byte` on."""
        if bits == 8:
            self._send("_codes", codes)
            return
        size = -(-width * bits // 8)
        packed = scratch("packed", [self.batch, self.heads, self.count, size], "uint8")
        with block("pack", [self.batch, self.heads, self.count, size]) as (b, h, i, j):
            T.reads(codes[b, h, i, 0:width])
            first = j * i64(8) // i64(bits)
            word: Expr = tirx.IntImm("int32", 0)
            for k in range(8 // bits if 8 % bits == 0 else (8 + 2 * bits - 2) // bits):
                at = first + i64(k)
                code = tirx.Cast("int32", codes[b, h, i, tirx.min(at, i64(width - 1))])
                code = (
                    choose(at < i64(width), code, tirx.IntImm("int32", 0))
                    if self._ends(width, bits)
                    else code
                )
                up = tirx.Cast(
                    "int32", at * i64(bits) - j * i64(8)
                )  # below 0: its low bits are a byte before
                zero = tirx.IntImm("int32", 0)
                word = word | ((code << tirx.max(up, zero)) >> tirx.max(zero - up, zero))
            store(packed, tirx.Cast("uint8", word & tirx.IntImm("int32", 255)), b, h, i, j)
        self._send("_codes", packed, byte)

    @staticmethod
    def _ends(width: int, bits: int) -> bool:
        """Whether the last byte may want codes behind the last."""
        return bool(width * bits % 8) or bool(8 % bits)

    def _send(self, suffix: str, source: tirx.Buffer, byte: int = 0) -> None:
        """Put what was made of each number, or of each group of them, into the cache."""
        cache, width = self.at[f"c{suffix}"], int(source.shape[3])
        each = self.spec.side.flush if suffix in ("_scale", "_min") else 1
        count = self.count // i64(each) if each > 1 else self.count
        with block(f"append{suffix}", [self.batch, self.heads, count, width]) as (b, h, i, j):
            at, valid = self.place(b, i * i64(each) if each > 1 else i)
            at = at // i64(each) if each > 1 else at
            with T.If(valid), T.Then():
                store(cache, source[b, h, i, j], b, h, at, i64(byte) + j if byte else j)

    def send_step(self, source: tirx.Buffer, number: int) -> None:
        """Steps [b, h, i, 1] to column `number`."""
        self._send("_scale", source, number)


@dataclass(frozen=True)
class _Set:
    """Channels of a codebook's side that share a step: norm / sqrt(channels); the code is how many midpoints
    are below."""

    whole: _Encode
    channel: int
    size: int
    bits: int
    byte: int
    number: int

    def emit(self) -> None:
        whole = self.whole
        fresh = self._of(whole.fresh())
        step = self._step(fresh)
        codes = scratch("codes", [whole.batch, whole.heads, whole.count, self.size], "uint8")
        with block("code", [whole.batch, whole.heads, whole.count, self.size]) as (b, h, i, d):
            code = _alone(self._nearest(fresh(b, h, i, d) / wide(step[b, h, i, 0])))
            store(codes, tirx.Cast("uint8", code), b, h, i, d)
        whole.send_codes(codes, self.size, self.bits, self.byte)
        whole.send_step(self._step(self._of(whole.fresh())), self.number)

    def _of(self, fresh: Token) -> Token:
        return lambda b, h, i, d: fresh(b, h, i, i64(self.channel) + d if self.channel else d)

    def _step(self, fresh: Token) -> tirx.Buffer:
        whole, dtype = self.whole, str(self.whole.at["c_scale"].dtype)
        out = scratch("step", [whole.batch, whole.heads, whole.count, 1], dtype)
        with block("step", [whole.batch, whole.heads, whole.count, 1]) as (b, h, i, j):
            root = root_mean_square(lambda d: fresh(b, h, i, d), self.size, _room)
            store(out, stored_step(root, dtype), b, h, i, j)
        return out

    def _nearest(self, ratio: Expr) -> Expr:
        found: Expr = tirx.IntImm("int32", 0)
        for middle in codebook.table(self.bits)[1]:
            found = found + tirx.Cast("int32", ratio > tirx.FloatImm("float32", float(middle)))
        return found


def _cut(code: Expr, bits: int, dtype: str) -> Expr:
    """A code in the low bits."""
    return tirx.Cast(dtype, code if bits == 8 else code & tirx.IntImm("int32", (1 << bits) - 1))


def _alone(code: Expr) -> Expr:
    """An int32 under a name, so that no schedule writes its making out again for each code of a byte."""
    kept = _room(1, "int32")
    store(kept, code, 0)
    return kept[0]


def _room(size: int, dtype: str) -> tirx.Buffer:
    """An array of a block's own."""
    return scratch("room", [size], dtype)

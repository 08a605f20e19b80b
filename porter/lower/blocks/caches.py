"""One element of a cache, whatever its form, as a block reads it: codes become a number where it is wanted.

Each reader says which part of each buffer an element needs, so that a schedule can copy the codes of a piece
of the cache inwards as they are stored. A ring of the newest tokens is needed as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from porter.kv import codebook
from porter.kv.layout import row_bytes
from porter.lower.blocks.define import (
    Expr,
    Spec,
    T,
    block,
    choose,
    define,
    f32,
    i64,
    marked,
    store,
    tirx,
)
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.rows import WIDE, Buffers
from porter.lower.kernels.stored import Cache, Source, Stored

Place = tuple[Expr, Expr, Expr, Expr]  # batch, head, token, channel


@dataclass(frozen=True)
class Reader:
    """Reads a source; `at` has its buffers, whose names begin with `name`, and `lengths`, int64 [b], where
    tokens are in a window or codes by how many there are."""

    source: Source
    at: Buffers
    name: str

    def number(self, place: Place) -> Expr:
        """The element in float32: code * step, then + minimum. Of a token past the row's, anything."""
        source = self.source
        if isinstance(source, Cache):
            return self._row(source, place)
        assert isinstance(source, Stored), source
        b, head, token, channel = place
        if not source.side.coded:
            return wide(self.at[self.name][b, head, token, channel])
        window, codes = self._buffer("_window"), self._buffer("_codes")
        held = None if window is None else wide(window[b, head, _slot(source, token), channel])
        if codes is None:
            assert held is not None
            return held
        first = i64(source.scheme.sink)
        decoded = self._decoded(source, (b, head, token - first, channel))
        if held is None:
            return decoded
        done = source.rounded(self._total(source, b))
        return choose(tirx.all(token >= first, token < first + done), decoded, held)

    @property
    def counts(self) -> bool:
        """Whether where a token is depends on how many there are."""
        return self._buffer("_window") is not None and self._buffer("_codes") is not None

    def regions(self, place: Place, *, lengths: bool = False) -> list[object]:
        """What of each buffer the element needs; all of a window, of which tokens are anywhere. With the
        row's length, if it is wanted besides."""
        source, (b, head, token, channel) = self.source, place
        found: list[object] = [self.at["lengths"][b]] if lengths or self.counts else []
        if isinstance(source, Cache):
            row = self.at[self.name]
            if source.codec in WIDE:
                return [*found, row[b, head, token, channel]]
            codes = _part(row, (b, head, token), channel, CODECS[source.codec].bits)
            return [*found, codes, self.at[f"{self.name}_scale"][b, head, token, 0]]
        assert isinstance(source, Stored), source
        if not source.side.coded:
            return [*found, self.at[self.name][b, head, token, channel]]
        if (window := self._buffer("_window")) is not None:
            found.append(window[b, head, 0 : window.shape[2], channel])
        if self._buffer("_codes") is not None:
            found += self._of_codes(source, (b, head, token - i64(source.scheme.sink), channel))
        return found

    def _of_codes(self, source: Stored, place: Place) -> list[object]:
        b, head, token, channel = place
        side, where = source.side, (b, head, token)
        bits = 3 if side.mixed else side.bits  # of two rates: anywhere in the row
        found: list[object] = [_part(self.at[f"{self.name}_codes"], where, channel, bits)]
        for suffix in ("_scale", "_min"):
            if (buffer := self._buffer(suffix)) is None:
                continue
            if side.along == "tokens":
                found.append(buffer[b, head, token // i64(side.group), channel])
            else:
                found.append(buffer[b, head, token, 0 : buffer.shape[3]])
        if (step := self._buffer("_step")) is not None:
            found.append(step[_of_static(source, head, channel)])
        return found

    def _row(self, source: Cache, place: Place) -> Expr:
        """An element of plain rows."""
        buffer, (*where, channel) = self.at[self.name], place
        if source.codec in WIDE:
            return wide(buffer[place])
        codec = CODECS[source.codec]
        code = buffer[place] if codec.bits == 8 else _field(buffer, where, i64(0), channel, codec.bits)
        return codec.decode(lambda _: code, 0) * self.at[f"{self.name}_scale"][(*where, i64(0))]

    def _decoded(self, source: Stored, place: Place) -> Expr:
        """The number of a code; `place` has the token's place among the codes."""
        side, (b, head, token, channel) = source.side, place
        if side.element.startswith("lloyd"):
            return self._of_sets(source, place)
        where = (b, head, token)
        if side.static:
            step = self.at[f"{self.name}_step"][_of_static(source, head, channel)]
        else:
            step = self._of_group(source, "_scale", place)
        codes = self.at[f"{self.name}_codes"]
        if side.element in ("int8", "e4m3fn"):
            return CODECS[side.element].decode(lambda _: codes[place], 0) * step
        code = tirx.Cast("int32", _field(codes, where, i64(0), channel, side.bits))
        if side.element.startswith("int"):
            top = tirx.IntImm("int32", 1 << (side.bits - 1))
            signed = (code ^ top) - top
            code = tirx.Select(step < f32(0), code, signed) if side.hybrid else signed
        if side.hybrid:
            step = tirx.max(step, f32(0) - step)
        value = tirx.Cast("float32", code) * step
        return value + self._of_group(source, "_min", place) if side.minimums else value

    def _of_group(self, source: Stored, suffix: str, place: Place) -> Expr:
        """The step or the minimum of the group."""
        side, (b, head, token, channel) = source.side, place
        buffer = self.at[self.name + suffix]
        if side.along == "tokens":
            return wide(buffer[b, head, token // i64(side.group), channel])
        group = channel // i64(side.group) if 0 < side.group < source.width else i64(0)
        return wide(buffer[b, head, token, group])

    def _of_sets(self, source: Stored, place: Place) -> Expr:
        """Of a codebook: each of its sets of channels has its own bits and step."""
        (*where, channel), found = place, None
        byte = first = 0
        for i, (size, bits) in enumerate(source.side.sets(source.width)):
            inside = channel - i64(first) if first else channel
            code = _field(self.at[f"{self.name}_codes"], where, i64(byte), inside, bits)
            step = wide(self.at[f"{self.name}_scale"][(*where, i64(i))])
            value = looked_up(codebook.table(bits)[0], tirx.Cast("int32", code)) * step
            found = value if found is None else choose(channel < i64(first), found, value)
            side = replace(source.side, element=f"lloyd{bits}", mixed=False)
            byte, first = byte + row_bytes(side, f"lloyd{bits}", size), first + size
        assert found is not None
        return found

    def _buffer(self, suffix: str) -> tirx.Buffer | None:
        return self.at.get(self.name + suffix)

    def _total(self, source: Stored, b: Expr) -> Expr:
        """Tokens of a row; a wrong length must not reach beyond the cache."""
        return tirx.max(tirx.min(self.at["lengths"][b], i64(source.capacity)), i64(0))


def read(source: Stored, heads: int) -> tirx.PrimFunc:
    """The side's buffers… (but for the copy), lengths [b] int64 -> all tokens, float32 [b, heads, capacity,
    width]; 0 past a row's length. What `porter.lower.kernels.stored.read_stored` does."""
    given = source.buffers("c", heads, source.capacity)
    shape = ("b", heads, source.capacity, source.width)
    names = [*(n for n, _, _ in given), "lengths"]

    def body(*args, b):
        *caches, y = args
        at = dict(zip(names, caches, strict=True))
        reader = Reader(source, at, "c")
        with block("y_read", [b, *shape[1:]]) as (n, h, t, d):
            T.reads(*reader.regions((n, h, t, d), lengths=True))
            store(y, choose(t < at["lengths"][n], reader.number((n, h, t, d)), f32(0)), n, h, t, d)

    buffers: list[Spec] = [*given, ("lengths", ("b",), "int64"), ("y", shape, "float32")]
    name = f"read_{source.name}_{source.label}_h{heads}_d{source.width}"
    return define(name, buffers, body).with_attr(marked("read"))


def looked_up(values: np.ndarray, code: Expr) -> Expr:
    """values[code], float32, by halves."""
    if len(values) == 1:
        return f32(float(values[0]))
    half = len(values) // 2
    low, high = looked_up(values[:half], code), looked_up(values[half:], code - tirx.IntImm("int32", half))
    return tirx.Select(code < tirx.IntImm("int32", half), low, high)


def _slot(source: Stored, token: Expr) -> Expr:
    """The window's slot of a token."""
    sink = i64(source.scheme.sink)
    late = source.slot(token)
    return tirx.Select(token < sink, token, late) if source.scheme.sink else late


def _of_static(source: Stored, head: Expr, channel: Expr) -> tuple[Expr, ...]:
    side = source.side
    return (
        head if side.static != "tensor" else i64(0),
        i64(0),
        channel if side.static == "channel" else i64(0),
    )


def _part(buffer: tirx.Buffer, where: Sequence[Expr], channel: Expr, bits: int) -> object:
    """Of a token's codes, those that a channel's code is among."""
    if 8 % bits:
        return buffer[(*where, slice(0, buffer.shape[3]))]
    return buffer[(*where, channel * i64(bits) // i64(8) if bits < 8 else channel)]


def _field(buffer: tirx.Buffer, where: Sequence[Expr], byte: Expr, place: Expr, bits: int) -> Expr:
    """Code number `place` of a bit stream that begins at a byte, in the low bits of a uint8."""
    if 8 % bits == 0:
        each = 8 // bits
        word = buffer[(*where, byte + place // i64(each))]
        shift = tirx.Cast("uint8", place % i64(each) * i64(bits))
        return (word >> shift) & tirx.IntImm("uint8", (1 << bits) - 1)
    bit = place * i64(bits)
    at, shift = byte + bit // i64(8), tirx.Cast("uint16", bit % i64(8))
    # It may lie across two bytes; behind the last one nothing is needed.
    after = tirx.min(at + i64(1), buffer.shape[3] - i64(1))
    low, high = (tirx.Cast("uint16", buffer[(*where, i)]) for i in (at, after))
    word = ((low | (high << tirx.IntImm("uint16", 8))) >> shift) & tirx.IntImm("uint16", (1 << bits) - 1)
    return tirx.Cast("uint8", word)


def wide(value: Expr) -> Expr:
    """In float32. (Of a bfloat16 by its bits: TVM takes what stands in a named value for an integer.)"""
    if str(value.ty.dtype) == "bfloat16":
        bits = tirx.Cast("uint32", T.reinterpret("uint16", value))
        return T.reinterpret("float32", bits << tirx.IntImm("uint32", 16))
    return value if str(value.ty.dtype) == "float32" else tirx.Cast("float32", value)

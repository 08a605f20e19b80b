"""How tokens of a cache become float32 in an attention kernel: plain rows, or a side of a `porter.kv` scheme.

A kernel asks for a tile of a few tokens at a time: codes are read packed, turned into numbers in registers
and laid in a tile that stays in the first-level cache, where every query head that shares the KV head reads
them. Nothing larger than a tile is ever decoded.

Codes of fewer than 8 bits are taken eight at a time: they fill whole bytes, which are spread to eight lanes
and shifted apart there, so channels keep their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from porter.kv import codebook
from porter.kv.layout import buffers as planned
from porter.kv.layout import row_bytes
from porter.kv.scheme import Scheme, Side
from porter.lower.kernels import vectors as vec
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Dim, Expr, Spec, T, define, f32, i64, local, loop, store, tirx

LANES = 8  # a register of float32
DTYPES = {"float8_e4m3fn": "uint8"}  # how kernels see what LLVM computes wrongly
WIDE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
WHOLE = ("", *WIDE, "int8", "e4m3fn", "e5m2")  # a code a word
Buffers = dict[str, tirx.Buffer]
Finish = Callable[[Expr, int, int], Expr]  # (number, first channel, lanes) -> number


def padded(width: int) -> int:
    """Channels of a tile's rows: whole registers."""
    return -(-width // LANES) * LANES


@dataclass(frozen=True)
class Tile:
    """Where decoded tokens go: row r is `rows[r * padded]` on; channels past `width` stay 0."""

    rows: tirx.Buffer
    padded: int

    def at(self, row: Expr, channel: Expr | int, lanes: int) -> Expr:
        """The place of `lanes` channels of a row."""
        first = row * i64(self.padded) + (i64(channel) if isinstance(channel, int) else channel)
        return T.ramp(first, 1, lanes) if lanes > 1 else first


class Source(Protocol):
    """Keys or values as they are stored."""

    @property
    def width(self) -> int:
        """Head size."""

    @property
    def label(self) -> str:
        """A word for kernels' names."""

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """What is read, in order, each name beginning with `name`."""

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """Decode tokens span[0] to span[1] - 1 of a row of `total` tokens, (batch, head), to the tile."""


@dataclass(frozen=True)
class Cache:
    """Rows of a codec; codes have one float32 scale for each token and head."""

    codec: str = "fp32"
    width: int = 0

    @property
    def label(self) -> str:
        """The codec."""
        return self.codec

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Codes [b, heads, length, words], then scales [b, heads, length, 1] where the codec needs them."""
        codec = CODECS[self.codec]
        storage = WIDE.get(self.codec, codec.storage)
        codes: Spec = (name, ("b", heads, length, codec.words(self.width)), storage)
        wide = self.codec in WIDE
        return [codes] if wide else [codes, (f"{name}_scale", ("b", heads, length, 1), "float32")]

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        first, end = span
        with loop(end - first) as i:
            where = (*row, first + i)
            scale = local(1)
            store(scale, f32(1) if self.codec in WIDE else at[f"{name}_scale"][(*where, 0)], 0)
            rows = _Rows(at[name], where, self.codec, self.width)
            if self.codec in WIDE:
                rows.decode(tile, i, lambda value, channel, lanes: value)
            else:
                rows.decode(tile, i, lambda value, channel, lanes: value * _spread(scale[0], lanes))


@dataclass(frozen=True)
class Stored:
    """One side, `key` or `value`, of a scheme's planned buffers (`porter.kv.layout`)."""

    scheme: Scheme
    name: str
    width: int
    capacity: int

    @property
    def side(self) -> Side:
        """How it is stored."""
        return self.scheme.side(self.name)

    @property
    def label(self) -> str:
        """The element."""
        return self.side.element

    def step(self, name: str, heads: int) -> list[Spec]:
        """The buffer of static steps, where there are any."""
        shape = {"tensor": (1, 1, 1), "head": (heads, 1, 1), "channel": (heads, 1, self.width)}
        return [(f"{name}_step", shape[self.side.static], "float32")] if self.side.static else []

    def planned(self, heads: int) -> list[tuple[str, tuple[int, ...], str]]:
        """(suffix, shape after the batch, TIR dtype) of each buffer of this side, in the layout's order."""
        plan = planned(self.scheme, self.width, heads, self.capacity)
        mine = [b for b in plan if b.name.split("_")[0] == self.name]
        return [
            (b.name.removeprefix(self.name), b.shape[1:], DTYPES.get(b.dtype.name, b.dtype.name))
            for b in mine
        ]

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """The planned buffers but for the exact copy, which attention does not read; then static steps."""
        planned: list[Spec] = [
            (name + suffix, ("b", *shape), dtype)
            for suffix, shape, dtype in self.planned(heads)
            if suffix != "_copy"
        ]
        return planned + self.step(name, heads)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        first, end = span
        if not self.side.coded:
            _copy(tile, at[name], row, span, i64(0), lambda t: t)
            return
        sink, done = i64(self.scheme.sink), self.rounded(total)
        if self.scheme.windowed(self.side) and f"{name}_window" in at:
            window = at[f"{name}_window"]
            _copy(tile, window, row, (first, tirx.min(end, sink)), i64(0), lambda t: t)
            late = tirx.max(first, sink + done)
            _copy(tile, window, row, (late, end), late - first, self.slot)
        if f"{name}_codes" in at:
            begin = tirx.max(first, sink)
            stop = tirx.min(end, sink + done)
            with loop(tirx.max(stop - begin, i64(0))) as i:
                self._decode(at, name, tile, begin - first + i, row, begin - sink + i)

    def rounded(self, total: Expr) -> Expr:
        """How many tokens of `total` are codes (`Scheme.rounded`)."""
        coded = tirx.max(total - i64(self.scheme.sink + self.scheme.recent), i64(0))
        flush = i64(self.side.flush)
        return coded // flush * flush if self.side.flush > 1 else coded

    def slot(self, token: Expr) -> Expr:
        """The window's slot of a token after the sinks."""
        sink = i64(self.scheme.sink)
        return sink + (token - sink) % i64(max(self.scheme.ring(self.side), 1))

    def _decode(
        self, at: Buffers, name: str, tile: Tile, to: Expr, row: tuple[Expr, Expr], token: Expr
    ) -> None:
        """Token `token` after the sinks to the tile's row `to`."""
        where, codes = (*row, token), at[f"{name}_codes"]
        if self.side.element.startswith("lloyd"):
            self._decode_sets(at, name, tile, to, where)
            return
        step = at[f"{name}_step" if self.side.static else f"{name}_scale"]
        scales = _Scales(self.side, step, at.get(f"{name}_min"), where, self.width)
        rows = _Rows(codes, where, self.side.element, self.width, scales.unsigned)
        rows.decode(tile, to, scales.applied)

    def _decode_sets(
        self, at: Buffers, name: str, tile: Tile, to: Expr, where: tuple[Expr, Expr, Expr]
    ) -> None:
        byte = channel = 0
        for i, (size, bits) in enumerate(self.side.sets(self.width)):
            step = local(1)
            store(step, tirx.Cast("float32", at[f"{name}_scale"][(*where, i)]), 0)
            rows = _Rows(at[f"{name}_codes"], where, f"lloyd{bits}", size, byte=byte, channel=channel)
            rows.decode(tile, to, lambda value, _, lanes, step=step: value * _spread(step[0], lanes))
            byte += row_bytes(dataclasses.replace(self.side, element=f"lloyd{bits}", mixed=False),
                              f"lloyd{bits}", size)  # fmt: skip
            channel += size


READ = 32  # tokens


class Readable(Source, Protocol):
    """A source of known capacity: one side, `key` or `value`, of a scheme."""

    name: str
    capacity: int


def read_stored(spec: Readable, heads: int) -> tirx.PrimFunc:
    """The side's buffers… (but for the copy), total lengths [b] int64 -> all tokens, float32 [b, heads,
    capacity, width]; 0 past a row's length."""
    given = spec.buffers("c", heads, spec.capacity)
    padded = -(-spec.width // LANES) * LANES

    def body(*args, b):
        *caches, lengths, y = args
        at = {name: buffer for (name, _, _), buffer in zip(given, caches, strict=True)}
        with loop(b * i64(heads), "parallel") as task:
            row = (task // i64(heads), task % i64(heads))
            total = tirx.max(tirx.min(lengths[row[0]], i64(spec.capacity)), i64(0))
            rows = local(READ * padded)
            with loop(-(-spec.capacity // READ)) as number:
                first = number * i64(READ)
                end = tirx.max(tirx.min(first + i64(READ), total), first)
                spec.fill(at, "c", Tile(rows, padded), row, (first, end), total)
                with loop(tirx.min(i64(READ), i64(spec.capacity) - first)) as t, loop(spec.width) as d:
                    value = tirx.Select(first + t < end, rows[t * i64(padded) + d], f32(0))
                    store(y, value, *row, first + t, d)

    shape = ("b", heads, spec.capacity, spec.width)
    buffers = [*given, ("lengths", ("b",), "int64"), ("y", shape, "float32")]
    return define(f"read_{spec.name}_{spec.label}_h{heads}_d{spec.width}", buffers, body)


def _copy(
    tile: Tile,
    buffer: tirx.Buffer,
    row: tuple[Expr, Expr],
    span: tuple[Expr, Expr],
    to: Expr,
    slot: Callable[[Expr], Expr],
) -> None:
    """Tokens of floats, each from its slot, to the tile's rows from `to` on."""
    width = int(buffer.shape[3])
    with loop(tirx.max(span[1] - span[0], i64(0))) as i:
        where = (*row, slot(span[0] + i))
        _Rows(buffer, where, "", width).decode(tile, to + i, lambda value, channel, lanes: value)


def _spread(value: Expr, lanes: int) -> Expr:
    return T.broadcast(value, lanes) if lanes > 1 else value


@dataclass(frozen=True)
class _Scales:
    """code * |step| + minimum, where `step` and `minimum` are those of the code's group."""

    side: Side
    step: tirx.Buffer
    minimum: tirx.Buffer | None
    where: tuple[Expr, Expr, Expr]
    width: int

    def _of(self, buffer: tirx.Buffer, channel: int, lanes: int) -> Expr:
        b, head, token = self.where
        if self.side.static in ("tensor", "head"):
            return _spread(buffer[head if self.side.static == "head" else i64(0), 0, 0], lanes)
        if self.side.static or self.side.along == "tokens":
            index = (head, 0) if self.side.static else (b, head, token // i64(self.side.group))
            at = T.ramp(i64(channel), 1, lanes) if lanes > 1 else i64(channel)
            return tirx.Cast(_lanes("float32", lanes), buffer[(*index, at)])
        group = self.side.group or self.width
        first, last = channel // group, (channel + lanes - 1) // group
        if first == last:
            return _spread(tirx.Cast("float32", buffer[(*self.where, i64(first))]), lanes)
        apart = [buffer[(*self.where, i64((channel + i) // group))] for i in range(lanes)]
        each = [tirx.Cast("float32", x) for x in apart]
        return tirx.Shuffle(each, [tirx.IntImm("int32", i) for i in range(lanes)])

    def unsigned(self, channel: int, lanes: int) -> Expr | None:
        """Of a hybrid side: which lanes have codes without a sign."""
        if not self.side.hybrid:
            return None
        return self._of(self.step, channel, lanes) < _spread(f32(0), lanes)

    def applied(self, value: Expr, channel: int, lanes: int) -> Expr:
        """What codes stand for."""
        step = self._of(self.step, channel, lanes)
        if self.side.hybrid:
            step = tirx.max(step, _spread(f32(0), lanes) - step)
        value = value * step
        return value if self.minimum is None else value + self._of(self.minimum, channel, lanes)


def _lanes(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


@dataclass(frozen=True)
class _Rows:
    """The codes of a token, from `byte` on, that are channels `channel` on; element "" is what the buffer's
    type says."""

    buffer: tirx.Buffer
    where: tuple[Expr, Expr, Expr]
    element: str
    width: int
    unsigned: Callable[[int, int], Expr | None] | None = None
    byte: int = 0
    channel: int = 0

    def decode(self, tile: Tile, to: Expr, finish: Finish) -> None:
        """Each group of lanes, finished, to a row of the tile."""
        for first in range(0, self.width, LANES):
            count = min(LANES, self.width - first)
            lanes = LANES if count == LANES else 1
            for channel in range(first, first + count, lanes):
                value = finish(self._value(channel, lanes), self.channel + channel, lanes)
                T.buffer_store(tile.rows, value, [tile.at(to, self.channel + channel, lanes)])

    def _value(self, channel: int, lanes: int) -> Expr:
        if self.element in WHOLE:
            at = T.ramp(i64(channel), 1, lanes) if lanes > 1 else i64(channel)
            code = self.buffer[(*self.where, at)]
            if self.element.startswith("e"):
                return self._bytes(channel, lanes)
            return tirx.Cast(_lanes("float32", lanes), code)
        bits = int(self.element[-1])
        word = self._word(channel // LANES, bits)
        if lanes == 1:
            return self._number(word, bits, channel % LANES * bits, 1, channel)
        return self._number(T.broadcast(word, lanes), bits, 0, lanes, channel)

    def _bytes(self, channel: int, lanes: int) -> Expr:
        """8-bit floats: the codecs decode one lane."""
        buffer = local(lanes)
        with loop(lanes, "vectorized") as v:
            decoded = CODECS[self.element].decode(lambda _: self.buffer[(*self.where, i64(channel) + v)], 0)
            store(buffer, decoded, v)
        return buffer[T.ramp(i64(0), 1, lanes)] if lanes > 1 else buffer[0]

    def _word(self, unit: int, bits: int) -> Expr:
        """The eight codes of a unit in the low bits of an int32; what is above them is anything."""
        size = -(-self.width * bits // 8)
        first, count = unit * bits, min(bits, size - unit * bits)
        if bits == 4 and count == 4:
            return self._load(first, 4)
        if bits == 3 and count == 3 and size > 3:  # four bytes at once, never beyond the token's own
            if first + 4 <= size:
                return self._load(first, 4)
            return self._load(first - 1, 4) >> tirx.IntImm("int32", 8)
        if bits == 2 and count == 2:
            return self._load(first, 2)
        word = tirx.Cast("int32", self._at(first))
        for i in range(1, count):
            word = word | (tirx.Cast("int32", self._at(first + i)) << tirx.IntImm("int32", 8 * i))
        return word

    def _at(self, byte: int) -> Expr:
        return self.buffer[(*self.where, i64(self.byte + byte))]

    def _load(self, byte: int, count: int) -> Expr:
        loaded = self.buffer[(*self.where, T.ramp(i64(self.byte + byte), 1, count))]
        if count == 4:
            return T.reinterpret("int32", loaded)
        return tirx.Cast("int32", T.reinterpret("uint16", loaded))

    def _number(self, word: Expr, bits: int, shift: int, lanes: int, channel: int) -> Expr:
        """Codes in lanes to float32: lane i has its own at bit shift + i * bits."""
        up = _steps(32 - bits - shift, -bits, lanes)
        down = _steps(shift, bits, lanes)
        signed = (word << up) >> _spread(tirx.IntImm("int32", 32 - bits), lanes)
        mask = _spread(tirx.IntImm("int32", (1 << bits) - 1), lanes)
        plain = (word >> down) & mask
        if self.element.startswith("lloyd"):
            looked_up = lanes == LANES and vec.available()
            return _looked_up(word >> down, bits) if looked_up else _centroids(plain, bits, lanes)
        code = plain if self.element.startswith("uint") else signed
        wide = None if self.unsigned is None else self.unsigned(self.channel + channel, lanes)
        if wide is not None:
            code = tirx.Select(wide, plain, signed)
        return tirx.Cast(_lanes("float32", lanes), code)


def _steps(first: int, step: int, lanes: int) -> Expr:
    return T.ramp(tirx.IntImm("int32", first), step, lanes) if lanes > 1 else tirx.IntImm("int32", first)


def _looked_up(code: Expr, bits: int) -> Expr:
    """centroid[code] of eight int32 codes in the lowest bits, with anything above them."""
    table = [float(c) for c in codebook.table(bits)[0]]
    if bits < 4:
        return vec.looked_up((table * 4)[:LANES], code)
    code = vec.held(code)
    upper = (code & _spread(tirx.IntImm("int32", 8), LANES)) != _spread(tirx.IntImm("int32", 0), LANES)
    return tirx.Select(upper, *(vec.looked_up(half, code) for half in (table[8:], table[:8])))


def _centroids(code: Expr, bits: int, lanes: int) -> Expr:
    """centroid[code]. They are symmetric: the magnitude is one of the upper half's, and a choice for each bit
    of those that are left; the sign is the upper bit's."""
    held = local(lanes, "int32")  # read many times: an expression would be simplified as often, all of it
    at = T.ramp(i64(0), 1, lanes) if lanes > 1 else i64(0)
    T.buffer_store(held, code, [at])
    code, half = held[at], 1 << (bits - 1)
    top, low = (_spread(tirx.IntImm("int32", n), lanes) for n in (half, half - 1))
    zero = _spread(tirx.IntImm("int32", 0), lanes)
    place = tirx.Select((code & top) == zero, code ^ low, code)
    left = [_spread(f32(float(c)), lanes) for c in codebook.table(bits)[0][half:]]
    for bit in range(bits - 1):
        on = (place & _spread(tirx.IntImm("int32", 1 << bit), lanes)) != zero
        left = [tirx.Select(on, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
    return tirx.Select((code & top) == zero, _spread(f32(0), lanes) - left[0], left[0])

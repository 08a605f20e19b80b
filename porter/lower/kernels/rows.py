"""Rows of packed codes to float32 in registers, eight channels at a time.

Codes of fewer than 8 bits fill whole bytes by the eight, which are spread to eight lanes and shifted apart
there, so channels keep their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.kv import codebook
from porter.kv.scheme import Side
from porter.lower.kernels import vectors as vec
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Expr, T, f32, i64, local, loop, store, tirx

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


def spread(value: Expr, lanes: int) -> Expr:
    """The number in so many lanes; one is the number itself."""
    return T.broadcast(value, lanes) if lanes > 1 else value


@dataclass(frozen=True)
class Scales:
    """code * |step| + minimum, where `step` and `minimum` are those of the code's group."""

    side: Side
    step: tirx.Buffer
    minimum: tirx.Buffer | None
    where: tuple[Expr, Expr, Expr]
    width: int

    def _of(self, buffer: tirx.Buffer, channel: int, lanes: int) -> Expr:
        b, head, token = self.where
        if self.side.static in ("tensor", "head"):
            return spread(buffer[head if self.side.static == "head" else i64(0), 0, 0], lanes)
        if self.side.static or self.side.along == "tokens":
            index = (head, 0) if self.side.static else (b, head, token // i64(self.side.group))
            at = T.ramp(i64(channel), 1, lanes) if lanes > 1 else i64(channel)
            return tirx.Cast(_lanes("float32", lanes), buffer[(*index, at)])
        group = self.side.group or self.width
        first, last = channel // group, (channel + lanes - 1) // group
        if first == last:
            return spread(tirx.Cast("float32", buffer[(*self.where, i64(first))]), lanes)
        apart = [buffer[(*self.where, i64((channel + i) // group))] for i in range(lanes)]
        each = [tirx.Cast("float32", x) for x in apart]
        return tirx.Shuffle(each, [tirx.IntImm("int32", i) for i in range(lanes)])

    def unsigned(self, channel: int, lanes: int) -> Expr | None:
        """Of a hybrid side: which lanes have codes without a sign."""
        if not self.side.hybrid:
            return None
        return self._of(self.step, channel, lanes) < spread(f32(0), lanes)

    def applied(self, value: Expr, channel: int, lanes: int) -> Expr:
        """What codes stand for."""
        step = self._of(self.step, channel, lanes)
        if self.side.hybrid:
            step = tirx.max(step, spread(f32(0), lanes) - step)
        value = value * step
        return value if self.minimum is None else value + self._of(self.minimum, channel, lanes)


def _lanes(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


@dataclass(frozen=True)
class Rows:
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
        signed = (word << up) >> spread(tirx.IntImm("int32", 32 - bits), lanes)
        mask = spread(tirx.IntImm("int32", (1 << bits) - 1), lanes)
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
    upper = (code & spread(tirx.IntImm("int32", 8), LANES)) != spread(tirx.IntImm("int32", 0), LANES)
    return tirx.Select(upper, *(vec.looked_up(half, code) for half in (table[8:], table[:8])))


def _centroids(code: Expr, bits: int, lanes: int) -> Expr:
    """centroid[code]. They are symmetric: the magnitude is one of the upper half's, and a choice for each bit
    of those that are left; the sign is the upper bit's."""
    held = local(lanes, "int32")  # read many times: an expression would be simplified as often, all of it
    at = T.ramp(i64(0), 1, lanes) if lanes > 1 else i64(0)
    T.buffer_store(held, code, [at])
    code, half = held[at], 1 << (bits - 1)
    top, low = (spread(tirx.IntImm("int32", n), lanes) for n in (half, half - 1))
    zero = spread(tirx.IntImm("int32", 0), lanes)
    place = tirx.Select((code & top) == zero, code ^ low, code)
    left = [spread(f32(float(c)), lanes) for c in codebook.table(bits)[0][half:]]
    for bit in range(bits - 1):
        on = (place & spread(tirx.IntImm("int32", 1 << bit), lanes)) != zero
        left = [tirx.Select(on, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
    return tirx.Select((code & top) == zero, spread(f32(0), lanes) - left[0], left[0])

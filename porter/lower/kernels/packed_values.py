"""A tile's weighted sum of values from their codes: pairs of tokens side by side, a channel a lane.

The codes of two tokens are spread to bytes, those of one channel next to each other, once for all rows; each
row's weights of the pair, 8-bit integers, multiply them and add up in 16 bits over the tile. Channels have
another order there, which the result keeps from tile to tile (`to_order`, `to_channels`).
"""

from __future__ import annotations

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, T, f32, i64, local, loop, store, tirx
from porter.lower.kernels.packed import CHUNK, TILE, Codes
from porter.lower.kernels.packed_keys import TINY, WINDOWS, _bits
from porter.lower.kernels.steps import float_steps, steps_of_tokens
from porter.lower.kernels.stored import LANES, Buffers

LIMIT = 255  # of weights' integers
PAIRS = TILE // 2
UNROLLED = 4  # pairs


class Values:
    """Weights, rounded, and their products with tiles of codes."""

    def __init__(self, codes: Codes, rows: int, at: Buffers, name: str, zero: Expr) -> None:
        self.codes, self.rows, self.at, self.name, self.zero = codes, rows, at, name, zero
        self.sets = 1 if codes.along_tokens else codes.chunks  # how often a row's weights are rounded
        self.parts = 2 if codes.bits == 4 else 1  # of a tile, whose sums fit 16 bits
        self.pairs = vec.scratch(rows * self.sets * PAIRS, "int32")  # a pair of weights, twice, for each pair
        self.scale = local(rows * self.sets)
        self.bias = local(rows * self.sets * self.parts, "int32")
        self.sum = local(rows)  # of a row's rounded weights
        self.base = local(rows * codes.chunks)  # what minimums along channels add to a chunk
        self.span = 128 if codes.bits == 2 else 64  # channels that a vector of packed codes has
        self.vectors = self.span * 2 // 32
        self.signs = local(codes.width // 4, "uint8")  # of hybrid codes of 2 bits, which top bits to turn
        self.bytes = vec.scratch(PAIRS * self.vectors * 32, "uint8")

    def channels(self, index: int) -> list[int]:
        """The eight channels of a chunk's vector `index`."""
        if self.codes.bits == 4:
            return [16 * (index // 2) + 2 * y + index % 2 for y in range(LANES)]
        return [4 * y + index for y in range(LANES)]

    def to_order(self, out: tirx.Buffer, back: bool = False) -> None:
        """Rows of channels to the order of vectors, in place, or back."""
        order = [c for index in range(4) for c in self.channels(index)]
        order = [order.index(c) for c in range(CHUNK)] if back else order
        with loop(self.rows * self.codes.chunks) as chunk:
            first = chunk * i64(CHUNK)
            four = [vec.held(vec.load(out, (), first + i64(8 * i), LANES)) for i in range(4)]
            for i in range(4):
                vec.put(out, vec.picked(four, order[8 * i : 8 * i + 8]), first + i64(8 * i), LANES)

    def weigh(
        self, out: tirx.Buffer, weights: tirx.Buffer, fade: tirx.Buffer, row: tuple[Expr, Expr], token: Expr
    ) -> None:
        """out[r] = out[r] * fade[r] + weights · values of the 32 tokens from `token` on."""
        self._round_weights(weights, row, token)
        steps = self._channel_steps(row, token)
        for span in range(self.codes.width // self.span):
            self._spread(row, token, span)
            for index in range(0, self.vectors, 2):
                for part in range(self.parts):
                    self._multiply(out, fade, span, index, part, steps)

    @property
    def _minimum(self) -> tirx.Buffer | None:
        return self.at.get(f"{self.name}_min")

    def _round_weights(self, weights: tirx.Buffer, row: tuple[Expr, Expr], token: Expr) -> None:
        steps, lows = self._token_steps(row, token)
        for r in range(self.rows):
            mine = [vec.held(vec.load(weights, (), r * TILE + i, LANES)) for i in range(0, TILE, LANES)]
            for s in range(self.sets):
                group = s * len(steps[0]) // self.sets if steps else 0
                scaled = [vec.held(w * x[group]) for w, x in zip(mine, steps, strict=True)] if steps else mine
                self._round(scaled, r, s)
                if lows:
                    low = [w * x[group] for w, x in zip(mine, lows, strict=True)]
                    store(self.base, vec.total(low), r * self.sets + s)

    def _token_steps(self, row: tuple[Expr, Expr], token: Expr) -> list[list[list[Expr]]]:
        """Where groups lie along channels: steps and minimums of tokens, [eight tokens][group]."""
        if self.codes.along_tokens:
            return [[], []]
        found = []
        for name in (f"{self.name}_scale", f"{self.name}_min"):
            blocks = range(0, TILE, LANES) if name in self.at else ()
            found.append([steps_of_tokens(self.at[name], row, token + i64(i)) for i in blocks])
        return found

    def _round(self, weights: list[Expr], r: int, s: int) -> None:
        place = r * self.sets + s
        top = vec.held(vec.largest(weights))
        scale = vec.held(top * f32(1 / LIMIT))
        store(self.scale, scale, place)
        inverse = T.broadcast(vec.held(f32(LIMIT) / tirx.max(top, f32(TINY))), LANES)
        whole = [vec.rounded_bits(w * inverse) for w in weights]
        numbers = vec.held(tirx.Cast("uint8x32", vec.picked(whole, range(TILE))))
        words = vec.as_type(numbers, "uint16x16")
        for half in range(2):
            twice = vec.picked([words], [8 * half + i // 2 for i in range(16)])
            vec.put(self.pairs, vec.as_type(twice, "int32x8"), place * PAIRS + 8 * half, LANES)
        if self.codes.bias or self._low_along_tokens:
            ones = vec.as_type(vec.spread(0x01010101, LANES), "int8x32")
            sums = vec.held(vec.added_pairs(vec.words_of(numbers, ones)))
            self._keep_sums(sums, scale, place)

    @property
    def _low_along_tokens(self) -> bool:
        return self.codes.along_tokens and self._minimum is not None

    def _keep_sums(self, sums: Expr, scale: Expr, place: int) -> None:
        """Of the integers: what the codes' bias takes off, or what minimums are multiplied by."""
        if self._low_along_tokens:
            store(self.sum, tirx.Cast("float32", vec.total([sums])) * scale, place)
            return
        lanes = LANES // self.parts
        for part in range(self.parts):
            mine = [vec.picked([sums], [(i % lanes) + part * lanes for i in range(LANES)])]
            whole = vec.total(mine) // tirx.IntImm("int32", self.parts)  # half of the lanes, twice
            less = whole * tirx.IntImm("int32", -self.codes.bias)
            word = (less & tirx.IntImm("int32", 0xFFFF)) | (less << tirx.IntImm("int32", 16))
            store(self.bias, word, place * self.parts + part)

    def _channel_steps(self, row: tuple[Expr, Expr], token: Expr) -> list[tirx.Buffer]:
        """Where groups lie along tokens: the channels' steps in the order of vectors, and what the sum of
        weights is multiplied by."""
        codes, found = self.codes, []
        if not codes.along_tokens:
            return found
        group = (*row, token // i64(codes.stored.side.group))
        for name in ("scale", "min"):
            buffer = self.at.get(f"{self.name}_{name}")
            if buffer is not None:
                found.append(vec.scratch(codes.width))
                for chunk in range(codes.chunks):
                    four = [vec.load(buffer, group, chunk * CHUNK + i, LANES) for i in range(0, CHUNK, LANES)]
                    for index in range(4):
                        mine = tirx.Cast("float32x8", vec.picked(four, self.channels(index)))
                        vec.put(found[-1], mine, chunk * CHUNK + 8 * index, LANES)
        if codes.stored.side.hybrid:
            self._split_signs(*found)
        return found

    def _split_signs(self, steps: tirx.Buffer, lows: tirx.Buffer) -> None:
        """Hybrid groups: a step below 0 is of codes without a sign. Top bits of the others are turned, and
        what that adds is taken off their minimum."""
        zero = T.broadcast(f32(0), LANES)
        for chunk in range(self.codes.chunks):
            top = None
            for index in range(4):
                at = chunk * CHUNK + 8 * index
                step, low = (vec.held(vec.load(x, (), at, LANES)) for x in (steps, lows))
                size = vec.held(tirx.max(step, zero - step))
                less = T.broadcast(f32(self.codes.bias), LANES) * size
                vec.put(steps, size, at, LANES)
                vec.put(lows, tirx.Select(step < zero, low, low - less), at, LANES)
                sign = vec.as_type(step, "uint32x8") ^ vec.spread(0x80000000, LANES, "uint32")
                sign = (sign >> vec.spread(31, LANES, "uint32")) << vec.spread(2 * index + 1, LANES, "uint32")
                top = sign if top is None else top | sign
            vec.put(self.signs, tirx.Cast("uint8x8", top), 8 * chunk, LANES)

    def _spread(self, row: tuple[Expr, Expr], token: Expr, span: int) -> None:
        """The bytes of a span of channels."""
        with loop(PAIRS) as pair:
            first = token + pair * i64(2)
            make = self._threes if self.codes.bits == 3 else self._even
            for i, vector in enumerate(make((*row, first), (*row, first + i64(1)), span)):
                vec.put(self.bytes, vector, pair * i64(self.vectors * 32) + i64(32 * i), 32)

    def _even(self, near: tuple[Expr, ...], far: tuple[Expr, ...], span: int) -> list[Expr]:
        """2 and 4 bits: bytes of both tokens side by side, then shifts."""
        bits, buffer = self.codes.bits, self.at[f"{self.name}_codes"]
        both = [self._turned(vec.load(buffer, where, 32 * span, 32), span) for where in (near, far)]
        both = [vec.held(x) for x in both]
        found = []
        for half in (0, 8):
            order = [16 * lane + half + i // 2 + 32 * (i % 2) for lane in range(2) for i in range(16)]
            words = vec.held(vec.as_type(vec.picked(both, order), "uint32x8"))
            found += [_bits(words, bits * k, bits) for k in range(8 // bits)]
        return found

    def _turned(self, packed: Expr, span: int) -> Expr:
        if self.codes.stored.side.hybrid:
            return vec.flipped(packed, vec.load(self.signs, (), 32 * span, 32))
        return self.codes.turned(packed, 32 * span)

    def _threes(self, near: tuple[Expr, ...], far: tuple[Expr, ...], span: int) -> list[Expr]:
        """3 bits: two chunks of 12 bytes, in words that hold four codes each."""
        buffer, words = self.at[f"{self.name}_codes"], []
        for where in (near, far):
            halves = [vec.load(buffer, where, 24 * span + byte, 16) for byte in (0, 8)]
            both = self.codes.turned(vec.picked(halves, range(32)), 24 * span, 24 * span + 8)
            both = vec.bytes_at(both, [*WINDOWS, *(i + 4 for i in WINDOWS)])
            words.append(vec.held(vec.as_type(both, "uint16x16")))
        a, b = words
        moved = [vec.held(vec.shifted_up(x, (4, 0), self.zero)) for x in words]  # codes 0 at bit 4, 2 at bit 10
        low = [moved[0] >> vec.spread(4, 16, "uint16"), *(vec.shifted_down(a, s) for s in ((3, 7), (6, 10), (9, 13)))]
        high = [vec.shifted_up(b, (8, 4), self.zero), vec.shifted_up(b, (5, 1), self.zero), moved[1] >> vec.spread(2, 16, "uint16"),
                vec.shifted_down(b, (1, 5))]  # fmt: skip
        return [
            vec.both(vec.masked(vec.as_type(x, "uint8x32"), 0x00070007), vec.masked(vec.as_type(y, "uint8x32"), 0x07000700))
            for x, y in zip(low, high, strict=True)
        ]

    def _place(self, span: int, index: int) -> list[tuple[int, int]]:
        """(chunk, vector of it) of the two halves of a vector."""
        first = span * self.span // CHUNK
        if self.codes.bits == 2:
            first += index // 4
            return [(first, index % 4), (first + 2, index % 4)]
        return [(first, index), (first + 1, index)]

    def _multiply(
        self, out: tirx.Buffer, fade: tirx.Buffer, span: int, index: int, part: int, steps: list[tirx.Buffer]
    ) -> None:
        """Two vectors of a span, all rows: products of a part of the tile's pairs, added to the result."""
        places = [self._place(span, index + i) for i in range(2)]
        sums, each = local(self.rows * 2 * 16, "int16"), PAIRS // self.parts
        sets = [0, 0] if self.codes.along_tokens else [chunk for chunk, _ in places[0]]
        for r in range(self.rows):
            for i in range(2):
                vec.put(sums, self._start(r, sets, part), (2 * r + i) * 16, 16)
        with loop(each // UNROLLED) as step:
            for j in range(UNROLLED):
                self._step(sums, sets, step * i64(UNROLLED) + i64(part * each + j), index)
        for r in range(self.rows):
            for i in range(2):
                self._add(out, fade, sums, r, i, places[i], part, steps)

    def _step(self, sums: tirx.Buffer, sets: list[int], pair: Expr, index: int) -> None:
        """A pair's products."""
        code = []
        for i in range(2):
            at = (pair * i64(self.vectors) + i64(index + i)) * i64(32)
            code.append(vec.held(vec.as_type(vec.load(self.bytes, (), at, 32), "int8x32")))
        for r in range(self.rows):
            numbers = vec.held(self._numbers(r, sets, pair))
            for i in range(2):
                at = (2 * r + i) * 16
                vec.put(sums, vec.load(sums, (), at, 16) + vec.words_of(numbers, code[i]), at, 16)

    def _start(self, r: int, sets: list[int], part: int) -> Expr:
        if not self.codes.bias or self._low_along_tokens:
            return vec.as_type(vec.spread(0, LANES), "int16x16")
        words = [self.bias[(r * self.sets + s) * self.parts + part] for s in sets]
        return vec.as_type(_halves(words), "int16x16")

    def _numbers(self, r: int, sets: list[int], pair: Expr) -> Expr:
        words = [self.pairs[i64((r * self.sets + s) * PAIRS) + pair] for s in sets]
        return vec.as_type(_halves(words), "uint8x32")

    def _add(
        self, out: tirx.Buffer, fade: tirx.Buffer, sums: tirx.Buffer, r: int, i: int,
        places: list[tuple[int, int]], part: int, steps: list[tirx.Buffer],
    ) -> None:  # fmt: skip
        kind = "int16" if self.codes.bias and not self._low_along_tokens else "uint16"
        found = vec.as_type(vec.load(sums, (), (2 * r + i) * 16, 16), f"{kind}x16")
        for half, (chunk, index) in enumerate(places):
            mine = vec.picked([found], range(8 * half, 8 * half + 8))
            value = tirx.Cast("float32x8", tirx.Cast("int32x8", mine))
            at, s = chunk * CHUNK + 8 * index, 0 if self.codes.along_tokens else chunk
            before = vec.load(out, (), r * self.codes.width + at, LANES)
            if part == 0:
                before = before * T.broadcast(fade[r], LANES)
                if not self.codes.along_tokens and self._minimum is not None:
                    before = before + T.broadcast(self.base[r * self.sets + chunk], LANES)
                if self._low_along_tokens:
                    before = vec.load(steps[1], (), at, LANES) * T.broadcast(self.sum[r], LANES) + before
            if steps:
                value = value * vec.load(steps[0], (), at, LANES)
            after = value * T.broadcast(self.scale[r * self.sets + s], LANES) + before
            vec.put(out, after, r * self.codes.width + at, LANES)


def _halves(words: list[Expr]) -> Expr:
    """int32x8: one number in the lower four lanes, and one in the upper."""
    if words[0] is words[1] or str(words[0]) == str(words[1]):
        return vec.spread(words[0], LANES)
    return vec.picked([vec.spread(w, 4) for w in words], range(LANES))

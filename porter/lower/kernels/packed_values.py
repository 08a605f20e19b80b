"""A tile's weighted sum of values from their codes: pairs of tokens side by side, a channel a lane.

The codes of 32 channels of two tokens are spread to the bytes of two vectors, both of one channel next to
each other, once for all rows; each row's weights of the pair, 8-bit integers, multiply them and add up in 16
bits over the tile. Channels have another order there, which the result keeps from tile to tile (`to_order`).
"""

from __future__ import annotations

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, T, f32, i64, local, loop, store, tirx
from porter.lower.kernels.packed import CHUNK, TILE, Codes
from porter.lower.kernels.packed_keys import TINY, WINDOWS, _bits
from porter.lower.kernels.rows import LANES, Buffers
from porter.lower.kernels.steps import prefetch_steps, steps_of_tokens

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
        self.signs = local(codes.width // 4, "uint8")  # of hybrid codes of 2 bits, which top bits to turn

    def channels(self, index: int) -> list[int]:
        """The eight channels of quarter `index` of a chunk: vector i has quarters 2 i and 2 i + 1."""
        if self.codes.bits == 4:
            return [16 * (index % 2) + 2 * y + index // 2 for y in range(LANES)]
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
        prefetch_steps(self.codes, self.at, self.name, row, token)
        self._round_weights(weights, row, token)
        steps = self._channel_steps(row, token)
        for chunk in range(self.codes.chunks):
            for part in range(self.parts):
                self._multiply(out, fade, row, token, chunk, part, steps)

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
                    both = [(x[group], y[group]) for x, y in zip(lows, steps, strict=True)]
                    both = [vec.lifted(low, step, self.codes.lifted) for low, step in both]
                    low = [w * x for w, x in zip(mine, both, strict=True)]
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
        numbers = vec.held(vec.rounded_bytes([w * inverse for w in weights], signed=False))
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

    def _bytes(self, row: tuple[Expr, Expr], token: Expr, chunk: int) -> list[Expr]:
        """The two vectors of a chunk of the tokens `token` and `token` + 1."""
        bits = self.codes.bits
        size = 4 * bits if bits == 2 else 16  # bytes that are read
        first = min(4 * bits * chunk, self.codes.width * bits // 8 - size)
        buffer = self.at[f"{self.name}_codes"]
        both = [vec.load(buffer, (*row, token + i64(i)), first, size) for i in range(2)]
        if bits == 3:
            order = [4 * bits * chunk - first + i for i in WINDOWS]
            both = [vec.picked([x], [*range(16)] * 2) for x in both]
            both = [vec.bytes_at(self.codes.turned(x, first), order) for x in both]
            return self._threes(*(vec.held(vec.as_type(x, "uint16x16")) for x in both))
        beside = [i // 2 + size * (i % 2) for i in range(2 * size)]
        pairs = vec.picked(both, beside * (2 if bits == 2 else 1))
        words = vec.held(vec.as_type(self._turned(pairs, chunk), "uint32x8"))
        if bits == 4:
            return [_bits(words, shift, bits) for shift in (0, 4)]
        shifts = [vec.ints([first] * 4 + [first + 2] * 4, "uint32") for first in (0, 4)]
        return [vec.masked(vec.as_type(words >> s, "uint8x32"), 0x03030303) for s in shifts]

    def _turned(self, pairs: Expr, chunk: int) -> Expr:
        """2 and 4 bits."""
        if self.codes.stored.side.hybrid:
            mine = vec.load(self.signs, (), 8 * chunk, 8)
            return vec.flipped(pairs, vec.picked([mine], [i // 2 % 8 for i in range(32)]))
        return self.codes.turned(pairs, 0)

    def _threes(self, near: Expr, far: Expr) -> list[Expr]:
        """Words, as `WINDOWS` has them, alike in both halves. Their codes 0 to 3 begin at bits 0 3 6 9 of the
        first, and 4 to 7 at 4 7 10 13 of the second; of the nearer token they come to bit 0, of the other
        one to bit 8."""
        up, down = (8, 4, 5, 1), (6, 10, 9, 13)
        moved = [vec.shifted_up(x, up, self.zero) for x in (near, far)]
        low = [moved[0] >> vec.spread(8, 16, "uint16"), vec.shifted_down(near, down)]
        high = [moved[1], vec.shifted_down(far, down) << vec.spread(8, 16, "uint16")]
        low = [vec.masked(vec.as_type(x, "uint8x32"), 0x00070007) for x in low]
        high = [vec.masked(vec.as_type(x, "uint8x32"), 0x07000700) for x in high]
        return [vec.both(a, b) for a, b in zip(low, high, strict=True)]

    def _multiply(
        self, out: tirx.Buffer, fade: tirx.Buffer, row: tuple[Expr, Expr], token: Expr, chunk: int, part: int,
        steps: list[tirx.Buffer],
    ) -> None:  # fmt: skip
        """A chunk, all rows: products of a part of the tile's pairs, added to the result."""
        sums, each = local(self.rows * 2 * 16, "int16"), PAIRS // self.parts
        s = 0 if self.codes.along_tokens else chunk
        for r in range(self.rows):
            for i in range(2):
                vec.put(sums, self._start(r, s, part), (2 * r + i) * 16, 16)
        with loop(each // UNROLLED) as step:
            for j in range(UNROLLED):
                pair = step * i64(UNROLLED) + i64(part * each + j)
                first = token + pair * i64(2)
                if j % 2 == 0 and chunk == 0:
                    vec.prefetch(self.at[f"{self.name}_codes"], (*row, first + i64(TILE)), 4)
                code = [vec.held(vec.as_type(x, "int8x32")) for x in self._bytes(row, first, chunk)]
                for r in range(self.rows):
                    word = self.pairs[i64((r * self.sets + s) * PAIRS) + pair]
                    numbers = vec.held(vec.as_type(vec.spread(word, LANES), "uint8x32"))
                    for i in range(2):
                        at = (2 * r + i) * 16
                        vec.put(sums, vec.load(sums, (), at, 16) + vec.words_of(numbers, code[i]), at, 16)
        for r in range(self.rows):
            for i in range(2):
                self._add(out, fade, sums, r, i, chunk, part, steps)

    def _start(self, r: int, s: int, part: int) -> Expr:
        """What the codes' bias takes off the sums, to begin with."""
        biased = self.codes.bias and not self._low_along_tokens
        word = self.bias[(r * self.sets + s) * self.parts + part] if biased else 0
        return vec.as_type(vec.spread(word, LANES), "int16x16")

    def _add(
        self, out: tirx.Buffer, fade: tirx.Buffer, sums: tirx.Buffer, r: int, i: int, chunk: int, part: int,
        steps: list[tirx.Buffer],
    ) -> None:  # fmt: skip
        kind = "int16" if self.codes.bias and not self._low_along_tokens else "uint16"
        found = vec.as_type(vec.load(sums, (), (2 * r + i) * 16, 16), f"{kind}x16")
        for half in range(2):
            mine = vec.picked([found], range(8 * half, 8 * half + 8))
            value = tirx.Cast("float32x8", tirx.Cast("int32x8", mine))
            at, s = chunk * CHUNK + 8 * (2 * i + half), 0 if self.codes.along_tokens else chunk
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

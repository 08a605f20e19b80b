"""Scores of a tile of keys from their codes: eight tokens at a time, a token a lane.

A token's codes of 32 channels are 2, 3 or 4 words of 32 bits. Words of eight tokens are transposed, so that a
vector has the same channels of each; shifts and masks spread them to bytes, four a lane. The query's 8-bit
integers lie in the same order, and every product adds two of its bytes; nothing is added across lanes but
these.
"""

from __future__ import annotations

from collections.abc import Iterator

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, T, f32, i64, local, loop, store, tirx
from porter.lower.kernels.packed import CHUNK, TILE, Codes
from porter.lower.kernels.rows import LANES, Buffers
from porter.lower.kernels.steps import float_steps, prefetch_steps, steps_of_tokens

LIMIT = 127  # of a query's integers
TINY = 1e-30  # below it a query's groups are 0: 127 / TINY is still a number
# Which of 16 channels each byte of four 32-bit lanes is, by bits of a code.
ORDER = {
    2: [4 * y + k for k in range(4) for y in range(4)],
    3: [8 * u + c for u in range(2) for c in (2, 0, 6, 4, 3, 1, 7, 5)],
    4: [8 * j + 2 * y + k for j in range(2) for k in range(2) for y in range(4)],
}
WINDOWS = [byte for u in range(4) for byte in (3 * u, 3 * u + 1, 3 * u + 1, 3 * u + 2)]


class Keys:
    """The query's rows, rounded, and their products with tiles of codes."""

    def __init__(self, codes: Codes, rows: int, at: Buffers, name: str, zero: Expr) -> None:
        self.codes, self.rows, self.at, self.name, self.zero = codes, rows, at, name, zero
        groups = rows * codes.chunks
        self.integers = vec.scratch(groups * LANES * 32, "int8")  # a chunk's, four a vector, in every lane
        self.scale, self.sum = local(groups), local(groups)
        self.bias = local(groups, "int32")
        self.base = local(rows)  # what minimums along tokens add to each score

    def prepare(self, query: tirx.Buffer) -> None:
        """Once for a query, whose rows are `width` floats each; where steps are those of channels, it waits
        for a tile's."""
        if not self.codes.along_tokens:
            for r in range(self.rows):
                for chunk in range(self.codes.chunks):
                    values = [vec.held(vec.load(query, (), i, LANES)) for i in self._at(r, chunk)]
                    self._round(values, r, chunk)

    def _at(self, r: int, chunk: int) -> range:
        first = r * self.codes.width + chunk * CHUNK
        return range(first, first + CHUNK, LANES)

    def _round(self, values: list[Expr], r: int, chunk: int) -> None:
        """A chunk of a row to integers, in the order of codes."""
        place = r * self.codes.chunks + chunk
        top = vec.held(vec.largest([vec.magnitude(x) for x in values]))
        store(self.scale, top * f32(1 / LIMIT), place)
        inverse = T.broadcast(vec.held(f32(LIMIT) / tirx.max(top, f32(TINY))), LANES)
        numbers = vec.rounded_bytes([x * inverse for x in values], signed=True)
        ordered = vec.held(vec.bytes_at(vec.as_type(numbers, "uint8x32"), ORDER[self.codes.bits]))
        fours = vec.as_type(ordered, "int32x8")
        for i in range(LANES):
            four = vec.as_type(vec.picked([fours], [i] * LANES), "int8x32")
            vec.put(self.integers, four, (place * LANES + i) * 32, 32)
        if self.codes.bias:
            ones = vec.as_type(vec.spread(0x01010101, LANES), "uint8x32")
            found = vec.total([vec.added_pairs(vec.words_of(ones, vec.as_type(ordered, "int8x32")))])
            # In the lower of the two words that are added last; its sums may wrap, their end fits.
            less = (found * tirx.IntImm("int32", -self.codes.bias)) & tirx.IntImm("int32", 0xFFFF)
            store(self.bias, less, place)
        if self._minimum is not None and not self.codes.along_tokens:
            store(self.sum, vec.total(values), place)

    @property
    def _minimum(self) -> tirx.Buffer | None:
        return self.at.get(f"{self.name}_min")

    def scores(self, query: tirx.Buffer, scores: tirx.Buffer, row: tuple[Expr, Expr], token: Expr) -> None:
        """scores[r, t] of the 32 tokens from `token`, counted from the first code, on."""
        if self.codes.along_tokens:
            self._fold_steps(query, row, token)
        prefetch_steps(self.codes, self.at, self.name, row, token)
        with loop(TILE // LANES) as block:
            first = vec.held(token + block * i64(LANES))
            sums = local(self.rows * LANES)
            vec.prefetch(self.at[f"{self.name}_codes"], (*row, first + i64(TILE)), LANES)
            for r in range(self.rows):
                start = self.base[r] if self.codes.along_tokens and self._minimum is not None else f32(0)
                vec.put(sums, T.broadcast(start, LANES), r * LANES, LANES)
            steps, lows = self._steps(row, first)
            # 0, which LLVM does not know: else it loads all integers before the loop, and stores them again.
            here = vec.held(block * tirx.Cast("int64", self.zero))
            for chunk, words in self._words(row, first):
                self._multiply(sums, chunk, words, steps, lows, here)
            for r in range(self.rows):
                vec.put(
                    scores, vec.load(sums, (), r * LANES, LANES), i64(r * TILE) + block * i64(LANES), LANES
                )

    def _fold_steps(self, query: tirx.Buffer, row: tuple[Expr, Expr], token: Expr) -> None:
        """The query times a group's steps, rounded; and times its minimums, summed."""
        codes = self.codes
        group = (*row, token // i64(codes.stored.side.group))
        lows = [[] for _ in range(self.rows)]
        for chunk in range(codes.chunks):
            place = [chunk * CHUNK + i for i in range(0, CHUNK, LANES)]
            steps = [vec.held(float_steps(self.at[f"{self.name}_scale"], group, i)) for i in place]
            low = [] if self._minimum is None else [float_steps(self._minimum, group, i) for i in place]
            low = [vec.held(vec.lifted(x, step, codes.lifted)) for x, step in zip(low, steps, strict=False)]
            for r in range(self.rows):
                values = [vec.load(query, (), i, LANES) for i in self._at(r, chunk)]
                self._round([vec.held(x * step) for x, step in zip(values, steps, strict=True)], r, chunk)
                for x, m in zip(values, low, strict=False):
                    lows[r] = [vec.held(x * m + lows[r][0] if lows[r] else x * m)]
        for r in range(self.rows):
            if lows[r]:
                store(self.base, vec.total(lows[r]), r)

    def _steps(self, row: tuple[Expr, Expr], token: Expr) -> tuple[list[Expr], list[Expr]]:
        """Of eight tokens, for each group of channels: steps, and minimums."""
        if self.codes.along_tokens:
            return [], []
        names = (f"{self.name}_scale", f"{self.name}_min")
        steps, lows = (steps_of_tokens(self.at[n], row, token) if n in self.at else [] for n in names)
        lifted = zip(lows, steps, strict=False)
        return steps, [vec.held(vec.lifted(x, step, self.codes.lifted)) for x, step in lifted]

    def _words(self, row: tuple[Expr, Expr], token: Expr) -> Iterator[tuple[int, list[Expr]]]:
        """Each chunk, and its eight vectors of bytes in the order of channels."""
        codes, size = self.codes, self.codes.width * self.codes.bits // 8
        if codes.bits == 2:
            for chunk in range(0, codes.chunks, 2):
                words = self._transposed(row, token, 8 * chunk)
                for i in range(2):
                    yield chunk + i, [_bits(w, 2 * k, 2) for w in words[2 * i : 2 * i + 2] for k in range(4)]
        elif codes.bits == 4:
            for chunk in range(codes.chunks):
                words = self._transposed(row, token, 16 * chunk)
                yield chunk, [_bits(w, 4 * k, 4) for w in words for k in range(2)]
        else:
            for chunk in range(codes.chunks):
                first = min(12 * chunk, size - 16)
                order = [12 * chunk - first + i for i in WINDOWS]
                words = self._transposed(row, token, first, order)
                yield chunk, [v for w in words for v in _threes(vec.as_type(w, "uint16x16"), self.zero)]

    def _transposed(
        self, row: tuple[Expr, Expr], token: Expr, byte: int, order: list[int] | None = None
    ) -> list[Expr]:
        """Four words of 16 bytes, in an order, of eight tokens: a vector each, int32x8."""
        buffer, rows = self.at[f"{self.name}_codes"], []
        for i in range(4):
            near, far = (vec.load(buffer, (*row, token + i64(i + j)), byte, 16) for j in (0, 4))
            both = self.codes.turned(vec.picked([near, far], range(32)), byte)
            both = vec.bytes_at(both, order) if order else both
            rows.append(vec.held(vec.as_type(both, "uint32x8")))
        low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
        pairs = [vec.held(vec.picked(rows[i : i + 2], o)) for o in (low, high) for i in (0, 2)]
        low, high = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
        return [vec.held(vec.picked(pairs[i : i + 2], o)) for i in (0, 2) for o in (low, high)]

    def _multiply(
        self,
        sums: tirx.Buffer,
        chunk: int,
        words: list[Expr],
        steps: list[Expr],
        lows: list[Expr],
        here: Expr,
    ) -> None:
        """sums[r] += a chunk's products."""
        codes, found = self.codes, local(self.rows * 16, "int16")
        for r in range(self.rows):
            bias = self.bias[r * codes.chunks + chunk] if codes.bias else tirx.IntImm("int32", 0)
            vec.put(found, vec.as_type(vec.spread(bias, LANES), "int16x16"), r * 16, 16)
        for i, word in enumerate(words):
            code = vec.held(word)
            for r in range(self.rows):
                place = i64(((r * codes.chunks + chunk) * LANES + i) * 32) + here
                product = vec.words_of(code, vec.load(self.integers, (), place, 32))
                vec.put(found, vec.load(found, (), r * 16, 16) + product, r * 16, 16)
        for r in range(self.rows):
            place = r * codes.chunks + chunk
            value = tirx.Cast("float32x8", vec.added_pairs(vec.load(found, (), r * 16, 16)))
            value = value * T.broadcast(self.scale[place], LANES)
            added = vec.load(sums, (), r * LANES, LANES)
            if steps:
                group = chunk * len(steps) // codes.chunks
                added = value * steps[group] + added
                if lows:
                    added = T.broadcast(self.sum[place], LANES) * lows[group] + added
            else:
                added = value + added
            vec.put(sums, added, r * LANES, LANES)


def _bits(words: Expr, shift: int, bits: int) -> Expr:
    """The codes at a shift in each byte, uint8x32."""
    moved = words >> vec.spread(shift, LANES, "uint32") if shift else words
    return vec.masked(vec.as_type(moved, "uint8x32"), 0x03030303 if bits == 2 else 0x0F0F0F0F)


def _threes(words: Expr, zero: Expr) -> Iterator[Expr]:
    """Words of bytes 0 and 1, then 1 and 2, of three: of their eight codes 2 0 6 4, then 3 1 7 5."""
    for down, up in (((6, 10), (8, 4)), ((9, 13), (5, 1))):
        low = vec.masked(vec.as_type(vec.shifted_down(words, down), "uint8x32"), 0x00070007)
        high = vec.masked(vec.as_type(vec.shifted_up(words, up, zero), "uint8x32"), 0x07000700)
        yield vec.both(low, high)

"""Weights of a Layout whose rows lie by themselves (`lanes` 1), read element by element."""

from __future__ import annotations

from dataclasses import dataclass

from porter.lower.blocks.define import Expr, Spec, i64, tirx
from porter.lower.kernels.codecs import CODECS, Codec
from porter.lower.kernels.layout import Layout


def grouped(layout: Layout) -> bool:
    """Whether a scale belongs to a part of a row, or to neighbouring rows: it is applied to each element. One
    of a whole row, or of the matrix, is applied to the sum."""
    return 0 < layout.group < layout.k


@dataclass(frozen=True)
class Packed:
    """Reads matrix `matrix` of the stack; `weight` are the buffers of `layout`, in its order."""

    layout: Layout
    weight: tuple[tirx.Buffer, ...]
    matrix: Expr

    def _buffer(self, name: str) -> tirx.Buffer:
        specs: list[Spec] = self.layout.buffers()
        return next(b for b, (n, _, _) in zip(self.weight, specs, strict=True) if n == name)

    def _row(self, n: Expr) -> Expr:
        return self.matrix * i64(self.layout.n) + n if self.layout.stack > 1 else n

    def stored(self, n: Expr, k: Expr) -> Expr:
        """The code at [n, k]; one narrower than a byte in the low bits of one."""
        codec, layout = self.layout.codec, self.layout
        group = layout.group or layout.k
        within = k % i64(group) if group < layout.k else k
        start = k // i64(group) * i64(codec.words(group)) if group < layout.k else i64(0)
        return _field(self._buffer("w"), self._row(n), start, within, codec, layout.words)

    def element(self, n: Expr, k: Expr) -> Expr:
        """The element in float32, less its zero point, halved where it is."""
        layout = self.layout
        code = self.stored(n, k)
        value = layout.codec.decode(lambda _: code, 0)
        if layout.zero:
            value = value - self._per_group("zero", layout.zero, n, self._group(k))
        if layout.micro:
            halving = CODECS["halving"]
            words = halving.words(-(-layout.k // layout.micro))
            bit = _field(self._buffer("shift"), self._row(n), i64(0), k // i64(layout.micro), halving, words)
            value = value * halving.decode(lambda _: bit, 0)
        return value

    def number(self, n: Expr, k: Expr) -> Expr:
        """The element times its scale, where the scale is not that of the whole row; float32."""
        value = self.element(n, k)
        return value * self.scale(n, self._group(k)) if grouped(self.layout) else value

    def scale(self, n: Expr, group: Expr) -> Expr:
        """A scale in float32, without the factor."""
        return self._per_group("scale", self.layout.scale, n, group)

    def zero(self, n: Expr, k: Expr) -> Expr:
        """An integer's zero point, int32."""
        return self._per_group("zero", self.layout.zero, n, self._group(k), exact=True)

    def of_sum(self, n: Expr) -> Expr | None:
        """What a sum over k is multiplied by, or None."""
        layout = self.layout
        scale = self.scale(n, i64(0)) if layout.group and not grouped(layout) else None
        if not layout.factor:
            return scale
        return self.factor() if scale is None else scale * self.factor()

    def factor(self) -> Expr:
        """What all scales are multiplied by, where there is such."""
        return self._buffer("factor")[0]

    def _group(self, k: Expr) -> Expr:
        return k // i64(self.layout.group) if grouped(self.layout) else i64(0)

    def _per_group(self, name: str, codec: str, n: Expr, group: Expr, *, exact: bool = False) -> Expr:
        layout = self.layout
        row = self._row(n)
        if layout.rows != 1:
            row = n // i64(layout.rows) if layout.rows else i64(0)
            row = self.matrix * i64(layout.row_groups) + row if layout.stack > 1 else row
        word = self._buffer(name)[row, group, 0]
        read = CODECS[codec].integer if exact else CODECS[codec].decode
        assert read is not None
        return read(lambda _: word, 0)


def _field(buffer: tirx.Buffer, row: Expr, start: Expr, place: Expr, codec: Codec, words: int) -> Expr:
    """The code number `place` of a bit stream that begins at word `start`, in the low bits of a word."""
    if codec.bits >= 8:
        return buffer[row, start + place, 0]
    bit = place * i64(codec.bits)
    at, shift = start + bit // i64(8), tirx.Cast("uint16", bit % i64(8))
    word = tirx.Cast("uint16", buffer[row, at, 0])
    if 8 % codec.bits:  # it may lie across two bytes; behind the last one nothing is needed
        after = tirx.Cast("uint16", buffer[row, tirx.min(at + i64(1), i64(words - 1)), 0])
        word = word | (after << tirx.IntImm("uint16", 8))
    return tirx.Cast("uint8", (word >> shift) & tirx.IntImm("uint16", 255))

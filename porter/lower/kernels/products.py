"""y = x Wᵀ where x is codes too: 8-bit values are multiplied as they are, and scaled group by group.

Two integers give an int32 sum, exact; a sum with 8-bit floats in it is of float32, whose products are exact
(at most 8 significant bits).
"""

from __future__ import annotations

from dataclasses import dataclass

from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Expr, Spec, define, i64, local, loop, store, tirx
from porter.lower.kernels.layout import LANES, Layout
from porter.lower.kernels.matmul import each_block, each_tile
from porter.lower.kernels.reading import Reader

LONGEST = 1 << 15  # so many products of differences of 8-bit integers fit an int32, 255² each


@dataclass(frozen=True)
class Activation:
    """How x [m, k] is stored: a codec of one code per word, and `group` codes of a row share a scale.

    `zero`: each group has a zero point too, int32. Where there are several groups, one holds whole groups of
    the weight.
    """

    codec: str
    group: int
    zero: bool = False

    def buffers(self, k: int) -> list[Spec]:
        """`x`, `x_scale` and `x_zero` where there are any."""
        shape = ("m", -(-k // self.group))
        zero: list[Spec] = [("x_zero", shape, "int32")] if self.zero else []
        return [("x", ("m", k), CODECS[self.codec].storage), ("x_scale", shape, "float32"), *zero]


def exact(layout: Layout, x: Activation) -> bool:
    """Are the sums of integers, and exact?"""
    integers = [layout.codec_name, x.codec, *([layout.zero] if layout.zero else [])]
    short = (layout.group or layout.k) <= LONGEST
    return all(CODECS[c].integer and CODECS[c].bits <= 8 for c in integers) and not layout.micro and short


def fits(layout: Layout, x: Activation) -> bool:
    """Do the groups of x hold whole groups of the weight?"""
    return x.group >= layout.k or (layout.group > 0 and x.group % layout.group == 0)


def products(layout: Layout, x: Activation, out: str = "float32") -> tirx.PrimFunc:
    """x [m, k] codes, its scales and zero points [m, groups], packed W -> y [m, n].

    `out` is float32, or int32: then the scales are left out and the sums themselves are the result.
    """
    assert fits(layout, x)
    assert out == "float32" or exact(layout, x)
    given = x.buffers(layout.k)

    def body(*arguments, m):
        *weight, y = arguments[len(given) :]
        tile = _Tile(Reader(layout, tuple(weight), i64(0)), x, arguments[: len(given)], y, out).emit
        each_block(layout, layout.n * layout.k, lambda block, width: each_tile(m, tile, block, width))

    buffers: list[Spec] = [*given, *layout.buffers(), ("y", ("m", layout.n), out)]
    group = f"_g{x.group}" if x.group < layout.k else ""
    return define(f"matmul_{x.codec}{group}{'_z' * x.zero}_by_{layout.name}", buffers, body)


@dataclass(frozen=True)
class _Tile:
    """y[row:row+rows, block*LANES:+width]; each group is summed by itself, then scaled and added."""

    reader: Reader
    spec: Activation
    x: tuple[tirx.Buffer, ...]
    y: tirx.Buffer
    out: str

    def emit(self, block: Expr, width: int, row: Expr, rows: int) -> None:
        kind = "int32" if exact(self.reader.layout, self.spec) else "float32"
        total, part = local(rows * LANES, self.out), local(rows * LANES, kind)
        with loop(rows * LANES, "vectorized") as v:
            store(total, _zero(self.out), v)
        for first, groups, codes in self.reader.layout.spans():
            with loop(groups) as i:
                group = i + i64(first)
                with loop(rows * LANES, "vectorized") as v:
                    store(part, _zero(kind), v)
                self._sum(part, kind, block, group, codes, row, rows)
                self._add(total, part, block, group, row, rows)
        for r in range(rows):
            with loop(width, "vectorized") as v:
                store(self.y, total[i64(r * LANES) + v], row + i64(r), block * i64(LANES) + v)

    def _sum(
        self, part: tirx.Buffer, kind: str, block: Expr, group: Expr, codes: int, row: Expr, rows: int
    ) -> None:
        reader, unit = self.reader, self.reader.layout.unit
        zero = local(LANES, kind) if reader.layout.zero else None
        if zero is not None:
            with loop(LANES, "vectorized") as v:
                store(zero, reader.zero(block, group, v, exact=kind == "int32"), v)

        def some(number: Expr, count: int) -> None:
            for which in range(count):
                decoded = local(LANES, kind)
                with loop(LANES, "vectorized") as v:
                    read = reader.integer if kind == "int32" else reader.element
                    less = zero[v] if zero is not None else None
                    store(decoded, read(block, group, number, which, v, less), v)
                k = reader.k(group, number, which)
                for r in range(rows):
                    factor = self._factor(row + i64(r), k, group, kind)
                    with loop(LANES, "vectorized") as v:
                        at = i64(r * LANES) + v
                        store(part, part[at] + factor * decoded[v], at)

        if codes // unit:
            with loop(codes // unit) as number:
                some(number, unit)
        if codes % unit:
            some(i64(codes // unit), codes % unit)

    def _factor(self, row: Expr, k: Expr, group: Expr, kind: str) -> Expr:
        """x[row, k] less its zero point."""
        codec = CODECS[self.spec.codec]
        value = (codec.integer if kind == "int32" else codec.decode)(lambda _: self.x[0][row, k], 0)
        if not self.spec.zero:
            return value
        zero = self.x[2][row, self._group(group)]
        return value - (zero if kind == "int32" else tirx.Cast("float32", zero))

    def _group(self, group: Expr) -> Expr:
        """The group of x that a group of the weight lies in."""
        layout = self.reader.layout
        whole = self.spec.group >= layout.k
        return i64(0) if whole else group // i64(self.spec.group // layout.group)

    def _add(
        self, total: tirx.Buffer, part: tirx.Buffer, block: Expr, group: Expr, row: Expr, rows: int
    ) -> None:
        """total += part * (scale of the weight * scale of x)."""
        if self.out == "int32":
            with loop(rows * LANES, "vectorized") as v:
                store(total, total[v] + part[v], v)
            return
        for r in range(rows):
            scale = self.x[1][row + i64(r), self._group(group)]
            with loop(LANES, "vectorized") as v:
                at = i64(r * LANES) + v
                both = self.reader.scale(block, group, v) * scale if self.reader.layout.group else scale
                store(total, total[at] + tirx.Cast("float32", part[at]) * both, at)


def _zero(dtype: str) -> Expr:
    return tirx.IntImm(dtype, 0) if dtype == "int32" else tirx.FloatImm(dtype, 0.0)

"""y = x Wᵀ for a constant weight, or matrices picked from a stack, of operands as a unit takes them.

Blocks, in order: `x_cast` (activations as operands), `w_decode` (codes as operands), `product` (on the unit),
`y_scale` (the scales of whole rows, on the vector unit; left out where there is nothing to do). Operands are
padded with zeros to whole steps of k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from porter.lower.blocks.define import (
    PLAIN,
    Expr,
    Spec,
    block,
    choose,
    define,
    i64,
    loop,
    marked,
    scratch,
    store,
    tirx,
)
from porter.lower.blocks.operand import Operand, codec_of, flushed
from porter.lower.blocks.packed import Packed, grouped
from porter.lower.blocks.unit import Unit, cast, products
from porter.lower.kernels.codecs import CODECS, Codec
from porter.lower.kernels.define import check
from porter.lower.kernels.integers import OUTSIDE
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.products import Activation

FLOATS = Activation("fp32", 0)  # x is float32, and has no scales


@dataclass(frozen=True)
class Product:
    """One kernel: x [m, k] times the matrix of `layout` (`lanes` 1).

    `x` says how activations are stored: float32, or codes with a scale for each row, or for each group of
    them that holds whole groups of the weight. With `stack` "all" or "picked" x is [t, m, k], or if `shared`
    [1, m, k]: product i is with matrix i mod stack, or with matrix ids[i], int64 [t], the first argument; a
    negative number counts from the end, and one outside of the stack stops the program. `out` is float32, or
    int32 for sums of integers without scales.
    """

    layout: Layout
    unit: Unit
    x: Activation = FLOATS
    stack: str = ""
    shared: bool = False
    out: str = "float32"

    def __post_init__(self) -> None:
        assert self.layout.lanes == 1, self
        assert self.out == "float32" or (self.unit.sums == "int32" and not self._within), self

    @property
    def name(self) -> str:
        """The kernel's name, readable in a plan; the module makes it unique."""
        stack = {"": "", "all": "_stacked", "picked": "_picked"}[self.stack]
        codes = f"_{self.x.codec}" if self.x.group else ""
        return f"product_{self.unit.label}{stack}{codes}_by_{self.layout.name}"

    @property
    def _within(self) -> int:
        """Codes along k whose sum is scaled before it is added, because the next have another scale; 0: only
        the whole sum is. Codes that are multiplied as they are keep their groups' scales out of the product.
        """
        if self.unit.w.coded and grouped(self.layout) and self.out == "float32":
            return self.layout.group
        return self.x.group if self.x.group < self.layout.k else 0

    @property
    def _steps(self) -> Unit:
        return replace(self.unit, step=self._within) if self._within else self.unit

    def buffers(self) -> list[Spec]:
        """Arguments and the result y [m, n] or [t, m, n]."""
        k, n = self.layout.k, self.layout.n
        x = self.x.buffers(k) if self.x.group else [("x", ("m", k), "float32")]
        ids: list[Spec] = [("ids", ("t",), "int64")] if self.stack == "picked" else []
        y: Spec = ("y", ("m", n), self.out)
        if self.stack:
            x = [(name, (1 if self.shared else "t", *shape), dtype) for name, shape, dtype in x]
            y = ("y", ("t", "m", n), self.out)
        return [*ids, *x, *self.layout.buffers(), y]

    def kernel(self) -> tirx.PrimFunc:
        """The PrimFunc."""
        names = [n for n, _, _ in self.buffers()]
        func = define(self.name, self.buffers(), lambda *given, **dims: self._body(names, given, dims))
        return func.with_attr(marked("product", self.unit.name)).with_attr(PLAIN, self._plain)

    @property
    def _plain(self) -> list[str]:
        """The blocks that change nothing: what is stored is what the unit multiplies."""
        layout, x, w = self.layout, self.unit.x, self.unit.w
        stored = self.x.codec if self.x.group else "fp32"
        plain_x = stored == codec_of(x.form) and not (self.x.zero or (x.flush and not x.coded))
        plain_w = layout.codec_name == codec_of(w.form) and not (layout.zero or layout.micro)
        plain_w = plain_w and (w.coded or not grouped(layout))
        whole = self._steps.padded(layout.k) == layout.k
        return [n for n, plain in (("x_cast", plain_x), ("w_decode", plain_w)) if plain and whole]

    def _body(self, names: list[str], given: tuple[tirx.Buffer, ...], dims: dict[str, tirx.Var]) -> None:
        at, weights = dict(zip(names, given, strict=True)), [n for n, _, _ in self.layout.buffers()]
        lead = [dims["t"]] if self.stack else []
        x_lead = [1 if self.shared else dims["t"]] if self.stack else []
        layout, unit, m, n = self.layout, self._steps, dims["m"], self.layout.n
        if self.stack == "picked":
            with loop(dims["t"]) as i:
                number = at["ids"][i]
                check(tirx.all(number >= i64(-layout.stack), number < i64(layout.stack)), OUTSIDE)
        padded = unit.padded(layout.k)
        x = scratch("x_operand", [*x_lead, m, padded], unit.x.storage)
        with block("x_cast", [*x_lead, m, padded]) as index:
            value = self._activation(at, index)
            store(x, _inside(index[-1], layout.k, padded, value, unit.x.zero()), *index)
        w = scratch("w_operand", [*lead, n, padded], unit.w.storage)
        with block("w_decode", [*lead, n, padded]) as index:
            packed = self._packed(at, weights, index[:-2])
            value = self._weight(packed, index[-2], index[-1])
            store(w, _inside(index[-1], layout.k, padded, value, unit.w.zero()), *index)
        scaled = self._scaled(at, weights)
        plain = scaled is None and unit.kept == self.out
        total = at["y"] if plain else scratch("sum", [*lead, m, n], "float32" if self._within else unit.kept)
        products(
            unit,
            [*lead, m, n],
            unit.steps(layout.k),
            lambda *i: x[(*self._x_lead(i[:-3]), i[-3], i[-1])],
            lambda *i: w[(*i[:-3], i[-2], i[-1])],
            total,
            self._scale_of_step(at, weights) if self._within else None,
        )
        if plain:
            return
        with block("y_scale", [*lead, m, n]) as index:
            value = cast(total[tuple(index)], str(total.dtype), self.out)
            store(at["y"], value if scaled is None else scaled(value, index), *index)

    def _x_lead(self, lead: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(i64(0) for _ in lead) if self.shared else lead

    def _packed(self, at: dict[str, tirx.Buffer], weights: list[str], lead: list[Expr]) -> Packed:
        stack = i64(self.layout.stack)
        number = (at["ids"][lead[0]] if self.stack == "picked" else lead[0]) if lead else i64(0)
        return Packed(self.layout, tuple(at[n] for n in weights), (number + stack) % stack)

    def _activation(self, at: dict[str, tirx.Buffer], index: list[Expr]) -> Expr:
        """An operand of x, as it is stored on the chip."""
        *_, k = index
        k = self._at_most(k)
        word = at["x"][(*index[:-1], k)]
        if not self.x.group:
            return self.unit.x.rounded(word)
        zero = at["x_zero"][(*index[:-1], self._x_group(k))] if self.x.zero else None
        return _operand(self.unit.x, CODECS[self.x.codec], word, zero)

    def _weight(self, packed: Packed, n: Expr, k: Expr) -> Expr:
        """An operand of W, likewise."""
        k = self._at_most(k)
        if not self.unit.w.coded:
            return self.unit.w.rounded(packed.number(n, k))
        zero = packed.zero(n, k) if self.layout.zero else None
        return _operand(self.unit.w, self.layout.codec, packed.stored(n, k), zero)

    def _at_most(self, k: Expr) -> Expr:
        """k where there is something: what pads a step is not read."""
        whole = self._steps.padded(self.layout.k) == self.layout.k
        return k if whole else tirx.min(k, i64(self.layout.k - 1))

    def _x_group(self, k: Expr) -> Expr:
        return k // i64(self.x.group) if self.x.group < self.layout.k else i64(0)

    def _scale_of_step(self, at: dict[str, tirx.Buffer], weights: list[str]) -> Callable[..., Expr]:
        """The scales of a sum over `_within` codes."""

        def scale(*index: Expr) -> Expr:
            *lead, m, n, step = index
            k, found = step * i64(self._within), None
            if self.x.group < self.layout.k and self.x.group:
                found = at["x_scale"][(*self._x_lead(tuple(lead)), m, self._x_group(k))]
            if self.unit.w.coded and grouped(self.layout):
                of_w = self._packed(at, weights, lead).scale(n, k // i64(self.layout.group))
                found = of_w if found is None else of_w * found
            assert found is not None
            return found

        return scale

    def _scaled(self, at: dict[str, tirx.Buffer], weights: list[str]) -> Callable[..., Expr] | None:
        """What becomes of a whole sum; None where it stays as it is."""
        layout, flush = self.layout, self.unit.x.flush
        of_rows = self.x.group >= layout.k
        of_sum = layout.factor or (layout.group and not grouped(layout))
        if self.out != "float32" or not (flush or of_rows or of_sum):
            return None

        def scaled(value: Expr, index: list[Expr]) -> Expr:
            *lead, m, n = index
            factors = []
            if of_sum:
                factors.append(self._packed(at, weights, lead).of_sum(n))
            if of_rows:
                factors.append(at["x_scale"][(*self._x_lead(tuple(lead)), m, 0)])
            if factors:
                value = value * (factors[0] if len(factors) == 1 else factors[0] * factors[1])
            return flushed(value) if flush else value

        return scaled


def _operand(operand: Operand, codec: Codec, word: Expr, zero: Expr | None) -> Expr:
    """A code less its zero point (int32), as an operand is stored; codes of 8-bit floats stay as they are."""
    if operand.coded and codec.integer is None:
        return word
    if not operand.coded:
        value = codec.decode(lambda _: word, 0)
        return operand.rounded(value if zero is None else value - tirx.Cast("float32", zero))
    if zero is None and operand.storage == str(codec.storage):
        return word
    value = codec.integer(lambda _: word, 0)
    return tirx.Cast(operand.storage, value if zero is None else value - zero)


def _inside(k: Expr, size: int, padded: int, value: Expr, zero: Expr) -> Expr:
    return value if size == padded else choose(k < i64(size), value, zero)

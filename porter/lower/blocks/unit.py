"""Unit: a matrix (or vector) unit as a product sees it, and the block that multiplies on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from porter.lower.blocks.define import LANES, Expr, T, block, i64, loop, scratch, store, tirx
from porter.lower.blocks.operand import Operand

At = Callable[..., Expr]


@dataclass(frozen=True)
class Unit:
    """What multiplies: `x` and `w` are its operands, `step` products are summed before the accumulator.

    `name` is the format of the target's matrix unit, or "" where the vector unit multiplies. `accumulator`
    is fp32, int32 or fp16.
    """

    x: Operand
    w: Operand
    step: int
    accumulator: str = "fp32"
    name: str = ""

    @property
    def sums(self) -> str:
        """TIR's dtype of the sum within a step: exact for integers."""
        return "int32" if self.x.integer and self.w.integer else "float32"

    @property
    def kept(self) -> str:
        """TIR's dtype of the accumulator."""
        return {"fp32": "float32", "fp16": "float16", "int32": "int32"}[self.accumulator]

    @property
    def label(self) -> str:
        """For kernels' names: bf16, or both operands where they differ."""
        names = dict.fromkeys(o.form.replace("-", "_") for o in (self.x, self.w))
        return "_".join(names)

    def steps(self, k: Expr | int) -> Expr | int:
        """How many steps a sum of k products takes; one, of zeros, where there may be none: a block that
        never runs leaves its sum as it finds it."""
        if isinstance(k, int):
            return -(-k // self.step)
        return tirx.max((k + i64(self.step - 1)) // i64(self.step), i64(1))

    def padded(self, k: Expr | int) -> Expr | int:
        """k up to whole steps."""
        steps = self.steps(k)
        return steps * self.step if isinstance(k, int) else steps * i64(self.step)


def products(
    unit: Unit,
    spatial: Sequence[Expr | int],
    steps: Expr | int,
    x: At,
    w: At,
    out: tirx.Buffer,
    scale: At | None = None,
) -> None:
    """Block `product`: out[spatial] += scale(spatial, step) * sum over a step of x(spatial, k) w(spatial, k).

    x and w give operands as they are stored; sums add up in the dtype of `out`. The domain is `spatial` and
    one reduced axis, of steps: a step is one work of the unit, and its products are summed side by side in
    LANES, then as a tree.
    """
    lanes = next(n for n in (LANES, 4, 2, 1) if unit.step % n == 0)
    zero = tirx.const(0, unit.sums)
    with block("product", spatial, [steps]) as (*at, step):
        with T.init():
            store(out, tirx.const(0, str(out.dtype)), *at)
        part = scratch("part", [lanes], unit.sums)
        with loop(lanes, "vectorized") as v:
            store(part, zero, v)
        with loop(unit.step // lanes) as chunk, loop(lanes, "vectorized") as v:
            k = step * i64(unit.step) + chunk * i64(lanes) + v
            a, b = unit.x.value(x(*at, k)), unit.w.value(w(*at, k))
            store(part, part[v] + a * b, v)
        half = lanes
        while half > 1:
            half //= 2
            with loop(half, "vectorized") as v:
                store(part, part[v] + part[v + i64(half)], v)
        total = part[0]
        if scale is not None:
            total = cast(total, unit.sums, "float32") * scale(*at, step)
        total = cast(total, unit.sums if scale is None else "float32", str(out.dtype))
        store(out, out[tuple(at)] + total, *at)


def cast(value: Expr, source: str, to: str) -> Expr:
    """From one dtype to another, if they differ."""
    return value if source == to else tirx.Cast(to, value)

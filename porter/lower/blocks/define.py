"""Blocks: loops that a schedule may tile, fuse and move, as TIR's schedule knows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm.script.ir_builder import IRBuilder

from porter.lower.kernels.define import Dim, Expr, Spec, T, define, f32, i64, loop, store, tirx

LANES = 8  # so many sums of a step run side by side: a vector register of float32


@contextmanager
def block(name: str, spatial: Sequence[Expr | int], reduced: Sequence[Expr | int] = ()) -> Iterator[list]:
    """`with block("product", [m, n], [k]) as (i, j, p):`, one iteration of the domain, int64."""
    kinds = [*([T.axis.spatial] * len(spatial)), *([T.axis.reduce] * len(reduced))]
    extents = [i64(e) if isinstance(e, int) else e for e in (*spatial, *reduced)]
    with T.grid(*extents) as loops:
        loops = [loops] if isinstance(loops, tirx.Var) else list(loops)
        with T.sblock(name):
            yield [kind(e, i) for kind, e, i in zip(kinds, extents, loops, strict=True)]


def scratch(name: str, shape: Sequence[Expr | int], dtype: str = "float32") -> tirx.Buffer:
    """A buffer between blocks, which a schedule may put into a level of memory."""
    buffer = T.sblock_alloc_buffer([i64(d) if isinstance(d, int) else d for d in shape], dtype)
    IRBuilder.name(name, buffer)
    return buffer


def choose(condition: Expr, value: Expr, other: Expr) -> Expr:
    """`value` where the condition holds; it is not computed elsewhere, so it may read what is not there."""
    return tirx.if_then_else(condition, value, other)


PLAIN = "porter.plain"
"""A kernel's attribute: its blocks whose result is, bit for bit, what they read, but for infinities."""


def marked(kind: str, form: str = "") -> dict[str, str]:
    """A kernel's attributes for whoever schedules it: what it is, and the format that the matrix unit
    multiplies ("": nothing is for the matrix unit)."""
    return {"porter.block": kind, "porter.format": form}


__all__ = [
    "LANES",
    "PLAIN",
    "Dim",
    "Expr",
    "Spec",
    "T",
    "block",
    "choose",
    "define",
    "f32",
    "i64",
    "loop",
    "marked",
    "scratch",
    "store",
    "tirx",
]

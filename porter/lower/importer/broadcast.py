"""Broadcasting of dimensions that cannot be proven equal: the program checks them when it runs."""

from __future__ import annotations

from typing import Any

from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.program import Importer


def broadcast_dims(imp: Importer, *shapes: list[Any]) -> list[Any]:
    """The shape that `shapes` broadcast to, aligned at their ends.

    Of two sizes that may differ, such as `total` and `past + sequence`, the first is taken: a number before a
    symbol. Raises TargetError PORT-0411 for sizes that do differ.
    """
    rank = max(map(len, shapes), default=0)
    return [_common(imp, [s[i - rank] for s in shapes if len(s) >= rank - i], shapes) for i in range(rank)]


def _common(imp: Importer, sizes: list[Any], shapes: tuple[list[Any], ...]) -> Any:
    wide = [s for s in sizes if not (isinstance(s, int) and s == 1)]
    numbers = {s for s in wide if isinstance(s, int)}
    if len(numbers) > 1:
        what = f"the shapes {' and '.join(str([*s]) for s in shapes)} do not broadcast"
        raise TargetError("PORT-0411", what, where=imp.current)
    return numbers.pop() if numbers else wide[0] if wide else 1


def agreed(imp: Importer, tensor: relax.Expr, dims: list[Any]) -> relax.Expr:
    """The tensor with its dimensions known to be `dims`, at run time where that cannot be proven."""
    own = imp.shape(tensor)
    if all(imp.same(a, b) for a, b in zip(own, dims, strict=True)):
        return tensor
    return imp.match(tensor, dims)


def broadcastable(imp: Importer, *tensors: relax.Expr) -> list[relax.Expr]:
    """The tensors, each size of theirs either 1 or known to be that of the result."""
    shapes = [imp.shape(t) for t in tensors]
    whole = broadcast_dims(imp, *shapes)
    result = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        tail = whole[len(whole) - len(shape) :]
        dims = [a if isinstance(a, int) and a == 1 else b for a, b in zip(shape, tail, strict=True)]
        result.append(agreed(imp, tensor, dims))
    return result

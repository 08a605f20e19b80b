"""Limits: whether kernels, launches and buffers keep to what the target's spec says of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from porter.errors import TargetError
from porter.lower.simt.kernels import Kernel
from porter.lower.simt.trees import Tree
from porter.run.trees import evaluate

if TYPE_CHECKING:
    from porter.lower.simt.program import Program
    from porter.target import TargetSpec


class TooLarge(TargetError):
    """A buffer, or a grid, that smaller bounds of the symbols would make smaller."""


def check(plan: Program, kernels: dict[str, Kernel], spec: TargetSpec) -> None:
    """Raise TargetError PORT-0453 naming the first limit that is exceeded, at the bounds of the symbols."""
    for fault in (*_kernels(plan, kernels, spec), *_buffers(plan, spec), *_grids(plan, spec)):
        raise fault


def _refused(what: str, limit: str, most: object, where: str, kind: type[TargetError] = TargetError) -> TargetError:
    return kind("PORT-0453", f"{what}; limits.{limit} is {most}", where=where)


def _kernels(plan: Program, kernels: dict[str, Kernel], spec: TargetSpec) -> Iterator[TargetError]:
    limits = spec.limits
    for name, kernel in kernels.items():
        block = plan.kernels[name]["block"]
        threads = block[0] * block[1] * block[2]
        if threads > limits.invocations.value:
            yield _refused(f"groups of {threads} threads", "invocations", limits.invocations.value, name)
        if any(size > most for size, most in zip(block, limits.workgroup.value, strict=True)):
            yield _refused(f"groups of {block}", "workgroup", list(limits.workgroup.value), name)
        if kernel.shared > limits.shared.value:
            yield _refused(f"{kernel.shared} bytes are shared by a group", "shared", limits.shared.text, name)
        if limits.bindings is not None and len(kernel.writes) > limits.bindings.value:
            yield _refused(f"{len(kernel.writes)} buffers", "bindings", limits.bindings.value, name)


def _buffers(plan: Program, spec: TargetSpec) -> Iterator[TargetError]:
    for limit, most in (("binding-size", spec.limits.binding_size), ("buffer-size", spec.limits.buffer_size)):
        if most is None:
            continue
        for name, tensor in plan.tensors.items():
            size = evaluate(tensor.bytes, plan.bounds)
            if size > most.value:
                fixed = isinstance(tensor.bytes, int)
                yield _refused(f"a buffer of {size} bytes", limit, most.text, name, TargetError if fixed else TooLarge)


def _grids(plan: Program, spec: TargetSpec) -> Iterator[TargetError]:
    """Groups along x beyond the limit are spread over z, where the source says so."""
    most = list(spec.limits.grid.value)
    if plan.source == "wgsl":
        most[0] *= most[2]
    for step in plan.dispatches:
        for axis, tree, limit in zip("xyz", step["grid"], most, strict=True):
            size = _most(tree, plan.bounds)
            if size > limit:
                what = f"{size} groups along {axis}"
                yield _refused(what, "grid", list(spec.limits.grid.value), step["kernel"], TooLarge)


def _most(tree: Tree, bounds: dict[str, int]) -> int:
    """Of a grid, which grows with every symbol."""
    return int(evaluate(tree, bounds))

"""Schedule kernels for chips, and run them before and after on the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from kernels import built
from tvm import s_tir, tirx

from porter import target
from porter.lower.tile.schedule import scheduled
from porter.target import TargetSpec

CHIPS = ("maia-200", "tpu-v6e", "trainium2")  # clusters; blocks of 8 x 128; partitions and weights that stay


@cache
def chip(name: str) -> TargetSpec:
    return target.load(name)


def both(
    function: tirx.PrimFunc,
    spec: TargetSpec,
    bounds: Mapping[str, int],
    sizes: Mapping[str, int] | None = None,
) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """The kernel as it is, and as it is scheduled, compiled."""
    found = scheduled(function, "kernel", spec, bounds, sizes)
    assert found is not None
    assert_annotated(found, spec)
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        before, after = built([function, found])
    return before, after


def blocks(function: tirx.PrimFunc) -> list[s_tir.SBlock]:
    """All blocks of a function but the root."""
    found: list[Any] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, found.append))
    return [b for b in found if b.name_hint != "root"]


def assert_annotated(function: tirx.PrimFunc, spec: TargetSpec) -> None:
    """Every outermost block says what does it; copies join the two levels of their DMA; products read where
    the unit reads, and write where it accumulates; what is computed is on the chip."""
    outer = next(iter(spec.memory))
    inside: list[Any] = []
    for block in blocks(function):
        if "porter.matrix" in block.annotations:
            tvm_ffi.structural_walk(block.body, (s_tir.SBlock, lambda b: inside.append(b.name_hint)))
    for block in blocks(function):
        if block.name_hint in inside:
            continue
        reads, writes = ({_level(r.source, outer) for r in side} for side in (block.reads, block.writes))
        kinds = {"porter.copy", "porter.matrix", "porter.vector", "porter.free"} & set(block.annotations)
        assert len(kinds) == 1, (block.name_hint, dict(block.annotations))
        if "porter.copy" in kinds:
            dma = spec.dma[str(block.annotations["porter.copy"])]
            assert {dma.source, dma.to} == reads | writes or block.name_hint.endswith("_gather")
        elif "porter.matrix" in kinds:
            assert reads | writes == {spec.matrix.reads, spec.matrix.accumulates}
            assert writes == {spec.matrix.accumulates}
            step = spec.matrix.formats[str(block.annotations["porter.matrix"])].step.value
            assert all(a <= b for a, b in zip(block.annotations["porter.mnk"], step, strict=True))
        else:
            assert outer not in reads | writes, block.name_hint


def _level(buffer: Any, outer: str) -> str:
    return outer if buffer.scope() in ("", "global") else buffer.scope().removeprefix("global.")

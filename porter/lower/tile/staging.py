"""Staging: inputs copied inwards and results copied outwards, level by level, as annotated copy blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir

from porter.lower.tile.chip import Chip

COPY, SLOTS, FREE = "porter.copy", "porter.slots", "porter.free"
VECTOR, VECTOR_OPS = "porter.vector", "porter.vector_ops"
MATRIX, MNK, CORES, CLUSTERS = "porter.matrix", "porter.mnk", "porter.cores", "porter.clusters"


class Staging:
    """A schedule of one kernel on one chip, with what all kinds of kernels need."""

    def __init__(self, function: Any, chip: Chip) -> None:
        self.schedule = s_tir.Schedule(function, error_render_level="none")
        self.chip = chip

    def names(self) -> list[str]:
        """Of the functions in the schedule's module."""
        return [g.name_hint for g in self.schedule.mod.functions]

    def inputs(self, block: Any) -> list[int]:
        """The numbers of the buffers that a block reads in the outermost memory."""
        reads = self.schedule.get(block).reads
        return [i for i, r in enumerate(reads) if r.source.scope() in ("", "global")]

    def read(self, block: Any, number: int, at: Sequence[Any], slots: int = 2) -> None:
        """Copy what `block` reads inwards, hop by hop; copy i stands in the loop at[i]."""
        copies = []
        for hop in self.chip.path:
            copy = self.schedule.cache_read(block, number, hop.scope, [block])
            self.annotate(copy, {COPY: hop.dma, SLOTS: slots})
            copies.append(copy)
        for copy, loop in reversed(list(zip(copies, at, strict=True))):
            self.schedule.compute_at(copy, loop)

    def move(self, block: Any, at: Sequence[Any], slots: int) -> None:
        """`block`, which stands in its loop, is the copy into the last level; those before it are added."""
        (number,) = self.inputs(block)
        copies = []
        for hop in self.chip.path[:-1]:
            copy = self.schedule.cache_read(block, number, hop.scope, [block])
            self.annotate(copy, {COPY: hop.dma, SLOTS: 2})
            copies.append(copy)
        for copy, loop in reversed(list(zip(copies, at, strict=False))):
            self.schedule.compute_at(copy, loop)
        self.annotate(block, {COPY: self.chip.path[-1].dma, SLOTS: slots})

    def inwards(self, block: Any, number: int, inner: Any) -> None:
        """Copy what `block` reads in the first level on to the last, in the loop `inner`."""
        copies = []
        for hop in self.chip.path[1:]:
            copy = self.schedule.cache_read(block, number, hop.scope, [block])
            self.annotate(copy, {COPY: hop.dma, SLOTS: 2})
            copies.append(copy)
        for copy in reversed(copies):
            self.schedule.compute_at(copy, inner)

    def cached(self, block: Any) -> list[Any]:
        """`block` writes the innermost level; gives the copies outwards, hop by hop."""
        return [self.schedule.cache_write(block, 0, hop.scope) for hop in self.chip.path]

    def result(self, block: Any, at: Sequence[Any]) -> None:
        """`block`, which stays where it is, writes the innermost level; the copy from hop i outwards stands
        in the loop at[i]."""
        self.outwards(self.cached(block), at)

    def store(self, block: Any, at: Sequence[Any]) -> None:
        """`block` is the copy from the first level outwards; those before it are added."""
        copies = [block]
        for hop in reversed(self.chip.path[:-1]):
            copies.insert(1, self.schedule.cache_read(block, 0, hop.scope))
        self.outwards(copies, at)

    def outwards(self, copies: Sequence[Any], at: Sequence[Any]) -> None:
        """Put copies outwards into their loops."""
        for copy, hop, loop in reversed(list(zip(copies, self.chip.path, at, strict=True))):
            self.annotate(copy, {COPY: hop.dma, SLOTS: 2})
            self.schedule.reverse_compute_at(copy, loop)

    def vector(self, block: Any, slots: int = 0) -> None:
        """Mark work of the vector unit: an operation an element for each buffer that the block reads."""
        found = {VECTOR: 1, VECTOR_OPS: max(1, len(self.schedule.get(block).reads))}
        self.annotate(block, found | ({SLOTS: slots} if slots else {}))

    def annotate(self, target: Any, entries: dict[str, Any]) -> None:
        """Put several annotations on a block or a loop."""
        for key, value in entries.items():
            self.schedule.annotate(target, key, value)

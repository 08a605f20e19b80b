"""Schedule of attention: scores of a few queries over the whole cache stay in a core's memory.

    for batch, key head, queries:                          dealt to clusters and cores
      q -> operands
      for piece of the cache:     K inwards; for unit step: product, score       scores stay
      score_max, weight, weight_sum, p_cast                                      on the vector unit
      for columns of the value:
        for piece of the cache:   V inwards; product_1                           sums in the accumulators
        y_divide;                                                                y outwards

Queries of all heads that share keys are rows of one unit step. The cache is longer than a core's memory,
so it comes in pieces; one row of scores is not, and is refused where it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from porter.lower.tile.bounds import most
from porter.lower.tile.capacity import check, overflowing
from porter.lower.tile.chip import Chip, Step, bits
from porter.lower.tile.nests import apart, named
from porter.lower.tile.padding import STORE, grown, padded
from porter.lower.tile.staging import CLUSTERS, CORES, FREE, MATRIX, MNK, SLOTS, Staging
from porter.lower.tile.tiling import UNKNOWN

TOKENS = {"k_cast": 2, "v_cast": 3}  # the number of the axis
SCORES = ("score", "score_max", "weight", "weight_sum")


def schedule(
    function: tirx.PrimFunc, name: str, form: str, chip: Chip, bounds: Mapping[str, int]
) -> tirx.PrimFunc:
    """An attention kernel of `porter.lower.blocks.attention`, multiplied in the unit's `form`, scheduled.

    As many queries at a time as fit. Raises TargetError PORT-0435 when scores of one do not.
    """
    function = named(function)
    shape = _Shape.of(function, bounds)
    queries = UNKNOWN if shape.queries is None else shape.queries
    queries = min(queries, max(1, chip.step(form).rows // shape.group))
    shared = chip.clusters > 1
    while True:
        cut = replace(_Cut.of(shape, queries, chip, form), shared=shared)
        result = _Schedule(Staging(_whole(function, cut), chip), cut, form).run()
        level = overflowing(result, chip, bounds)
        if shared and level in [hop.level for hop in chip.path[:-1]]:
            shared = False
        elif level and queries > 1:
            queries = -(-queries // 2)
        else:
            check(result, name, chip, bounds)
            return result


@dataclass(frozen=True)
class _Shape:
    """Of a kernel: query heads to a key head, queries (None: known at run time), the widths of a key and a
    value, and the most tokens that the cache may have."""

    group: int
    queries: int | None
    key: int
    value: int
    tokens: int

    @classmethod
    def of(cls, function: tirx.PrimFunc, bounds: Mapping[str, int]) -> _Shape:
        nests = {n.name: n for n in apart(function) or []}
        _, hq, s, dv, _ = (loop.extent for loop in nests["product_1"].loops)
        _, heads, t, dk = (loop.extent for loop in nests["k_cast"].loops)
        queries = int(s) if isinstance(s, tirx.IntImm) else None
        return cls(int(hq) // int(heads), queries, int(dk), int(dv), most(t, bounds))


@dataclass(frozen=True)
class _Cut:
    """Queries at a time; tokens of a unit step and of a piece; columns of a value of a unit step."""

    step: Step
    group: int
    queries: int
    core_queries: int
    tokens: int
    piece: int
    columns: int
    shape: _Shape
    shared: bool = True  # whether a cluster holds all of the cache of a head

    @classmethod
    def of(cls, shape: _Shape, queries: int, chip: Chip, form: str) -> _Cut:
        step = chip.step(form)
        piece = _piece(shape, step, chip, form)
        tokens = step.columns
        side = 1
        if chip.clusters > 1 and shape.queries is not None:
            side = max(1, min(chip.cores // shape.group, -(-shape.queries // queries)))
        return cls(step, shape.group, queries, side, tokens, piece, min(step.columns, shape.value), shape)


def _piece(shape: _Shape, step: Step, chip: Chip, form: str) -> int:
    """Tokens of the cache that come at a time: what the last DMA moves in its fixed time, but two slots of it
    fill no more than a quarter of the memory; whole unit steps of both products, two of the second."""
    hop, width = chip.path[-1], max(shape.key, shape.value)
    dma = chip.spec.dma[hop.dma]
    source = chip.level(dma.source)
    rate = (source.bandwidth.value if source.bandwidth else math.inf) / chip.cores
    moved = rate * dma.fixed.value / (4 * width)
    fit = int(chip.level(hop.level).size.value) / 4 / (2 * width * (4 + bits(form) / 8))
    least = math.lcm(step.columns, 2 * step.k)
    return max(1, int(min(moved, fit, shape.tokens + least - 1) / least)) * least


def _whole(function: tirx.PrimFunc, cut: _Cut) -> tirx.PrimFunc:
    """On whole tiles: queries outside are computed and dropped, tokens outside are not seen."""
    queries = cut.queries * cut.core_queries
    function = padded(function, "product", {2: queries, 3: cut.piece})
    function = grown(function, SCORES, {2: queries, 3: cut.piece}, float("-inf"))
    function = padded(function, "product_1", {2: queries, 3: cut.columns, 4: cut.piece // cut.step.k})
    return grown(function, ("y_divide",), {2: queries, 3: cut.columns})


class _Schedule:
    def __init__(self, staging: Staging, cut: _Cut, form: str) -> None:
        self.staging, self.cut, self.form = staging, cut, form
        self.schedule, self.chip = staging.schedule, staging.chip
        self.function = staging.names()[0]

    def block(self, name: str) -> Any:
        return self.schedule.get_sblock(name, self.function)

    def run(self) -> tirx.PrimFunc:
        places, columns = self._result()
        self._values(places, columns)
        self._softmax(places)
        self._scores(places)
        return self.schedule.mod[self.function]

    def _result(self) -> tuple[list[Any], Any]:
        """y_divide tiled, and y outwards. Gives the loops of copies, hop by hop, and that of columns."""
        schedule, cut, chip = self.schedule, self.cut, self.chip
        divide = self.block("y_divide")
        b, h, s, d = schedule.get_loops(divide)
        heads, group = schedule.split(h, [None, cut.group])
        so, sc, si = schedule.split(s, [None, cut.core_queries, cut.queries])
        do, di = schedule.split(d, [None, cut.columns])
        clustered = chip.clusters > 1
        if clustered:
            core_group, group = schedule.split(group, [cut.group, 1])
            schedule.reorder(b, heads, so, core_group, sc, do, group, si, di)
            self.cache = schedule.fuse(b, heads)
            core = schedule.fuse(core_group, sc)
            schedule.annotate(self.cache, CLUSTERS, 1)
        else:
            schedule.reorder(b, heads, so, sc, do, group, si, di)
            self.cache = so = core = schedule.fuse(b, heads, so, sc)
        schedule.annotate(core, CORES, 1)
        self.rows = cut.queries if clustered else cut.queries * cut.group
        places = [so] * (len(chip.path) - 1) + [core]
        schedule.set_scope(divide, 0, chip.path[-1].scope)
        self.staging.vector(divide, 2)
        self.staging.store(self.block(STORE), [*places[:-1], do])
        return places, do

    def _values(self, places: list[Any], columns: Any) -> None:
        """product_1, with V a piece at a time."""
        schedule, cut, chip = self.schedule, self.cut, self.chip
        product = self.block("product_1")
        schedule.set_scope(product, 0, chip.accumulators)
        schedule.compute_at(product, columns, preserve_unit_loops=True)
        *rest, k = self._below(product, columns)
        to, tk = schedule.split(k, [None, cut.piece // cut.step.k])
        schedule.reorder(to, tk, *rest)
        self._operand(self.block("v_cast"), to, self._pieces(to), self._pieces(places[-1]))
        schedule.decompose_reduction(product, to)
        self._unit(rest[0], cut.columns)
        schedule.annotate(self.block("product_1_init"), FREE, 1)

    def _softmax(self, places: list[Any]) -> None:
        """From weights as operands back to scores, in the core's memory."""
        for name in ("p_cast", "weight_sum", "weight", "score_max", "score"):
            block = self.block(name)
            self.schedule.set_scope(block, 0, self.chip.path[-1].scope)
            self.schedule.compute_at(block, places[-1])
            if name != "score":
                self.staging.vector(block)

    def _scores(self, places: list[Any]) -> None:
        """product under score, a piece of the cache at a time."""
        schedule, cut, chip = self.schedule, self.cut, self.chip
        score, product = self.block("score"), self.block("product")
        *_, t = schedule.get_loops(score)
        to, tm, ti = schedule.split(t, [None, cut.piece // cut.tokens, cut.tokens])
        inner = self._below(score, places[-1])
        schedule.reorder(to, tm, *[loop for loop in inner if not self._same(loop, (to, tm, ti))], ti)
        schedule.set_scope(product, 0, chip.accumulators)
        schedule.compute_at(product, tm, preserve_unit_loops=True)
        loops = self._below(product, tm)
        schedule.reorder(loops[-1], *loops[:-1])
        self._operand(self.block("q_cast"), places[-1], places)
        self._operand(self.block("k_cast"), to, self._pieces(to), self._pieces(places[-1]))
        for number in self.staging.inputs(score):
            self.staging.read(score, number, [*places[:-1], to])
        self.staging.vector(score)
        schedule.decompose_reduction(product, loops[-1])
        self._unit(loops[0], cut.tokens)
        schedule.annotate(self.block("product_init"), FREE, 1)

    def _pieces(self, loop: Any) -> list[Any]:
        """The loops of the cache's copies: all of a head's for a cluster's cores, where that fits."""
        between = self.cache if self.cut.shared else loop
        return [between] * (len(self.chip.path) - 1) + [loop]

    def _below(self, block: Any, loop: Any) -> list[Any]:
        """The loops of a block within `loop`."""
        loops = self.schedule.get_loops(block)
        place = next(i for i, one in enumerate(loops) if self._same(one, (loop,)))
        return loops[place + 1 :]

    def _same(self, loop: Any, others: tuple[Any, ...]) -> bool:
        return any(self.schedule.get(loop).loop_var.same_as(self.schedule.get(o).loop_var) for o in others)

    def _operand(self, block: Any, inner: Any, places: list[Any], once: list[Any] | None = None) -> None:
        """A block that makes operands in the loop `inner`; its inputs come in at `places`, but those that all
        tokens need alike at `once`: a window, in which tokens are anywhere, and lengths."""
        schedule, copies = self.schedule, self.staging.inputs(block)
        same = [] if once is None else self._same_for_all(block)
        schedule.set_scope(block, 0, self.chip.path[-1].scope)
        schedule.compute_at(block, inner)
        for number in copies:
            self.staging.read(block, number, once if once is not None and number in same else places)
        self.staging.vector(block, 2)

    def _same_for_all(self, block: Any) -> list[int]:
        """The numbers of what a block reads wherever the token is."""
        node = self.schedule.get(block)
        token = node.iter_vars[TOKENS[node.name_hint]].var
        found = [
            {v for r in region.region for v in tirx.analysis.undefined_vars(r.min)} for region in node.reads
        ]
        return [i for i, used in enumerate(found) if token not in used]

    def _unit(self, loop: Any, columns: int) -> None:
        block = self.schedule.blockize(loop)
        mnk = self.cut.step.mnk(self.rows, columns)
        self.staging.annotate(block, {MATRIX: self.form, MNK: mnk, SLOTS: 1})

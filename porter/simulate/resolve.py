"""Resolve: what each core does, as numbers: loops whose iterations are all alike, and operations.

A loop whose body depends on its variable is cut into stretches of equal iterations, by halving the range
until nothing in the body varies: the whole tiles and the ragged edge of 1,000 iterations cost a handful of
steps.

Around the outermost loop that is dealt out all cores wait for each other: a kernel is a sequence of stages.
The cores of a cluster do not: what they share are the buffers that the cluster fills for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from porter.errors import TargetError
from porter.simulate.expression import Ranges, Varies, exact
from porter.simulate.program import Loop, Node, Operation, Program, When, sizes


@dataclass(frozen=True)
class Repeat:
    """`body`, `count` times; each time the buffers `renews` begin a new filling."""

    count: int
    body: tuple[Step, ...]
    renews: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deal:
    """What each core of a cluster does."""

    shares: tuple[tuple[Step, ...], ...]


Step = Repeat | Deal | Operation  # an operation whose sizes are numbers


@dataclass(frozen=True)
class Stage:
    """What is done between two points where all wait: (how many cores or clusters, the work of each)."""

    shares: tuple[tuple[int, tuple[Step, ...]], ...]

    @property
    def active(self) -> int:
        """How many cores or clusters have work."""
        return sum(number for number, _ in self.shares)


@dataclass(frozen=True)
class Again:
    """Stages that come `count` times."""

    count: int
    stages: tuple[Stage | Again, ...]


def resolve(program: Program, cores: int, clusters: int) -> tuple[Stage | Again, ...]:
    """The stages of `program` on a chip with `cores` cores in `clusters` clusters (0: it has none).

    Raises TargetError PORT-0445 where a loop over cores stands in another, PORT-0446 where there are no
    clusters to deal over.
    """
    return tuple(_Resolver(program, cores, clusters).stages(program.body, {}))


def homes(program: Program) -> dict[str, str]:
    """Of each buffer that does not live as long as the kernel, the loop whose iterations renew it.

    That is the innermost loop around all that touches the buffer. Buffers of the outermost level (that of the
    kernel's arguments) have a place for everything and are not renewed.
    """
    paths: dict[str, tuple[str, ...]] = {}

    def visit(nodes: tuple[Node, ...], path: tuple[str, ...]) -> None:
        for node in nodes:
            if isinstance(node, Loop):
                visit(node.body, (*path, node.variable))
            elif isinstance(node, When):
                visit(node.body, path)
            else:
                for name in (*node.reads, *node.writes):
                    paths[name] = _common(paths.get(name, path), path)

    visit(program.body, ())
    on_chip = {buffer.name for buffer in program.buffers if buffer.slots}
    return {name: path[-1] for name, path in paths.items() if path and name in on_chip}


def shared(program: Program) -> frozenset[str]:
    """The buffers that operations outside of loops over cores touch: in a cluster, all cores have them."""
    found: set[str] = set()

    def visit(nodes: tuple[Node, ...]) -> None:
        for node in nodes:
            if isinstance(node, Loop | When):
                if not isinstance(node, Loop) or node.over != "cores":
                    visit(node.body)
            else:
                found.update(node.reads, node.writes)

    visit(program.body)
    return frozenset(found)


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if end is None else end]


def _spreads(node: Node) -> bool:
    if isinstance(node, Loop):
        return bool(node.over) or any(map(_spreads, node.body))
    return isinstance(node, When) and any(map(_spreads, node.body))


class _Resolver:
    def __init__(self, program: Program, cores: int, clusters: int) -> None:
        self.over = {"cores": cores, "clusters": clusters}
        self.name = program.name
        self.renews: dict[str, tuple[str, ...]] = {}
        for buffer, loop in homes(program).items():
            self.renews[loop] = (*self.renews.get(loop, ()), buffer)

    def stages(self, nodes: tuple[Node, ...], ranges: Ranges) -> Iterator[Stage | Again]:
        for spread, group in groupby(nodes, _spreads):
            if not spread:
                if steps := self.steps(tuple(group), ranges):
                    yield Stage(((1, steps),))
                continue
            for node in group:
                if isinstance(node, When):
                    if exact(node.condition, ranges):
                        yield from self.stages(node.body, ranges)
                elif isinstance(node, Loop) and node.over:
                    yield from self.dealt(node, ranges)
                elif isinstance(node, Loop):
                    yield from self.serial(node, ranges)

    def serial(self, loop: Loop, ranges: Ranges) -> Iterator[Again]:
        """A loop around one that is dealt out."""
        last = exact(loop.extent, ranges) - 1
        if last >= 0:
            for count, stages in self.stretches(
                loop, 0, last, ranges, lambda r: tuple(self.stages(loop.body, r))
            ):
                yield Again(count, stages)

    def dealt(self, loop: Loop, ranges: Ranges) -> Iterator[Stage]:
        if not self.over[loop.over]:
            what = "a loop is dealt out over clusters, and the chip has none"
            raise TargetError("PORT-0446", what, f"{self.name}, loop {loop.variable}")
        shares: dict[tuple[Step, ...], int] = {}
        for share in self.shares(loop, self.over[loop.over], ranges):
            shares[share] = shares.get(share, 0) + 1
        yield Stage(tuple((number, share) for share, number in shares.items() if _works(share)))

    def shares(self, loop: Loop, among: int, ranges: Ranges) -> list[tuple[Step, ...]]:
        """The iterations of each of `among`, in contiguous runs."""
        if loop.over == "cores" and any(map(_spreads, loop.body)):
            what = "a loop that is dealt out over cores has another one in it"
            raise TargetError("PORT-0445", what, f"{self.name}, loop {loop.variable}")
        extent = exact(loop.extent, ranges)
        if extent <= 0:
            return [()] * among
        each = -(-extent // among)
        stretches = self.repeats(loop, 0, extent - 1, ranges)
        return [tuple(_cut(stretches, first * each, (first + 1) * each)) for first in range(among)]

    def steps(self, nodes: tuple[Node, ...], ranges: Ranges) -> tuple[Step, ...]:
        found: list[Step] = []
        for node in nodes:
            if isinstance(node, When):
                if exact(node.condition, ranges):
                    found += self.steps(node.body, ranges)
            elif isinstance(node, Loop) and node.over:
                among = self.over["cores"] // max(1, self.over["clusters"])
                shares = self.shares(node, among, ranges)
                found += [Deal(tuple(shares))] if any(map(_works, shares)) else []
            elif isinstance(node, Loop):
                last = exact(node.extent, ranges) - 1
                found += self.repeats(node, 0, last, ranges) if last >= 0 else []
            else:
                known = {key: exact(size, ranges) for key, size in sizes(node)}
                if all(known.values()):  # outside of its guard it does nothing
                    found.append(replace(node, **known))
        return tuple(found)

    def repeats(self, loop: Loop, low: int, high: int, ranges: Ranges) -> list[Repeat]:
        renews = self.renews.get(loop.variable, ())
        found = self.stretches(loop, low, high, ranges, lambda r: self.steps(loop.body, r))
        return [Repeat(count, body, renews) for count, body in found]

    def stretches(self, loop, low, high, ranges, resolved):  # type: ignore[no-untyped-def]
        """(iterations, what `resolved` makes of each) from `low` to `high`, equal neighbours as one."""
        try:
            return [(high - low + 1, resolved({**ranges, loop.variable: (low, high)}))]
        except Varies as varies:
            if loop.variable not in varies.variables:
                raise
        middle = (low + high) // 2
        first = self.stretches(loop, low, middle, ranges, resolved)
        second = self.stretches(loop, middle + 1, high, ranges, resolved)
        if first[-1][1] == second[0][1]:
            second[0] = (first.pop()[0] + second[0][0], second[0][1])
        return first + second


def _works(steps: tuple[Step, ...]) -> bool:
    return any(_works(step.body) if isinstance(step, Repeat) else True for step in steps)


def _cut(repeats: list[Repeat], first: int, end: int) -> Iterator[Repeat]:
    """Iterations `first` to `end` of a sequence of stretches."""
    at = 0
    for repeat in repeats:
        low, high = max(first, at), min(end, at + repeat.count)
        if low < high:
            yield replace(repeat, count=high - low)
        at += repeat.count

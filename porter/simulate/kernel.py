"""Simulate one kernel: stages one after the other, and in each, cores with the same work once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from porter.simulate.cost import ZERO, Core, exact
from porter.simulate.program import Copy, Matrix, Program
from porter.simulate.resolve import Again, Stage, resolve
from porter.simulate.result import KernelTime, Traffic, Use
from porter.simulate.work import Actor, Work
from porter.target import TargetSpec

LATENCY = Fraction(1, 2)
"""A kernel whose busiest queue is busy for less of its time is bound by latency."""


def simulate(program: Program, spec: TargetSpec) -> KernelTime:
    """The time of one call of `program` on the chip of `spec`.

    Raises TargetError PORT-0445 and PORT-0448 for a program that cannot be timed, PORT-0446 where the spec
    lacks a figure, or has no such DMA, level or format.
    """
    total = _Total(spec, program)
    for times, stage in _stages(resolve(program, Core(spec).cores, Core(spec).clusters)):
        total.add(times, stage)
    return total.result()


def slowest(program: Program, spec: TargetSpec) -> Work | None:
    """Of the stage that takes longest, the core or cluster that does; None where nothing is done."""
    found = [
        Work(steps, program, spec, stage.active)
        for _, stage in _stages(resolve(program, Core(spec).cores, Core(spec).clusters))
        for _, steps in stage.shares
    ]
    return max(found, key=lambda work: work.seconds(), default=None)


def _stages(stages: tuple[Stage | Again, ...], times: int = 1) -> Iterator[tuple[int, Stage]]:
    for stage in stages:
        if isinstance(stage, Again):
            yield from _stages(stage.stages, times * stage.count)
        elif stage.shares:
            yield times, stage


class _Total:
    """Sums over stages; equal ones are simulated once."""

    def __init__(self, spec: TargetSpec, program: Program) -> None:
        self.spec, self.program = spec, program
        self.buffers = {buffer.name: buffer for buffer in program.buffers}
        self.seconds, self.flop, self.cores = Fraction(0), 0, 0
        self.busy: dict[str, Fraction] = {}
        self.operations: Counter[str] = Counter()
        self.moved: dict[str, list[int]] = {}
        self.reasons: dict[str, dict[str, Fraction]] = {}  # of each unit, where it takes longest
        self.known: dict[Stage, tuple[list[Work], list[Fraction]]] = {}

    def add(self, times: int, stage: Stage) -> None:
        if stage not in self.known:
            found = [Work(steps, self.program, self.spec, stage.active) for _, steps in stage.shares]
            self.known[stage] = found, [work.seconds() for work in found]
        works, ends = self.known[stage]
        self.seconds += times * max(ends)
        active = [number * work.cores for (number, _), work in zip(stage.shares, works, strict=True)]
        self.cores = max(self.cores, sum(active))
        for (number, _), work in zip(stage.shares, works, strict=True):
            for actor in work.actors:
                self._count(actor, times * number * actor.number)
        self._reason(works[ends.index(max(ends))], times)

    def _count(self, actor: Actor, times: int) -> None:
        for operation, each in actor.counted.items():
            cost, number = actor.costs[operation], each * times
            unit = _unit(cost.queue)
            self.busy[unit] = self.busy.get(unit, ZERO) + cost.busy * number * actor.cores
            self.operations[unit] += number
            if isinstance(operation, Copy):
                for way, name in enumerate((operation.source, operation.target)):
                    level = self.moved.setdefault(self.buffers[name].level, [0, 0])
                    level[way] += operation.bytes(operation.elements) * number
            if isinstance(operation, Matrix):
                self.flop += 2 * int(operation.m) * int(operation.n) * int(operation.k) * number

    def _reason(self, work: Work, times: int) -> None:
        """On the slowest cores: of each unit what keeps it busy, where it is busiest."""
        found: dict[str, dict[str, Fraction]] = {}
        for actor in work.actors:
            units: dict[str, dict[str, Fraction]] = {}
            for operation, each in actor.counted.items():
                cost = actor.costs[operation]
                why = units.setdefault(_unit(cost.queue), {})
                why[cost.why] = why.get(cost.why, ZERO) + cost.busy * each * times
            for unit, why in units.items():
                found[unit] = max(found.get(unit, {}), why, key=lambda one: sum(one.values()))
        for unit, why in found.items():
            known = self.reasons.setdefault(unit, {})
            for name, busy in why.items():
                known[name] = known.get(name, ZERO) + busy

    def result(self) -> KernelTime:
        chip = self.seconds * Core(self.spec).cores or Fraction(1)
        uses = [Use(unit, self.operations[unit], busy, busy / chip) for unit, busy in self.busy.items()]
        order = list(self.spec.memory)
        traffic = [Traffic(level, *moved) for level, moved in self.moved.items()]
        clock = self.spec.matrix.clock if self.spec.matrix else None
        return KernelTime(
            self.program.name,
            self.seconds,
            self.seconds * exact(clock) if clock else None,
            self.cores,
            self._bound(),
            self.flop,
            tuple(sorted(uses, key=lambda use: use.unit)),
            tuple(sorted(traffic, key=lambda level: order.index(level.level))),
        )

    def _bound(self) -> str:
        reasons = max(self.reasons.values(), key=lambda why: sum(why.values()), default={})
        if sum(reasons.values()) < LATENCY * self.seconds:
            return "latency"
        return max(reasons, key=lambda why: reasons[why], default="")


def _unit(queue: str) -> str:
    """Both queues of a DMA are one unit: an outward copy keeps the inward queue busy."""
    return queue.removesuffix(" in").removesuffix(" out")

"""Work: what a core does between two waits, or a cluster with its cores, made ready for the engine.

Cores of a cluster that do the same throughout are simulated as one. Each has queues and buffers of its own;
buffers that operations outside of the cores' loops touch are the cluster's: all cores read what it fills,
and it collects what they write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from porter.errors import TargetError
from porter.simulate.cost import Core, Cost
from porter.simulate.engine import Action, Renewal, Round, Watch, run
from porter.simulate.program import Operation, Program
from porter.simulate.resolve import Deal, Repeat, Step, shared
from porter.target import TargetSpec


@dataclass
class Actor:
    """A core or a cluster by itself: `number` of them alike, each of `cores` cores.

    `index` is the place of its part in each `Deal`, -1 for what stands outside of them.
    """

    index: int
    number: int
    cores: int
    counted: Counter[Operation]
    costs: dict[Operation, Cost] = field(default_factory=dict)
    queues: dict[str, int] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where in the state a buffer's times stand: one for each of its `slots`, then two more."""

    oldest: int
    slots: int

    @property
    def written(self) -> int:
        """When the filling is written."""
        return self.oldest + self.slots

    @property
    def done(self) -> int:
        """When all that touch the filling are done."""
        return self.oldest + self.slots + 1


class Work:
    """`steps` of one core, or of one cluster, of `active` that work at the same time.

    `ticks` to the second make every cost a whole number; place 0 of the state is when all is done.
    """

    def __init__(self, steps: tuple[Step, ...], program: Program, spec: TargetSpec, active: int) -> None:
        self.buffers = {buffer.name: buffer for buffer in program.buffers}
        self.size = 1
        self.actors = list(_actors(steps, Core(spec)))
        self.shared = _checked(shared(program), self.actors[1:], program.name)
        self.common: dict[str, Place] = {}
        inner = sum(actor.number for actor in self.actors[1:])
        for actor in self.actors:
            core = Core(spec, active if actor.index < 0 else active * inner)
            actor.costs = {op: core.of(op, self.buffers) for op in actor.counted}
            self._settle(actor)
        times = [
            t for a in self.actors for cost in a.costs.values() for t in (cost.lead, cost.busy, cost.length)
        ]
        self.ticks = math.lcm(*(time.denominator for time in times))
        self.steps = self._steps(steps, self.actors[0])

    @property
    def cores(self) -> int:
        """How many cores are at work in it."""
        return sum(actor.number for actor in self.actors[1:]) or self.actors[0].cores

    def seconds(self) -> Fraction:
        """Until all is done."""
        state = self.start()
        run(state, self.steps)
        return Fraction(state[0], self.ticks)

    def start(self) -> list[int]:
        """The state before anything is done."""
        return [0] * self.size

    def watched(self, watch: Watch) -> None:
        """Tell `watch` of every operation, one by one."""
        run(self.start(), self.steps, watch)

    def _settle(self, actor: Actor) -> None:
        """Give queues and buffers their places."""
        for name in sorted({q for cost in actor.costs.values() for q in (cost.queue, cost.also) if q}):
            actor.queues[name] = self.size
            self.size += 1
        used = {name for op in actor.counted for name in (*op.reads, *op.writes)}
        for name, buffer in self.buffers.items():
            if name in used and name not in self.common:
                place = Place(self.size, max(1, buffer.slots))
                self.size += place.slots + 2
                actor.places[name] = place
                if name in self.shared:
                    self.common[name] = place
            elif name in used:
                actor.places[name] = self.common[name]

    def _steps(self, steps: tuple[Step, ...], actor: Actor) -> tuple[Round | Action, ...]:
        made: list[Round | Action] = []
        for step in steps:
            if isinstance(step, Repeat):
                body = self._steps(step.body, actor)
                made.append(Round(step.count, body, self._renewals(step, actor)))
            elif isinstance(step, Deal):
                for part in self.actors[1:]:
                    made += self._steps(step.shares[part.index], part)
            else:
                made.append(self._action(step, actor))
        return tuple(made)

    def _renewals(self, step: Repeat, actor: Actor) -> tuple[Renewal, ...]:
        """In a core's loop its own buffers, in a cluster's those of its cores too."""
        actors = self.actors if actor.index < 0 else [actor]
        places = {a.places[name] for a in actors for name in step.renews if name in a.places}
        return tuple(Renewal(p.oldest, p.slots) for p in sorted(places, key=lambda p: p.oldest))

    def _action(self, operation: Operation, actor: Actor) -> Action:
        """Reading waits for what is written; writing for whom the place served before; changing for both,
        and for those who read what is changed. Who writes a part of a buffer does not wait for who reads
        other parts of the same filling."""
        cost = actor.costs[operation]
        waits: set[int] = set()
        marks = {0}
        for name in operation.reads:
            waits.add(actor.places[name].written)
            marks.add(actor.places[name].done)
        for name in operation.writes:
            place = actor.places[name]
            waits.add(place.oldest)
            marks |= {place.written, place.done}
            if name in operation.reads:
                waits.add(place.done)
        lead, busy, length = (int(t * self.ticks) for t in (cost.lead, cost.busy, cost.length))
        also = actor.queues[cost.also] if cost.also else -1
        ordered = tuple(sorted(waits)), tuple(sorted(marks))
        return Action(operation.name, actor.queues[cost.queue], *ordered, lead, busy, length, also)


def _actors(steps: tuple[Step, ...], core: Core) -> Iterator[Actor]:
    """What stands outside of every `Deal`, then the different parts in them."""
    deals = list(_deals(steps))
    per_cluster = core.cores // max(1, core.clusters)
    yield Actor(-1, 1, per_cluster if deals else 1, _counted(steps, -1))
    alike: dict[tuple[tuple[Step, ...], ...], list[int]] = {}
    for index in range(len(deals[0].shares) if deals else 0):
        alike.setdefault(tuple(deal.shares[index] for deal in deals), []).append(index)
    for indices in alike.values():
        if counted := _counted(steps, indices[0]):
            yield Actor(indices[0], len(indices), 1, counted)


def _checked(names: frozenset[str], cores: list[Actor], kernel: str) -> frozenset[str]:
    """What cores of a cluster write for each other would need them to wait for each other: not modelled."""
    operations = [operation for actor in cores for operation in actor.counted]
    read, written = ({name for op in operations for name in getattr(op, key)} for key in ("reads", "writes"))
    if both := sorted(names & read & written):
        what = "cores of a cluster both read and write a buffer that the cluster has in common"
        raise TargetError("PORT-0445", what, f"{kernel}, buffer {both[0]}")
    return names


def _deals(steps: tuple[Step, ...]) -> Iterator[Deal]:
    for step in steps:
        if isinstance(step, Repeat):
            yield from _deals(step.body)
        elif isinstance(step, Deal):
            yield step


def _counted(steps: tuple[Step, ...], index: int, inside: bool = False) -> Counter[Operation]:
    """How often part `index` carries out each operation; -1 is what stands outside of the deals."""
    found: Counter[Operation] = Counter()
    for step in steps:
        if isinstance(step, Repeat):
            for operation, number in _counted(step.body, index, inside).items():
                found[operation] += number * step.count
        elif isinstance(step, Deal):
            if index >= 0:
                found += _counted(step.shares[index], index, True)
        elif inside == (index >= 0):
            found[step] += 1
    return found

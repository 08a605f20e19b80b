"""A simulator without closed forms: every iteration of every core is an event.

Written against the rules in `porter.simulate` (the docstrings of `cost`, `program` and `work`), not its
code: it shares the data types and what a single operation costs, which have tests of their own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from porter.simulate.cost import Core
from porter.simulate.program import Loop, Program, When, sizes
from porter.target import TargetSpec

OPERATORS = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "//": np.floor_divide,
    "%": np.mod,
    "min": np.minimum,
    "max": np.maximum,
    "<": np.less,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "select": np.where,
}


def number(expression: Any, at: dict[str, Any]) -> int:
    """The value of an expression; all points of a `count` are looked at."""
    if isinstance(expression, tuple) and expression[0] == "count":
        spans = [number(extent, at) for _, extent in expression[1]]
        points = np.indices(spans, sparse=True) if spans else ()
        names = [name for name, _ in expression[1]]
        holds = values(expression[2], at | dict(zip(names, points, strict=True)))
        return int(np.count_nonzero(np.broadcast_to(holds, spans)))
    if isinstance(expression, tuple) and expression[0] == "together":
        total, whole = 1, True
        for along, size in expression[1][::-1]:
            total *= number(along, at) if whole else 1
            whole = whole and number(along, at) == number(size, at)
        return total
    return int(values(expression, at))


def values(expression: Any, at: dict[str, Any]) -> Any:
    """At all points that `at` has arrays for."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return at[expression]
    kind, *parts = expression
    if kind in ("count", "together"):
        arrays = {name: known for name, known in at.items() if isinstance(known, np.ndarray)}
        if not arrays:
            return number(expression, at)
        grids = np.broadcast_arrays(*arrays.values())
        points = zip(*(grid.ravel().tolist() for grid in grids), strict=True)
        found = [number(expression, at | dict(zip(arrays, point, strict=True))) for point in points]
        return np.reshape(found, grids[0].shape)
    return 1 * OPERATORS[kind](*(values(part, at) for part in parts))  # truth is 0 or 1


@dataclass
class Event:
    """An operation of one iteration: where it runs, what it must wait for, and when it begins."""

    operation: Any
    actor: tuple[int, int]  # cluster (or core of a chip without), core in it; -1: the cluster itself
    after: list[tuple[str, Event]] = field(default_factory=list)
    begin: Fraction | None = None
    cost: Any = None


@dataclass
class Timeline:
    """All events of a program, the seconds until the last is done, and bytes read and written by level."""

    seconds: Fraction
    events: list[Event]
    moved: dict[str, list[int]]
    busy: dict[str, Fraction]


def simulate(program: Program, spec: TargetSpec) -> Timeline:
    """Carry out `program` event by event."""
    return _Machine(program, spec).run()


class _Machine:
    def __init__(self, program: Program, spec: TargetSpec) -> None:
        self.program, self.spec = program, spec
        self.cores, self.clusters = Core(spec).cores, Core(spec).clusters
        self.buffers = {b.name: b for b in program.buffers}
        self.seconds = Fraction(0)
        self.events: list[Event] = []
        self.moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.busy: dict[str, Fraction] = defaultdict(Fraction)
        self.homes = self._homes()
        self.shared = self._shared()

    def run(self) -> Timeline:
        self._top(self.program.body, {})
        return Timeline(self.seconds, self.events, dict(self.moved), dict(self.busy))

    def _homes(self) -> dict[str, str | None]:
        """The innermost loop around all that touches a buffer."""
        around: dict[str, list[list[str]]] = defaultdict(list)

        def walk(nodes: Any, path: list[str]) -> None:
            for node in nodes:
                if isinstance(node, Loop):
                    walk(node.body, [*path, node.variable])
                elif isinstance(node, When):
                    walk(node.body, path)
                else:
                    for name in {*node.reads, *node.writes}:
                        around[name].append(path)

        walk(self.program.body, [])
        found: dict[str, str | None] = {}
        for name, paths in around.items():
            common = [v for v in paths[0] if all(v in path for path in paths)]
            found[name] = common[-1] if common and self.buffers[name].slots else None
        return found

    def _shared(self) -> set[str]:
        """Buffers that a cluster touches itself."""
        found: set[str] = set()

        def walk(nodes: Any, inside: bool) -> None:
            for node in nodes:
                if isinstance(node, Loop):
                    walk(node.body, inside or node.over == "cores")
                elif isinstance(node, When):
                    walk(node.body, inside)
                elif not inside:
                    found.update(node.reads, node.writes)

        walk(self.program.body, False)
        return found

    def _deals(self, node: Any) -> bool:
        if isinstance(node, Loop):
            return bool(node.over) or any(self._deals(inner) for inner in node.body)
        return isinstance(node, When) and any(self._deals(inner) for inner in node.body)

    def _top(self, nodes: Any, at: dict[str, int]) -> None:
        """Stages: all wait for all around the outermost loops that are dealt out."""
        alone: list[Any] = []
        for node in [*nodes, None]:
            if node is not None and not self._deals(node):
                alone.append(node)
                continue
            if alone:
                self._stage([(0, alone, at)], clustered=False)
                alone = []
            if isinstance(node, When):
                if number(node.condition, at):
                    self._top(node.body, at)
            elif isinstance(node, Loop) and node.over:
                among = self.cores if node.over == "cores" else self.clusters
                extent = number(node.extent, at)
                each = -(-extent // among)
                runs = [range(i * each, min(extent, (i + 1) * each)) for i in range(among)]
                tasks = [(i, [(node, run)], at) for i, run in enumerate(runs)]
                self._stage(tasks, clustered=node.over == "clusters")
            elif isinstance(node, Loop):
                for i in range(number(node.extent, at)):
                    self._top(node.body, at | {node.variable: i})

    def _stage(self, tasks: list[Any], *, clustered: bool) -> None:
        events: list[Event] = []
        for index, nodes, at in tasks:
            events += _Unrolled(self, index, clustered).all(nodes, at)
        units = {event.actor[0] for event in events}
        for event in events:
            inside = {e.actor for e in events if e.actor[0] == event.actor[0] and e.actor[1] >= 0}
            active = len(units) * (len(inside) if clustered and event.actor[1] >= 0 else 1)
            event.cost = Core(self.spec, active).of(event.operation, self.buffers)
        end = _carried_out(events)
        self.seconds += end
        self.events += events
        for event in events:
            self.busy[event.cost.queue] += event.cost.busy
            if hasattr(event.operation, "source"):
                size = event.operation.bytes(event.operation.elements)
                self.moved[self.buffers[event.operation.source].level][0] += size
                self.moved[self.buffers[event.operation.target].level][1] += size


class _Unrolled:
    """Events of one core or cluster in the order of the program, with what each waits for."""

    def __init__(self, machine: _Machine, index: int, clustered: bool) -> None:
        self.machine, self.index, self.clustered = machine, index, clustered
        self.events: list[Event] = []
        self.filling: dict[tuple[int, str], int] = defaultdict(int)
        self.touched: dict[tuple[int, str, int], list[tuple[str, Event]]] = defaultdict(list)

    def all(self, nodes: Any, at: dict[str, int]) -> list[Event]:
        for node in nodes:
            if isinstance(node, tuple):
                self.loop(node[0], node[1], at, -1)
            else:
                self.node(node, at, -1)
        return self.events

    def loop(self, loop: Loop, run: range, at: dict[str, int], core: int) -> None:
        for i in run:
            per_cluster = self.machine.cores // max(1, self.machine.clusters)
            for name, home in self.machine.homes.items():
                if home == loop.variable:
                    owners = [core] if core >= 0 else [-1, *range(per_cluster)]
                    for owner in owners:
                        self.filling[owner, name] += 1
            for node in loop.body:
                self.node(node, at | {loop.variable: i}, core)

    def node(self, node: Any, at: dict[str, int], core: int) -> None:
        if isinstance(node, When):
            if number(node.condition, at):
                for inner in node.body:
                    self.node(inner, at, core)
        elif isinstance(node, Loop) and node.over:
            extent, among = number(node.extent, at), self.machine.cores // self.machine.clusters
            each = -(-extent // among)
            for owner in range(among):
                self.loop(node, range(owner * each, min(extent, (owner + 1) * each)), at, owner)
        elif isinstance(node, Loop):
            self.loop(node, range(number(node.extent, at)), at, core)
        else:
            known = {key: number(size, at) for key, size in sizes(node)}
            if all(known.values()):
                self.operation(replace(node, **known), core)

    def operation(self, operation: Any, core: int) -> None:
        event = Event(operation, (self.index, core))
        uses = []
        for name in {*operation.reads, *operation.writes}:
            shared = not self.clustered or name in self.machine.shared
            owner = -1 if shared else core
            filling = self.filling[owner, name]
            slots = max(1, self.machine.buffers[name].slots)
            now = self.touched[owner, name, filling]
            reads, writes = name in operation.reads, name in operation.writes
            if reads:
                event.after += [pair for pair in now if writes or pair[0] == "w"]
            if writes and filling >= slots:
                event.after += self.touched[owner, name, filling - slots]
            uses.append((now, "w" if writes else "r"))
        for now, kind in uses:
            now.append((kind, event))
        self.events.append(event)


def _carried_out(events: list[Event]) -> Fraction:
    """Begin whichever event can begin first, until all have; the time when the last is done."""
    queues: dict[Any, list[Any]] = defaultdict(list)
    for event in events:
        if event.cost.also:
            queues[event.actor, event.cost.also].append(event.cost.busy)
        queues[event.actor, event.cost.queue].append(event)
    free: dict[Any, Fraction] = defaultdict(Fraction)
    end = Fraction(0)
    while queues:
        ready = []
        for key, waiting in list(queues.items()):
            while waiting and isinstance(waiting[0], Fraction):
                free[key] += waiting.pop(0)  # the engines are lent to an outward copy
            if not waiting:
                del queues[key]
                continue
            head = waiting[0]
            others = [other for _, other in head.after]
            if all(other.begin is not None for other in others):
                there = [other.begin + other.cost.length + head.cost.lead for other in others]
                ready.append((max([free[key], head.cost.lead, *there]), key))
        if not ready:
            assert not queues, "events wait for each other"
            break
        begin, key = min(ready, key=lambda pair: pair[0])
        event = queues[key].pop(0)
        event.begin = begin
        free[key] = begin + event.cost.busy
        end = max(end, begin + event.cost.length)
    return end

"""The simulator against one without closed forms, on programs made at random: equal to the last digit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings

from porter.simulate import Buffer, Copy, Loop, Matrix, Program, Vector, When, simulate
from porter.target import TargetSpec
from tests.support import stepped
from tests.support.chips import chip

CHIPS = [
    chip(),
    chip(3, rate='rate = { value = "30 GB/s", published = "T" }'),
    chip(2, fixed=1, least='least = { value = "2 cycles", published = "T" }'),
    chip(1, fixed=90, engines=1, least='load = { value = "11 cycles", published = "T" }'),
]
CLUSTERED = [chip(4, 2), chip(6, 2, fixed=40, engines=1)]
LEVELS = {"hbm": ["x", "w", "y"], "sram": ["a", "b", "c"], "acc": ["p", "q"]}


def _size(draw: Callable[..., Any], names: Iterator[int], around: list[str], most: int) -> Any:
    """A number, or one that ends raggedly along a loop around."""
    whole = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["whole", "edge", "min", "box"]))
    if not around or kind == "whole":
        return whole
    loop = draw(st.sampled_from(around))
    if kind == "min":
        rest = ("-", draw(st.integers(1, 5 * most)), ("*", loop, whole))
        return ("max", 0, ("min", whole, rest))
    inner = f"i{next(names)}"
    bound = draw(st.integers(1, 5 * most))
    guard: Any = ("<", ("+", ("*", loop, whole), inner), bound)
    if kind == "edge":
        return ("count", ((inner, whole),), guard)
    other = f"i{next(names)}"
    joint = ("<", ("+", ("+", loop, inner), other), draw(st.integers(1, 9)))
    return ("count", ((inner, whole), (other, 3)), ("and", guard, joint))


@st.composite
def programs(draw: Callable[..., Any], clustered: bool = False) -> Program:
    """Up to four loops deep, extents and sizes with ragged edges, any buffers, any order."""
    names = iter(range(1000))
    buffers = [Buffer(n, level, 0) for level in ("hbm",) for n in LEVELS[level]]
    buffers += [Buffer(n, level, draw(st.integers(1, 3))) for level in ("sram", "acc") for n in LEVELS[level]]
    if clustered:
        buffers += [Buffer(n, "shared", draw(st.integers(1, 3))) for n in ("s", "t")]

    def size(around: list[str], most: int) -> Any:
        return _size(draw, names, around, most)

    def operation(around: list[str], way: str) -> Any:
        name = f"op{next(names)}"
        sram, acc = st.sampled_from(LEVELS["sram"]), st.sampled_from(LEVELS["acc"])
        kind = draw(st.sampled_from(["in", "in", "out", "matrix", "matrix", "vector"]))
        if clustered and way == "cluster":
            pair = (draw(st.sampled_from(LEVELS["hbm"])), draw(st.sampled_from(["s", "t"])))
            pair = pair if draw(st.booleans()) else pair[::-1]
            return Copy(name, "outer", *pair, size(around, 40), 4, 8)
        if kind in ("in", "out"):
            outer = draw(st.sampled_from(LEVELS["hbm"]))
            if clustered:  # cores do not write for each other
                outer = "s" if kind == "in" else "t"
            pair = (outer, draw(sram)) if kind == "in" else (draw(sram), outer)
            return Copy(name, "hbm", *pair, size(around, 90), 4, draw(st.sampled_from([4, 8, 16])))
        if kind == "matrix":
            sizes = (size(around, 9), size(around, 9), draw(st.integers(1, 9)))
            target = draw(acc)
            more = (target,) if draw(st.booleans()) else ()
            return Matrix(name, "bf16", *sizes, (draw(sram), draw(sram), *more), (target,))
        reads = (draw(st.sampled_from([*LEVELS["sram"], *LEVELS["acc"]])),)
        return Vector(name, size(around, 30), draw(st.integers(1, 3)), reads, (draw(sram),))

    def body(around: list[str], depth: int, dealt: str) -> tuple[Any, ...]:
        made = []
        for _ in range(draw(st.integers(1, 3 if depth else 4))):
            kind = draw(st.sampled_from(["loop", "loop", "op", "op", "when"]))
            way = "core" if dealt == "cores" or not clustered else "cluster"
            if depth >= 4 or kind == "op":
                made.append(operation(around, way))
            elif kind == "when" and around:
                test = ("<", draw(st.integers(0, 3)), ("%", draw(st.sampled_from(around)), 4))
                made.append(When(test, body(around, depth + 1, dealt)))
            else:
                variable, over = f"v{next(names)}", ""
                if not dealt and draw(st.booleans()):
                    over = "clusters" if clustered else "cores"
                elif dealt == "clusters" and draw(st.booleans()):
                    over = "cores"
                extent = size(around, draw(st.sampled_from([2, 3, 9, 30 if depth < 2 else 4])))
                inner = body([*around, variable], depth + 1, over or dealt)
                made.append(Loop(variable, extent, inner, over))
        return tuple(made)

    return Program("made", tuple(buffers), body([], 0, ""))


def _events(program: Program, most: int) -> bool:
    """Whether it is small enough to be carried out event by event."""
    total = 0

    def walk(nodes: Any, at: dict[str, int]) -> None:
        nonlocal total
        for node in nodes:
            if isinstance(node, Loop):
                for i in range(stepped.number(node.extent, at)):
                    total += 1
                    if total > most:
                        return
                    walk(node.body, at | {node.variable: i})
            elif isinstance(node, When):
                walk(node.body, at)
            else:
                total += 1

    walk(program.body, {})
    return total <= most


def check(program: Program, spec: TargetSpec) -> None:
    """Time, bytes and the time that each unit is busy are the same fractions."""
    expected, found = stepped.simulate(program, spec), simulate(program, spec)
    assert found.seconds == expected.seconds
    assert {t.level: [t.read, t.written] for t in found.traffic} == expected.moved
    if not any(isinstance(e, Copy) and e.dma == "outer" for e in (e.operation for e in expected.events)):
        busy: dict[str, Fraction] = {}
        for queue, time in expected.busy.items():
            unit = queue.removesuffix(" in").removesuffix(" out")
            busy[unit] = busy.get(unit, Fraction(0)) + time
        assert {u.unit: u.busy for u in found.uses} == busy
    assert sum(u.operations for u in found.uses) == len(expected.events)


@settings(max_examples=300, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(programs(), st.sampled_from(CHIPS))
def test_equal_to_the_cycle(program: Program, spec: TargetSpec) -> None:
    if _events(program, 1500):
        check(program, spec)


@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(programs(clustered=True), st.sampled_from(CLUSTERED))
def test_equal_to_the_cycle_with_clusters(program: Program, spec: TargetSpec) -> None:
    if _events(program, 1500):
        check(program, spec)


def _pipeline(loops: int, slots: int) -> Program:
    """Copy in, multiply, copy out."""
    buffers = (
        *(Buffer(name, "hbm", 0) for name in "xy"),
        Buffer("a", "sram", slots),
        Buffer("p", "acc", slots),
        Buffer("c", "sram", slots),
    )
    inner = (
        Copy("load", "hbm", "x", "a", 64, 64, 16),
        Matrix("product", "bf16", 8, 8, 8, ("a", "p"), ("p",)),
    )
    body = (
        Loop("k", 5, inner),
        Vector("move", 64, 1, ("p",), ("c",)),
        Copy("store", "hbm", "c", "y", ("min", 64, ("-", 64 * loops - 9, ("*", "i", 64))), 64, 32),
    )
    return Program("pipeline", buffers, (Loop("i", loops, body),))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("spec", CHIPS, ids=range(len(CHIPS)))
def test_a_long_pipeline_is_equal(slots: int, spec: TargetSpec) -> None:
    check(_pipeline(40, slots), spec)


@pytest.mark.parametrize("spec", CHIPS, ids=range(len(CHIPS)))
def test_two_slots_are_faster_than_one(spec: TargetSpec) -> None:
    one, two = (simulate(_pipeline(40, slots), spec).seconds for slots in (1, 2))
    assert two < one


def _loads(count: int) -> Program:
    """Two streams of different rates that meet after a loop: loads nobody waits for, and vector work."""
    buffers = (Buffer("x", "hbm", 0), Buffer("y", "hbm", 0), Buffer("a", "sram", 2), Buffer("b", "sram", 1))
    body = (
        Copy("load", "hbm", "x", "a", 100, 100, 8),
        Vector("work", 3, 1, ("b",), ("b",)),
    )
    after = Copy("store", "hbm", "b", "y", 100, 100, 8), Vector("both", 9, 1, ("a", "b"), ("b",))
    return Program("streams", buffers, (Loop("i", count, body), *after))


MAKERS = (_loads, lambda count: _pipeline(count, 2), lambda count: _pipeline(count, 3))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("spec", CHIPS, ids=range(len(CHIPS)))
def test_a_million_iterations_take_what_a_hundred_promise(
    make: Callable[[int], Program], spec: TargetSpec
) -> None:
    """The other simulator says what 36 more iterations cost once all has settled."""
    many, few, step = 1_200_000, 120, 36
    near, far = (stepped.simulate(make(count), spec).seconds for count in (few, few + step))
    expected = near + (far - near) * ((many - few) // step)
    assert simulate(make(many), spec).seconds == expected


def test_a_slow_stream_is_overtaken() -> None:
    """A time that stands still while another grows towards it is no period: the vector unit catches up."""
    buffers = (Buffer("x", "hbm", 0), Buffer("a", "sram", 1), Buffer("b", "sram", 1))
    late = Copy("late", "hbm", "x", "a", 1000, 1000, 8)
    work, join = Vector("work", 1, 1, ("b",), ("b",)), Vector("join", 1, 1, ("a", "b"), ("a",))
    for count in (1, 7, 50, 400):
        loop = Loop("i", count, (work, Matrix("product", "bf16", 1, 1, 1, ("a",), ("a",))))
        check(Program("late", buffers, (late, loop, join)), chip())

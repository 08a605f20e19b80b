"""What the simulator says of a kernel: what binds, who is busy, what moved; plans, traces and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from porter.errors import TargetError
from porter.simulate import (
    KIND,
    Buffer,
    Call,
    Copy,
    Kernel,
    Loop,
    Matrix,
    Program,
    Step,
    StepTime,
    Vector,
    When,
    simulate,
    trace,
)
from porter.simulate.result import COLUMNS
from tests.support import stepped
from tests.support.chips import chip

BUFFERS = (
    Buffer("x", "hbm", 0),
    Buffer("y", "hbm", 0),
    Buffer("a", "sram", 2),
    Buffer("p", "acc", 2),
    Buffer("c", "sram", 2),
)


def kernel(tiles: int = 12, side: int = 8, *, elements: int = 64, over: str = "cores") -> Program:
    """`tiles` tiles: load, multiply, move, store."""
    body = (
        Copy("load", "hbm", "x", "a", elements, elements, 16),
        Matrix("product", "bf16", side, side, side, ("a",), ("p",)),
        Vector("move", side * side, 1, ("p",), ("c",)),
        Copy("store", "hbm", "c", "y", elements, elements, 32),
    )
    return Program("kernel", BUFFERS, (Loop("i", tiles, body, over),))


def use(result: Any, unit: str) -> Any:
    """What a unit did."""
    return next(u for u in result.uses if u.unit == unit)


def test_bytes_operations_and_work_are_counted() -> None:
    found = simulate(kernel(), chip(3))
    assert [(t.level, t.read, t.written) for t in found.traffic] == [
        ("hbm", 12 * 128, 12 * 256),
        ("sram", 12 * 256, 12 * 128),
    ]
    assert found.flop == 12 * 2 * 8**3
    assert found.cores == 3
    assert {u.unit: u.operations for u in found.uses} == {"dma hbm": 24, "matrix": 12, "vector": 12}
    assert found.cycles == found.seconds * 10**9


def test_utilisation_is_of_all_cores() -> None:
    one, three = (simulate(kernel(over=over), chip(3)) for over in ("", "cores"))
    assert use(one, "matrix").busy == use(three, "matrix").busy == 12 * 8 * 5 * Fraction(1, 10**9)
    assert use(one, "matrix").utilisation == use(one, "matrix").busy / (3 * one.seconds)
    assert three.seconds < one.seconds


def test_shares_that_differ_wait_for_the_largest() -> None:
    """13 tiles on 3 cores: two have 5, one 3."""
    five = simulate(kernel(5, over=""), chip(3))
    assert simulate(kernel(13), chip(3)).seconds >= five.seconds


@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (kernel(60, 32), "matrix unit"),
        (kernel(60, 1, elements=4000), "bandwidth of sram"),
        (kernel(60, 1, elements=1), "fixed cost of dma hbm"),
        (kernel(1, 8), "latency"),
    ],
)
def test_what_binds(program: Program, bound: str) -> None:
    assert simulate(program, chip(1, fixed=40)).bound_by == bound


def test_a_kernel_cannot_beat_its_units_or_its_memory() -> None:
    for tiles, side, elements in ((7, 8, 64), (40, 16, 1000), (40, 1, 3)):
        found = simulate(kernel(tiles, side, elements=elements), chip(2))
        assert found.seconds >= Fraction(sum(t.read + t.written for t in found.traffic[:1]), 100 * 10**9)
        assert all(u.utilisation <= 1 for u in found.uses)


def test_another_schedule_takes_another_time() -> None:
    """The same product in larger tiles, or without double buffering: nothing else tells the simulator."""
    small, large = kernel(32, 8, elements=64), kernel(4, 16, elements=128)
    single = replace(small, buffers=tuple(replace(b, slots=min(b.slots, 1)) for b in BUFFERS))
    spec = chip(1, fixed=200)
    assert simulate(small, spec).flop == simulate(large, spec).flop
    times = [simulate(p, spec).seconds for p in (small, large, single)]
    assert times[1] < times[0] < times[2]


def test_stages_wait_for_each_other() -> None:
    first, second = kernel(12), kernel(6, 4)
    renamed = Loop("j", 6, second.body[0].body, "cores")  # type: ignore[union-attr]
    both = Program("both", BUFFERS, (*first.body, renamed))
    apart = simulate(first, chip(3)).seconds + simulate(Program("s", BUFFERS, (renamed,)), chip(3)).seconds
    assert simulate(both, chip(3)).seconds == apart
    again = Program("again", BUFFERS, (Loop("n", 1000, both.body),))
    assert simulate(again, chip(3)).seconds == 1000 * apart


def test_an_empty_kernel_takes_no_time() -> None:
    empty = Program("none", BUFFERS, (Loop("i", 0, kernel().body),))
    found = simulate(empty, chip())
    assert (found.seconds, found.uses, found.bound_by) == (0, (), "")
    assert trace(empty, chip())["traceEvents"] == []


def test_loops_over_cores_do_not_nest() -> None:
    nested = Program("nested", BUFFERS, (Loop("j", 2, kernel().body, "cores"),))
    with pytest.raises(TargetError) as error:
        simulate(nested, chip(2))
    assert error.value.code == "PORT-0445"
    with pytest.raises(TargetError) as error:
        simulate(Program("c", BUFFERS, (Loop("j", 2, kernel(over="").body, "clusters"),)), chip(2))
    assert error.value.code == "PORT-0446"


def test_cores_of_a_cluster_do_not_write_for_each_other() -> None:
    buffers = (*BUFFERS, Buffer("s", "shared", 1))
    inner = (Copy("out", "hbm", "a", "s", 9, 9, 8), Copy("in", "hbm", "s", "a", 9, 9, 8))
    outer = Loop("g", 2, (Copy("fill", "outer", "x", "s", 9, 9, 8), Loop("i", 2, inner, "cores")), "clusters")
    with pytest.raises(TargetError) as error:
        simulate(Program("exchange", buffers, (outer,)), chip(4, 2))
    assert error.value.code == "PORT-0445"


def test_the_trace_is_what_happens() -> None:
    program, spec = kernel(5, over=""), chip()
    found = json.loads(json.dumps(trace(program, spec)))
    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    expected = stepped.simulate(program, spec).events
    assert [(e["name"], e["ts"], e["dur"]) for e in events] == [
        (e.operation.name, float(e.begin * 10**6), float(e.cost.length * 10**6)) for e in expected
    ]
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(
        float(simulate(program, spec).seconds * 10**6),
        rel=1e-12,  # a sum of two rounded numbers
    )
    assert found["otherData"] == {"kind": KIND, "kernel": "kernel", "target": "small", "complete": True}
    threads = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["ph"] == "M"}
    assert {threads[e["tid"]] for e in events if e["name"] == "product"} == {f"matrix ({KIND})"}


def test_a_long_trace_is_cut_and_says_so() -> None:
    found = trace(kernel(50, over=""), chip(), limit=9)
    assert sum(e["ph"] == "X" for e in found["traceEvents"]) == 9
    assert not found["otherData"]["complete"]


def step(**untimed: str) -> Step:
    """Two calls of `one`, with as many tiles as rows and cached tokens together, and one of `two`, with three
    times as many as rows."""
    body = kernel().body[0].body  # type: ignore[union-attr]
    one = Loop("i", ("+", "b", "n"), body, "cores"), Loop("j", ("%", "b", 1), body)
    two = (Loop("i", ("*", "b", 3), body, "cores"),)
    found = {"one": Kernel("one", ("b", "n"), BUFFERS, one), "two": Kernel("two", ("b",), BUFFERS, two)}
    calls = [Call("one", (("b", "batch"), ("n", "past")))] * 2 + [Call("two", (("b", ("min", "batch", 8)),))]
    return Step({name: k for name, k in found.items() if name not in untimed}, untimed, tuple(calls))


def test_a_step_is_the_sum_of_its_calls_each_simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    spy = lambda program, spec: asked.append(program.name) or simulate(program, spec)  # noqa: E731
    monkeypatch.setattr("porter.simulate.step.simulate", spy)
    found = step().simulate({"batch": 2, "past": 9}, chip(2))
    assert asked == ["one", "two"]
    one, two = (simulate(kernel(n), chip(2)).seconds for n in (2 + 9, 3 * 2))
    assert found.seconds == 2 * one + two
    told = found.to_dict()
    assert told["kind"] == KIND
    assert json.loads(json.dumps(told))["kernels"][0]["calls"] == 2
    assert sum(k["seconds"] * k["calls"] for k in told["kernels"]) == pytest.approx(
        told["seconds"], rel=1e-12
    )
    assert [level.read for level in found.traffic] == [(2 * 11 + 6) * size for size in (128, 256)]
    assert found.cycles == found.seconds * 10**9
    rows = found.rows()
    assert [row["kernel"] for row in rows] == ["one", "two", f"all ({KIND})"]
    assert all(tuple(row) == COLUMNS for row in rows)


def test_steps_add_up_and_what_has_no_time_is_named() -> None:
    few, more = (step(two="why").simulate({"batch": 2, "past": past}, chip()) for past in (1, 9))
    both = StepTime.of([few, more, few])
    assert both.seconds == 2 * few.seconds + more.seconds
    assert [(k.name, calls) for k, calls in both.calls] == [("one", 4), ("one", 2)]
    assert both.untimed == {"two": (3, "why")}
    assert both.to_dict()["not_simulated"] == [{"name": "two", "calls": 3, "why": "why"}]
    seconds = few.seconds * few.utilisation["matrix"] * 2 + more.seconds * more.utilisation["matrix"]
    assert both.utilisation["matrix"] == seconds / both.seconds


def test_a_kernel_that_cannot_be_timed_is_left_out_by_name() -> None:
    lacking = Kernel("two", (), BUFFERS, (Matrix("product", "int3", 1, 1, 1, ("a",), ("p",)),))
    found = replace(step(), kernels=dict(step().kernels) | {"two": lacking})
    assert found.simulate({"batch": 2, "past": 9}, chip()).untimed == {
        "two": (1, "small does not have matrix.formats.int3")
    }


def test_a_step_needs_its_kernels_and_sizes() -> None:
    with pytest.raises(TargetError) as error:
        replace(step(), kernels={}).simulate({"batch": 2, "past": 9}, chip())
    assert error.value.code == "PORT-0449"
    with pytest.raises(TargetError) as error:
        step().simulate({"batch": 2}, chip())
    assert error.value.code == "PORT-0447"
    with pytest.raises(TargetError) as error:
        step().kernels["one"].at({"b": 1})
    assert error.value.code == "PORT-0447"


def test_what_a_condition_leaves_out_costs_nothing() -> None:
    whole = kernel(8, over="")
    loop = whole.body[0]
    halved = Loop("i", 16, (When(("<", "i", 8), loop.body),))  # type: ignore[union-attr]
    assert simulate(replace(whole, body=(halved,)), chip()).seconds == simulate(whole, chip()).seconds

"""Slots and tagged caches lowered, beside `porter.kv.cache`: the same bytes, read packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import compiled

from porter.kv import Cache, Constants, attend, parse, tags
from porter.kvgraph.functions import Cached, append_function, read_function
from porter.kvgraph.tagged import assign_function

HEADS, SHARED, CAPACITY, BATCH, OPSET = 2, 2, 40, 3, 24
SIDES = ("key", "value")
MORE = np.isin(np.arange(tags.COUNT), [0, 2, 5])
UNIT = 2.0**-24


@dataclass(frozen=True)
class Case:
    text: str
    size: int

    def model(self) -> ir.Model:
        """Slots, both appends, Attention over both reads."""
        scheme, batch = parse(self.text), ir.SymbolicDim("b")
        dtypes = {
            "q": "float32",
            "tags": "int64",
            "past_lengths": "int64",
            "total": "int64",
            "slots": "int32",
        }
        shapes = {
            "q": [batch, HEADS * SHARED, "s", self.size],
            "tags": [batch, "s"],
            "past_lengths": [batch],
            "total": [batch],
            "slots": [batch, 1, CAPACITY - scheme.sink, 1],
        }
        cached = {s: Cached(scheme, s, HEADS, self.size, CAPACITY) for s in SIDES}
        for side in SIDES:
            shapes[f"new_{side}"], dtypes[f"new_{side}"] = [batch, HEADS, "s", self.size], "float32"
            for b in cached[side].buffers:
                shapes[side + b.name], dtypes[side + b.name] = [batch, *b.shape[1:]], b.dtype
        given = {n: _value(n, dtypes[n], shape) for n, shape in shapes.items()}
        more = ir.Value(name="more", const_value=ir.tensor(MORE, name="more"), shape=ir.Shape([tags.COUNT]),
                        type=ir.TensorType(ir.DataType.BOOL))  # fmt: skip
        functions = [assign_function(scheme, CAPACITY, OPSET)]
        nodes = [ir.node(functions[0].name, [given["slots"], given["tags"], given["past_lengths"], more],
                         {"scheme": self.text}, domain="porter")]  # fmt: skip
        slots = _named(nodes[0].outputs[0], "present_slots", given["slots"])
        results, read = [slots], []
        for side, each in cached.items():
            functions += [append_function(each, OPSET), read_function(each, OPSET)]
            pasts = [given[side + b.name] for b in each.buffers]
            inputs = [*pasts, given[f"new_{side}"], given["past_lengths"], slots]
            write = ir.node(
                functions[-2].name, inputs, each.attributes, domain="porter", num_outputs=len(pasts)
            )
            results += [_named(o, f"present_{p.name}", p) for o, p in zip(write.outputs, pasts, strict=True)]
            inputs = [*write.outputs, given["total"], slots]
            nodes += [write, ir.node(functions[-1].name, inputs, each.attributes, domain="porter")]
            read.append(nodes[-1].outputs[0])
            _named(read[-1], f"all_{side}", _value("", "float32", [batch, HEADS, CAPACITY, self.size]))
        inputs = [given["q"], *read, None, None, None, given["total"]]
        nodes.append(ir.node("Attention", inputs, {"is_causal": 1}))
        results.append(_named(nodes[-1].outputs[0], "y", _value("", "float32", None)))
        graph = ir.Graph(list(given.values()), results, nodes=nodes, initializers=[more],
                         opset_imports={"": OPSET, "porter": 1}, name="tagged")  # fmt: skip
        return ir.Model(graph, ir_version=11, functions=functions)


def _value(name: str, dtype: object, shape: list | None) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    return ir.Value(name=name, type=kind, shape=None if shape is None else ir.Shape(shape))


def _named(value: ir.Value, name: str, like: ir.Value) -> ir.Value:
    value.name, value.type, value.shape = name, like.type, like.shape
    return value


@cache
def built(case: Case) -> tuple:
    source = case.model()
    return compiled(source, {"b": BATCH, "s": 16}), source


class Held:
    """The lowered program's buffers beside the oracle."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        (self.run, source), self.case = built(case), case
        self.names = [v.name for v in source.graph.outputs]
        self.oracle = Cache(parse(case.text), case.size, HEADS, CAPACITY, BATCH, Constants(more=MORE))
        self.state = {n: a.copy() for n, a in self.oracle.state.items()}
        self.rng = np.random.default_rng(seed)

    def append(self, given: np.ndarray, rows: np.ndarray) -> None:
        """Tags int64 [B,S] to the rows where `rows` bool [B]; the others have a start below 0."""
        count, size = given.shape[1], self.case.size
        new = {s: self.rng.standard_normal((BATCH, HEADS, count, size)).astype(np.float32) for s in SIDES}
        before = self.oracle.lengths.copy()
        self.oracle.append(new["key"], new["value"], np.where(rows, count, 0), given)
        q = self.rng.standard_normal((BATCH, HEADS * SHARED, count, size)).astype(np.float32)
        feeds = self.state | {"q": q, "tags": given, "total": self.oracle.lengths.copy()}
        feeds |= {"past_lengths": np.where(rows, before, -1)} | {f"new_{s}": x for s, x in new.items()}
        out = dict(zip(self.names, self.run(feeds), strict=True))
        for name in self.state:
            self.state[name] = out[f"present_{name}"]
            np.testing.assert_array_equal(self.state[name], self.oracle.state[name], err_msg=name)
        for row in np.flatnonzero(rows):
            keys, values = (self.oracle.stored(s, row) for s in SIDES)
            want, top = attend(keys, values, q[row]).output, np.abs(values).max()
            sizes = np.abs(q[row]).sum(-1).max() * np.abs(keys).max() * size**-0.5
            # Products of D terms, of a code, a step and a minimum each; sums over tokens, and rescaling.
            bound = 2 * (size + 6) * UNIT * sizes + (2 * keys.shape[1] + 8) * UNIT
            assert np.abs(out["y"][row] - want).max() <= bound * top


CASES = [
    Case("triaxial recent=4 key=uint2+uint4-g32-fp16 share=0.3", 5),
    Case("triaxial recent=0 share=0.25", 80),
    Case("key=int2+int4-g3 value=int3+int8 share=0.5 recent=5 sink=3 high=fp32", 8),
    Case("key=uint4+uint2-g5 value=int2+int4-hybrid share=1.0 recent=3", 12),
    Case("triaxial share=0 recent=2 sink=1", 16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.text} d{c.size}")
def test_bytes_and_attention_are_those_of_the_definition(case: Case) -> None:
    held, rng = Held(case), np.random.default_rng(1)
    every = np.ones(BATCH, bool)
    for count in (1, 11, 1, 1, 6):
        held.append(rng.integers(0, 6, (BATCH, count)), every)
    held.append(rng.integers(0, 6, (BATCH, 9)), np.array([True, False, True]))
    held.append(np.zeros((BATCH, 5), int), np.array([False, True, False]))
    held.append(np.zeros((BATCH, 6), int), every)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_tags_and_splits(data: st.DataObject) -> None:
    held = Held(data.draw(st.sampled_from(CASES)), data.draw(st.integers(0, 9)))
    for _ in range(5):
        room = CAPACITY - int(held.oracle.lengths.max())
        if not room:
            break
        count = data.draw(st.integers(1, min(room, 8)))
        drawn = st.lists(
            st.sampled_from([-(2**63), -1, *range(7), 255, 256, 2**63 - 1]), min_size=count, max_size=count
        )
        given = np.array(data.draw(st.lists(drawn, min_size=BATCH, max_size=BATCH)), np.int64)
        rows = np.array(data.draw(st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)))
        held.append(given, rows if rows.any() else ~rows)


def test_slots_that_are_nonsense_reach_no_further_than_the_pools() -> None:
    """Whatever the caller's buffer says: what is read and written are places of this row's pools."""
    case = CASES[0]
    run, source = built(case)
    names, rng = [v.name for v in source.graph.outputs], np.random.default_rng(2)
    state = {n: a.copy() for n, a in Held(case).state.items()}
    extremes = np.iinfo(np.int32)
    state["slots"][:] = rng.choice([extremes.min, extremes.max, -100, 100], state["slots"].shape)
    # Other rows are full of something that would show.
    alone = {"past_lengths": np.array([-1, 30, -1]), "total": np.array([0, 34, 0])}
    for name, array in state.items():
        if name != "slots":
            array[[0, 2]] = 77
    feeds = state | {"tags": np.zeros((BATCH, 4), int), "q": np.ones((BATCH, 4, 4, 5), np.float32)} | alone
    feeds |= {f"new_{s}": rng.standard_normal((BATCH, HEADS, 4, 5)).astype(np.float32) for s in SIDES}
    out = dict(zip(names, run(feeds), strict=True))
    assert np.isfinite(out["y"][1]).all()
    for name, array in state.items():
        np.testing.assert_array_equal(out[f"present_{name}"][[0, 2]], array[[0, 2]])


def test_one_kernel_reads_both_pools_and_the_callers_buffers_are_written() -> None:
    run, source = built(CASES[0])
    presents = [v.name for v in source.graph.outputs if v.name.startswith("present_")]
    assert run.imported.in_place == {name: name.removeprefix("present_") for name in presents}
    kernels = [v.name_hint for v in run.imported.module.get_global_vars()]
    assert not [name for name in kernels if name.startswith("read_")]
    assert len([name for name in kernels if name.startswith("attention_")]) == 1

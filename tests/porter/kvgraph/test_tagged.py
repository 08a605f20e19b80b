"""Slots and pools of a tagged scheme in ONNX Runtime against `porter.kv.cache`, byte for byte."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.kv import Cache, Constants, names, tags
from porter.kv.scheme import Scheme
from porter.kvgraph.functions import Cached, append_function, read_function
from porter.kvgraph.tagged import assign_function
from porter.run.reference import ReferenceRunner

OPSET, HEADS, SIDES = 24, 2, ("key", "value")


def model_of(scheme: Scheme, size: int, capacity: int) -> ir.Model:
    """Slots, both sides' append, then both reads: inputs past_…, new_…, tags, past_lengths, total_lengths."""
    batch, functions = ir.SymbolicDim("batch"), [assign_function(scheme, capacity, OPSET)]

    def value(name: str, dtype: object, *shape: object) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        return ir.Value(name=name, type=kind, shape=ir.Shape(shape))

    given = [value(n, np.int64, batch) for n in ("past_lengths", "total_lengths")]
    given += [value("tags", np.int64, batch, "count"), value("more", np.bool_, "tags")]
    past, total, tag, more = given
    slots = value("past_slots", np.int32, batch, 1, capacity - scheme.sink, 1)
    assign = ir.node(functions[0].name, [slots, tag, past, more], {"scheme": "x"}, domain="porter")
    present = assign.outputs[0]
    present.name, present.type, present.shape = "present_slots", slots.type, slots.shape
    given.append(slots)
    nodes, results = [assign], [present]
    for side in SIDES:
        cached = Cached(scheme, side, HEADS, size, capacity)
        functions += [append_function(cached, OPSET), read_function(cached, OPSET)]
        held = [value(f"past_{side}{b.name}", b.dtype, batch, *b.shape[1:]) for b in cached.buffers]
        new = value(f"new_{side}", np.float32, batch, HEADS, "count", size)
        given += [*held, new]
        write = ir.node(functions[-2].name, [*held, new, past, present], cached.attributes, domain="porter",
                        num_outputs=len(held))  # fmt: skip
        for out, b, like in zip(write.outputs, cached.buffers, held, strict=True):
            out.name, out.type, out.shape = f"present_{side}{b.name}", like.type, like.shape
        read = ir.node(
            functions[-1].name, [*write.outputs, total, present], cached.attributes, domain="porter"
        )
        tokens = read.outputs[0]
        tokens.name, tokens.type = f"tokens_{side}", ir.TensorType(ir.DataType.FLOAT)
        tokens.shape = ir.Shape([batch, HEADS, capacity, size])
        nodes += [write, read]
        results += [*write.outputs, tokens]
    graph = ir.Graph(given, results, nodes=nodes, opset_imports={"": OPSET, "porter": 1}, name="tagged")
    return ir.Model(graph, ir_version=11, functions=functions)


class Both:
    """The oracle, and the functions beside it."""

    def __init__(self, text: str, size: int, capacity: int, batch: int, more: np.ndarray) -> None:
        self.scheme, self.size, self.more = names.parse(text), size, more
        self.oracle = Cache(self.scheme, size, HEADS, capacity, batch, Constants(more=more))
        model = model_of(self.scheme, size, capacity)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        self.runner, self.random = ReferenceRunner(model), np.random.default_rng(size)
        assert self.runner.engine == "onnxruntime"
        self.state = {n: a.copy() for n, a in self.oracle.state.items()}

    def append(self, given: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Tags int64 [B,S]; `rows` bool [B]: the rows that get them, the others stay as they are."""
        batch, count = given.shape
        rows = np.ones(batch, bool) if rows is None else rows
        new = {
            s: self.random.standard_normal((batch, HEADS, count, self.size)).astype(np.float32) for s in SIDES
        }
        before = self.oracle.lengths.copy()
        self.oracle.append(new["key"], new["value"], np.where(rows, count, 0), given)
        feeds = {f"past_{n}": a[rows] for n, a in self.state.items()} | {
            f"new_{s}": new[s][rows] for s in SIDES
        }
        feeds |= {"tags": given[rows], "past_lengths": before[rows], "total_lengths": before[rows] + count}
        out = self.runner.run(feeds | {"more": self.more})
        for name in self.state:
            self.state[name][rows] = out[f"present_{name}"]
        for name, array in self.state.items():
            np.testing.assert_array_equal(array, self.oracle.state[name], err_msg=name)
        for side in SIDES:
            tokens = out[f"tokens_{side}"]
            assert np.isfinite(tokens).all()
            for i, row in enumerate(np.flatnonzero(rows)):
                got = tokens[i, :, : self.oracle.lengths[row]]
                np.testing.assert_array_equal(got, self.oracle.stored(side, row))


MORE = np.isin(np.arange(tags.COUNT), [0, 2, 5])


@pytest.mark.parametrize("size", [5, 8, 80])
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("window", ["recent=0", "recent=4 sink=2", "recent=5 high=fp32", "recent=0 sink=3"])
def test_bytes_and_tokens(window, share, size):
    text = f"key=uint2+uint4-g32-fp16 value=int2+int4-g3 share={share} {window}"
    both, random = Both(text, size, 24, 3, MORE), np.random.default_rng(0)
    for count in (1, 9, 1, 1, 4):
        both.append(random.integers(0, 6, (3, count)))
    both.append(random.integers(0, 6, (3, 8)), np.array([True, False, True]))


def test_pools_that_are_full_give_way():
    """All want more bits, then none does: what finds no place goes to the other pool, to the last token."""
    both = Both("triaxial recent=2 share=0.4", 8, 22, 2, MORE)
    both.append(np.array([[0] * 12, [1] * 12]))
    both.append(np.array([[1] * 10, [0] * 10]))
    slots = both.state["slots"][:, 0, :20, 0]
    np.testing.assert_array_equal(np.flatnonzero(slots[0] < 0), range(8))
    np.testing.assert_array_equal(np.flatnonzero(slots[1] < 0), range(12, 20))
    for row in slots:
        assert sorted(row) == [*range(-8, 0), *range(12)]


def test_numbers_that_are_no_tags_want_nothing_more():
    both = Both("triaxial recent=0 share=0.5", 8, 16, 1, np.ones(tags.COUNT, bool))
    both.append(np.array([[-1, 0, 256, -(2**63), 2**63 - 1, 255, -256]]))
    np.testing.assert_array_equal(np.flatnonzero(both.state["slots"][0, 0, :7, 0] < 0), [1, 5])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_tags_and_splits(data):
    recent, sink, capacity = (data.draw(st.integers(low, high)) for low, high in ((0, 8), (0, 5), (9, 24)))
    share = data.draw(st.floats(0, 1, width=16))
    side = data.draw(st.sampled_from(["uint2+uint4-g5-fp16", "int2+uint3-g4", "int3+int8", "uint4+uint2"]))
    text = f"key={side} value={side} share={share} recent={recent} sink={sink}"
    rows = data.draw(st.integers(1, 3))
    both = Both(text, data.draw(st.integers(1, 9)), capacity, rows, MORE)
    for _ in range(4):
        room = capacity - int(both.oracle.lengths.max())
        if not room:
            break
        count = data.draw(st.integers(1, room))
        drawn = st.lists(st.integers(-1, 6), min_size=count, max_size=count)
        given = np.array(data.draw(st.lists(drawn, min_size=rows, max_size=rows)))
        chosen = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        both.append(given, chosen if chosen.any() else None)

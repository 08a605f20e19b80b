"""AppendCache and ReadCache in ONNX Runtime against `porter.kv.cache`, byte for byte."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.errors import PassError
from porter.kv import Cache, Constants, names
from porter.kv.scheme import STATIC
from porter.kvgraph.functions import Cached, append_function, read_function
from porter.run.reference import ReferenceRunner

OPSET, CAPACITY, HEADS = 24, 24, 2

WHOLE = ("int8", "int4", "int3", "int2", "uint4", "uint3", "uint2", "e4m3fn")
CHANNELS = [
    *WHOLE,
    *(f"{e}-g5-fp16" for e in WHOLE),
    *(f"{e}-g4-fp16-hybrid" for e in ("int4", "int3", "int2")),
    "int3-g5-hybrid",
    *(f"{e}-rotate" for e in ("lloyd4", "lloyd3", "lloyd2", "lloyd1")),
    "lloyd3-fp16-rotate-mixed",
    "lloyd2-rotate-mixed",
]
TOKENS = ["int8-g4-tokens", "int3-g4-tokens-fp16", "uint2-g3-tokens-fp16", "int2-g4-tokens-fp16-hybrid"]
WINDOWS = ["recent=5", "sink=3", "recent=4 sink=2 high=fp32"]


def model_of(cached: Cached) -> ir.Model:
    """One append, then a read: inputs past_…, new, past_lengths; outputs present_…, tokens."""
    functions = [append_function(cached, OPSET), read_function(cached, OPSET)]
    batch = ir.SymbolicDim("batch")

    def value(name: str, dtype: np.dtype, *shape: object) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        return ir.Value(name=name, type=kind, shape=ir.Shape(shape))

    past = [value(f"past{b.name}", b.dtype, batch, *b.shape[1:]) for b in cached.buffers]
    new = value("new", np.float32, batch, cached.heads, "count", cached.size)
    lengths = [value(n, np.int64, batch) for n in ("past_lengths", "total_lengths")]
    step = [value("step", np.float32, None, 1, None)] if cached.side.static else []
    write, read = (
        ir.node(f.name, inputs, cached.attributes, domain="porter", num_outputs=outputs)
        for f, inputs, outputs in (
            (functions[0], [*past, new, lengths[0], *step], len(past)),
            (functions[1], [], 1),
        )
    )
    for i, (out, b) in enumerate(zip(write.outputs, cached.buffers, strict=True)):
        out.name, out.type, out.shape = f"present{b.name}", past[i].type, past[i].shape
    read = ir.node(functions[1].name, [*write.outputs, lengths[1], *step], cached.attributes, domain="porter")
    tokens = read.outputs[0]
    tokens.name, tokens.type = "tokens", ir.TensorType(ir.DataType.FLOAT)
    tokens.shape = ir.Shape([batch, cached.heads, cached.capacity, cached.size])
    graph = ir.Graph(
        [*past, new, *lengths, *step],
        [*write.outputs, tokens],
        nodes=[write, read],
        opset_imports={"": OPSET, "porter": 1},
        name="cache",
    )
    return ir.Model(graph, ir_version=11, functions=functions)


class Graph:
    """The functions of one side, stepped like a Cache."""

    def __init__(self, cached: Cached, batch: int, step: np.ndarray | None = None) -> None:
        model = model_of(cached)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        self.runner, self.cached = ReferenceRunner(model), cached
        assert self.runner.engine == "onnxruntime"
        self.extra = {} if step is None else {"step": step}
        self.state = {b.name: np.zeros((batch, *b.shape[1:]), b.dtype) for b in cached.buffers}
        self.tokens = np.zeros(0)

    def append(self, new: np.ndarray, lengths: np.ndarray) -> None:
        feeds = {f"past{n}": a for n, a in self.state.items()}
        totals = lengths + new.shape[2]
        out = self.runner.run(
            feeds | {"new": new, "past_lengths": lengths, "total_lengths": totals} | self.extra
        )
        self.tokens = out.pop("tokens")
        self.state = {n.removeprefix("present"): a for n, a in out.items()}


def compare(text: str, size: int, splits: list[list[int]], side: str, **made: object) -> None:
    """Append `splits[i]` tokens of row i, one array at a time; rows are stepped together where they can."""
    scheme, random = names.parse(text), np.random.default_rng(0)
    cached = Cached(scheme, side, HEADS, size, CAPACITY)
    constants = Constants(**made)
    oracle = Cache(scheme, size, HEADS, CAPACITY, len(splits), constants)
    rows = [Graph(cached, 1, getattr(constants, f"{side}_step")) for _ in splits[:1]] * len(splits)
    states = [{n: a.copy() for n, a in rows[0].state.items()} for _ in splits]
    for step in range(max(map(len, splits))):
        for row, counts in enumerate(splits):
            if step >= len(counts):
                continue
            x = random.standard_normal((1, HEADS, counts[step], size)).astype(np.float32)
            x *= np.exp(random.standard_normal((1, HEADS, counts[step], 1))).astype(np.float32)
            whole = np.zeros((len(splits), HEADS, counts[step], size), np.float32)
            whole[row] = x[0]
            only = np.where(np.arange(len(splits)) == row, counts[step], 0)
            turned = oracle._turned(side, whole)  # what plain nodes do before the function
            before = oracle.lengths.copy()
            oracle.append(whole, whole, only)
            graph = rows[row]
            graph.state = states[row]
            graph.append(turned[row : row + 1], before[row : row + 1])
            states[row] = graph.state
            check(oracle, states[row], graph.tokens[0], side, row)
    together(cached, oracle, states, side, random, constants)


def together(
    cached: Cached, oracle: Cache, states: list[dict], side: str, random: np.random.Generator, made: Constants
) -> None:
    """One more append to all rows at once, whose lengths differ."""
    room = int(CAPACITY - oracle.lengths.max())
    if not room:
        return
    graph = Graph(cached, len(states), getattr(made, f"{side}_step"))
    graph.state = {n: np.concatenate([s[n] for s in states]) for n in states[0]}
    x = random.standard_normal((len(states), HEADS, room, cached.size)).astype(np.float32)
    before = oracle.lengths.copy()
    oracle.append(x, x)
    graph.append(oracle._turned(side, x), before)
    for row in range(len(states)):
        check(oracle, {n: a[row : row + 1] for n, a in graph.state.items()}, graph.tokens[row], side, row)


def check(oracle: Cache, state: dict, tokens: np.ndarray, side: str, row: int) -> None:
    for name, array in state.items():
        want = oracle.state[f"{side}{name}"][row]
        assert np.isfinite(tokens).all()
        np.testing.assert_array_equal(array[0], want.view(array.dtype), err_msg=f"{side}{name}")
    got = tokens[:, : oracle.lengths[row]]
    np.testing.assert_array_equal(got, oracle.stored(side, row))


SPLITS = [[1] * 20, [20], [3, 9, 1, 2]]


@pytest.mark.parametrize("text", CHANNELS)
@pytest.mark.parametrize("size", [8, 13])
def test_whole_tokens(text, size):
    compare(f"key={text} value={text}", size, SPLITS, "key")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("text", [*CHANNELS, *TOKENS])
def test_windows(text, window):
    compare(f"key={text} value={text} {window}", 8, SPLITS, "value")


@pytest.mark.parametrize("text", TOKENS)
def test_groups_along_tokens(text):
    compare(f"key={text} value={text}", 13, SPLITS, "key")


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_windows_and_splits(data):
    text = data.draw(st.sampled_from([*CHANNELS, *TOKENS]))
    recent, sink = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    splits = data.draw(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=3))
    size = data.draw(st.integers(4, 20))
    side = data.draw(st.sampled_from(["key", "value"]))
    compare(f"key={text} value={text} recent={recent} sink={sink}", size, splits, side)


@pytest.mark.parametrize("window", ["", "recent=3 sink=1"])
@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("element", ["int8", "int4", "e4m3fn"])
def test_static_steps(element, static, window):
    shape = {"tensor": (1, 1, 1), "head": (HEADS, 1, 1), "channel": (HEADS, 1, 9)}[static]
    step = np.random.default_rng(1).uniform(0.01, 0.5, shape).astype(np.float32)
    text = f"key={element}-{static} value=fp16 {window}"
    compare(text, 9, SPLITS, "key", key_step=step)


def test_zeros_extremes_and_ties():
    """Groups of zeros, of equal numbers, of the largest and smallest floats, and codes halfway."""
    for text in (*CHANNELS, "int3-g4-fp16"):
        scheme = names.parse(f"key={text} value={text}")
        x = np.zeros((1, HEADS, 7, 8), np.float32)
        x[0, 0, 1] = 3.5
        x[0, 0, 2] = np.finfo(np.float32).max / 32  # sums of errors stay finite
        x[0, 0, 3] = np.finfo(np.float32).smallest_normal
        x[0, 0, 4] = [7, 0.5, -0.5, 1.5, 2.5, -2.5, -7, 0]
        x[0, 1, 5] = [-0.0, -1e-30, 1e-30, 448, -448, 1, -1, 2**-9]
        x[0, 1, 6] = 1e6 * np.arange(-4, 4)
        if scheme.key.rotate:
            x[0, 0, 2] = 0  # turning it is beyond float32
        oracle = Cache(scheme, 8, HEADS, CAPACITY)
        oracle.append(x, x)
        graph = Graph(Cached(scheme, "key", HEADS, 8, CAPACITY), 1)
        graph.append(oracle._turned("key", x), np.zeros(1, np.int64))
        check(oracle, graph.state, graph.tokens[0], "key", 0)


def test_residual():
    """Signs and codes are the same; what is read has a projection summed in another order in float64, so
    that a float32 may be its neighbour."""
    scheme = names.parse("key=lloyd2-rotate-residual value=lloyd2-fp16-rotate-residual")
    for side in ("key", "value"):
        x = np.random.default_rng(0).standard_normal((1, HEADS, 9, 12)).astype(np.float32)
        oracle = Cache(scheme, 12, HEADS, CAPACITY)
        oracle.append(x, x)
        graph = Graph(Cached(scheme, side, HEADS, 12, CAPACITY), 1)
        graph.append(oracle._turned(side, x), np.zeros(1, np.int64))
        for name, array in graph.state.items():
            np.testing.assert_array_equal(array[0], oracle.state[f"{side}{name}"][0])
        want = oracle.stored(side, 0)
        np.testing.assert_allclose(
            graph.tokens[0][:, :9], want, rtol=0, atol=2 * 2.0**-24 * np.abs(want).max()
        )


@pytest.mark.parametrize("text", ["key=int8 value=int8 recent=4 high=bf16", "key=int8 value=int8 copy=bf16"])
def test_what_a_graph_cannot_hold_is_refused(text):
    with pytest.raises(PassError, match="PORT-0274"):
        Cached(names.parse(text), "key", HEADS, 8, 512)


def test_the_copy_is_the_tokens_themselves():
    compare("key=int8 value=int4-g4 copy=fp32", 8, SPLITS, "value")
    compare("key=int8-g5 value=int4 copy=fp16", 8, SPLITS, "key")

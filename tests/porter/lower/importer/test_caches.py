"""AppendCache and ReadCache lowered, beside ONNX Runtime with their bodies: the same bytes, read packed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import compiled, imported, reference

from porter.errors import TargetError
from porter.kv import parse
from porter.kvgraph.functions import Cached, append_function, read_function

HEADS, SHARED, SIZE, CAPACITY, BATCH = 2, 2, 12, 24, 2
OPSET = 24
TEXTS = [
    "innerq recent=5 sink=3 key=int3-g5-fp16 value=int2-g4-tokens-fp16-hybrid",
    "kivi2 recent=4 key=uint2-g4-tokens-fp16 value=uint4-g4-fp16",
    "key=lloyd2-mixed-rotate-fp16 value=e4m3fn-head",
    "key=lloyd3-fp16-rotate-residual value=lloyd2-mixed-rotate-residual",
    "recent=3 sink=2 key=lloyd1-rotate-residual value=int4",
]


def attending(text: str, used: str = "Attention") -> ir.Model:
    """Append to both sides and attend; or only add what is read to itself."""
    scheme, batch = parse(text), ir.SymbolicDim("b")
    functions, nodes, read, results = [], [], {}, []
    floats, ints = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    given = {n: ir.Value(name=n, type=ints, shape=ir.Shape([batch])) for n in ("past_lengths", "total")}
    given["q"] = ir.Value(name="q", type=floats, shape=ir.Shape([batch, HEADS * SHARED, "s", SIZE]))
    for side in ("key", "value"):
        cached = Cached(scheme, side, HEADS, SIZE, CAPACITY)
        functions += [append_function(cached, OPSET), read_function(cached, OPSET)]
        pasts = []
        for b in cached.buffers:
            kind = ir.TensorType(ir.DataType.from_numpy(b.dtype))
            pasts.append(ir.Value(name=side + b.name, type=kind, shape=ir.Shape([batch, *b.shape[1:]])))
        new = ir.Value(name=f"new_{side}", type=floats, shape=ir.Shape([batch, HEADS, "s", SIZE]))
        given |= {v.name: v for v in (*pasts, new)}
        steps = []
        if cached.side.static:
            step = ir.tensor(np.full((HEADS, 1, 1), 0.01, np.float32), name=f"{side}_step")
            steps = [ir.Value(name=step.name, const_value=step, type=floats, shape=step.shape)]
        write = ir.node(functions[-2].name, [*pasts, new, given["past_lengths"], *steps], cached.attributes,
                        domain="porter", num_outputs=len(pasts))  # fmt: skip
        for out, past in zip(write.outputs, pasts, strict=True):
            out.name, out.type, out.shape = f"present_{past.name}", past.type, past.shape
        nodes += [write, ir.node(functions[-1].name, [*write.outputs, given["total"], *steps],
                                 cached.attributes, domain="porter")]  # fmt: skip
        results += write.outputs
        read[side] = nodes[-1].outputs[0]
        read[side].name, read[side].type = f"all_{side}", floats
        read[side].shape = ir.Shape([batch, HEADS, CAPACITY, SIZE])
        read[side, "steps"] = steps
    if used == "Attention":
        inputs = [given["q"], read["key"], read["value"], None, None, None, given["total"]]
        nodes.append(ir.node("Attention", inputs, {"is_causal": 1}))
    else:
        nodes.append(ir.node(used, [read["key"], read["value"]]))
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", floats
    constants = [*read["key", "steps"], *read["value", "steps"]]
    graph = ir.Graph(list(given.values()), [y, *results], nodes=nodes, initializers=constants,
                     opset_imports={"": OPSET, "porter": 1}, name="caches")  # fmt: skip
    return ir.Model(graph, ir_version=11, functions=functions)


def stepped(source: ir.Model, steps: tuple[int, ...]) -> None:
    """Run both on the same buffers, the reference's of the step before."""
    ours, theirs = compiled(source), reference(source)
    names, rng = [v.name for v in source.graph.outputs], np.random.default_rng(0)
    feeds, lengths = {}, np.array([0, 2])
    for value in source.graph.inputs:
        shape = [d if isinstance(d, int) else {"b": BATCH, "s": 1}[d.value] for d in value.shape]
        feeds[value.name] = np.zeros(shape, value.dtype.numpy())
    for count in steps:
        for name in ("q", "new_key", "new_value"):
            shape = (*feeds[name].shape[:2], count, SIZE)
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
        feeds |= {"past_lengths": lengths, "total": lengths + count}
        got, wanted = (dict(zip(names, run(feeds), strict=True)) for run in (ours, theirs))
        top = np.abs(wanted["y"]).max()
        # Sums of 12 products, exp of them, sums over 24 tokens: ours is held to float64 by itself, and ONNX
        # Runtime adds as much again.
        assert np.abs(got.pop("y") - wanted.pop("y")).max() <= 200 * 2.0**-24 * top
        for name in wanted:
            np.testing.assert_array_equal(got[name].view(np.uint8), wanted[name].view(np.uint8), name)
            feeds[name.removeprefix("present_")] = wanted[name]
        lengths = lengths + count


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_bytes_in_place_and_nothing_is_expanded(text: str) -> None:
    source = attending(text)
    found = imported(source)
    presents = {v.name for v in source.graph.outputs if v.name != "y"}
    assert found.in_place == {name: name.removeprefix("present_") for name in presents}
    kernels = [v.name_hint for v in found.module.get_global_vars()]
    assert not [name for name in kernels if name.startswith("read_")]
    assert len([name for name in kernels if name.startswith("attention_")]) == 1
    stepped(source, (7, 1, 1, 9, 1))


def test_residuals_of_heads_whose_size_is_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their projection is all signs; with a head size of 12 it is not."""
    monkeypatch.setitem(globals(), "SIZE", 16)
    source = attending("key=lloyd2-rotate-residual value=lloyd3-fp16-rotate-residual")
    stepped(source, (7, 1, 1, 9, 1))


@pytest.mark.parametrize("text", [TEXTS[0], "key=lloyd2-rotate-residual value=lloyd3-rotate-residual-fp16"])
def test_another_reader_gets_floats(text: str) -> None:
    source = attending(text, used="Add")
    ours, theirs = compiled(source), reference(source)
    rng, feeds = np.random.default_rng(1), {}
    for value in source.graph.inputs:
        shape = [d if isinstance(d, int) else {"b": BATCH, "s": 20}[d.value] for d in value.shape]
        feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        if value.dtype != ir.DataType.FLOAT:
            feeds[value.name] = np.zeros(shape, value.dtype.numpy())
    feeds["total"] = np.full(BATCH, 20)
    got, wanted = ours(feeds)[0], theirs(feeds)[0]
    # What a residual turns back are 12 products, in any order.
    room = 16 * 2.0**-24 * np.abs(wanted).max() if "residual" in text else 0
    np.testing.assert_allclose(got[:, :, :20], wanted[:, :, :20], rtol=0, atol=room)
    assert not got[:, :, 20:].any()


@pytest.mark.parametrize(
    ("attribute", "text", "code"),
    [
        ("scheme", "key=nothing", "PORT-0423"),
        ("scheme", "int8", "PORT-0423"),
        ("scheme", "fp16", "PORT-0423"),
        ("side", "both", "PORT-0423"),
    ],
)
def test_refused(attribute: str, text: str, code: str) -> None:
    source = attending(TEXTS[0])
    source.graph[0].attributes[attribute] = ir.AttrString(attribute, text)
    with pytest.raises(TargetError, match=code):
        imported(source)

"""A sweep gives what the whole model gives, for one forward pass and bounded memory."""

import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from decoders import empty_cache, tiny_decoder

from porter import decoder as decoders
from porter import graph, nibbles
from porter.calibrate import Sweep, sweep
from porter.context import Feeds
from porter.errors import OptionError, PassError
from porter.run.feeds import empty_caches, feeds
from porter.run.reference import ReferenceRunner

LENGTHS = (9, 1, 17)  # of the feeds; one has a single token


def whole(model: ir.Model, names: Iterable[str], fed: list[Feeds]) -> list[Feeds]:
    """Those values of the whole model, run at once."""
    model = model.clone()
    made = {v.name: v for n in model.graph for v in n.outputs}
    model.graph.outputs[:] = [made[name] for name in names]
    runner = ReferenceRunner(model)
    return [runner.run({n: feed[n] for n in runner.inputs}) for feed in fed]


def multiplied(model: ir.Model) -> list[ir.Value]:
    """What weights multiply, in graph order."""
    found = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            weight = node.inputs[1]
            weight = weight.producer().inputs[0] if weight.producer() is not None else weight
            if weight.is_initializer() and node.inputs[0].producer() is not None:
                found[node.inputs[0]] = None
    return list(found)


def fed_with(model: ir.Model, vocabulary: int, seed: int = 0) -> list[Feeds]:
    random, past = np.random.default_rng(seed), empty_cache(model, 1)
    return [{"input_ids": random.integers(0, vocabulary, (1, n))} | past for n in LENGTHS]


def text(body: str, *functions: ir.Function) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 24, "porter" : 1]> {body}')
    model.functions.update({f.identifier(): f for f in functions})
    return model


def mapped(array: np.ndarray) -> bool:
    return isinstance(array.base, np.memmap)


def same(got: Iterable[np.ndarray], wanted: list[Feeds], name: str) -> None:
    for array, want in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(array, want[name], strict=True)


# ------------------------------------------------------------------ what it gives

FORMS = {
    "fused": {},
    "apart": {"fused": False, "tied": False},
    "table": {"positions": "table"},
    "sliced": {"positions": "sliced", "layers": 3},
    "learned": {"positions": "learned"},
}


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("form", FORMS)
def test_every_multiplied_value_is_that_of_the_whole_model(form: str, typed: bool) -> None:
    model = tiny_decoder(**FORMS[form])
    if not typed:
        for value in (v for n in model.graph for v in n.outputs):
            value.type = value.shape = None
    fed = fed_with(model, 61)
    sweep_, values = Sweep(model, fed), multiplied(model)
    assert len(values) > 4 * FORMS[form].get("layers", 2)
    for value in values:
        same(sweep_.advance(value), whole(model, [value.name], fed), value.name)


def test_an_exported_model(stories_onnx: Path) -> None:
    model = graph.load(stories_onnx)
    interface, runner = decoders.recognise(model), ReferenceRunner(stories_onnx)
    random, past = np.random.default_rng(0), empty_caches(interface, runner.inputs, 1)
    fed = [feeds(interface, random.integers(0, 512, (1, n)), 0, past, runner.inputs) for n in LENGTHS]
    values, sweep_ = multiplied(model), Sweep(model, fed)
    assert len(values) == 4 * 5 + 1
    for value in values:
        same(sweep_.advance(value), whole(model, [value.name], fed), value.name)


def test_an_encoder_without_cache(tiny: object) -> None:
    model = tiny(past=None, positions="position_ids", mask="attention_mask", output="last_hidden_state")
    fed = [
        {
            "input_ids": np.arange(n)[None] % 11,
            "position_ids": np.arange(n)[None],
            "attention_mask": np.ones((1, n), np.int64),
        }
        for n in (5, 2)
    ]
    sweep_, values = Sweep(model, fed), multiplied(model)
    assert [v.name for v in values] == ["x", "y"]
    for value in [*values, model.graph.outputs[0]]:
        same(sweep_.advance(value), whole(model, [value.name], fed), value.name)


def test_a_cache_with_tokens_and_other_batches() -> None:
    model = tiny_decoder()
    random = np.random.default_rng(1)
    fed = [
        {"input_ids": random.integers(0, 61, (batch, 3))} | empty_cache(model, batch, past, seed=batch)
        for batch, past in ((1, 0), (3, 5), (2, 1))
    ]
    sweep_ = Sweep(model, fed)
    for value in multiplied(model):
        same(sweep_.advance(value), whole(model, [value.name], fed), value.name)


def test_functions_of_the_model_run() -> None:
    model = text(
        """g (float[n,4] x) => (float[n,2] y) <float s = {0.5}, float[4,2] w = {1,0, 2,1, 0,3, -1,1}> {
            scaled = Mul(x, s)
            small = Cast<to = 3>(scaled)
            packed = porter.PackInt4(small)
            again = porter.UnpackInt4(packed)
            wide = Cast<to = 1>(again)
            y = MatMul(wide, w)
        }"""
    )
    nibbles.add_functions(model)
    fed = [{"x": np.arange(-4 * n, 4 * n, 2, np.float32).reshape(-1, 4)} for n in (1, 2)]
    names = ["small", "packed", "wide", "y"]
    made = {v.name: v for n in model.graph for v in n.outputs}
    sweep_ = Sweep(model, fed)
    for name in names:
        same(sweep_.advance(made[name]), whole(model, [name], fed), name)


def test_a_graph_in_a_node_reads_from_outside() -> None:
    model = text(
        """g (float[n] x, bool c) => (float[n] y) <float w = {3.0}> {
            a = Mul(x, w)
            b = Add(a, x)
            d = Neg(b)
            z = If (c) <then_branch = t () => (float[n] p) { p = Mul(a, w) },
                        else_branch = e () => (float[n] q) { q = Identity(b) }>
            s = Add(z, d)
            y = Mul(s, w)
        }"""
    )
    fed = [{"x": np.arange(3, dtype=np.float32) + 1, "c": np.array(c)} for c in (True, False)]
    made = {v.name: v for n in model.graph for v in n.outputs}
    sweep_ = Sweep(model, fed)
    for name in ("b", "d", "z", "y"):  # a is read again, inside z alone
        same(sweep_.advance(made[name]), whole(model, [name], fed), name)


# ------------------------------------------------------------------ edits, looking ahead, errors


def double(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name=name)


def test_edits_between_advances_take_effect_and_what_ran_is_not_run_again() -> None:
    model = tiny_decoder(tied=False)
    fed, values = fed_with(model, 61), multiplied(model)
    sweep_, before = Sweep(model, fed), whole(model, [v.name for v in values], fed)
    same(sweep_.advance(values[2]), before, values[2].name)
    late = model.clone()  # with all edits but the one that comes too late
    for edited in (model, late):
        double(edited, "model.layers.0.mlp.gate_proj+model.layers.0.mlp.up_proj.weight")
        double(edited, "model.layers.1.self_attn.o_proj.weight")
    double(model, "model.embed_tokens.weight")
    after = whole(late, [v.name for v in values], fed)
    for value in values[3:]:
        same(sweep_.advance(value), after, value.name)
        assert not np.array_equal(after[0][value.name], before[0][value.name])


def test_a_weight_that_becomes_nodes_is_read_in_its_new_form() -> None:
    model = tiny_decoder(tied=False, fused=False)
    fed, values = fed_with(model, 61), multiplied(model)
    sweep_ = Sweep(model, fed)
    list(sweep_.advance(values[0]))
    weight = model.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
    reader = weight.uses()[0].node
    codes = np.clip(np.rint(weight.const_value.numpy() * 100), -128, 127).astype(np.int8)
    scale = ir.val("scale", const_value=ir.tensor(np.float32(0.01), name="scale"))
    model.graph.register_initializer(scale)
    weight.const_value = ir.tensor(codes, name=weight.name)
    weight.type = ir.TensorType(ir.DataType.INT8)
    node = ir.node("DequantizeLinear", [weight, scale])
    node.outputs[0].name = "floats"
    model.graph.insert_before(reader, node)
    reader.replace_input_with(0, node.outputs[0])
    for value in values[1:]:
        same(sweep_.advance(value), whole(model, [value.name], fed), value.name)


def test_a_dequantized_table_that_two_layers_share_is_not_kept() -> None:
    model = text(
        """g (int64[n] x) => (float[n,4] y) <int8[4,2] w = {1,2,3,4,5,6,7,8}, float s = {0.5}> {
            table = DequantizeLinear(w, s)
            a = Gather(table, x)
            b = Neg(a)
            turned = Transpose(table)
            y = MatMul(b, turned)
        }"""
    )
    fed = [{"x": np.array([3, 0, 1])}]
    sweep_ = Sweep(model, fed)
    made = {v.name: v for n in model.graph for v in n.outputs}
    list(sweep_.advance(made["b"]))
    model.graph.initializers["s"].const_value = ir.tensor(np.float32(2), name="s")
    [y] = sweep_.advance(made["y"])
    table = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(y, -(table[[3, 0, 1]] / 2) @ (2 * table).T)


def test_peeking_runs_ahead_and_leaves_everything_editable() -> None:
    model = tiny_decoder(tied=False)
    fed, values = fed_with(model, 61), multiplied(model)
    names = [v.name for v in values]
    sweep_, before = Sweep(model, fed), whole(model, names, fed)
    list(sweep_.advance(values[0]))
    for _ in range(2):
        for arrays, want in zip(sweep_.peek(values[:4]), before, strict=True):
            for array, name in zip(arrays, names[:4], strict=True):
                np.testing.assert_array_equal(array, want[name], strict=True)
    double(model, "model.layers.0.self_attn.o_proj.weight")
    after = whole(model, names, fed)
    assert not np.array_equal(after[0][names[2]], before[0][names[2]])
    for value in values:
        same(sweep_.advance(value), after, value.name)


def test_a_value_that_was_run_past_is_refused() -> None:
    model = tiny_decoder()
    sweep_, values = Sweep(model, fed_with(model, 61)), multiplied(model)
    list(sweep_.advance(values[3]))
    with pytest.raises(PassError, match="run past") as caught:
        sweep_.advance(values[1])
    assert caught.value.code == "PORT-0291"
    weight = model.graph.initializers["model.norm.weight"]
    turned = next(
        n.outputs[0] for n in model.graph if n.op_type == "Transpose" and n.inputs[0].is_initializer()
    )
    for value in (weight, turned):
        with pytest.raises(PassError, match="no input reaches") as caught:
            sweep_.peek([value])
        assert caught.value.code == "PORT-0291"


def test_feeds_that_are_missing_or_do_not_fit_are_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(OptionError, match="nothing to calibrate on") as caught:
        Sweep(model, [])
    assert caught.value.code == "PORT-0290"
    fed = fed_with(model, 61)
    del fed[1]["past_key_values.1.value"]
    with pytest.raises(OptionError, match=r"feed 1 .*past_key_values\.1\.value") as caught:
        Sweep(model, fed)
    assert caught.value.code == "PORT-0293"


# ------------------------------------------------------------------ what it costs


def test_every_node_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass in all: only what depends on no input may be computed twice."""
    model = tiny_decoder(layers=4)
    ran: list[str] = []

    class Counting(ReferenceRunner):
        def __init__(self, piece: ir.Model, *, briefly: bool = False) -> None:
            ran.extend(n.outputs[0].name for n in piece.graph)
            super().__init__(piece, briefly=briefly)

    monkeypatch.setattr(sweep, "ReferenceRunner", Counting)
    sweep_ = Sweep(model, fed_with(model, 61))
    for value in multiplied(model):
        list(sweep_.advance(value))
    constant = {n.outputs[0].name for n in model.graph if n.inputs and n.inputs[0].is_initializer()}
    moving = [name for name in ran if name not in constant - {"gather_1"}]
    assert len(moving) == len(set(moving)) > 60


def test_only_the_weights_of_a_piece_are_read() -> None:
    model, read = tiny_decoder(tied=False), []

    def lazy(name: str, tensor: ir.TensorProtocol) -> ir.LazyTensor:
        def compute() -> ir.TensorProtocol:
            read.append(name)
            return tensor

        return ir.LazyTensor(compute, dtype=tensor.dtype, shape=tensor.shape, name=name)

    for name, value in model.graph.initializers.items():
        if name.endswith("proj.weight"):
            value.const_value = lazy(name, value.const_value)
    sweep_, values = Sweep(model, fed_with(model, 61)), multiplied(model)
    seen = []
    for value in values[:4]:
        list(sweep_.advance(value))
        seen.append({name.rpartition(".layers.")[2] for name in read})
        read.clear()
    assert seen == [
        set(),
        {"0.self_attn.v_proj.weight"},
        {"0.self_attn.o_proj.weight"},
        {"0.mlp.up_proj.weight"},
    ]


def test_what_does_not_fit_memory_is_mapped_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bound = 32 * 1024
    monkeypatch.setattr(sweep, "MEMORY", bound)
    model, random = (
        tiny_decoder(hidden=64, heads=8, kv_heads=2, layers=2, context=256),
        np.random.default_rng(0),
    )
    fed = [
        {"input_ids": random.integers(0, 61, (1, 96))} | empty_cache(model, 1) for _ in range(40)
    ]  # 40 times 96 tokens of 64 floats: 960 KiB for each value
    values = multiplied(model)
    wanted = whole(model, [v.name for v in values], fed[:2])
    sweep_ = Sweep(model, fed, tmp_path)
    list(sweep_.advance(values[0]))
    tracemalloc.start()
    for value in values[1:]:
        arrays = sweep_.advance(value)
        same([next(arrays), next(arrays)], wanted, value.name)
        kept = sweep_._frontier._kept.values()
        held = sum(a.nbytes for k in kept for a in k.arrays if a.nbytes > sweep.SMALL and not mapped(a))
        assert held == sum(k.held for k in kept) <= bound
        assert held or value is not values[1]
        del arrays
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The frontier in memory, one feed's activations (7 values of 24 KiB or less for each kept one), and the
    # model's own bytes, 0.4 MB as protobuf and as session: far from the 2 MB that two values' arrays have.
    assert peak < bound + 1_000_000, peak
    assert list(tmp_path.iterdir()) == [], "the files have no names, so nothing is left behind"


def test_an_output_that_nothing_else_needs_holds_nothing() -> None:
    model = text(
        """g (float[n,2] x) => (float[n,2] y, float16[n,2] cache) <float[2,2] w = {1,2,3,4}> {
            k = MatMul(x, w)
            cache = Cast<to = 10>(k)
            z = Neg(k)
            y = MatMul(z, w)
        }"""
    )
    sweep_ = Sweep(model, [{"x": np.ones((3, 2), np.float32)}])
    made = {v.name: v for n in model.graph for v in n.outputs}
    list(sweep_.advance(made["z"]))
    assert set(sweep_._frontier._kept) == {made["z"]}
    list(sweep_.advance(made["y"]))
    with pytest.raises(PassError, match="run past"):
        sweep_.advance(made["cache"])

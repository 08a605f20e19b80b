"""Models that other tools quantized, through the host's pipeline and its lowering, beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import foreign
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)

from porter import graph, target
from porter.context import Context
from porter.decoder import recognise
from porter.inspect import inspect
from porter.lower.lower import lower
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline
from porter.run.decode import Decode
from porter.run.host import HostRunner
from porter.run.reference import ReferenceRunner

STEPS = (5, 1, 1, 3)


def logits(runner: object, model: ir.Model, batch: int = 1) -> np.ndarray:
    """What a model says to a prompt, two tokens, and three at once: [batch, tokens, vocabulary]."""
    session = Decode(runner, recognise(model), batch)
    random = np.random.default_rng(0)
    return np.concatenate([session.step(random.integers(0, 61, (batch, n))) for n in STEPS], axis=1)


def ported(path: Path) -> ir.Model:
    """The model of a file after the host's passes."""
    model = graph.load(path)
    Pipeline.parse(pipeline_text(target.load("host"), Options())).run(model, Context(target.load("host")))
    return model


def lowered(model: ir.Model, folder: Path) -> HostRunner:
    found = recognise(model)
    shapes = {v.name: v.shape for v in model.graph.inputs}
    bounds = {str(d.value): n for d, n in zip(shapes[found.tokens], (4, 8), strict=True)}
    if found.cache == "concat":
        bounds[str(shapes[found.caches[0].past][2].value)] = 64
    folder.mkdir()
    lower(model, target.load("host"), folder, bounds)
    return HostRunner(folder)


def check(source: ir.Model, folder: Path, terms: int, batch: int = 1) -> ir.Model:
    """The passes' result and the lowered program say what ONNX Runtime makes of the source.

    `terms`: how many roundings of 2^-24, of numbers of the size of the logits, may lie between them.
    """
    path = folder / "source.onnx"
    graph.save(source, path)
    wanted = logits(ReferenceRunner(path), graph.load(path), batch)
    model = ported(path)
    assert all(node.domain in ("", "porter") for node in model.graph)
    runners = {"passes": ReferenceRunner(model), "lowered": lowered(model, folder / "lib")}
    assert runners["passes"].engine == "onnxruntime"
    for name, runner in runners.items():
        found = logits(runner, model, batch)
        assert np.abs(found - wanted).max() <= terms * 2.0**-24 * np.abs(wanted).max(), name
    return model


GENAI = {
    "growing": {},
    "shared buffers": {"past": "shared"},
    "lengths as inputs": {"past": "told"},
    "separate projections": {"packed": False},
    "rotation outside": {"rotary": "outside"},
    "8 bits": {"bits": 8},
    "2 bits": {"bits": 2},
    "2 bits, zero points": {"bits": 2, "zeros": True},
    "float": {"bits": 0},
    "zero points": {"zeros": True},
    "tied": {"tied": True},
    "tied, zero points": {"tied": True, "zeros": True},
    "window": {"window": 4},
    "ragged blocks": {"ffn": 72},
}


@pytest.mark.parametrize("name", GENAI)
def test_a_decoder_of_the_genai_builder(name: str, tmp_path: Path) -> None:
    # Two layers of sums over at most 80 products, in another order: some hundred roundings each.
    model = check(foreign.genai_decoder(**GENAI[name]), tmp_path, 1000)
    found = recognise(model)
    assert found.cache == "static"
    assert found.others == ()
    assert not found.mask


# ------------------------------------------------------------------ ONNX Runtime's own quantizers


class Reader(CalibrationDataReader):
    """Some prompts, and a token after them."""

    def __init__(self, model: ir.Model) -> None:
        random, size = np.random.default_rng(1), foreign.Size()
        self.feeds = iter(
            {
                "input_ids": random.integers(0, size.vocab, (1, count)),
                "attention_mask": np.ones((1, past + count), np.int64),
                **{
                    v.name: random.standard_normal((1, size.kv_heads, past, size.head_size)).astype(
                        np.float32
                    )
                    for v in model.graph.inputs
                    if v.name.startswith("past")
                },
            }
            for past, count in ((0, 7), (5, 1), (9, 1))
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feeds."""
        return next(self.feeds, None)


def static(source: Path, out: Path, **options: object) -> None:
    reader = Reader(graph.load(source))
    quantize_static(source, out, reader, quant_format=QuantFormat.QDQ, **options)


def n_bits(source: Path, out: Path, **options: object) -> None:
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(source), algo_config=matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(**options)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def dynamic(source: Path, out: Path, **options: object) -> None:
    # Its own shape inference stops at what is not standard.
    quantize_dynamic(source, out, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT}, **options)


U8, S8 = QuantType.QUInt8, QuantType.QInt8
TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "static uint8, int8 weights": partial(static, activation_type=U8, weight_type=S8),
    "static int8, per channel": partial(static, activation_type=S8, weight_type=S8, per_channel=True),
    "static uint8, uint8 weights": partial(static, activation_type=U8, weight_type=U8),
    "static int16": partial(static, activation_type=QuantType.QInt16, weight_type=S8),
    "dynamic int8": partial(dynamic, weight_type=S8),
    "dynamic int8 per channel": partial(dynamic, weight_type=S8, per_channel=True),
    "dynamic uint8": partial(dynamic, weight_type=U8),
    "operators, symmetric": partial(n_bits, block_size=16, is_symmetric=True),
    "operators, asymmetric": partial(n_bits, block_size=32, is_symmetric=False),
    "operators, 8 bits": partial(n_bits, block_size=32, is_symmetric=True, bits=8),
    "QDQ, symmetric": partial(n_bits, block_size=16, is_symmetric=True, quant_format=QuantFormat.QDQ),
    "QDQ, asymmetric": partial(n_bits, block_size=32, is_symmetric=False, quant_format=QuantFormat.QDQ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_what_onnx_runtimes_quantizers_make(name: str, tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
    graph.save(foreign.genai_decoder(bits=0), plain)
    TOOLS[name](plain, quantized)
    check(graph.load(quantized), tmp_path, 1000)


def test_activations_that_a_kernel_rounds_are_not_rounded(tmp_path: Path) -> None:
    """accuracy_level=4 asks ONNX Runtime's kernel for int8 activations, which is not what the model means."""
    plain, quantized = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
    graph.save(foreign.genai_decoder(bits=0), plain)
    n_bits(plain, quantized, block_size=32, is_symmetric=True, accuracy_level=4)
    (tmp_path / "asked").mkdir()
    # Half a step of 1/127 of the largest in each block, in each of nine products one after another.
    check(graph.load(quantized), tmp_path / "asked", int(9 / 254 * 2**24))
    meant = graph.load(quantized)
    for node in meant.graph:
        node.attributes.pop("accuracy_level", None)
    check(meant, tmp_path, 1000)


# ------------------------------------------------------------------ what ModelOpt writes


def rewritten(change: Callable[[ir.Node, np.ndarray], list[ir.Node]]) -> ir.Model:
    """A decoder whose MatMul by a weight [K, N] become what `change` makes of node and weight."""
    model = foreign.genai_decoder(bits=0)
    for node in [n for n in model.graph if n.op_type == "MatMul"]:
        made = change(node, node.inputs[1].const_value.numpy())
        old, new = node.outputs[0], made[-1].outputs[0]
        for i, each in enumerate(made):
            each.outputs[0].name = f"{old.name}_{i}"
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [old], [new])
    for node in model.graph:
        for value in (v for v in node.inputs if v is not None and v.const_value is not None):
            if value.name not in model.graph.initializers:
                model.graph.register_initializer(value)
    return model


def constant(node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    name = f"{node.name}.{name}"
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def awq(node: ir.Node, weight: np.ndarray, block: int = 16) -> list[ir.Node]:
    """int4 blocks along K of W * s, and the product of x and 1 / s."""
    smooth = np.random.default_rng(2).random(len(weight)).astype(np.float32) + 0.5
    scaled = (weight * smooth[:, None]).reshape(-1, block, weight.shape[1])
    scale = np.abs(scaled).max(1) / 7
    codes = np.round(scaled / scale[:, None]).reshape(weight.shape).astype(ml_dtypes.int4)
    x = ir.node("Mul", [node.inputs[0], constant(node, "pre_quant_scale", 1 / smooth)])
    placed = {"axis": 0, "block_size": block}
    w = ir.node("DequantizeLinear", [constant(node, "w", codes), constant(node, "s", scale)], placed)
    return [x, w, ir.node("MatMul", [x.outputs[0], w.outputs[0]])]


def fp8(node: ir.Node, weight: np.ndarray) -> list[ir.Node]:
    """x and W through e4m3fn, with a scale for each tensor and zero points of 0."""
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    scale = np.float32(np.abs(weight).max() / 448)
    codes = constant(node, "w", (weight / scale).astype(ml_dtypes.float8_e4m3fn))
    at = [constant(node, "xs", np.array(0.02, np.float32)), constant(node, "xz", zero)]
    x = ir.node("QuantizeLinear", [node.inputs[0], *at])
    back = ir.node("DequantizeLinear", [x.outputs[0], *at])
    of = [constant(node, "ws", np.array(scale)), constant(node, "wz", zero)]
    w = ir.node("DequantizeLinear", [codes, *of])
    return [x, back, w, ir.node("MatMul", [back.outputs[0], w.outputs[0]])]


def int8(node: ir.Node, weight: np.ndarray) -> list[ir.Node]:
    """x by one scale, W by one for each output channel, no zero points."""
    scale = np.abs(weight).max(0) / 127
    codes = constant(node, "w", np.round(weight / scale).astype(np.int8))
    at = [constant(node, "xs", np.array(0.03, np.float32)), constant(node, "xz", np.zeros((), np.int8))]
    x = ir.node("QuantizeLinear", [node.inputs[0], *at])
    back = ir.node("DequantizeLinear", [x.outputs[0], *at])
    of = [constant(node, "ws", scale), constant(node, "wz", np.zeros(len(scale), np.int8))]
    w = ir.node("DequantizeLinear", [codes, *of], {"axis": 1})
    return [x, back, w, ir.node("MatMul", [back.outputs[0], w.outputs[0]])]


@pytest.mark.parametrize("change", [awq, fp8, int8], ids=lambda f: f.__name__)
def test_what_modelopt_makes(change: Callable, tmp_path: Path) -> None:
    # A value on the border of two codes would fall to either side by such roundings; none of these does.
    model = check(rewritten(change), tmp_path, 1000)
    stored = {n.inputs[0].dtype.name for n in model.graph if n.op_type == "DequantizeLinear"}
    assert stored & {"INT4", "INT8", "FLOAT8E4M3FN"}


# ------------------------------------------------------------------ an encoder that was optimized


def test_an_encoder_of_fused_operators(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    graph.save(foreign.fused_encoder(), path)
    model, random = ported(path), np.random.default_rng(0)
    assert all(not node.domain for node in model.graph)
    feeds = {n: random.integers(0, 2, (2, 7)) for n in ("token_type_ids", "attention_mask")}
    feeds |= {"input_ids": random.integers(0, 61, (2, 7))}
    feeds["attention_mask"][:, 0] = 1
    feeds = {n: a.astype(np.int32) for n, a in feeds.items()}
    (wanted,) = ReferenceRunner(path).run(feeds).values()
    for runner in (ReferenceRunner(model), lowered(model, tmp_path / "lib")):
        (found,) = runner.run(feeds).values()
        assert np.abs(found - wanted).max() <= 1000 * 2.0**-24 * np.abs(wanted).max()


# ------------------------------------------------------------------ inspect, recognise


def test_inspect_says_what_quantized_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph.save(foreign.genai_decoder(tied=True), path)
    found = inspect(path)["quantized_by"]
    assert found == [
        "MatMulNBits 4-bit block 32, 11 weights",
        "GatherBlockQuantized 4-bit block 32, 1 weight",
    ]
    graph.save(rewritten(int8), path)
    found = inspect(path)["quantized_by"]
    assert found == [
        "DequantizeLinear int8 per channel, 11 weights",
        "QuantizeLinear to int8, 11 activations",
    ]
    graph.save(foreign.genai_decoder(bits=0), path)
    assert inspect(path)["quantized_by"] == []


def test_the_interfaces_of_grouped_query_attention() -> None:
    found = recognise(foreign.genai_decoder())
    assert (found.cache, found.capacity, found.mask, found.others) == ("concat", 0, "attention_mask", ())
    found = recognise(foreign.genai_decoder(past="shared"))
    assert (found.cache, found.capacity, found.mask) == ("static", 64, "attention_mask")
    found = recognise(foreign.genai_decoder(past="told"))
    assert (found.last, found.total, found.others) == ("seqlens_k", "total_sequence_length", ())

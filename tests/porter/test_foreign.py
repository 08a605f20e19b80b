"""Models that other tools quantized, through the host's pipeline and its lowering, beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import foreign
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
from porter.convert import Options, pipeline_text
from porter.decoder import recognise
from porter.lower.lower import lower
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
    assert found.cache == ("concat" if "window" in name else "static")
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
                    v.name: random.standard_normal((1, size.kv_heads, past, size.head_size)).astype(np.float32)
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

"""Models that other tools quantized, through the host's pipeline and its lowering, beside ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import decoders
import foreign
import numpy as np
import onnx_ir as ir
import pytest

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

"""A trained decoder on each target's numerics, against a Llama in numpy with the same roundings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama import Llama, Numerics

from porter import convert, decoder, graph, target
from porter.context import Context
from porter.lower.lower import lower
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline
from porter.run.decode import Decode
from porter.run.host import HostRunner

CASES = {
    ("maia-200", ""): Numerics("bf16"),
    ("h100", ""): Numerics("tf32"),
    ("trainium2", ""): Numerics("fp32"),
    ("webgpu", "int4"): Numerics("fp32", "int4-g32", "fp32"),
    ("h100", "int4"): Numerics("tf32", "int4-g32", "bf16"),
    ("tpu-v6e", "fp8"): Numerics("bf16", "fp8-e4m3b11fnuz", "bf16", flush=True),
    ("trainium2", "fp8"): Numerics("fp32", "fp8-e4m3", "bf16"),
    ("a100", "int8"): Numerics("tf32", "int8", "bf16"),
}
"""By target and --weights: what its .toml comes to."""


@pytest.fixture(scope="module")
def llama() -> Llama:
    """The checkpoint that `stories_onnx` was exported from."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra porter[export]")
    folder = Path(__file__).parents[3] / "samples" / "stories260k"
    return Llama(safetensors.load_file(folder / "model.safetensors"), heads=8, kv_heads=4, layers=5)


def ported(source: Path, folder: Path, name: str, weights: str) -> tuple[Decode, list]:
    """The decoder on a target, three rows of it; and the placement."""
    spec = target.load(name)
    model = graph.load(source)
    pipeline = Pipeline.parse(pipeline_text(spec, Options(target=name, weights=weights)))
    pipeline.run(model, Context(spec, {}, 0))
    found = decoder.recognise(model)
    plan = lower(model, spec, folder, convert._bounds(model, found))
    return Decode(HostRunner(folder), found, 3), plan.placement


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_logits_are_those_of_the_same_roundings(
    stories_onnx: Path, tmp_path: Path, llama: Llama, name: str, weights: str
) -> None:
    how = CASES[name, weights]
    session, _ = ported(stories_onnx, tmp_path, name, weights)
    tokens = np.random.default_rng(0).integers(3, 512, (3, 21))
    got = np.concatenate(
        [session.step(tokens[:, :13]), *(session.step(tokens[:, i : i + 1]) for i in range(13, 21))], 1
    )
    wanted = llama.logits(tokens, how)
    plain = llama.logits(tokens, Numerics("fp32", how.weights, "fp32"))
    if {how.floats, how.codes} == {"fp32"}:
        # 100 float32 roundings of the largest logit, about 16: what the host is held to.
        assert np.abs(got - wanted).max() < 100 * 2.0**-24 * 16
        return
    # Sums in float32 stray from those in float64, so that now and then an operand next to a tie rounds to the
    # other side, by a whole step of its format; what comes after it in that row differs then, and rounds
    # elsewhere too. Positions before the first of those agree as float32 does: every tenth at least (seen:
    # 70 % in bfloat16, 18 % in TF32, whose ties are denser). Two runs with unrelated roundings differ by
    # sqrt(2) of what the roundings do to the logits: the whole keeps within half of that.
    parts = np.sqrt(np.mean((got - wanted) ** 2, -1) / np.mean((plain - wanted) ** 2, -1))
    assert np.quantile(parts, 0.1) < 1e-3
    assert rms(got - wanted) < rms(plain - wanted) / np.sqrt(2)

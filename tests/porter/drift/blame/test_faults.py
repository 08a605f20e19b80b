"""Planted faults are named first; a port without one is not blamed."""

from __future__ import annotations

from pathlib import Path

import blamed
import faults
import numpy as np
import pytest

from porter.blame import cut, steps_of
from porter.drift.blame import repro
from porter.drift.blame.blame import blame
from porter.drift.blame.replay import replay

DECODERS = ("babyllama-char-1m", "bitllama-3m", "pycode-5m", "stories260k")
# Enough for a prefill, a second piece on top of it, and single steps.
STEPS = cut(np.random.default_rng(5).integers(3, 500, (2, 24)), whole=False)


@pytest.mark.parametrize("fault", ["one scale", "stale slot"])
def test_a_fault_in_the_graph_is_named_first(fault: str, stories_onnx: Path) -> None:
    outcome = blamed.planted(stories_onnx, fault, STEPS, top=1)
    assert outcome.named, outcome.line
    assert outcome.spikes == 1
    first = outcome.stage.suspects[0].site
    assert first.module.startswith("model.layers.2.")


def test_a_fault_of_a_kernel_is_named_and_its_repro_shows_it(stories_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    outcome = blamed.planted_lowered(stories_onnx, faults.ACCUMULATOR, STEPS, folder, top=1)
    assert outcome.named, outcome.line
    assert outcome.spikes == 1
    first = outcome.stage.suspects[0]
    assert first.site.kernel.startswith("matmul_int4")
    # bfloat16 has 8 bits: 172 sums lose some 40 dB more than none, and nothing is left of float32's 144 dB.
    assert 20 < first.local_db < 60
    assert first.share > 0.9
    sides = outcome.reference, outcome.candidate
    repro.write(tmp_path / "repro", first, outcome.stage, *sides, STEPS)
    found = replay(tmp_path / "repro")
    assert found["onnx"] > 120
    assert found["kernel"] == pytest.approx(min(first.steps_db), abs=0.5)


@pytest.mark.long
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_every_fault_in_every_decoder(fault: str, name: str, exported: dict[str, Path]) -> None:
    outcome = blamed.planted(exported[name], fault, _steps(exported[name]))
    assert outcome.named, outcome.line


@pytest.mark.long
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("fault", [faults.ACCUMULATOR, "stale slot", "causal offset", "epsilon"])
def test_faults_of_the_lowered_program_in_every_decoder(
    fault: str, name: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    outcome = blamed.planted_lowered(exported[name], fault, _steps(exported[name]), tmp_path)
    assert outcome.named, outcome.line


@pytest.mark.long
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("port", ["int4", "fp8"])
def test_no_blame_without_a_fault(name: str, port: str, exported: dict[str, Path]) -> None:
    source, model = blamed.ported(exported[name], port)
    a, b = blamed.side("source", source), blamed.side("port", model)
    for seed in range(20):
        stage = blame("passes", a, b, steps_of(exported[name], "", seed, 4)[0], 0)
        assert [s for s in stage.suspects if s.kind == "spike"] == [], seed


def _steps(path: Path) -> list[np.ndarray]:
    return steps_of(path, "", 0, 4)[0]

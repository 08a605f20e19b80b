"""A trained model with a certified cache, from conversion to running: what is computed, what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from porter.convert import Options, convert
from porter.diff import diff
from porter.drift.measure import Runnable
from porter.generate import stream
from porter.report.report import DriftReport
from porter.report.terminal import render

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text())
TEXT = "Once upon a time there was a small dog who liked to run in the park with his friends. "


@pytest.fixture(scope="module")
def converted(stories_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DriftReport]:
    """Texts of different lengths, so that some are padded."""
    folder = tmp_path_factory.mktemp("certified")
    (folder / "texts.json").write_text(json.dumps([TEXT * 3, TEXT * 2, TEXT]))
    options = Options(kv="certified tolerance=1.0", context=128, data=str(folder / "texts.json"))
    return folder / "out", convert(stories_onnx, folder / "out", options)


def test_the_report_says_how_often_the_copy_was_read(converted: tuple[Path, DriftReport]) -> None:
    folder, report = converted
    found = json.loads((folder / "report.json").read_text())
    jsonschema.validate(found, SCHEMA)
    steps = report.feeds["tokens"] * 5 * 8  # layers, heads; padding does not count
    assert {name: r["steps"] for name, r in found["recomputed"].items()} == {"passes": steps, "total": steps}
    passes, total = (found["recomputed"][name] for name in ("passes", "total"))
    # A bound at the edge may fall either way in two programs that sum in other orders, and a key that lies
    # between two codes be rounded differently, after which a layer's figures differ by a step.
    assert 0.05 * steps < total["exact"] < 0.95 * steps
    assert abs(passes["exact"] - total["exact"]) <= 0.002 * steps
    assert total["share"] == total["exact"] / steps
    assert total["kind"] == "measured"
    text = f"total {100 * total['share']:.4g} % of {steps:,} head-steps"
    assert text in (folder / "report.html").read_text()
    lines = [str(part) for part in render(report).renderables]
    assert any(text in line and "(measured)" in line for line in lines)


def test_bits_are_those_held_and_those_read(converted: tuple[Path, DriftReport]) -> None:
    """8 channels: codes of 8 and 4 bits, a step of 32 a token each, and the copy."""
    memory = converted[1].memory
    assert memory["KV cache, scales and windows included"].value == pytest.approx(42)
    assert memory["KV cache, read without its exact copy"].value == pytest.approx(10)


def test_what_the_codes_do_to_each_head_is_measured(converted: tuple[Path, DriftReport]) -> None:
    found = converted[1].attention
    assert {(h.layer, h.head) for h in found} == {(i, j) for i in range(5) for j in range(8)}
    assert all(0 < h.tv < 0.3 and h.cosine > 0.9 for h in found)


def test_a_run_says_it_too(converted: tuple[Path, DriftReport], stories_onnx: Path) -> None:
    made = stream(Runnable.of(converted[0]), "Once upon a time", None, 20, {"temperature": 0}, None)
    fed = len(made.prompt) + 19  # the last token is not fed
    assert made.recomputed.steps == fed * 5 * 8
    assert 0 < made.recomputed.exact < made.recomputed.steps
    assert made.to_dict()["recomputed"] == {"steps": fed * 40, "exact": made.recomputed.exact}
    assert f"of {fed * 40:,} head-steps (measured)" in made.summary()
    plain = stream(Runnable.of(stories_onnx), "Once upon a time", None, 3, {"temperature": 0}, None)
    assert plain.recomputed is None
    assert "head-steps" not in plain.summary()


def test_a_comparison_of_bundles_says_it_too(converted: tuple[Path, DriftReport], stories_onnx: Path) -> None:
    report = diff(stories_onnx, converted[0], data="random")
    assert set(report.recomputed) == {"total"}
    assert report.recomputed["total"].steps == report.feeds["tokens"] * 40


def test_without_tolerance_logits_are_those_of_the_source(stories_onnx: Path, tmp_path: Path) -> None:
    """All attention is exact, up to float32 (see test_convert)."""
    options = Options(kv="certified tolerance=0", context=64, data="random", decode=1)
    report = convert(stories_onnx, tmp_path / "out", options)
    assert {t.share for t in report.recomputed.values()} == {1.0}
    reference, port = Runnable.of(stories_onnx), Runnable.of(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(3, 512, (3, 40))
    np.testing.assert_allclose(
        port.session(3).step(tokens), reference.session(3).step(tokens), rtol=0, atol=1e-4
    )

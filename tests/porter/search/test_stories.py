"""--weights auto on a trained model, lowered: within its budget, and the same again from its pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from porter.bundle import Bundle
from porter.cli import app
from porter.convert import Options, convert
from porter.errors import PorterError

ROOT = Path(__file__).parent.parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text())
BUDGET = 0.02
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(stories_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto") / "stories"
    convert(stories_onnx, out, Options(weights="auto", budget=f"kl={BUDGET}"))
    return out


def test_the_lowered_program_keeps_the_budget_and_the_report_says_how(found: Path) -> None:
    report = json.loads((found / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["ok"]
    assert report["drift"]["total"]["kl_mean"] <= BUDGET
    search = report["search"]
    # Errors of different weights are independent: what their sum promised is measured within a third.
    assert search["promised"]["kl_mean"] == pytest.approx(report["drift"]["total"]["kl_mean"], rel=1 / 3)
    assert search["bits"]["weights"] < 6.5  # int8 alone is 8.2 and keeps it, int4-g32 alone 5 and does not
    assert search["bound"] == search["cost"]


def test_its_pipeline_makes_the_same_model(found: Path, stories_onnx: Path, tmp_path: Path) -> None:
    text = Bundle.open(found).manifest["pipeline"]
    convert(stories_onnx, tmp_path / "again", Options(pipeline=text))
    for name in ("model.onnx", "plan.json", "manifest.json"):
        assert (found / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_exit_code_3_where_nothing_keeps_the_budget(stories_onnx: Path, tmp_path: Path) -> None:
    words = ["convert", str(stories_onnx), "-o", str(tmp_path / "out"), "--weights", "auto", "--kv", "int4"]
    result = CliRunner().invoke(app, [*words, "--budget", "kl=1e-6"])
    assert isinstance(result.exception, PorterError)
    assert (result.exception.code, result.exception.exit_code) == ("PORT-0631", 3)
    assert not (tmp_path / "out").exists()

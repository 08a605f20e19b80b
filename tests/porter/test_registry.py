"""Passes of installed packages: found through their entry point, listed, and refused when a name is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Foreign, Pipeline
from porter.registry import builtin, describe, find

MODULE = '''"""Count the nodes; x -> x."""
from dataclasses import dataclass
import onnx_ir as ir
from porter.pipeline import Pass

@dataclass(frozen=True)
class Count(Pass):
    """Count."""
    start: int = 0
    def run(self, model, context):
        """How many."""
        return 0

class Foreign(ir.passes.InPlacePass):
    def call(self, model):
        model.producer_name = "foreign"
        return ir.passes.PassResult(model, modified=True)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that offers `extra.count` and `extra.foreign`, and `clean.dead`, which is taken."""
    (tmp_path / "extra_passes.py").write_text(MODULE)
    info = tmp_path / "extra_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[porter.passes]\nextra.count = extra_passes:Count\nextra.foreign = extra_passes:Foreign\n"
        "clean.dead = extra_passes:Count\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "extra_passes", raising=False)


@pytest.mark.usefixtures("installed")
def test_a_pass_of_another_package() -> None:
    pipeline = Pipeline.parse("extra.count{start=2},extra.foreign")
    assert str(pipeline.passes[0]) == "extra.count{start=2}"
    assert isinstance(pipeline.passes[1], Foreign)
    assert str(pipeline) == "extra.count{start=2},extra.foreign"


@pytest.mark.usefixtures("installed")
def test_an_onnx_ir_pass_of_another_package_runs() -> None:
    import onnx_ir as ir

    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 24]> g (float[1] x) => (float[1] y) { y = Neg(x) }'
    )
    steps = Pipeline.parse("extra.foreign").run(model, Context())
    assert (steps[0].edits, model.producer_name) == (1, "foreign")


@pytest.mark.usefixtures("installed")
def test_a_name_that_two_claim_is_refused() -> None:
    with pytest.raises(PassError, match="PORT-0208"):
        find("clean.dead")


def test_all_are_listed() -> None:
    rows = {row["name"]: row for row in describe()}
    assert set(builtin()) <= set(rows)
    assert all(row["what"] and row["promise"] in ("exact", "reorders", "lossy") for row in rows.values())


def test_the_checkout_holds_no_second_copy() -> None:
    """`import passes` inside a checkout would make every pass class a second time."""
    root = Path(__file__).parent.parent.parent
    for name in ("passes", "targets"):
        run = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True
        )
        assert run.returncode
        assert f"import porter.{name}" in run.stderr

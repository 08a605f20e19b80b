"""Golden files: pipeline, model before, model after, between dashes; --update-golden rewrites them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from porter.context import Context
from porter.pipeline import Pipeline

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(FOLDER.rglob("*.onnxtxt"))


def read(path: Path) -> tuple[str, str, str]:
    """The pipeline text, the model before and the model after (empty in a new file)."""
    parts = path.read_text(encoding="utf-8").split("\n---\n")
    return parts[0].strip(), parts[1].strip(), parts[2].strip() if len(parts) > 2 else ""


def after(pipeline: str, before: str) -> str:
    """The text of the model when the pipeline has run."""
    model = ir.from_onnx_text(before)
    for step in Pipeline.parse(pipeline).passes:
        step.run(model, Context())
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnx.printer.to_text(proto).strip()


@pytest.mark.parametrize("path", CASES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_golden(path: Path, pytestconfig: pytest.Config) -> None:
    pipeline, before, expected = read(path)
    found = after(pipeline, before)
    if pytestconfig.getoption("--update-golden"):
        path.write_text(f"{pipeline}\n---\n{before}\n---\n{found}\n", encoding="utf-8")
    else:
        assert found == expected


def test_every_pass_of_these_folders_has_a_golden_file() -> None:
    from porter.registry import builtin

    wanted = {n for n in builtin() if n.split(".")[0] in ("clean", "fuse")}
    assert wanted <= {".".join(p.parent.relative_to(FOLDER).parts) for p in CASES}

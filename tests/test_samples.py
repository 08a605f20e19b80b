"""Every numbered sample runs and prints what its page says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shown

SAMPLES = Path(__file__).parent.parent / "samples"


def _run(sample: str, out: Path) -> str:
    """What run.sh of the sample prints, given the porter of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [SAMPLES / sample / "run.sh", out.name],
        cwd=out.parent,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_numbered_sample_has_a_page() -> None:
    numbered = sorted(f for f in SAMPLES.iterdir() if f.name[0].isdigit())
    assert [f.name[:3] for f in numbered] == [f"{i:02}-" for i in range(1, len(numbered) + 1)]
    assert all((f / "README.md").is_file() for f in numbered)
    assert all((f / "expected.txt").is_file() for f in numbered if (f / "run.sh").is_file())
    assert list((SAMPLES / "stories260k").glob("LICENSE*")), "the shipped weights need their licence"


def test_first_port(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    printed = _run("01-first-port", tmp_path / "out")
    shown.check((SAMPLES / "01-first-port" / "expected.txt").read_text("utf-8"), printed)
    assert (tmp_path / "out" / "stories260k" / "report.html").stat().st_size > 10_000


def test_own_pass(stories_onnx: Path, tmp_path: Path) -> None:
    printed = _run("03-own-pass", _with_model(stories_onnx, tmp_path))
    shown.check((SAMPLES / "03-own-pass" / "expected.txt").read_text("utf-8"), printed)


def test_own_chip(stories_onnx: Path, tmp_path: Path) -> None:
    printed = _run("04-own-chip", _with_model(stories_onnx, tmp_path))
    page = (SAMPLES / "04-own-chip" / "expected.txt").read_text("utf-8")
    shown.check(page, printed)
    model = "stories260k.onnx on tern"
    told = [line for line in printed.partition(model)[0].splitlines() if not line.endswith(" …")]
    assert told == page.partition(model)[0].splitlines(), "estimates are exact"


def _with_model(stories_onnx: Path, folder: Path) -> Path:
    """A folder with the exported model: run.sh exports only what is not there."""
    out = folder / "out"
    out.mkdir()
    for file in stories_onnx.parent.iterdir():
        name = file.name.replace(stories_onnx.stem, "stories260k", 1)
        shutil.copytree(file, out / name) if file.is_dir() else shutil.copy(file, out / name)
    _rename_data(out)
    return out


def _rename_data(out: Path) -> None:
    """The ONNX file names its file of weights, which keeps that name."""
    (out / "stories260k.onnx.data").rename(out / "model.onnx.data")

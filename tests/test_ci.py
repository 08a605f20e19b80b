"""In CI a test that does not run is a failure, but for a GPU; and the last line is the summary of pytest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = """
import pytest

def test_that_runs(): pass

@pytest.mark.gpu
def test_that_needs_a_gpu(): pytest.skip("no GPU here")
"""
SKIPPING = "def test_that_cannot_run(): pytest.skip('no such library')\n"


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("ci", "more", "status"), [("true", SKIPPING, 1), ("true", "", 0), ("", SKIPPING, 0)]
)
def test_a_skipped_test_fails_in_ci_alone(
    tmp_path: Path, ci: str, more: str, status: int, workers: str
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(SUITE + more)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        workers,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "CI": ci})
    last = done.stdout.splitlines()[-1]
    assert done.returncode == status, done.stdout
    assert re.fullmatch(rf"=+ 1 passed, {2 if more else 1} skipped in \S+s =+", last)
    assert ("test_that_cannot_run must run: Skipped: no such library" in done.stdout) == bool(status)


def test_the_script_of_ci_is_sound() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text("utf-8")

"""The figures of docs/benchmarks.md hold: benchmarks/accuracy.py says so itself, and this asks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.parametrize("what", ["logits", "greedy", "perplexity"])
def test_every_figure_is_within_its_bound(what: str, models: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "accuracy.py",
        what,
        "--models",
        models,
        "--work",
        tmp_path,
    ]
    assert subprocess.run(command, check=False).returncode == 0

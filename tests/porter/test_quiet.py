"""No telemetry: what porter imports leaves nothing in the user's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = "import porter.convert, porter.lower.lower, porter.run.host, porter.run.reference"


def test_starting_up_writes_nothing(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would write an identifier, TVM's bridge to PyTorch compile an extension."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []

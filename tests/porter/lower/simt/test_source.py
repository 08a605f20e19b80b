"""Every kernel of a small decoder through Dawn, a compiler of WGSL that needs no device."""

import json
import os
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest
from decoders import tiny_decoder

from porter import target
from porter.lower.lower import lower

ROOT = Path(__file__).parents[4]
BOUNDS = {"batch": 2, "sequence": 8, "past": 16}
# Where `.ci/run` puts the npm package, or where one's own is.
DAWN = Path(os.environ.get("PORTER_DAWN", ROOT / ".venv" / "node" / "node_modules" / "webgpu"))


def decoder() -> ir.Model:
    return tiny_decoder(layers=1, positions="range", tied=False)


def dawn(*files: Path) -> list[list[str]]:
    if not (DAWN / "index.js").is_file():
        pytest.skip("no Dawn: npm install --prefix .venv/node webgpu")
    script = ROOT / "tests" / "support" / "lint.mjs"
    done = subprocess.run(["node", script, DAWN, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_dawn_takes_every_kernel(tmp_path: Path) -> None:
    lower(decoder(), target.load("webgpu"), tmp_path, BOUNDS)
    files = sorted((tmp_path / "lib" / "kernels").glob("*.wgsl"))
    assert len(files) >= 15
    assert dawn(*files) == []


def test_dawn_refuses_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.wgsl"
    wrong.write_text(
        "@compute @workgroup_size(1)\nfn wrong(\n @builtin(workgroup_id) id : vec3<u32>) { let x = inff; }"
    )
    assert any("inff" in message for _, message in dawn(wrong))

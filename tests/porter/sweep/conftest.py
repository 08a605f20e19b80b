"""A small decoder to sweep, and sweeps whose workers do as they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import sweeping
from decoders import tiny_decoder

from porter.sweep.matrix import Matrix, Options
from porter.sweep.sweep import sweep
from porter.sweep.swept import Swept

SIZE = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 20, "vocab": 31, "context": 24}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of one layer with random weights. Read only."""
    path = tmp_path_factory.mktemp("swept") / "tiny.onnx"
    ir.save(tiny_decoder(**SIZE), path)
    return path


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Path:
    """A folder with the decoder and two chips, a.toml and b.toml."""
    (tmp_path / "tiny.onnx").write_bytes(source.read_bytes())
    sweeping.chip(tmp_path, "a"), sweeping.chip(tmp_path, "b", dollars=2)
    return tmp_path


@pytest.fixture
def told(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Swept]:
    """told(function, weights="fp32,int8", …): a sweep in place/out whose workers do `function`."""

    def run(function: Callable, targets: str = "a,b", **more: object) -> Swept:
        monkeypatch.setattr("porter.sweep.sweep.measure", function)
        axes = {name: str(more.pop(name)) for name in ("weights", "kv", "activations") if name in more}
        files = ",".join(str(place / f"{t}.toml") if len(t) == 1 else t for t in targets.split(","))
        options = Options(**{"workers": 2, **more})
        return sweep(place / "tiny.onnx", place / "out", Matrix.of(targets=files, **axes), options)

    return run

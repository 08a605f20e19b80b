"""Decoders of someone else's code with quantized caches, from the command to the lowered program."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cached import beside_onnx_runtime, planned_bytes

pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import FAMILIES, POSITIONS, exported

from porter import cli
from porter.bundle import Bundle
from porter.convert import Options, convert
from porter.kv import parse


def check(folder: Path, kv: str) -> None:
    """The report's bytes are those of the scheme and of the lowered program, which does in every row what
    ONNX Runtime does."""
    held, bits = planned_bytes(folder, parse(kv))
    report = json.loads((folder / "report.json").read_text())
    found = {name: figure["value"] for name, figure in report["memory"].items() if "KV cache" in name}
    capacity = Bundle.open(folder).decoder.capacity
    assert found == {
        f"KV cache, {capacity} tokens x batch 1": held,
        "KV cache, scales and windows included": float(f"{bits:.4f}"),
    }
    beside_onnx_runtime(folder)


QUICK = [
    ("llama", "innerq recent=8 sink=2 key=int3-g8-fp16 value=int3-g8-tokens-fp16"),
    ("gpt2", "kivi2 recent=8 key=uint2-g16-tokens-fp16 keep-first=1"),
]


@pytest.mark.parametrize(("family", "kv"), QUICK)
def test_a_cache_is_quantized_without_naming_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture, family: str, kv: str
) -> None:
    """Learned positions say how many tokens fit; a model that says nothing gets what is asked for."""
    context = 0 if family == "gpt2" else POSITIONS
    path = exported(family, tmp_path)
    capfd.readouterr()
    cli.convert(path, tmp_path / "out", kv=kv, context=context, decode=2, data="random", json_=True)
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "KV cache, 45 tokens x batch 1" in json.loads(printed.out)["memory"]
    check(tmp_path / "out", kv)


SHORT = (
    "int8",
    "int4 rotate",
    "fp8",
    "fp8-dynamic",
    "kivi2 recent=8 key=uint2-g16-tokens-fp16",
    "innerq recent=16 sink=4 key=int3-g8-fp16 value=int3-g8-tokens-fp16",
    "innerq-hybrid recent=8 sink=2 value=int2-g8-tokens-fp16-hybrid rotate",
    "turboquant4",
    "turboquant2.5",
    "kivi4 keep-first=1 keep-last=1",
    "int8 value=kivi2 recent=3",
    "innerq recent=64",
)
MATRIX = [("llama", kv) for kv in SHORT] + [
    (family, kv)
    for family in FAMILIES
    if family not in ("llama", "opt")
    for kv in (SHORT[2], *SHORT[4:7], SHORT[8])
]


@pytest.mark.long
@pytest.mark.parametrize(("family", "kv"), MATRIX)
def test_every_family_with_every_kind_of_cache(tmp_path: Path, family: str, kv: str) -> None:
    tokens = np.random.default_rng(1).integers(0, 61, (2, POSITIONS))
    np.save(tmp_path / "tokens.npy", tokens)
    path = exported(family, tmp_path, opset=23 if family in ("gpt2", "mistral") else 20)
    options = Options(kv=kv, context=POSITIONS, decode=1, data=str(tmp_path / "tokens.npy"))
    convert(path, tmp_path / "out", options)
    check(tmp_path / "out", kv)

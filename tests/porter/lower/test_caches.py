"""Decoders with sliding windows and a softcap over quantized caches, lowered whole: a scheme of each kind."""

from __future__ import annotations

from pathlib import Path

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from cached import beside_onnx_runtime, planned_bytes

from porter import target
from porter.context import Context
from porter.kv import parse
from porter.lower.lower import lower
from porter.pipeline import Pipeline

CAPACITY = 37  # larger than the window, no multiple of a group, and of no other size in the model
SCHEMES = (
    "fp8",
    "kivi2 recent=8 key=uint2-g8-tokens-fp16",
    "innerq recent=8 sink=3 value=int3-g8-tokens-fp16",
    "turboquant2.5",
)


@pytest.mark.parametrize("text", SCHEMES)
def test_steps_beside_onnx_runtime(tmp_path: Path, text: str) -> None:
    """Grouped heads of 12 channels; the first layer sees 7 tokens, the second all."""
    model = decoders.tiny_decoder(head_size=12, window=7, softcap=3.0)
    plain = decoders.tiny_decoder(head_size=12, window=7, softcap=3.0)
    ids = np.random.default_rng(9).integers(0, 61, (2, 30))
    calibration = [{"input_ids": ids, **decoders.empty_cache(plain, 2)}]
    passes = f"kv.static_cache{{capacity={CAPACITY}}},kv.quantize{{scheme={text}}}"
    Pipeline.parse(passes).run(model, Context(calibration=calibration))
    ir.save(model, tmp_path / "model.onnx")
    plan = lower(model, target.load("host"), tmp_path, {"batch": 3, "sequence": CAPACITY})
    beside_onnx_runtime(tmp_path)
    held, _ = planned_bytes(tmp_path, parse(text))
    caches = [b for b in plan.buffers if b.kind == "input" and b.name.startswith("past_key_values.")]
    assert sum(b.bytes for b in caches) == 3 * held
    # Nothing as long as the cache is made: of its length there is the mask, a bit of a byte for each token.
    long = [b for b in plan.buffers if b.kind == "workspace" and str(CAPACITY) in b.shape]
    assert {b.dtype for b in long} <= {"bool"}

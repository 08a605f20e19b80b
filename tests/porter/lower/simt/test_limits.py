"""Limits of a launch: bounds shrink to fit them, and what cannot is refused by the limit's name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import tiny_decoder
from lowering import model, with_weights

from porter import target
from porter.errors import TargetError
from porter.lower.lower import lower
from porter.target import TargetSpec

BOUNDS = {"batch": 8, "sequence": 512, "past": 16}


def limited(**figures: Any) -> TargetSpec:
    spec = target.load("webgpu")
    limits = {
        name: getattr(spec.limits, name).model_copy(update={"value": value})
        if hasattr(getattr(spec.limits, name), "model_copy")
        else getattr(spec.limits, name)._replace(value=value)
        for name, value in figures.items()
    }
    return spec.model_copy(update={"limits": spec.limits.model_copy(update=limits)})


def test_a_step_takes_fewer_tokens_where_buffers_are_small(tmp_path: Path) -> None:
    plan = lower(tiny_decoder(layers=1), limited(binding_size=64 << 10), tmp_path, dict(BOUNDS))
    assert plan.bounds["past"] == 16
    assert plan.bounds["sequence"] < 512
    assert max(b.bytes for b in plan.buffers) <= 64 << 10


def test_a_weight_that_no_binding_reaches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"limits\.binding-size") as caught:
        lower(tiny_decoder(layers=1), limited(binding_size=1 << 10), tmp_path, dict(BOUNDS))
    assert caught.value.code == "PORT-0453"
    assert caught.value.exit_code == 4


def test_more_buffers_than_a_kernel_may_bind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"limits\.bindings is 2") as caught:
        lower(tiny_decoder(layers=1), limited(bindings=2), tmp_path, dict(BOUNDS))
    assert caught.value.code == "PORT-0453"


def test_no_weight_lies_in_two_shards(tmp_path: Path) -> None:
    text = "g (float[b,64] x) => (float[b,64] y) { t = MatMul(x, u) y = MatMul(t, v) }"
    text = text.replace("x)", "x, float[64,64] u, float[64,64] v)")
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((64, 64)).astype(np.float32) for n in "uv"}
    plan = lower(with_weights(model(text), **weights), limited(buffer_size=20 << 10), tmp_path, {"b": 4})
    assert len(plan.shards) == 2
    for weight in plan.weights:
        shard = plan.shards[weight["shard"]]
        assert weight["offset"] % 256 == 0
        assert shard["offset"] <= weight["offset"]
        assert (
            weight["offset"] + weight["bytes"]
            <= shard["offset"] + shard["bytes"]
            <= (tmp_path / "lib/weights.bin").stat().st_size
        )

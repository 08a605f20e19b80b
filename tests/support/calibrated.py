"""A tiny decoder with loud channels, feeds to calibrate it on, and how far a port's logits are from it."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir

from porter.context import Context, Feeds


def decoder(**sizes: object) -> ir.Model:
    """A tiny decoder whose norms let a few channels through much louder than the others."""
    model = decoders.tiny_decoder(**sizes)
    for name, value in model.graph.initializers.items():
        if name.endswith("layernorm.weight"):
            gain = np.ones(value.shape[0], np.float32)
            gain[::7] = 8
            value.const_value = ir.tensor(np.abs(value.const_value.numpy()) * gain, name=name)
    return model


def feeds(model: ir.Model, count: int = 6, seed: int = 3) -> list[Feeds]:
    """One sequence each."""
    random, past = np.random.default_rng(seed), decoders.empty_cache(model, 1)
    return [{"input_ids": random.integers(0, 61, (1, 20 + i))} | past for i in range(count)]


def context(model: ir.Model) -> Context:
    """With calibration feeds."""
    return Context(calibration=feeds(model))


def error(model: ir.Model, port: ir.Model) -> float:
    """The mean squared change of the logits over other feeds than those of `context`."""
    live = [decoders.session(m) for m in (model, port)]
    found = [[decoders.run(m, f)["logits"] for m in live] for f in feeds(model, 4, seed=8)]
    return float(np.mean([np.mean((a - b) ** 2) for a, b in found]))


def values(model: ir.Model, name: str) -> list[np.ndarray]:
    """The arrays that one value of the model has on the feeds of `context`, the whole model run at once."""
    model = decoders.copy(model)
    model.graph.outputs[:] = [next(v for n in model.graph for v in n.outputs if v.name == name)]
    live = decoders.session(model)
    names = {i.name for i in live.get_inputs()}
    return [live.run(None, {k: v for k, v in f.items() if k in names})[0] for f in feeds(model)]


def rows(model: ir.Model, name: str) -> np.ndarray:
    """The same as observations, float64 [tokens, K]."""
    found = values(model, name)
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in found]).astype(np.float64)

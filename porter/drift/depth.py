"""Depth: how the error of a model grows from layer to layer, along the values that layers add to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import decoder, graph
from porter.decoder import Decoder
from porter.drift.compare import padded
from porter.run.feeds import empty_caches, feeds
from porter.run.reference import ReferenceRunner

LONGEST = 128  # tokens of a text that are fed, in one step
# What may stand between one addition and the next: models that normalize after it.
BETWEEN = ("LayerNormalization", "RMSNormalization", "Identity", "Cast", "Dropout")


@dataclass(frozen=True)
class Level:
    """A value that a layer added to: its name, the layer, and the signal over the noise in it, in decibels
    (inf when both models have the same)."""

    name: str
    layer: int
    sqnr_db: float


def depth(reference: Path, candidate: Path, texts: Sequence[np.ndarray]) -> list[Level]:
    """Compare the running sums of two forms of one model, both ONNX files, over the first tokens of `texts`.

    The values are those that both have by name: passes keep the names of what they replace.
    """
    models = [graph.load(path) for path in (reference, candidate)]
    known = {v.name for node in models[1].graph for v in node.outputs}
    found = [v.name for v in sums(models[0].graph) if v.name in known]
    about = [decoder.recognise(model) for model in models]
    layers = len({c.layer for c in about[0].caches}) or len(found)
    window = min(n for n in (LONGEST, *(n for d in about for n in (d.capacity, d.context))) if n)
    tokens, mask = padded([t[:window] for t in texts])
    kept = mask.astype(bool)
    a, b = (_values(*pair, found, tokens) for pair in zip(models, about, strict=True))
    return [
        Level(name, i * layers // len(found), _decibels(a[name][kept], b[name][kept]))
        for i, name in enumerate(found)
        if a[name].shape == b[name].shape and a[name].shape[:2] == tokens.shape
    ]


def sums(of: ir.Graph) -> list[ir.Value]:
    """The longest row of additions in which each adds to the one before: the residual stream.

    What it carries is read twice: by the layer, and by the addition after it. A bias is added to what is read
    once.
    """
    lengths: dict[ir.Value, int] = {}
    before: dict[ir.Value, ir.Value] = {}
    for node in of:
        if node.op_type not in ("Add", *BETWEEN) or node.domain:
            continue
        out, near = node.outputs[0], [v for v in node.inputs if v in lengths and _carried(v)]
        best = max(near, key=lengths.__getitem__, default=None)
        lengths[out] = (lengths[best] if best is not None else 0) + (node.op_type == "Add")
        if best is not None:
            before[out] = best
    last = max(lengths, key=lengths.__getitem__, default=None)
    row = []
    while last is not None:
        if last.producer().op_type == "Add" and (last.shape is None or len(last.shape) == 3):
            row.append(last)
        last = before.get(last)
    return row[::-1]


def _carried(value: ir.Value) -> bool:
    readers = [node for node, _ in value.uses()]
    return len(readers) > 1 or any(node.op_type in BETWEEN for node in readers)


def _values(
    model: ir.Model, about: Decoder, names: Sequence[str], tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """What the values are when the model is fed tokens int64 [batch, n], its caches empty."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    given = {v.name for v in model.graph.outputs}
    model.graph.outputs.extend(values[n] for n in names if n not in given)
    runner = ReferenceRunner(model)
    caches = empty_caches(about, runner.inputs, len(tokens))
    found = runner.run(feeds(about, tokens, 0, caches, runner.inputs))
    return {name: found[name] for name in names}


def _decibels(a: np.ndarray, b: np.ndarray) -> float:
    signal, noise = (float(np.square(x, dtype=np.float64).sum()) for x in (a, a - b))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / noise))

"""Ports with planted faults, and blame of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faults
import numpy as np
import onnx_ir as ir
from faults import named

from porter import graph, target
from porter.context import Context
from porter.convert import run_passes
from porter.decoder import recognise
from porter.drift.blame import sides
from porter.drift.blame.blame import Stage, blame
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline

PORTS = {
    "int4": {"weights": "int4-g32", "kv": "int8"},
    "fp8": {"weights": "fp8", "kv": "int8"},
    "bias": {"weights": "int4-g32", "kv": "int8"},
}
LAYER = 2


@dataclass(frozen=True)
class Outcome:
    """What blame said of a planted fault: `named`, whether the first that it names is right."""

    fault: str
    named: bool
    spikes: int
    stage: Stage
    reference: sides.Side
    candidate: sides.Side

    @property
    def line(self) -> str:
        """A row of a table."""
        first = self.stage.suspects[0]
        share = "" if first.share is None else f"{first.share:.0%}"
        cells = (self.fault, "yes" if self.named else "NO", f"{first.site.op} `{first.site.name}`",
                 first.judged.why, f"{first.local_db:.1f}", f"{first.judged.expected_db:.1f}", share,
                 f"{self.stage.drift:.2g}")  # fmt: skip
        return f"| {' | '.join(cells)} |"


def ported(path: Path, port: str, seed: int = 0) -> tuple[ir.Model, ir.Model]:
    """The source, and what the passes of the host's pipeline make of it, not lowered."""
    source, model = graph.load(path), graph.load(path)
    if port == "bias":
        faults.with_bias(source)
        faults.with_bias(model)
    spec = target.load("host")
    pipeline = Pipeline.parse(pipeline_text(spec, Options(**PORTS.get(port, {}))))
    run_passes(pipeline, model, Context(spec, (), seed), lambda stage, fraction: None)
    return source, model


def side(name: str, model: ir.Model) -> sides.Side:
    """An ONNX model to compare."""
    return sides.onnx(name, model, recognise(model))


def planted(path: Path, fault: str, steps: Sequence[np.ndarray], top: int = 2) -> Outcome:
    """Plant a fault in a port of `path`, and blame it against the source."""
    plant, port = faults.FAULTS[fault]
    source, model = ported(path, port)
    right = plant(model, LAYER)
    return _outcome(fault, right, "passes", side("source", source), side("port", model), steps, top)


def planted_lowered(
    path: Path, fault: str, steps: Sequence[np.ndarray], folder: Path, top: int = 2
) -> Outcome:
    """Plant a fault in the lowered program alone: the model beside it is as it should be."""
    port = "int4" if fault == faults.ACCUMULATOR else faults.FAULTS[fault][1]
    clean, faulty = ported(path, port)[1], ported(path, port)[1]
    wrong: contextlib.AbstractContextManager = contextlib.nullcontext()
    if fault == faults.ACCUMULATOR:
        right = {named(faults.linears(faulty, LAYER)["down"])}
        wrong = faults.narrow_accumulator(*right)
    else:
        right = faults.FAULTS[fault][0](faulty, LAYER)
    with wrong:
        model = faults.lowered(clean, faulty, folder)
    meaning = recognise(model)
    program = sides.program("program", folder, model, meaning)
    return _outcome(fault, right, "lowering", sides.onnx("model", model, meaning), program, steps, top)


def _outcome(
    fault: str,
    right: set[str],
    name: str,
    reference: sides.Side,
    candidate: sides.Side,
    steps: Sequence[np.ndarray],
    top: int,
) -> Outcome:
    stage = blame(name, reference, candidate, steps, top)
    first, spikes = stage.suspects[0], [s for s in stage.suspects if s.kind == "spike"]
    right_one = first.kind == "spike" and first.site.name in right
    return Outcome(fault, right_one, len(spikes), stage, reference, candidate)

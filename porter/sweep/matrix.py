"""Matrix: what a sweep crosses, and each cell as a task of plain data, named after all that it depends on."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porter import options as conversion
from porter import target
from porter.drift.measure import RANDOM
from porter.errors import OptionError, PorterError
from porter.pipeline import Pipeline
from porter.sweep.shared import Shared
from porter.sweep.store import digest
from porter.sweep.work import Task
from porter.target import TargetSpec

WIDE = "fp32"  # what an axis has when nothing is asked of it


@dataclass(frozen=True)
class Matrix:
    """What is crossed: targets, and formats and schemes as the command line takes them."""

    targets: tuple[str, ...]
    weights: tuple[str, ...] = (WIDE,)
    kv: tuple[str, ...] = (WIDE,)
    activations: tuple[str, ...] = (WIDE,)

    @classmethod
    def of(cls, **axes: str) -> Matrix:
        """Axes from texts with commas. Raises OptionError PORT-0641 for one that names nothing."""
        found = {}
        for axis, text in axes.items():
            found[axis] = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
            if not found[axis]:
                raise OptionError("PORT-0641", "there is nothing to sweep over", where=f"--{axis}")
        if found["targets"] == ("all",):
            found["targets"] = tuple(target.names())
        return cls(**found)


@dataclass(frozen=True)
class Options:
    """What a sweep may be told besides; paths and texts are as the command line takes them.

    `context` is the tokens that a cache holds and at which a step is timed (0: what the model was made for),
    `prompt` and `batch` those of the estimate. `workers` 0: one a core, or what the cluster has. `ray`:
    "" for processes here, "local" for a cluster on this machine, else a cluster's address.
    """

    method: str = ""
    budget: str = ""
    data: str = ""
    calibration: str = ""
    seed: int = 0
    context: int = 0
    prompt: int = 512
    batch: int = 1
    keep: bool = False
    workers: int = 0
    ray: str = ""
    repeat: str = ""
    progress: Callable[[float, str], None] = field(default=lambda fraction, note: None, compare=False)


@dataclass(frozen=True)
class Cell:
    """One combination: how it was asked for, and its task; or why the target does not offer it."""

    target: str
    weights: str
    kv: str
    activations: str
    task: Task | None = field(default=None, compare=False)
    refused: PorterError | None = field(default=None, compare=False)

    def __str__(self) -> str:
        narrow = () if self.activations == WIDE else (self.activations,)
        return " ".join((self.target, self.weights, self.kv, *narrow))


def cells(matrix: Matrix, options: Options, shared: Shared) -> list[Cell]:
    """Every combination, in the order asked for.

    Raises what reading a target does, the refusal itself when no combination is offered at all, and
    OptionError PORT-0296 for calibration data that none looks at.
    """
    crossed = itertools.product(matrix.targets, matrix.weights, matrix.kv, matrix.activations)
    found = [_cell(*axes, options, shared) for axes in crossed]
    if all(cell.refused for cell in found):
        raise next(cell.refused for cell in found if cell.refused)
    if options.calibration and not any(c.task and "calibration" in c.task["options"] for c in found):
        what = "no cell has a pass that looks at calibration data"
        raise OptionError("PORT-0296", what, where=options.calibration, hint="--method gptq has one")
    return found


@functools.cache
def _parsed(text: str) -> Pipeline:
    """The passes of a pipeline; targets share most of them, and finding a pass takes milliseconds."""
    return Pipeline.parse(text)


def _cell(name: str, weights: str, kv: str, activations: str, options: Options, shared: Shared) -> Cell:
    spec = target.load(name)
    asked = {
        "target": str(Path(name).absolute()) if name.endswith(".toml") else name,
        "weights": weights,
        "kv": kv,
        "activations": activations,
        "method": options.method if spec.flavour(weights) != WIDE else "",
        "context": options.context,
        "data": shared.data,
        "seed": options.seed,
    }
    try:
        pipeline = _parsed(conversion.pipeline_text(spec, conversion.Options(**asked)))
    except PorterError as refused:
        return Cell(spec.name, weights, kv, activations, refused=refused)
    if any(p.calibrates for p in pipeline.passes):
        file = options.calibration not in ("", RANDOM)
        asked["calibration"] = str(Path(options.calibration).absolute()) if file else options.calibration
    context = options.context or shared.context
    inputs = {
        "source": shared.sha256,
        "target": digest(spec.to_dict()),
        "pipeline": str(pipeline),
        "data": shared.data_sha256,
        "calibration": shared.calibration_sha256 if "calibration" in asked else "",
        "seed": options.seed,
        "estimate": {"batch": options.batch, "prompt": min(options.prompt, context), "context": context},
        "versions": dict(shared.versions),
    }
    task = {
        "name": _name(spec, asked, inputs),
        "inputs": inputs,
        "source": str(shared.source),
        "options": asked,
        "keep": options.keep,
        "repeat": _command(shared.source, asked),
    }
    return Cell(spec.name, weights, kv, activations, task)


def _name(spec: TargetSpec, asked: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """A file name that says what it is, and differs when anything differs that the result depends on."""
    narrow = spec.flavour(asked["activations"])
    formats = [spec.flavour(asked["weights"]), asked["kv"], *([narrow] if narrow != WIDE else [])]
    readable = "_".join([spec.name, *formats])
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', readable)[:80]}-{digest(inputs)[:16]}"


def _command(source: Path, asked: Mapping[str, Any]) -> str:
    """The conversion alone, for a shell."""
    given = [(f"--{name}", str(value)) for name, value in asked.items() if value and value != WIDE]
    return shlex.join(["porter", "convert", str(source), *itertools.chain(*given), "-o", "BUNDLE"])

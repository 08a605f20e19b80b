"""lower: a model after its passes -> library, packed weights and plan, written into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
from porter.lower import build, indexed, plan, weights
from porter.lower.blocks.placement import placements
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.importer.program import DTYPES, Importer
from porter.lower.importer.templates import Host
from porter.lower.scheduled import step
from porter.lower.simt import emit, limits
from porter.lower.simt.program import Program, program
from porter.lower.tile import schedule as tile
from porter.target import TargetSpec

LIBRARIES, WEIGHTS, PLAN = "lib", "lib/weights.bin", "plan.json"
PROGRAM = "lib/program.txt"  # the kernels as they are scheduled, family tile
KERNELS = "lib/program.json"  # and as the simulator reads them


def lower(
    model: ir.Model,
    target: TargetSpec,
    folder: Path,
    bounds: dict[str, int],
    progress: Callable[[float], None] = lambda fraction: None,
) -> plan.Plan:
    """Compile `model` and write `lib/model-….so`, `lib/weights.bin` and `plan.json` into `folder`; for family
    simt the kernels' source as well.

    `bounds` gives the largest value of each symbolic dimension; memory is planned for them. Weights are
    packed and written one at a time. Raises TargetError PORT-0410 to PORT-0421 and
    PORT-0450 to PORT-0453, ModelError PORT-0412, EnvironmentFailure PORT-0902.
    """
    build.check_linker()
    kernels = templates(target)
    imported = Importer(model, bounds, kernels).run()
    progress(0.1)
    target_tvm = build.tvm_target(target)
    planned = build.planned(imported.module, target_tvm, imported.sources)
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    made = (Program if target.family == "simt" else plan.Plan)(
        bounds=imported.bounds,
        inputs=[_interface(v) for v in inputs],
        outputs=[_interface(v) for v in model.graph.outputs],
        in_place=imported.in_place,
        placement=placements(kernels.profile, imported.multiplied) if isinstance(kernels, Chip) else [],
    )
    if isinstance(made, Program):
        found = program(planned.module, made, imported.parameters, planned.nodes, target)
        emit.describe(made, found, imported.parameters, target)
        limits.fit(made, found, target)
        emit.write(made, found, target, folder)
    else:
        plan.extract(planned.module, made, imported.parameters, planned.nodes)
    progress(0.2)
    (folder / LIBRARIES).mkdir(exist_ok=True)
    module = planned.module
    if target.family == "tile":
        scheduled = tile.program(module, target, imported.bounds)
        module = scheduled.module
        (folder / PROGRAM).write_text(scheduled.text(), encoding="utf-8")
        step(module, target, scheduled.control).write(folder / KERNELS)
    library = build.write_library(build.compiled(module, target_tvm), folder / LIBRARIES)
    made.library = f"{LIBRARIES}/{library}"
    progress(0.6)
    total = sum(p.bytes for p in imported.parameters) or 1
    weights.write(
        imported.parameters,
        folder / WEIGHTS,
        lambda done: progress(0.6 + 0.4 * min(1.0, done / total)),
        emit.alignment(target),
    )
    (folder / PLAN).write_text(json.dumps(made.to_json(), indent=1) + "\n", encoding="utf-8")
    return made


def templates(target: TargetSpec) -> Host | Chip:
    """The kernels that a target's family has."""
    return Host() if target.family == "host" else Chip(Profile(target))


def _interface(value: ir.Value) -> dict[str, object]:
    dims = enumerate(value.shape or [])
    shape = [d if isinstance(d, int) else str(d.value or f"{value.name}_{i}") for i, d in dims]
    found = {"name": value.name, "shape": shape, "dtype": DTYPES[value.dtype]}
    return found | ({"rows": count} if (count := indexed.rows(value)) else {})

"""Emit: a device's part of a bundle, its kernels' source and what the plan says of them."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import tvm

from porter.lower.simt import kernels as making
from porter.lower.simt.kernels import Kernel
from porter.lower.simt.language import Language, device, language
from porter.lower.simt.program import Program
from porter.lower.weights import ALIGNMENT, Parameter, offsets
from porter.target import TargetSpec

KERNELS = "lib/kernels"


def describe(
    plan: Program, kernels: dict[str, Kernel], parameters: list[Parameter], spec: TargetSpec
) -> None:
    """Note in the plan where each kernel's source will be and how it is launched, and where weights lie."""
    plan.shards = shards(parameters, spec)
    starts = [s["offset"] for s in plan.shards]
    for entry, at in zip(plan.weights, offsets(parameters, alignment(spec)), strict=True):
        entry |= {"offset": at, "shard": bisect_right(starts, at) - 1}
    told = language(spec)
    for name, kernel in sorted(kernels.items()):
        plan.kernels[name] = {
            "file": f"{KERNELS}/{name}.{told.suffix}" if told.apart else f"{KERNELS}.{told.suffix}",
            "block": kernel.block,
            "writes": kernel.writes,
            "scalars": kernel.scalars,
        }


def write(plan: Program, kernels: dict[str, Kernel], spec: TargetSpec, folder: Path) -> None:
    """Write the source into `folder`: a file for each kernel, or one for all."""
    told = language(spec)
    for name, text in _sources(kernels, spec, told).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _sources(kernels: dict[str, Kernel], spec: TargetSpec, told: Language) -> dict[str, str]:
    if told.apart:
        return {f"{KERNELS}/{name}.{told.suffix}": k.source for name, k in kernels.items()}
    module = tvm.IRModule({name: kernels[name].function for name in sorted(kernels)})
    return {f"{KERNELS}.{told.suffix}": making.source(module, device(spec), told)}


def alignment(spec: TargetSpec) -> int:
    """Of a weight in the file."""
    found = spec.limits.offset_alignment if spec.limits else None
    return max(ALIGNMENT, int(found.value)) if found is not None else ALIGNMENT


def shards(parameters: list[Parameter], spec: TargetSpec) -> list[dict[str, int]]:
    """Parts of the weights' file, as large as a buffer may be; no weight lies in two."""
    most, align = spec.limits.buffer_size, alignment(spec)
    found: list[dict[str, Any]] = []
    for parameter, start in zip(parameters, offsets(parameters, align), strict=True):
        end = start + -(-parameter.bytes // align) * align
        if not found or (most is not None and end - found[-1]["offset"] > most.value):
            found.append({"offset": start, "bytes": 0})
        found[-1]["bytes"] = end - found[-1]["offset"]
    return found

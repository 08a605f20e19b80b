"""What the parts of a target must agree on; the first that does not is the error, with the key's path."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

from porter.target import placing, units
from porter.target.figure import Figure, refused
from porter.target.machine import Scope

if TYPE_CHECKING:
    from porter.target.spec import TargetSpec

Fault = tuple[str, str, str]  # code, path of the key, what is wrong
NEEDS = {
    "host": (),
    "tile": ("memory", "matrix", "vector", "vector.rate", "dma", "numerics", "limits.alignment"),
    "simt": (
        "vector",
        "numerics",
        "limits.workgroup",
        "limits.invocations",
        "limits.grid",
        "limits.shared",
    ),
}
"""The parts that a family cannot do without."""


def check(spec: TargetSpec, figures: Mapping[str, Figure]) -> None:
    """Refuse a target whose parts contradict each other (PORT-0305 to PORT-0307)."""
    for faults in (
        _sources(spec, figures),
        _needs(spec),
        _units(spec),
        _memory(spec),
        _dma(spec),
        _links(spec),
        _launch(spec),
        _formats(spec),
        _numerics(spec),
        _readable(spec),
        _efficiency(spec),
    ):
        for code, path, what in faults:
            raise refused(code, f"{path}: {what}")


def _sources(spec: TargetSpec, figures: Mapping[str, Figure]) -> Iterator[Fault]:
    for key, text in spec.sources.items():
        if not text.strip():
            yield "PORT-0305", f"sources.{key}", "it names no title or address"
    for path, figure in figures.items():
        cited = re.findall(r"\[([A-Za-z]\w*)\]", figure.source)
        if figure.kind == "published":
            cited = [key.strip() for key in figure.source.split(",")]
        for key in cited:
            if key not in spec.sources:
                yield "PORT-0305", path, f"there is no source {key!r} in [sources]"
        if figure.kind == "derived" and not cited:
            yield "PORT-0305", path, "a derived figure names what it is derived from, as [KEY] of [sources]"


def _needs(spec: TargetSpec) -> Iterator[Fault]:
    if "kind" not in spec.tvm:
        yield "PORT-0306", "tvm.kind", "the key is missing: it says what TVM compiles for"
    for path in NEEDS[spec.family]:
        part: object = spec
        for key in path.split("."):
            part = getattr(part, key, None)
        if not part:
            yield "PORT-0306", path, f"a target of family {spec.family} must have it"


def _memory(spec: TargetSpec) -> Iterator[Fault]:
    scopes, results = get_args(Scope), spec.matrix.accumulates if spec.matrix else ""
    for name, level in spec.memory.items():
        if (level.scope == "chip") != (level.count is None):
            what = (
                "the chip's own is there once"
                if level.count
                else f"how many has the chip, one a {level.scope}?"
            )
            yield "PORT-0306", f"memory.{name}.count", what
        if spec.family == "tile" and level.bandwidth is None and name != results:
            yield "PORT-0306", f"memory.{name}.bandwidth", "the key is missing"
    for outer, inner in pairwise(spec.memory):
        a, b = spec.memory[outer], spec.memory[inner]
        if scopes.index(a.scope) > scopes.index(b.scope) or a.copies > b.copies:
            yield "PORT-0306", f"memory.{inner}.count", f"fewer than of {outer}, which stands outside it"
    for outer, inner in pairwise(name for name in spec.memory if name != results):
        a, b = spec.memory[outer], spec.memory[inner]
        beside = a.scope == b.scope != "chip"  # shared memory and registers
        if not beside and a.size.value < b.size.value:
            yield "PORT-0306", f"memory.{inner}.size", f"larger than {outer}, which stands outside it"


def _units(spec: TargetSpec) -> Iterator[Fault]:
    if spec.matrix is None:
        return
    for key in ("reads", "accumulates"):
        if getattr(spec.matrix, key) not in spec.memory:
            yield "PORT-0306", f"matrix.{key}", f"there is no level {getattr(spec.matrix, key)!r} in [memory]"
    for name, operand in spec.matrix.formats.items():
        path = f"matrix.formats.{name}"
        if name not in placing.known():
            yield "PORT-0307", path, f"there is no number format {name!r}"
        yield from _pace(spec, name)
        whole = name.startswith(("int", "uint"))
        if operand.accumulator.value == "int32" and not whole:
            yield "PORT-0306", f"{path}.accumulator", "floats do not add up in int32"
        if operand.accumulator.value == "fp16" and whole:
            yield "PORT-0306", f"{path}.accumulator", "sums of integers do not fit fp16"
    for i, mixed in enumerate(spec.matrix.mixed):
        for key in ("activations", "weights"):
            if getattr(mixed, key) not in spec.matrix.formats:
                what = f"{getattr(mixed, key)!r} is not in matrix.formats"
                yield "PORT-0306", f"matrix.mixed.{i}.{key}", what


def _pace(spec: TargetSpec, name: str) -> Iterator[Fault]:
    """Units, clock and steps make the rate; makers round and overclock by up to a fifth, not by two."""
    matrix = spec.matrix
    assert matrix is not None
    operand = matrix.formats[name]
    if operand.cycles is None:
        if spec.family == "tile":
            yield "PORT-0306", f"matrix.formats.{name}.cycles", "the key is missing"
        return
    if matrix.clock is None:
        yield "PORT-0306", "matrix.clock", f"the key is missing: formats.{name}.cycles are cycles of it"
        return
    made = 2 * math.prod(operand.step.value) / operand.cycles.value * matrix.clock.value * matrix.units.value
    if not 0.8 < made / operand.rate.value < 1.25:
        what = f"{operand.rate.text}, but units, clock, step and cycles make {units.shown(made, 'FLOP/s')}"
        yield "PORT-0306", f"matrix.formats.{name}.rate", what


def _dma(spec: TargetSpec) -> Iterator[Fault]:
    order = list(spec.memory)
    for name, dma in spec.dma.items():
        for key, level in (("from", dma.source), ("to", dma.to)):
            if level not in order:
                yield "PORT-0306", f"dma.{name}.{key}", f"there is no level {level!r} in [memory]"
                return
        if order.index(dma.source) >= order.index(dma.to):
            yield "PORT-0306", f"dma.{name}.to", f"{dma.to} does not stand inside {dma.source}"


def _links(spec: TargetSpec) -> Iterator[Fault]:
    for name, link in spec.links.items():
        if link.topology not in ("host", "network") and (link.chips is None or link.latency is None):
            missing = "latency" if link.chips else "chips"
            yield "PORT-0306", f"links.{name}.{missing}", "the key is missing: chips are joined by this link"
        for operation, ways in link.collectives.items():
            for way, told in ways.items():
                if not (told.latency or told.bandwidth or told.points):
                    path = f"links.{name}.collectives.{operation}.{way}"
                    yield "PORT-0306", path, "it says nothing: give latency, bandwidth or points"
        if link.topology.startswith("torus") and link.ports is None:
            yield "PORT-0306", f"links.{name}.ports", "the key is missing: a torus has so many neighbours"


def _launch(spec: TargetSpec) -> Iterator[Fault]:
    limits = spec.limits
    if limits.workgroup and limits.invocations and max(limits.workgroup.value) > limits.invocations.value:
        yield "PORT-0306", "limits.workgroup", "one dimension alone is more than limits.invocations"
    if limits.resident and limits.invocations and limits.resident.value < limits.invocations.value:
        yield "PORT-0306", "limits.resident", "a core does not hold one full workgroup of limits.invocations"
    if limits.binding_size and limits.buffer_size and limits.binding_size.value > limits.buffer_size.value:
        yield "PORT-0306", "limits.binding-size", "more than limits.buffer-size, which holds it"


def _formats(spec: TargetSpec) -> Iterator[Fault]:
    computed = spec.vector.formats.value if spec.vector else ()
    for name in computed:
        if name not in placing.known():
            yield "PORT-0307", "vector.formats", f"there is no number format {name!r}"
    for name in spec.weights:
        if name not in placing.known():
            yield "PORT-0307", "weights", f"there is no number format {name!r}"
    for short, name in spec.aliases.items():
        if not spec.reads(name) and name not in spec.kv:
            yield "PORT-0307", f"aliases.{short}", f"the kernels do not read {name!r}; see weights and kv"


def _numerics(spec: TargetSpec) -> Iterator[Fault]:
    if spec.numerics is None:
        return
    native = [
        *(spec.matrix.formats if spec.matrix else ()),
        *(spec.vector.formats.value if spec.vector else ()),
    ]
    for how in ("widened", "emulated"):
        for name, to in getattr(spec.numerics, how).items():
            path = f"numerics.{how}.{name}"
            if name not in (*placing.known(), *placing.CLASSES):
                yield "PORT-0307", path, f"{name!r} is neither a number format nor a class of them"
            if to.value not in native:
                yield (
                    "PORT-0307",
                    path,
                    f"{to.value!r} is in neither matrix.formats nor vector.formats: {', '.join(native)}",
                )
            if how == "emulated" and name in spec.numerics.widened:
                yield "PORT-0307", path, "it is widened too"
            members = [n for n in spec.weights if name in (n, placing.class_of(n))]
            lost = [n for n in members if how == "widened" and not placing.holds(str(to.value), n)]
            lost = [
                n for n in lost if n == name or n not in (*spec.numerics.widened, *spec.numerics.emulated)
            ]
            if lost:
                yield "PORT-0307", path, f"not every number of {lost[0]} is one of {to.value}: it is emulated"


def _readable(spec: TargetSpec) -> Iterator[Fault]:
    """Weights that the kernels read are multiplied somehow, next to activations in floats."""
    if spec.family == "host":
        return
    for name in spec.weights:
        if placing.placement(spec, name) is None:
            what = f"neither widened nor emulated says how weights in {name} are multiplied, nor those of"
            what += f" class {placing.class_of(name)}"
            yield "PORT-0307", "numerics", what


def _efficiency(spec: TargetSpec) -> Iterator[Fault]:
    for kernel, table in spec.efficiency.items():
        for name, constants in table.items():
            path = f"efficiency.{kernel}.{name}"
            if placing.base(name) not in placing.known():
                yield "PORT-0307", path, f"there is no number format {name!r}"
            if not (constants.compute or constants.memory or constants.fixed):
                yield "PORT-0306", path, "it says nothing: give compute, memory or fixed"
            if constants.half and kernel != "prefill-attention":
                yield "PORT-0306", f"{path}.half", "only attention over a prompt depends on its tokens"

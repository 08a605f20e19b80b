"""Schedule: every kernel of a program put into a chip's memories and unit steps, and it all as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tvm
from tvm import s_tir, tirx

from porter.errors import TargetError
from porter.lower.tile import attention, variants, vector
from porter.lower.tile.bounds import of_kernels
from porter.lower.tile.capacity import Held, held
from porter.lower.tile.chip import Chip
from porter.lower.tile.nests import apart, fixed, named, with_checks, without_checks
from porter.target import TargetSpec

PRODUCTS = ("product", "pairs")


@dataclass
class Program:
    """A module whose kernels are scheduled, what each holds of each memory, and the names of kernels that are
    not: they compute sizes and places, one number at a time, which is the control processor's work."""

    module: tvm.IRModule
    held: dict[str, list[Held]] = field(default_factory=dict)
    control: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All scheduled kernels, in order of names, each as TVMScript below what it holds on the chip."""
        functions = {g.name_hint: f for g, f in self.module.functions.items()}
        parts = []
        for name, buffers in sorted(self.held.items()):
            lines = [f"# kernel {name}"]
            lines += [
                f"#   {h.level}: {h.name} {list(h.shape)} x {h.slots} = {h.bytes} bytes" for h in buffers
            ]
            parts.append("\n".join([*lines, functions[name].script(show_meta=False)]))
        parts += [f"# kernel {name}: by the control processor" for name in sorted(self.control)]
        return "\n\n".join(parts) + "\n"


def program(module: tvm.IRModule, spec: TargetSpec, bounds: Mapping[str, int]) -> Program:
    """Schedule every kernel of a planned module for a chip of family tile.

    `bounds`: the largest value of each symbol of `main`. Raises TargetError PORT-0435 when a kernel overflows
    a memory, PORT-0436 when results of a unit step break a limit, PORT-0437 when the spec lacks a unit or a
    DMA, PORT-0438 when TVM cannot schedule a kernel.
    """
    result = Program(tvm.IRModule(module.functions, attrs=module.attrs))
    known = of_kernels(module, bounds)
    for global_var, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        name = global_var.name_hint
        found = scheduled(function, name, spec, known.get(name, {}))
        if found is None:
            result.control.append(name)
            continue
        result.module.update_func(global_var, found)
        result.held[name] = held(without_checks(found)[0], Chip(spec), known.get(name, {}))
    return result


def scheduled(
    function: tirx.PrimFunc,
    name: str,
    spec: TargetSpec,
    bounds: Mapping[str, int],
    sizes: Mapping[str, int] | None = None,
) -> tirx.PrimFunc | None:
    """One kernel scheduled, or None where it is not made of blocks. Raises what `program` does.

    `bounds`: the largest value of each symbol of the kernel; `sizes`: values of symbols, which become
    numbers, so that the schedule is for them alone.
    """
    chip = Chip(spec)
    function, checks = without_checks(fixed(function, sizes or {}))
    if apart(function) is None:
        return None
    form = str(function.attrs.get("porter.format", ""))
    kind = str(function.attrs.get("porter.block", ""))
    function = named(function)
    try:
        if form and kind in PRODUCTS:
            result = variants.schedule(function, name, form, chip, bounds)
        elif form and kind == "attention":
            result = attention.schedule(function, name, form, chip, bounds)
        else:
            result = vector.schedule(function, name, chip, bounds)
    except (s_tir.ScheduleError, tvm.error.InternalError, ValueError) as error:
        line = str(error).strip().splitlines()[-1]
        what = f"{name} cannot be scheduled into the memories of {spec.name}: {line}"
        raise TargetError(
            "PORT-0438", what, hint="this is a gap in porter: please report the model"
        ) from error
    return with_checks(result, checks)

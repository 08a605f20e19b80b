"""Step: a scheduled program, the calls of its kernels that make one step; simulated, and as JSON in a bundle.

The JSON is the tree of `porter.simulate.program`: a node is an object whose `do` says its kind, an expression
a number, a name or a list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from porter.errors import TargetError
from porter.simulate.binding import Kernel
from porter.simulate.expression import KINDS, Expression, exact, substituted, variables
from porter.simulate.kernel import simulate
from porter.simulate.program import Buffer, Copy, Loop, Matrix, Program, Vector, When
from porter.simulate.result import KernelTime, StepTime
from porter.target import TargetSpec

CONTROL = "the control processor's"
SCHEMA = "porter.program/1"
_NODES: dict[str, type] = {"copy": Copy, "matrix": Matrix, "vector": Vector, "loop": Loop, "when": When}


@dataclass(frozen=True)
class Call:
    """A launch of a kernel; `sizes` of the kernel's symbols are expressions of the program's."""

    kernel: str
    sizes: tuple[tuple[str, Expression], ...]

    def at(self, dimensions: Mapping[str, int]) -> dict[str, int]:
        """The kernel's symbols as numbers. Raises TargetError PORT-0447 for a symbol without a size."""
        found = {}
        for name, size in self.sizes:
            known = substituted(size, dimensions)
            if missing := sorted(variables(known)):
                what = f"nothing says how large the dimension {missing[0]!r} is"
                where = f"a call of {self.kernel}"
                raise TargetError("PORT-0447", what, where, f"known: {', '.join(sorted(dimensions))}")
            found[name] = exact(known, {})
        return found


@dataclass(frozen=True)
class Step:
    """`calls` of kernels, one after the other. `untimed` says of kernels that are not there, why."""

    kernels: Mapping[str, Kernel]
    untimed: Mapping[str, str]
    calls: tuple[Call, ...]

    def simulate(self, dimensions: Mapping[str, int], spec: TargetSpec) -> StepTime:
        """The time of the step with the program's symbols at `dimensions`.

        Calls of one kernel with the same sizes are simulated once. Kernels that cannot be timed are
        `untimed` in the result too. Raises TargetError PORT-0447 for a symbol without a size, PORT-0449 for
        a kernel that is not there.
        """
        programs: Counter[Program] = Counter()
        untimed: Counter[str] = Counter()
        reasons = dict(self.untimed)
        for call, number in Counter(self.calls).items():
            if call.kernel in reasons:
                untimed[call.kernel] += number
            elif call.kernel in self.kernels:
                programs[self.kernels[call.kernel].at(call.at(dimensions))] += number
            else:
                what = "a launch calls a kernel that has no scheduled program"
                raise TargetError("PORT-0449", what, call.kernel)
        times: list[tuple[KernelTime, int]] = []
        for program, number in programs.items():
            try:
                times.append((simulate(program, spec), number))
            except TargetError as error:
                untimed[program.name] += number
                reasons[program.name] = error.what
        return StepTime(tuple(times), {name: (n, reasons[name]) for name, n in untimed.items()})

    def write(self, file: Path) -> None:
        """As one line of JSON, the same for the same step."""
        document = {
            "schema": SCHEMA,
            "kernels": {name: _plain(kernel) for name, kernel in sorted(self.kernels.items())},
            "untimed": dict(sorted(self.untimed.items())),
            "calls": _plain(self.calls),
        }
        file.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Step:
        """What `write` wrote. Raises TargetError PORT-0440 when it is not that."""
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError(f"it is of schema {document['schema']}")
            kernels = {str(name): _kernel(told) for name, told in document["kernels"].items()}
            untimed = {str(name): str(why) for name, why in document["untimed"].items()}
            calls = tuple(_call(told) for told in document["calls"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"the program of the bundle cannot be read: {error or type(error).__name__}"
            raise TargetError("PORT-0440", what, str(file), "convert the model again") from error
        return cls(kernels, untimed, calls)


def _plain(part: Any) -> Any:
    if is_dataclass(part):
        do = next((name for name, kind in _NODES.items() if isinstance(part, kind)), "")
        told = {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
        return {"do": do, **told} if do else told
    return [_plain(each) for each in part] if isinstance(part, tuple) else part


def _call(told: dict[str, Any]) -> Call:
    return Call(str(told["kernel"]), tuple((str(name), _expression(size)) for name, size in told["sizes"]))


def _kernel(told: dict[str, Any]) -> Kernel:
    buffers = tuple(Buffer(str(b["name"]), str(b["level"]), int(b["slots"])) for b in told["buffers"])
    names = tuple(map(str, told["symbols"]))
    return Kernel(str(told["name"]), names, buffers, tuple(map(_node, told["body"])))


def _node(told: dict[str, Any]) -> Any:
    kind = _NODES[told["do"]]
    given: dict[str, Any] = {}
    for field in fields(kind):
        part = told[field.name]
        if field.name == "body":
            given["body"] = tuple(map(_node, part))
        elif str(field.type) == "Expression":
            given[field.name] = _expression(part)
        elif str(field.type).startswith("tuple"):
            given[field.name] = tuple(map(str, part))
        else:
            given[field.name] = part
    return kind(**given)


def _expression(told: Any) -> Any:
    if isinstance(told, int | str):
        return told
    kind, *parts = told
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of expression")
    if kind in ("count", "together"):
        parts[0] = tuple((_expression(a), _expression(b)) for a, b in parts[0])
        return (kind, parts[0], *map(_expression, parts[1:]))
    return (kind, *map(_expression, parts))

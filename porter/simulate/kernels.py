"""Kernels: those of a scheduled program, by name, and which of them have no time; as JSON in a bundle.

The JSON is the tree of `porter.simulate.program`: a node is an object whose `do` says its kind, an expression
a number, a name or a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from porter.errors import TargetError
from porter.simulate.binding import Kernel
from porter.simulate.expression import KINDS
from porter.simulate.program import Buffer, Copy, Loop, Matrix, Program, Vector, When

CONTROL = "the control processor's"
SCHEMA = "porter.program/1"
_NODES: dict[str, type] = {"copy": Copy, "matrix": Matrix, "vector": Vector, "loop": Loop, "when": When}


@dataclass(frozen=True)
class Kernels:
    """`found` are the kernels, `untimed` says of the others why they have no time."""

    found: Mapping[str, Kernel]
    untimed: Mapping[str, str]

    def __call__(self, kernel: str, shapes: Sequence[Sequence[int]], integers: Sequence[int]) -> Program:
        """The program of a call. Raises TargetError PORT-0449 for a kernel that is not there, PORT-0447 for
        arguments that do not fit it."""
        if kernel not in self.found:
            raise TargetError("PORT-0449", "a launch calls a kernel that has no scheduled program", kernel)
        return self.found[kernel].called(shapes, integers)

    def write(self, file: Path) -> None:
        """As one line of JSON, the same for the same kernels."""
        kernels = {name: _plain(kernel) for name, kernel in sorted(self.found.items())}
        document = {"schema": SCHEMA, "kernels": kernels, "untimed": dict(sorted(self.untimed.items()))}
        file.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Kernels:
        """What `write` wrote. Raises TargetError PORT-0440 when it is not that."""
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError(f"it is of schema {document['schema']}")
            found = {str(name): _kernel(told) for name, told in document["kernels"].items()}
            untimed = {str(name): str(why) for name, why in document["untimed"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"the kernels of the bundle cannot be read: {error or type(error).__name__}"
            raise TargetError("PORT-0440", what, str(file), "convert the model again") from error
        return cls(found, untimed)


def _plain(part: Any) -> Any:
    if is_dataclass(part):
        do = next((name for name, kind in _NODES.items() if isinstance(part, kind)), "")
        told = {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
        return {"do": do, **told} if do else told
    return [_plain(each) for each in part] if isinstance(part, tuple) else part


def _kernel(told: dict[str, Any]) -> Kernel:
    buffers = tuple(Buffer(str(b["name"]), str(b["level"]), int(b["slots"])) for b in told["buffers"])
    parameters = tuple(p if isinstance(p, str) else tuple(map(_expression, p)) for p in told["parameters"])
    names = tuple(map(str, told["symbols"]))
    return Kernel(str(told["name"]), names, parameters, buffers, tuple(map(_node, told["body"])))


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

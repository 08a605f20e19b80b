"""Watched: a lowered program whose kernels' results are read, and replaced, while it runs.

The program is the bundle's own, unchanged: TVM's virtual machine tells of every call, and buffers are written
to between calls. So nothing is fused otherwise than where nobody looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm

from porter.context import Feeds
from porter.errors import BundleError
from porter.run.host import HostRunner


@dataclass(frozen=True)
class Result:
    """A value of the model that a launch leaves in a buffer: the number of the launch, and of the buffer
    among its tensors, from the end if negative."""

    name: str
    launch: int
    kernel: str
    argument: int


class Watched:
    """The program in a bundle's folder; `model` is what it was compiled from.

    `results` are the values of the model that can be read, in the order they are made; `kernels` the kernel
    that does most for each node.
    Raises BundleError PORT-0501 as HostRunner does.
    """

    def __init__(self, folder: Path, model: ir.Model) -> None:
        self.runner = HostRunner(folder)
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self._kernels = [launch["kernel"] for launch in plan["launches"]]
        self._names = {*self._kernels}
        self.results = list(_results(plan, model))
        self.kernels = _kernels(plan)
        self._library = folder / plan["library"]
        self.tapped: tuple[Path, str, list[np.ndarray], int] | None = None
        self._after: dict[int, list[Result]] = {}
        for result in self.results:
            self._after.setdefault(result.launch, []).append(result)

    def run(
        self,
        feeds: Feeds,
        wanted: Collection[str],
        cut: Collection[str],
        given: Callable[[str], np.ndarray],
        seen: Callable[[str, np.ndarray], None],
        tap: str = "",
    ) -> Feeds:
        """Outputs by name. After a launch `seen` is told of the `wanted` values that it made, and those that
        are `cut` are overwritten with what is `given`. `tapped` then has of the launch that makes the value
        `tap`: the library, the kernel, its arguments before the call, and which of them is the result.

        Raises BundleError PORT-0610 when the program makes other calls than its plan lists.
        """
        at, failure = 0, None

        def watch(function: Any, name: str, before: bool, made: Any, *arguments: Any) -> int:
            nonlocal at, failure
            if name not in self._names or failure is not None:
                return 0
            if before:
                self._tap(at, tap, arguments)
                return 0
            try:
                self._check(at, name)
                tensors = [a for a in arguments if isinstance(a, tvm.runtime.Tensor)]
                for result in self._after.get(at, ()):
                    tensor = tensors[result.argument]
                    if result.name in wanted:
                        seen(result.name, tensor.numpy())
                    if result.name in cut:
                        _write(tensor, given(result.name))
            except Exception as error:  # the machine that calls this cannot pass it on
                failure = error
            at += 1
            return 0

        self.runner.instrument(watch)
        try:
            outputs = self.runner.run(feeds)
        finally:
            self.runner.instrument(lambda *_: 0)
        if failure is not None:
            raise failure
        return outputs

    def _tap(self, at: int, value: str, arguments: tuple[Any, ...]) -> None:
        for result in self._after.get(at, ()):
            if result.name == value:
                tensors = [i for i, a in enumerate(arguments) if isinstance(a, tvm.runtime.Tensor)]
                kept = [np.array(a.numpy() if i in tensors else int(a)) for i, a in enumerate(arguments)]
                self.tapped = self._library, result.kernel, kept, tensors[result.argument]

    def _check(self, at: int, name: str) -> None:
        if at >= len(self._kernels) or self._kernels[at] != name:
            raise BundleError("PORT-0610", f"launch {at} is {name!r}, which the plan does not have there",
                              hint="convert the model again")  # fmt: skip


def call(library: Path, kernel: str, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Call a kernel of a program's library by itself; the arguments as they are after it."""
    function = tvm.runtime.load_module(str(library)).get_function(kernel, True)
    lent = [tvm.runtime.tensor(a) if a.ndim or a.dtype != np.int64 else int(a) for a in arguments]
    function(*lent)
    return [a if isinstance(a, int) else a.numpy() for a in lent]


def _write(tensor: tvm.runtime.Tensor, array: np.ndarray) -> None:
    shape = tuple(int(d) for d in tensor.shape)
    if array.size:
        tensor.copyfrom(np.ascontiguousarray(array).reshape(shape))


def _results(plan: dict[str, Any], model: ir.Model) -> Sequence[Result]:
    """The values of the model that launches make: those of a launch's nodes that others read, in order."""
    nodes = {n.name or n.outputs[0].name or n.op_type: n for n in model.graph}
    written = {b["name"]: b["first"] for b in plan["buffers"] if b["kind"] in ("workspace", "output")}
    in_place = {past: present for present, past in plan["in_place"].items()}
    last = {name: i for i, launch in enumerate(plan["launches"]) for name in launch["nodes"]}
    found = []
    for i, launch in enumerate(plan["launches"]):
        buffers = launch["buffers"]
        own = [nodes[n] for n in launch["nodes"] if n in nodes and last[n] == i]
        values = [v for n in own for v in n.outputs if v.name and _leaves(v, own)]
        overwritten = [j for j, b in enumerate(buffers) if in_place.get(b) in {v.name for v in values}]
        # Constants are arguments too, but no buffers of the plan: results are counted from the end.
        fresh = [j - len(buffers) for j, b in enumerate(buffers) if written.get(b) == i]
        places = overwritten or fresh
        if len(places) == len(values):
            found += [Result(v.name, i, launch["kernel"], j) for v, j in zip(values, places, strict=True)]
    return found


def _kernels(plan: dict[str, Any]) -> dict[str, str]:
    """Of each node the first kernel that is not there for shapes alone."""
    found: dict[str, str] = {}
    for launch in plan["launches"]:
        for node in launch["nodes"]:
            if found.get(node, "sizes_").startswith(("sizes_", "reshape")):
                found[node] = launch["kernel"]
    return found


def _leaves(value: ir.Value, nodes: list[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())

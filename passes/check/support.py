"""Change nothing; refuse a model with an operator or element type that cannot be lowered, naming all.

Celu(x)  ->  PORT-0401: the lowering has no Celu (1 node: act_1)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.errors import TargetError
from porter.lower.supported import OPERATORS, PREFIXES, TYPES
from porter.pipeline import Pass, Promise

SHOWN = 3  # names of nodes or tensors for each thing that is missing


@dataclass(frozen=True)
class CheckSupport(Pass):
    """Raises TargetError PORT-0401 for operators, PORT-0402 for element types."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, model: ir.Model, context: Context) -> int:
        """0: there is nothing to edit."""
        where: dict[str, list[str]] = defaultdict(list)
        for node in model.graph.all_nodes():
            if _identifier(node) not in OPERATORS and not _identifier(node).startswith(PREFIXES):
                where[_identifier(node)].append(node.name or str(node.outputs[0].name))
        if where:
            hint = "rewrite them with a pass of your own, or run the model on a target that has them"
            raise TargetError("PORT-0401", f"the lowering has no {_listed(where, 'node')}", hint=hint)
        for value in _values(model.graph):
            if value.dtype is not None and value.dtype.name not in TYPES:
                where[value.dtype.name.lower()].append(str(value.name))
        if where:
            hint = "export in float32"
            raise TargetError(
                "PORT-0402", f"the lowering has no tensors of {_listed(where, 'tensor')}", hint=hint
            )
        return 0


def _identifier(node: ir.Node) -> str:
    """`Add`, or `domain.Name` outside ONNX's own domain."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and results, those of subgraphs too."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from attribute.value.inputs
                yield from attribute.value.initializers.values()


def _listed(where: dict[str, list[str]], noun: str) -> str:
    """`Celu (1 node: act_1), Mish (2 nodes: a, b)`, in alphabetical order."""
    return ", ".join(f"{name} ({_counted(places, noun)})" for name, places in sorted(where.items()))


def _counted(places: list[str], noun: str) -> str:
    more = ", …" if len(places) > SHOWN else ""
    return f"{len(places)} {noun}{'s' if len(places) > 1 else ''}: {', '.join(places[:SHOWN])}{more}"

"""Read a node's attributes with their ONNX defaults."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The attribute's Python value, or `default` where the node does not say."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def axis_of(node: ir.Node, rank: int, default: int, name: str = "axis") -> int:
    """An axis attribute counted from the front."""
    axis = int(attribute(node, name, default))
    return axis + rank if axis < 0 else axis

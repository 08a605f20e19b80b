"""Write a sequence of slices, whose members are picked by number, as one Split.

    s = SplitToSequence<axis>(x, sizes); a = SequenceAt(s, 0); b = SequenceAt(s, -1)
        -> a, b = Split<axis>(x, sizes)

What torch.split and torch.chunk are exported as. The sizes and the length of the axis must be numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter.context import Context
from porter.match import add_initializer, attribute, constant, fresh_name, given, graphs
from porter.pipeline import Pass, Promise


@dataclass(frozen=True)
class UnpackSequences(Pass):
    """Turn SplitToSequence with SequenceAt into Split."""

    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ("clean.opset",)

    def run(self, model: ir.Model, context: Context) -> int:
        """The number of sequences unpacked."""
        return sum(
            _unpack(node) for graph in graphs(model) for node in graph if node.op_type == "SplitToSequence"
        )


def _unpack(node: ir.Node) -> bool:
    sizes, picks = _sizes(node), _picks(node)
    if sizes is None or picks is None or not all(-len(sizes) <= p < len(sizes) for p in picks.values()):
        return False
    lengths = add_initializer(node.graph, f"{node.outputs[0].name}_sizes", np.array(sizes))
    axis = ir.AttrInt64("axis", int(attribute(node, "axis", 0)))
    split = ir.Node("", "Split", [node.inputs[0], lengths], [axis], num_outputs=len(sizes), name=node.name)
    split.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, split)
    for at, pick in picks.items():
        old, new = at.outputs[0], split.outputs[pick]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove([*picks, node], safe=True)
    for i, output in enumerate(split.outputs):
        output.name = output.name or fresh_name(split.graph, f"{split.name}_part_{i}")
    return True


def _sizes(node: ir.Node) -> list[int] | None:
    """Length of each part along the axis, None when it does not follow or the parts lose their axis."""
    shape, axis = node.inputs[0].shape, int(attribute(node, "axis", 0))
    total = shape[axis] if shape is not None else None
    if not isinstance(total, int):
        return None
    if given(node, 1) is None:
        return [1] * total if attribute(node, "keepdims", 1) else None
    sizes = constant(node.inputs[1])
    if sizes is None:
        return None
    if sizes.ndim:
        return [int(s) for s in sizes] if int(sizes.sum()) == total else None
    whole, tail = divmod(total, int(sizes))
    return [int(sizes)] * whole + [tail] * bool(tail)


def _picks(node: ir.Node) -> dict[ir.Node, int] | None:
    """Which member each reader of the sequence takes, None when one does anything else with it."""
    picks: dict[ir.Node, int] = {}
    for use in node.outputs[0].uses():
        position = constant(use.node.inputs[1]) if use.node.op_type == "SequenceAt" else None
        if position is None or position.size != 1:
            return None
        picks[use.node] = int(position.reshape(()))
    return None if node.outputs[0].is_graph_output() else picks

"""Provenance: which pass made or changed each node, written on the node as `porter.pass: 3:fuse.rms_norm`.

The number is the pass's place in the pipeline. Blame reads it; nothing else depends on it.
"""

from __future__ import annotations

import onnx_ir as ir

KEY = "porter.pass"


class Provenance:
    """Looks at a model between passes, and marks what is new or different on the nodes."""

    def __init__(self, model: ir.Model) -> None:
        self._known = _signatures(model)
        self._steps = 0

    def after(self, name: str, model: ir.Model) -> None:
        """The pass `name` has run."""
        now = _signatures(model)
        for node, signature in now.items():
            if self._known.get(node) != signature:
                node.metadata_props[KEY] = f"{self._steps}:{name}"
        self._known, self._steps = now, self._steps + 1


def _signatures(model: ir.Model) -> dict[ir.Node, tuple]:
    """What a node computes and of which values; the objects are kept, so that no other takes their place."""
    return {
        node: (
            node.op_type,
            tuple(_Same(v) for v in node.inputs),
            tuple(_Same(v.const_value) for v in node.inputs if v is not None),
            tuple((name, _Same(a)) for name, a in node.attributes.items()),
        )
        for node in model.graph
    }


class _Same:
    """Equal to itself alone."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._held is other._held

    __hash__ = None  # type: ignore[assignment]

"""The table of operators that `clean.contrib` rewrites: (domain, name) -> how."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from porter.foreign import attention, blocks, integers, layers
from porter.foreign.editor import Editor
from porter.graph.structure import FOREIGN

CONTRIB = "com.microsoft"
_FUSED = {**attention.TABLE, **blocks.TABLE, **integers.TABLE, **layers.TABLE}
TABLE: dict[tuple[str, str], Callable[[Editor], None]] = {
    **{(CONTRIB, name): rewrite for name, rewrite in _FUSED.items()},
    **{("", name): rewrite for name, rewrite in integers.STANDARD.items()},
    **{("", name): layers.TABLE[name] for name in FOREIGN},
}


def rewriter(node: ir.Node) -> Callable[[Editor], None] | None:
    """How to rewrite a node, or None."""
    return TABLE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))

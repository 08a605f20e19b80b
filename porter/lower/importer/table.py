"""The table of importers: operator name -> function(importer, node, *inputs) -> value or tuple of values."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from porter.lower.importer import (
    attention,
    borrowed,
    caches,
    casts,
    certified,
    dynamic,
    elementwise,
    gathers,
    linear,
    parts,
    quantized,
    reductions,
    shapes,
    unary,
)

Function = Callable[..., object]

TABLES: dict[str, dict[str, Function]] = {
    "": {
        **elementwise.TABLE,
        **unary.TABLE,
        **casts.TABLE,
        **shapes.TABLE,
        **parts.TABLE,
        **reductions.TABLE,
        **linear.TABLE,
        **gathers.TABLE,
        **attention.TABLE,
        **quantized.TABLE,
        **dynamic.TABLE,
        **borrowed.TABLE,
    },
    "porter": quantized.FUNCTIONS,
}


PREFIXES: dict[str, Function] = {**caches.PREFIXES, **certified.PREFIXES}


def function_for(node: ir.Node) -> Function | None:
    """The importer of a node's operator, or None."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain == "porter":  # functions of a body each, by what their names begin with
        for prefix, function in PREFIXES.items():
            if node.op_type.startswith(prefix):
                return function
    return TABLES.get(domain, {}).get(node.op_type)

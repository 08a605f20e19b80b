"""Indexed: which inputs number the rows of a table, and how many rows there are."""

from __future__ import annotations

import onnx_ir as ir

KEEPS = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity")  # whose result holds the same numbers


def rows(value: ir.Value) -> int:
    """The rows of the smallest table that the input's integers number, 0 where there is none, or none of a
    known size: a Gather takes them as they come, -rows to rows - 1 by ONNX."""
    found = []
    for user, place in value.uses():
        if user.op_type == "Gather" and place == 1:
            table, axis = user.inputs[0], user.attributes.get_int("axis", 0)
            size = table.shape[axis] if table is not None and table.shape is not None else 0
            found.append(size if isinstance(size, int) else 0)
        elif user.op_type in KEEPS and place == 0:
            found.append(rows(user.outputs[0]))
    return min((n for n in found if n), default=0)

"""Tidy the graph that torch.onnx wrote, changing no arithmetic.

Identity nodes, dead nodes and the exporter's notes go; every weight gets its PyTorch name; tied weights
become one.

    inner.lm_head.weight [same memory as inner.model.embed_tokens.weight]  ->  model.embed_tokens.weight
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import onnx_ir as ir

from porter import __version__

if TYPE_CHECKING:
    import torch

    from porter.export.source import Source

_PREFIX = "inner."


def clean(model: ir.Model, flat: Source) -> None:
    """Tidy in place: PyTorch names, one copy of tied weights, no dead nodes, no local paths."""
    import onnx

    common = ir.passes.common
    _name_weights(model, flat.module)
    for step in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    _clear_metadata(model)
    model.producer_name, model.producer_version = "porter", __version__
    opset = onnx.helper.make_opsetid("", model.opset_imports[""])
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for([opset]))
    model.metadata_props.update(flat.metadata)


def _name_weights(model: ir.Model, module: torch.nn.Module) -> None:
    """Give initializers their PyTorch names; tensors that share memory become one under the first name."""
    first = _first_names(module)
    weights = model.graph.initializers
    interface = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
    for value in list(weights.values()):
        first_name = first.get(value.name, value.name)
        name = first_name.removeprefix(_PREFIX)
        if name in interface:  # a parameter that has the name of an input or output keeps the prefix
            name = first_name
        if name == value.name:
            continue
        if name in weights:
            value.replace_all_uses_with(weights[name])
            weights.pop(value.name)
        else:
            _make_room(model, name)
            value.name = name


def _first_names(module: torch.nn.Module) -> dict[str, str]:
    """Name -> the first name of a parameter or buffer that is the same memory seen the same way."""
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    seen: dict[tuple, str] = {}
    return {n: seen.setdefault((t.data_ptr() or n, t.dtype, t.shape, t.stride()), n) for n, t in tensors}


def _make_room(model: ir.Model, name: str) -> None:
    """Rename a computed value that holds `name`."""
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                value.name = f"{name}_computed"


def _clear_metadata(model: ir.Model) -> None:
    """Drop the exporter's notes, which hold local paths, but keep which module each node comes from."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(f for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _clear_value(value)
    for node in model.graph.all_nodes():
        path = _module_path(node)
        node.metadata_props.clear()
        node.doc_string = None
        if path:
            node.metadata_props["porter.module"] = path
        for value in node.outputs:
            _clear_value(value)


def _clear_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    if value.const_value is not None:
        value.const_value.doc_string = None


def _module_path(node: ir.Node) -> str:
    """`model.layers.0.self_attn` of a node that was traced inside that module, else an empty text."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    inside = [s for s in scopes[:-1] if s.startswith(_PREFIX)]  # the last is the operation itself
    return inside[-1].removeprefix(_PREFIX) if inside else ""

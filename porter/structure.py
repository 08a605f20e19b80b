"""Whether a graph is well formed: values defined once and in order, operators as their schemas say."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from porter.errors import ModelError
from porter.mapped import all_nodes
from porter.untrusted import shown

# Domains whose every operator onnx has a schema for. Other domains are let through here; check.support judges
# them.
CHECKED = ("", "ai.onnx.ml", "ai.onnx.preview.training")
OWN = "porter"  # its operators are model-local functions, or a mistake

Defined = ChainMap[str, ir.Value]


def verify(model: ir.Model) -> None:
    """Raise ModelError unless the model is well formed; reads no weights, so it can follow every pass.

    PORT-0106: an opset newer than onnx knows. PORT-0120: used before it is made. PORT-0121: undefined.
    PORT-0122: a name used twice. PORT-0123: unknown operator. PORT-0124: wrong number of inputs or outputs.
    PORT-0125: wrong attributes. PORT-0129: functions that call each other in a circle.
    """
    _check_calls(model)
    bodies = [(model.graph, model.opset_imports)]
    bodies += [(f.graph, f.opset_imports) for f in model.functions.values()]
    for graph, opsets in bodies:
        _check_opsets(opsets)
        _check_graph(graph, ChainMap(), opsets, model.functions)


def sort(model: ir.Model) -> None:
    """Sort nodes topologically, moving as few as possible. Raises ModelError PORT-0120 on a cycle."""
    for graph in [model.graph, *(f.graph for f in model.functions.values())]:
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError("PORT-0120", "the graph has a cycle", where=shown(graph.name)) from error


def _check_opsets(opsets: Mapping[str, int]) -> None:
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 1) > newest:
        what = f"the model uses opset {opsets['']}, newer than {newest}, the newest porter knows"
        raise ModelError("PORT-0106", what, hint="export it again with an older opset")


def _check_calls(model: ir.Model) -> None:
    """No function may reach itself; depth-first without recursion, because a chain may be long."""
    calls = {
        key: [n.op_identifier() for n in f.all_nodes() if n.op_identifier() in model.functions]
        for key, f in model.functions.items()
    }
    done: set[tuple[str, str, str]] = set()
    for start in calls:
        path, stack = [], [(start, False)]
        while stack:
            key, leaving = stack.pop()
            if leaving:
                done.add(path.pop())
            elif key in path:
                raise ModelError(
                    "PORT-0129", "a function calls itself, directly or through others", where=shown(key[1])
                )
            elif key not in done:
                path.append(key)
                stack += [(key, True), *((called, False) for called in calls[key])]


def _check_graph(graph: ir.Graph, outer: Defined, opsets: Mapping[str, int], functions: Mapping) -> None:
    defined = outer.new_child()
    for value in graph.inputs:
        _define(value, defined)
    for value in graph.initializers.values():
        if value.const_value is None:
            raise ModelError("PORT-0121", "an initializer has no value", where=shown(value.name))
        if not value.is_graph_input():
            _define(value, defined)
    for node in graph:
        for value in node.inputs:
            if value is not None:
                _check_defined(value, defined, _label(node))
        _check_node(node, opsets, functions)
        for inner in _subgraphs(node):
            _check_graph(inner, defined, opsets, functions)
        for value in node.outputs:
            if value.name or value.uses():
                _define(value, defined)
    _check_outputs(graph, defined)


def _check_outputs(graph: ir.Graph, defined: Defined) -> None:
    seen: set[str | None] = set()
    for value in graph.outputs:
        _check_defined(value, defined, "the graph's outputs")
        if value.name in seen:
            raise ModelError("PORT-0122", "a value is listed twice as an output", where=shown(value.name))
        seen.add(value.name)


def _define(value: ir.Value, defined: Defined) -> None:
    if not value.name:
        raise ModelError("PORT-0127", "a value that is used has no name", where=shown(value.producer()))
    if value.name in defined.maps[0]:
        raise ModelError("PORT-0122", f"two things claim the value name {shown(value.name)!r}")
    defined[value.name] = value


def _check_defined(value: ir.Value, defined: Defined, user: str) -> None:
    if defined.get(value.name or "") is value:
        return
    producer = value.producer()
    if producer is None or producer.graph is None:
        what = f"the value {shown(value.name)!r} is used, but nothing in the model makes it"
        raise ModelError("PORT-0121", what, where=user)
    raise ModelError("PORT-0120", f"the value {shown(value.name)!r} is used before it is made", where=user)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found.extend(attribute.as_graphs())
    return found


def _label(node: ir.Node) -> str:
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{shown(op)} {shown(node.name)}" if node.name else shown(op)


def _check_node(node: ir.Node, opsets: Mapping[str, int], functions: Mapping) -> None:
    if node.domain not in opsets:
        what = f"the operator's domain {shown(node.domain)!r} is not among the opset imports"
        raise ModelError("PORT-0123", what, where=_label(node))
    function = functions.get(node.op_identifier())
    if function is not None:
        _check_call(node, function)
    elif node.domain in CHECKED:
        _check_schema(node, _schema(node.op_type, opsets[node.domain], node.domain))
    elif node.domain == OWN:
        raise ModelError("PORT-0123", "the model has no such function", where=_label(node))


def _check_call(node: ir.Node, function: ir.Function) -> None:
    if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
        what = f"the function takes {len(function.inputs)} inputs and makes {len(function.outputs)} outputs"
        raise ModelError("PORT-0124", what, where=_label(node))
    required = {a.name for a in function.attributes.values() if a.value is None}
    missing = required - set(node.attributes)
    unknown = set(node.attributes) - set(function.attributes)
    if missing or unknown:
        _attribute_error(node, missing, unknown)


@functools.cache
def _schema(op: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None


def _check_schema(node: ir.Node, schema: onnx.defs.OpSchema | None) -> None:
    if schema is None or schema.deprecated:
        newest = _schema(node.op_type, onnx.defs.onnx_opset_version(), node.domain)
        hint = f"it exists since opset {newest.since_version}" if newest and not newest.deprecated else ""
        raise ModelError("PORT-0123", "the model's opset has no such operator", where=_label(node), hint=hint)
    _check_counts(node, schema)
    known = schema.attributes
    missing = {name for name, a in known.items() if a.required} - set(node.attributes)
    unknown = set(node.attributes) - set(known)
    if missing or unknown:
        _attribute_error(node, missing, unknown)
    for name, attribute in node.attributes.items():
        if attribute.type.value != known[name].type.value:
            what = f"the attribute {name!r} is {attribute.type.name}, not {known[name].type.name}"
            raise ModelError("PORT-0125", what, where=_label(node))


def _attribute_error(node: ir.Node, missing: set[str], unknown: set[str]) -> None:
    what = f"lacks the attribute {min(missing)!r}" if missing else f"has no attribute {shown(min(unknown))!r}"
    raise ModelError("PORT-0125", f"the operator {what}", where=_label(node))


def _check_counts(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    given = max((i + 1 for i, value in enumerate(node.inputs) if value is not None), default=0)
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    absent = [
        f.name for f, v in zip(schema.inputs, node.inputs, strict=False) if v is None and f.option == single
    ]
    if absent or not schema.min_input <= given <= schema.max_input:
        what = (
            f"lacks its input {absent[0]!r}"
            if absent
            else f"has {given} inputs, not {_span(schema.min_input, schema.max_input)}"
        )
        raise ModelError("PORT-0124", f"the operator {what}", where=_label(node))
    made = max((i + 1 for i, value in enumerate(node.outputs) if value.name or value.uses()), default=0)
    if not schema.min_output <= made <= schema.max_output:
        what = f"the operator has {made} outputs, not {_span(schema.min_output, schema.max_output)}"
        raise ModelError("PORT-0124", what, where=_label(node))


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


__all__ = ["all_nodes", "sort", "verify"]

"""Whether a graph is well formed: values defined once and in order, operators as their schemas say."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Mapping, Set
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from porter.errors import ModelError
from porter.graph.untrusted import shown

# Domains whose every operator onnx has a schema for. Other domains are let through here; check.support judges
# them.
CHECKED = ("", "ai.onnx.ml", "ai.onnx.preview.training")
FOREIGN = ("SimplifiedLayerNormalization",)  # which ONNX Runtime keeps in ONNX's own domain
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
    for domain, version in opsets.items():
        if not 0 < version < 2**31:
            raise ModelError("PORT-0106", f"no domain has a version {version}", where=shown(domain))


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
                _check_defined(value, defined, node)
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
        _check_defined(value, defined, None)
        if value.name in seen:
            raise ModelError("PORT-0122", "a value is listed twice as an output", where=shown(value.name))
        seen.add(value.name)


def _define(value: ir.Value, defined: Defined) -> None:
    if not value.name:
        raise ModelError("PORT-0127", "a value that is used has no name", where=shown(value.producer()))
    if value.name in defined.maps[0]:
        raise ModelError("PORT-0122", f"two things claim the value name {shown(value.name)!r}")
    defined[value.name] = value


def _check_defined(value: ir.Value, defined: Defined, node: ir.Node | None) -> None:
    if defined.get(value.name or "") is value:
        return
    producer, user = value.producer(), _label(node) if node is not None else "the graph's outputs"
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
    elif node.domain in CHECKED and node.op_type not in FOREIGN:
        _check_operator(node, _signature(node.op_type, opsets[node.domain], node.domain))
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


@dataclass(frozen=True)
class Signature:
    """What a schema asks for, read once: onnx converts it anew at every look."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    single: tuple[tuple[int, str], ...]  # inputs that may not be left out
    attributes: Mapping[str, str]  # the type by name
    required: frozenset[str]
    since: int


@functools.lru_cache(maxsize=4096)
def _signature(op: str, version: int, domain: str) -> Signature | None:
    """None for an operator that the opset does not have, or no longer has."""
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return Signature(
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        single=tuple((i, f.name) for i, f in enumerate(schema.inputs) if f.option == single),
        attributes={name: a.type.name for name, a in schema.attributes.items()},
        required=frozenset(name for name, a in schema.attributes.items() if a.required),
        since=schema.since_version,
    )


def _check_operator(node: ir.Node, signature: Signature | None) -> None:
    if signature is None:
        newest = _signature(node.op_type, onnx.defs.onnx_opset_version(), node.domain)
        hint = f"it exists since opset {newest.since}" if newest else ""
        raise ModelError("PORT-0123", "the model's opset has no such operator", where=_label(node), hint=hint)
    _check_counts(node, signature)
    if not node.attributes and not signature.required:
        return
    missing = signature.required - node.attributes.keys()
    unknown = node.attributes.keys() - signature.attributes.keys()
    if missing or unknown:
        _attribute_error(node, missing, unknown)
    for name, attribute in node.attributes.items():
        if attribute.type.name != signature.attributes[name]:
            what = f"the attribute {name!r} is {attribute.type.name}, not {signature.attributes[name]}"
            raise ModelError("PORT-0125", what, where=_label(node))


def _attribute_error(node: ir.Node, missing: Set[str], unknown: Set[str]) -> None:
    what = f"lacks the attribute {min(missing)!r}" if missing else f"has no attribute {shown(min(unknown))!r}"
    raise ModelError("PORT-0125", f"the operator {what}", where=_label(node))


def _check_counts(node: ir.Node, signature: Signature) -> None:
    for i, name in signature.single:
        if i < len(node.inputs) and node.inputs[i] is None:
            raise ModelError("PORT-0124", f"the operator lacks its input {name!r}", where=_label(node))
    given = max((i + 1 for i, value in enumerate(node.inputs) if value is not None), default=0)
    made = max((i + 1 for i, value in enumerate(node.outputs) if value.name or value.uses()), default=0)
    for count, (low, high), kind in (
        (given, signature.inputs, "inputs"),
        (made, signature.outputs, "outputs"),
    ):
        if not low <= count <= high:
            what = f"the operator has {count} {kind}, not {_span(low, high)}"
            raise ModelError("PORT-0124", what, where=_label(node))


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"

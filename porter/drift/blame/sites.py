"""Sites: the piece of a graph that makes an aligned value of others, and what is known of it.

value      the aligned value that it makes
nodes      all between that value and the aligned values before it; constants (weights being decoded) apart
node       the one that does most: a linear layer, an attention, else the last
storage    what its weights are stored in, or the formats that it casts to, besides float32
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile

import onnx_ir as ir

from porter.drift.blame.align import Alignment
from porter.drift.blame.pieces import constant_nodes, reads
from porter.drift.blame.sides import Side
from porter.weights.select import is_linear

MODULE, PASS = "porter.module", "porter.pass"
FULL = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
ATTENTION = ("Attention", "CertifiedAttention", "GroupQueryAttention", "MultiHeadAttention")
_CASTS = ("Cast", "QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Site:
    """See above. `inputs` are the values that come in, aligned or the graph's; `module` is PyTorch's path and
    `made_by` the pass that made or changed it last, "" where nothing tells."""

    value: str
    node: ir.Node
    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    storage: tuple[str, ...]
    module: str
    made_by: str
    kernel: str

    @property
    def name(self) -> str:
        """The main node's."""
        return named(self.node)

    @property
    def op(self) -> str:
        """The main node's operator."""
        return self.node.op_type

    @property
    def heavy(self) -> bool:
        """Whether it multiplies matrices."""
        return self.op in ("MatMul", "Gemm", "Einsum", *ATTENTION)


def named(node: ir.Node) -> str:
    """A node's name, or that of its first result."""
    return str(node.name or node.outputs[0].name or node.op_type)


def sites(reference: Side, candidate: Side, aligned: Alignment) -> list[Site]:
    """The site of every aligned value of the candidate, in order."""
    constant = constant_nodes(candidate.model.graph)
    values = {v.name: v for n in candidate.model.graph for v in n.outputs}
    theirs = {v.name: v.producer() for n in reference.model.graph for v in n.outputs}
    order = {node: i for i, node in enumerate(candidate.model.graph)}
    found = []
    for name, other in aligned.pairs.items():
        nodes, constants, inputs = segment(values[name], aligned.pairs.keys(), constant)
        nodes, constants = sorted(nodes, key=order.get), sorted(constants, key=order.get)
        if not nodes:
            continue
        main = _main(nodes, values[name].producer())
        path = _module([theirs[other], values[name].producer(), main])
        found.append(
            Site(
                name, main, tuple(nodes), tuple(constants), tuple(inputs), _storage(nodes, constants), path,
                _made_by([*nodes, *constants]), _kernel(candidate.kernels, main, nodes),
            )
        )  # fmt: skip
    return found


def segment(
    value: ir.Value, stops: Collection[str], constant: Collection[ir.Node]
) -> tuple[set[ir.Node], set[ir.Node], dict[str, None]]:
    """Nodes that make `value` of values named in `stops` and of the graph's inputs, constant nodes among
    them apart, and the names of what comes in."""
    nodes, constants, inputs = {value.producer()}, set(), {}
    stack = list(reads(value.producer()))
    while stack:
        v = stack.pop()
        node = v.producer()
        if node is not None and node in constant:
            if node not in constants:
                constants.add(node)
                stack += reads(node)
        elif v.is_initializer():
            continue
        elif node is None or v.name in stops:
            inputs[v.name] = None
        elif node not in nodes:
            nodes.add(node)
            stack += reads(node)
    return nodes, constants, inputs


def _main(nodes: list[ir.Node], last: ir.Node) -> ir.Node:
    linear = [n for n in nodes if is_linear(n)]
    attention = [n for n in nodes if n.op_type in ATTENTION]
    return (attention or linear or [last])[-1]


def _storage(nodes: list[ir.Node], constants: list[ir.Node]) -> tuple[str, ...]:
    """Types besides float32 that numbers pass through; integers count where they are decoded to floats."""
    found: dict[str, None] = {}
    for node in [*nodes, *constants]:
        if node.domain == "porter" or node.op_type == "DequantizeLinear":
            stored = [v.const_value for v in node.inputs[:1] if v is not None and v.const_value is not None]
            found |= dict.fromkeys(t.dtype.name.lower() for t in stored)
            if not stored:
                found |= {node.op_type if node.domain != "porter" else "cache": None}
        elif node.op_type in _CASTS and node.outputs[0].dtype is not None:
            kind = node.outputs[0].dtype
            if node.op_type != "Cast" or (kind.is_floating_point() and kind not in FULL):
                found |= {kind.name.lower(): None}
    for node in nodes:
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype not in FULL:
                found |= {tensor.dtype.name.lower(): None}
    return tuple(sorted(found))


def _module(nodes: list[ir.Node | None]) -> str:
    """The module path of the first that has one; where several read one product, what they have in common."""
    for node in nodes:
        if node is None:
            continue
        if path := node.metadata_props.get(MODULE, ""):
            return path
        readers = [u.node.metadata_props.get(MODULE, "") for v in node.outputs for u in v.uses()]
        weights = [v.name for v in node.inputs if v is not None and v.is_initializer()]
        if weights and weights[-1].endswith(".weight"):
            return weights[-1].removesuffix(".weight")
        if readers and all(readers):
            return _common(readers)
    return ""


def _common(paths: list[str]) -> str:
    """The module that all are in."""
    parts = [path.split(".") for path in paths]
    same = takewhile(lambda column: len({*column}) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in same)


def _made_by(nodes: list[ir.Node]) -> str:
    """The pass that came last: passes are numbered as `3:quantize.rtn`."""
    marks = [n.metadata_props.get(PASS, "") for n in nodes]
    numbered = [(int(m[1]), m[2]) for text in marks if (m := re.fullmatch(r"(\d+):(.*)", text))]
    return max(numbered)[1] if numbered else ""


def _kernel(kernels: Mapping[str, str], main: ir.Node, nodes: list[ir.Node]) -> str:
    return next((kernels[n] for n in (named(main), *map(named, reversed(nodes))) if n in kernels), "")

"""Layers: the chosen matrices by what they multiply, in the order in which a model runs them.

Matrices that multiply one value x (query, key and value; gate and up) see the same inputs: their statistics
are gathered once, and whoever rescales x has to do right by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from porter.errors import PassError
from porter.weights import select
from porter.weights.select import Matrix


@dataclass(frozen=True)
class Product:
    """A node that computes `input` times a matrix; `direct`: not of a part of it that a Gather picked."""

    node: ir.Node
    input: ir.Value
    direct: bool


@dataclass(frozen=True)
class Layer:
    """A value [..., K] and the matrices [N,K] or [E,N,K] that it is multiplied with."""

    input: ir.Value
    matrices: tuple[Matrix, ...]

    @property
    def channels(self) -> int:
        """K."""
        return self.matrices[0].shape[-1]


def layers(graph: ir.Graph, chosen: Sequence[Matrix]) -> tuple[list[Layer], list[Matrix]]:
    """The layers in the order of the graph, and the matrices that are multiplied with nothing: tables.

    A matrix of several products (one that layers share) belongs to the first of them.
    """
    places = {node: i for i, node in enumerate(graph)}
    first, tables = {}, []
    for matrix in chosen:
        found = sorted(products(matrix), key=lambda p: places[p.node])
        if found:
            first[matrix] = found[0]
        else:
            tables.append(matrix)
    by_input: dict[ir.Value, list[Matrix]] = {}
    for matrix in sorted(first, key=lambda m: places[first[m].node]):
        by_input.setdefault(first[matrix].input, []).append(matrix)
    return [Layer(x, tuple(members)) for x, members in by_input.items()], tables


def products(matrix: Matrix) -> list[Product]:
    """Every product that a matrix is a factor of."""
    return [p for use in matrix.uses for p in _products(use.node, True)]


def _products(node: ir.Node, direct: bool) -> Iterator[Product]:
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transA", 0)):
        yield Product(node, node.inputs[0], direct)
    elif node.op_type == "Transpose" or (node.op_type == "Gather" and len(node.inputs[0].shape) == 3):
        for reader, _ in node.outputs[0].uses():
            yield from _products(reader, direct and node.op_type == "Transpose")


def feeds_attention(matrix: Matrix) -> bool:
    """Whether the result goes into attention before it meets another matrix: of query, key, value."""
    return any(select.reaches_attention(p.node) for p in products(matrix))


def check_feeds(feeds: Sequence[object], what: str) -> None:
    """Raise PassError PORT-0280 when there are no calibration feeds for the pass `what`."""
    if not feeds:
        hint = "give --calibration FILE, or take rtn, hqq or kquant, which look at weights alone"
        raise PassError(
            "PORT-0280", "the method needs activations, and nothing to run is given", where=what, hint=hint
        )

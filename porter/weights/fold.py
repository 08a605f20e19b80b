"""Divide a value x [..., K] by s [K], and multiply the columns of the matrices that read it: the same model.

    RMSNormalization(h, g)         ->  RMSNormalization(h, g / s)       LayerNormalization's bias too
    Mul(h, g)                      ->  Mul(h, g / s)                    g constant [K]
    Mul(a, MatMul(h, U[K,M]^T))    ->  Mul(a, MatMul(h, (U / s)[K,M]^T))     rows of U: of the up projection
    MatMul(x, W[N,K]^T)            ->  MatMul(x, (W * s)[N,K]^T)

U may be some rows of a matrix that a Split takes apart. Nothing else is folded: where x is what attention
gives, its values are cached, and the cache is the model's interface.
Folding is exact but for the roundings of g / s, U / s and W * s. They are computed when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from porter import match
from porter.weights import select
from porter.weights.layers import Layer, products
from porter.weights.select import Matrix

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Fold:
    """How one layer's input can be divided: `why` it cannot, or `sources` to divide, some elements each."""

    layer: Layer
    readers: tuple[Matrix, ...] = ()
    sources: tuple[Source, ...] = ()
    why: str = ""

    def apply(self, s: np.ndarray) -> None:
        """Divide the layer's input by s, float [K] > 0."""
        for source in self.sources:
            value = source.own()
            factor = np.ones(value.const_value.shape[source.axis], np.float64)
            factor[source.first : source.first + len(s)] = 1 / s.astype(np.float64)
            _multiply(value, factor, source.axis)
        for matrix in self.readers:
            _multiply(matrix.value, s.astype(np.float64), 0 if matrix.turned else 1)


@dataclass(frozen=True)
class Source:
    """An initializer that `node` reads and K elements of its axis from `first` on that x is a multiple of."""

    value: ir.Value
    axis: int
    first: int = 0
    node: ir.Node | None = field(default=None)

    def own(self) -> ir.Value:
        """The initializer, or a copy for `node` alone where others read it."""
        if self.node is None or len(self.value.uses()) == 1:
            return self.value
        graph = self.node.graph
        copy = match.add_initializer(
            graph, f"{self.value.name}.folded", _lazily(self.value.const_value, lambda a: a)
        )
        at = next(i for i, v in enumerate(self.node.inputs) if v is self.value)
        self.node.replace_input_with(at, copy)
        return copy


def folds(graph: ir.Graph, found: list[Layer]) -> list[Fold]:
    """What can be done for each layer; `why` says it where nothing can."""
    by_node = {p.node: m for m in select.matrices(graph) for p in products(m)}
    return [_fold(layer, by_node) for layer in found]


def _fold(layer: Layer, by_node: dict[ir.Node, Matrix]) -> Fold:
    x = layer.input
    if x.is_graph_output():
        return Fold(layer, why="it is an output of the model")
    readers = {by_node.get(node) for node, at in x.uses()}
    if None in readers or any(at != 0 for _, at in x.uses()):
        return Fold(layer, why="something else than matrices reads it")
    if not all(_is_only_here(m, x) for m in readers):
        return Fold(layer, why="a matrix that reads it is used elsewhere, or is a stack")
    sources = _sources(x, by_node, layer.channels)
    if not sources:
        return Fold(layer, why=f"nothing before it ({_kind(x)}) can be divided")
    return Fold(layer, tuple(sorted(readers, key=lambda m: m.name)), sources)


def _kind(x: ir.Value) -> str:
    node = x.producer()
    return "an input" if node is None else node.op_type


def _is_only_here(matrix: Matrix, x: ir.Value) -> bool:
    places = products(matrix)
    alone = len(matrix.uses) == len(matrix.value.uses()) and "embedding" not in matrix.roles
    return len(matrix.shape) == 2 and alone and all(p.input is x for p in places)


def _sources(x: ir.Value, by_node: dict[ir.Node, Matrix], channels: int) -> tuple[Source, ...]:
    """What to divide so that x is divided."""
    node = x.producer()
    if node is None or node.domain or x is not node.outputs[0]:
        return ()
    if node.op_type in _NORMS:
        return _norm(node, channels)
    if node.op_type == "Mul":
        return _vector(node, channels) or next((rows for v in node.inputs if (rows := _rows(v, by_node))), ())
    return _rows(x, by_node, final=True)


def _norm(node: ir.Node, channels: int) -> tuple[Source, ...]:
    parts = [v for v in node.inputs[1:] if v is not None]
    fine = all(is_constant(v) and list(v.const_value.shape) == [channels] for v in parts)
    return tuple(Source(v, 0, node=node) for v in parts) if fine and parts else ()


def _vector(node: ir.Node, channels: int) -> tuple[Source, ...]:
    for value in node.inputs:
        if is_constant(value) and value.const_value.size == channels == value.const_value.shape[-1]:
            return (Source(value, len(value.const_value.shape) - 1, node=node),)
    return ()


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer that nobody can feed."""
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def _rows(value: ir.Value, by_node: dict[ir.Node, Matrix], final: bool = False) -> tuple[Source, ...]:
    """The rows of a matrix that a value is the product of, if nothing else reads the value (but for the
    layer's matrices: `final`)."""
    node, first = value.producer(), 0
    if node is None or value.is_graph_output() or not (final or len(value.uses()) == 1):
        return ()
    if node.op_type == "Split" and not node.domain:
        sizes = split_sizes(node)
        if sizes is None:
            return ()
        first = sum(sizes[: node.outputs.index(value)])
        node = node.inputs[0].producer() if len(node.inputs[0].uses()) == 1 else None
    matrix = by_node.get(node)
    if matrix is None or node.op_type != "MatMul" or not _is_only_here(matrix, node.inputs[0]):
        return ()
    if len(products(matrix)) != 1:
        return ()
    return (Source(matrix.value, 1 if matrix.turned else 0, first),)


def split_sizes(node: ir.Node, axis: int = -1) -> list[int] | None:
    """The parts of a Split along an axis, by their inferred or stated sizes; None where it splits another."""
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    wanted = (axis,) if rank is None else (axis % rank, axis % rank - rank)
    if node.attributes.get_int("axis", 0) not in wanted:
        return None
    stated = match.constant(match.given(node, 1))
    if stated is not None:
        return stated.tolist()
    last = node.inputs[0].shape[axis] if rank else None
    count = len(node.outputs)
    return [last // count] * count if isinstance(last, int) and last % count == 0 else None


def _multiply(value: ir.Value, factor: np.ndarray, axis: int) -> None:
    """Multiply an initializer by `factor` along an axis."""
    multiply(value, factor.reshape([-1 if i == axis else 1 for i in range(len(value.const_value.shape))]))


def multiply(value: ir.Value, wide: np.ndarray) -> None:
    """Multiply an initializer by what has its axes, in float64 and back, when it is read."""
    tensor = value.const_value
    value.const_value = _lazily(tensor, lambda a: (a.astype(np.float64) * wide).astype(a.dtype))
    value.const_value.name = value.name


def _lazily(tensor: ir.TensorProtocol, change: Callable[[np.ndarray], np.ndarray]) -> ir.LazyTensor:
    def compute() -> ir.Tensor:
        return ir.Tensor(change(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)

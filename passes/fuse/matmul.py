"""Linear layers that read the same value become one, and a weight stands as PyTorch keeps it.

    MatMul(x, W[in, out])                              -> MatMul(x, Transpose(W'[out, in]))
    MatMul(x, Wq^T), MatMul(x, Wk^T), MatMul(x, Wv^T)  -> Split(MatMul(x, [Wq; Wk; Wv]^T))
    the same, each + bias                              -> Split(MatMul(x, [Wq; Wk; Wv]^T) + [bq; bk; bv])

The new weights are lazy: they are joined when they are read, one layer at a time. A weight that something
else reads too (a tied embedding) is left alone. A wider product may be cut into other blocks, so the `in`
products of each output may be summed in another order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter.context import Context
from porter.match import (
    add_initializer,
    attribute,
    fresh_name,
    graphs,
    producer,
    shared_initializer,
    take_over,
    tidy,
    users,
)
from porter.pipeline import Pass, Promise
from porter.symbolic.symbols import write_shapes

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Linear:
    """MatMul(x, Transpose(weight[out, in])), and Add(that, bias[out]) when `bias` is there."""

    node: ir.Node
    weight: ir.Value
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def result(self) -> ir.Value:
        """The value that the rest of the graph reads."""
        return (self.add or self.node).outputs[0]


@dataclass(frozen=True)
class FuseMatmul(Pass):
    """Fuse linear layers that share their input."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "clean.identity")

    def run(self, model: ir.Model, context: Context) -> int:
        """Weights turned plus groups of layers joined."""
        edits = 0
        for graph in graphs(model):
            edits += sum(_turn(model.graph, node) for node in list(graph))
            for group in list(_groups(graph)):
                _join(model.graph, group)
                edits += 1
        if edits:
            tidy(model)
            write_shapes(model)
        return edits


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that only one node reads, of two axes of floats."""
    if value is None or value.is_graph_input() or value.is_graph_output() or len(value.uses()) != 1:
        return None
    tensor = value.const_value if value.producer() is None else None
    return tensor if tensor is not None and len(tensor.shape) == 2 and tensor.dtype in FLOATS else None


def _turn(main: ir.Graph, node: ir.Node) -> bool:
    """Keep a weight [in, out] as [out, in] and transpose it where it is read."""
    if node.op_type != "MatMul" or node.domain != "" or node.graph is not main:
        return False
    old = node.inputs[1]
    tensor = _weight(old)
    if tensor is None:
        return False
    turned = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(list(tensor.shape)[::-1]),
    )
    name = str(old.name)  # type: ignore[union-attr]
    del main.initializers[name]
    transpose = ir.node("Transpose", [add_initializer(main, name, turned)], {"perm": [1, 0]})
    transpose.outputs[0].name = fresh_name(main, f"{name}_transposed")
    main.insert_before(node, transpose)
    node.replace_input_with(1, transpose.outputs[0])
    return True


def _linear(node: ir.Node) -> Linear | None:
    """Read a MatMul as a linear layer whose weight nothing else reads."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    transpose = producer(node.inputs[1], "Transpose")
    if (
        transpose is None
        or list(attribute(transpose, "perm", [1, 0])) != [1, 0]
        or len(transpose.outputs[0].uses()) > 1
    ):
        return None
    weight = transpose.inputs[0]
    tensor = _weight(weight)
    if tensor is None:
        return None
    add, bias = _bias(node, int(tensor.shape[0]))  # type: ignore[arg-type]
    return Linear(node, weight, add, bias)  # type: ignore[arg-type]


def _bias(node: ir.Node, size: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add of a constant [out] that alone reads a product."""
    readers = users(node.outputs[0])
    add = readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else None
    if add is None or node.outputs[0].is_graph_output():
        return None, None
    bias = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    tensor = bias.const_value if bias is not None and bias.producer() is None else None
    fits = tensor is not None and list(tensor.shape) == [size] and not bias.is_graph_input()  # type: ignore[union-attr]
    return (add, bias) if fits else (None, None)


def _groups(graph: ir.Graph) -> Iterator[list[Linear]]:
    """Two or more linear layers of one input and one width in, all with a bias or all without."""
    found: dict[tuple[object, ...], list[Linear]] = {}
    for node in graph:
        linear = _linear(node)
        if linear is not None:
            shape, dtype = linear.weight.const_value.shape, linear.weight.const_value.dtype  # type: ignore[union-attr]
            found.setdefault((node.inputs[0], shape[1], dtype, linear.bias is None), []).append(linear)
    yield from (group for group in found.values() if len(group) > 1)


def _join(main: ir.Graph, group: Sequence[Linear]) -> None:
    """Put one product and a Split in the place of the first of the group."""
    first = group[0].node
    graph = first.graph
    x = first.inputs[0]
    weight = _joined(main, [g.weight for g in group])
    transpose = _named(main, ir.node("Transpose", [weight], {"perm": [1, 0]}), f"{weight.name}_transposed")
    product = _named(
        main, ir.node("MatMul", [x, transpose.outputs[0]]), str(weight.name).removesuffix(".weight")
    )
    nodes = [transpose, product]
    if group[0].bias is not None:
        bias = _joined(main, [g.bias for g in group])  # type: ignore[misc]
        nodes.append(
            _named(main, ir.node("Add", [product.outputs[0], bias]), f"{product.outputs[0].name}_biased")
        )
    sizes = [int(g.weight.const_value.shape[0]) for g in group]  # type: ignore[union-attr,arg-type]
    lengths = shared_initializer(main, "sizes_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
    split = ir.node("Split", [nodes[-1].outputs[0], lengths], {"axis": -1}, num_outputs=len(group))
    graph.insert_before(first, [*nodes, split])  # type: ignore[union-attr]
    for g, new in zip(group, split.outputs, strict=True):
        take_over(g.result, new)


def _named(graph: ir.Graph, node: ir.Node, name: str) -> ir.Node:
    node.outputs[0].name = fresh_name(graph, name)
    return node


def _joined(main: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """A lazy initializer that holds the values one after the other along the first axis."""
    tensors = [v.const_value for v in values]
    rows = sum(int(t.shape[0]) for t in tensors)  # type: ignore[union-attr,arg-type,misc]
    dtype = tensors[0].dtype  # type: ignore[union-attr]
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([t.numpy() for t in tensors]), dtype=dtype),  # type: ignore[union-attr]
        dtype=dtype,
        shape=ir.Shape([rows, *list(tensors[0].shape)[1:]]),  # type: ignore[union-attr]
    )
    return add_initializer(main, joined_name([str(v.name) for v in values]), lazy)


def joined_name(names: Sequence[str]) -> str:
    """`a.q_proj.weight`, `a.k_proj.weight` -> `a.qk_proj.weight`; `gate.w`, `up.w` -> `gate_up.w`.

    What all names begin and end with, cut at dots and underscores, and between it what tells them apart:
    single letters follow each other, words get an underscore.
    """
    split = [re.findall(r"[^._]+[._]?", n) for n in names]
    start = _alike(split)
    middles = [parts[start:] for parts in split]
    end = min(_alike([m[::-1] for m in middles]), min(len(m) for m in middles) - 1)
    kept = [m[: len(m) - end] for m in middles]
    different = ["".join(k).rstrip("._") for k in kept]
    after = "".join(kept[0])[len(different[0]) :] + "".join(middles[0][len(kept[0]) :])
    between = "" if all(len(d) == 1 and d.isalpha() for d in different) else "_"
    return "".join(split[0][:start]) + between.join(different) + after


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """How many elements all lists begin with."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

"""From one past length for the whole batch to one for each row: which values follow, and how.

In a decoder with a concatenated cache every row has as many past tokens, P, and the graph reads P off the
shape of a cache. With a static cache each row b has its own number p[b]. `Walk` follows P from the shapes
through the graph and proves that the values that depend on it can be computed per row:

    number     c * P + w, w free of P. Only w is kept: P is set to 0.
    positions  P + w with w a vector: Range(P, P + S), or w + P. Here rows begin: p[:, None] + w.
    rows       computed from positions, each row from its own. Either the value has an axis of size 1 in
               front, which becomes the batch's (FIRST), or it has none and gets one (NEW).

A value that meets the batch in front, such as the queries in RotaryEmbedding, is where a walk ends well.
Whatever is not known to keep rows apart makes it end with a `Refusal`, and nothing is changed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

OUTPUT = "an output of the model depends on the past's length"
TIME = 2  # the axis of a cache [batch, heads, tokens, head_size] that P is the size of


@dataclass(frozen=True)
class Refusal(Exception):
    """Why the graph cannot be rewritten: the node, its operator, and the reason in half a sentence."""

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.reason}"


def refuse(node: ir.Node, reason: str) -> Refusal:
    """A Refusal that names the node, or its first output when it has no name."""
    return Refusal(node.name or str(node.outputs[0].name), node.op_type, reason)


@dataclass(frozen=True)
class Dims:
    """A vector of sizes of a cache: the axis that each is the size of."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Number:
    """One element: `times` * P and something free of P."""

    times: int


class Rows(enum.Enum):
    """A value that each row of the batch has of its own, and where the batch's axis comes from."""

    FIRST = "axis 0, of size 1, becomes the batch's"
    NEW = "a batch axis is put in front"


Kind = Dims | Number | Rows


class Walk:
    """The values of `graph` that depend on P, in `kinds`, and the `edits` that give each row its own.

    `pasts` are the caches; `lengths` is int64 [batch], the p[b]. Nodes in `done` read caches and are taken
    care of elsewhere; only nodes in `live` are looked at. Making a Walk changes nothing; it raises Refusal.
    `apply` edits the graph.
    """

    def __init__(
        self,
        graph: ir.Graph,
        pasts: Iterable[ir.Value],
        lengths: ir.Value,
        done: Iterable[ir.Node],
        live: Collection[ir.Node],
    ) -> None:
        self.graph, self.lengths = graph, lengths
        self.pasts, self.done = set(pasts), set(done)
        self.batch: int | ir.SymbolicDim = next(iter(pasts)).shape[0]
        self.kinds: dict[ir.Value, Kind] = {}
        self.edits: list[Callable[[], None]] = []
        self.starts: set[ir.Value] = (
            set()
        )  # where rows begin: these keep their shape, what reads them changes
        for node in graph:
            if node in live and node not in self.done:
                self._visit(node)

    def apply(self) -> None:
        """Edit the graph, write down the shapes that changed, and remove what nothing reads any more."""
        for edit in self.edits:
            edit()
        for value, kind in self.kinds.items():
            if value.shape is not None and isinstance(kind, Rows) and value not in self.starts:
                axes = list(value.shape)[kind is Rows.FIRST :]
                value.shape = ir.Shape([self.batch, *axes])
        read = {v.producer() for v in self.kinds} | {n for p in self.pasts for n, _ in p.uses()}
        for node in reversed(self.graph):
            if node in read and not any(v.uses() or v.is_graph_output() for v in node.outputs):
                self.graph.remove(node, safe=True)

    @property
    def one_row(self) -> bool:
        """Whether the batch is always one row, so that no value changes its shape."""
        return self.batch == 1

    def is_batch(self, value: ir.Value) -> bool:
        """Whether axis 0 of the value is known to be the batch."""
        return bool(value.shape) and value.shape[0] == self.batch != ir.SymbolicDim(None)

    def _visit(self, node: ir.Node) -> None:
        from porter.symbolic.row_rules import RULES, sizes_of_cache  # they are written in terms of a Walk

        if self.pasts.intersection(node.inputs):
            kind = sizes_of_cache(self, node)
        elif any(v in self.kinds for v in node.inputs):
            rule = None if node.domain else RULES.get(node.op_type)
            if rule is None:
                raise refuse(node, "it is not known to treat the rows of a batch apart")
            kind = rule(self, node)
        else:
            return
        if kind is not None:
            for out in node.outputs:
                self._remember(node, out, kind)

    def _remember(self, node: ir.Node, out: ir.Value, kind: Kind) -> None:
        if out.is_graph_output():
            raise refuse(node, OUTPUT)
        if any(user.graph is not self.graph for user, _ in out.uses()):
            raise refuse(node, "a subgraph depends on the past's length")
        if self.one_row and isinstance(kind, Rows):
            return  # already as it will be
        self.kinds[out] = kind

    def zero(self, node: ir.Node, rank: int) -> None:
        """Later: let those who read the node's number P read 0 instead."""
        value = node.outputs[0]

        def edit() -> None:
            nothing = self.constant(f"{value.name}.none", np.zeros((1,) * rank, np.int64))
            ir.convenience.replace_all_uses_with(value, nothing)

        self.edits.append(edit)

    def start_rows(self, node: ir.Node) -> Rows | None:
        """Later: add p to the positions that the node computes for P = 0. Says what becomes of their
        shape."""
        value = node.outputs[0]
        if value.shape is None or value.dtype is None:
            raise refuse(node, "the shape of the positions is not known")
        if value.is_graph_output():
            raise refuse(node, OUTPUT)
        rank = len(value.shape)
        if rank > 1 and value.shape[0] != 1 and not self.is_batch(value):
            raise refuse(node, "the positions have no axis for the batch in front")
        self.starts.add(value)
        self.edits.append(lambda: self._add_lengths(node, value, rank))
        if rank > 1 and self.is_batch(value):
            return None
        return Rows.FIRST if rank > 1 else Rows.NEW

    def _add_lengths(self, node: ir.Node, value: ir.Value, rank: int) -> None:
        rows = self.insert_after(node, "Add", [value, self.column(node, max(rank, 2), value.dtype)], "rows")
        rows.type = value.type
        axes = list(value.shape)[1:] if rank > 1 else list(value.shape)
        rows.shape = value.shape if self.one_row else ir.Shape([self.batch, *axes])
        ir.convenience.replace_all_uses_with(value, rows)
        rows.producer().replace_input_with(0, value)

    def column(self, node: ir.Node, rank: int, dtype: ir.DataType) -> ir.Value:
        """p as [batch, 1, …] of `rank` axes, computed after `node`; as it is, [1], when there is one row."""
        value = self.lengths
        if dtype != ir.DataType.INT64:
            value = self.insert_after(node, "Cast", [value], "lengths_cast", to=dtype)
        if self.one_row:
            return value
        axes = self.constant(f"{node.outputs[0].name}.axes", np.arange(1, rank))
        column = self.insert_after(node, "Unsqueeze", [value, axes], "lengths")
        column.type, column.shape = ir.TensorType(dtype), ir.Shape([self.batch] + [1] * (rank - 1))
        return column

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.graph.register_initializer(value)
        return value

    def insert_after(
        self, node: ir.Node, op: str, inputs: list[ir.Value], suffix: str, **attributes: int
    ) -> ir.Value:
        """The first output of a new node, placed after `node` and after those of its inputs that stand
        later."""
        new = ir.node(op, inputs, attributes or None)
        new.outputs[0].name = f"{node.outputs[0].name}.{suffix}"
        order = {n: i for i, n in enumerate(self.graph)}
        last = max(
            (v.producer() for v in inputs if v.producer() in order), key=order.__getitem__, default=node
        )
        self.graph.insert_after(max(node, last, key=order.__getitem__), new)
        return new.outputs[0]


def remove_unread(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what made a value and is of no other use."""
    node = None if value is None else value.producer()
    if node is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    sources = list(node.inputs)
    graph.remove(node, safe=True)
    for source in sources:
        remove_unread(graph, source)


def live_nodes(graph: ir.Graph, cut: Collection[tuple[ir.Node, int]] = ()) -> set[ir.Node]:
    """Nodes that an output of the graph, or a subgraph, needs; not for the uses in `cut` (node and input)."""
    live: set[ir.Node] = set()
    for node in reversed(graph):
        for out in node.outputs:
            needed = any(
                (u.node in live and tuple(u) not in cut) or u.node.graph is not graph for u in out.uses()
            )
            if needed or out.is_graph_output():
                live.add(node)
    return live

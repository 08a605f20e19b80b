"""Attention over caches in a graph: where its query and appended floats are, what decodes its buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.context import Feeds
from porter.decoder import Decoder
from porter.kv.names import parse
from porter.kvgraph.body import DOMAIN
from porter.kvgraph.certified import PREFIX
from porter.kvgraph.functions import Cached, read_function
from porter.run.reference import ReferenceRunner


@dataclass(eq=False)
class Layer:
    """One Attention over a cache: names of its `query`, its appended `key` and `value`, its `mask` or "".

    `scale` None means 1/sqrt(head size). `reader` makes what Attention reads from `stored` (present by past)
    and from `others`, values of the graph.
    """

    index: int
    query: str
    key: str
    value: str
    mask: str
    scale: float | None
    softcap: float
    stored: Mapping[str, str]
    others: Sequence[str]
    reader: Callable[[Feeds], tuple[np.ndarray, np.ndarray]]

    def __post_init__(self) -> None:
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    @property
    def wanted(self) -> list[str]:
        """The values of the graph that are looked at."""
        return [n for n in (self.query, self.key, self.value, self.mask, *self.others) if n]

    def append(self, steps: Sequence[Feeds]) -> None:
        """Keep the keys and values of the steps."""
        for parts, name in zip(self._parts, (self.key, self.value), strict=True):
            parts += [step[name] for step in steps]

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values so far, float32 [B,H,T,D]."""
        for parts in self._parts:
            parts[:] = [np.concatenate(parts, axis=2)]
        return self._parts[0][0], self._parts[1][0]

    def held(self, step: Feeds, caches: Feeds) -> tuple[np.ndarray, np.ndarray]:
        """What the cache's buffers stand for, float [B,H,C,D]."""
        fed = {present: caches[past] for past, present in self.stored.items()}
        return self.reader(fed | {name: step[name] for name in self.others})

    def attend(
        self, query: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One query float64 [Hq,D] over [H,T,D]: logits and distribution [Hq,T], output [Hq,D]."""
        shared = len(query) // len(keys)
        keys, values = (np.repeat(x.astype(np.float64), shared, axis=0) for x in (keys, values))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = (keys @ query[:, :, None])[:, :, 0] * scale
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        seen = (
            logits
            if mask is None
            else np.where(mask, logits, -np.inf)
            if mask.dtype == bool
            else logits + mask
        )
        weights = np.exp(seen - seen.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.where(np.isneginf(seen), 0, logits), weights, (weights[:, None] @ values)[:, 0]


def find(model: ir.Model, decoder: Decoder) -> list[Layer]:
    """The Attention nodes that read a cache, in graph order; of a certified one, what its codes hold."""
    places = {c.present: (c.layer, c.kind, c.past) for c in decoder.caches}
    moving = _after(v for v in model.graph.inputs if not v.is_initializer())
    found = []
    for node in model.graph:
        if node.op_type == "Attention" and not node.domain and len(node.inputs) >= 3:
            layer = _layer(model, node, places, moving)
            found += [layer] if layer is not None else []
        elif node.op_type.startswith(PREFIX):
            found.append(_certified(model, node, places))
    return found


_Places = Mapping[str, tuple[int, str, str]]
# What may lie between the floats and a buffer that TensorScatter writes.
_STORING = ("Cast", "Clip", "QuantizeLinear", "PackInt4")


def _layer(model: ir.Model, node: ir.Node, places: _Places, moving: set[ir.Value]) -> Layer | None:
    """The Attention as a Layer; None when it reads no cache, one whose floats are not found, or one that is
    read through a node with a graph of its own; and where its mask is not computed."""
    near = _nearest(node.inputs[1], places)
    if near is None:
        return None
    index = places[near.name][0]
    mine = [v for v in model.graph.outputs if v.name in places and places[v.name][0] == index]
    new = {side: next(filter(None, (_appended(v) for v in mine if _side(places[v.name]) == side)), None)
           for side in ("key", "value")}  # fmt: skip
    if None in new.values():
        return None
    nodes, inputs, weights = _between(node.inputs[1:3], set(mine), moving)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    fixed = mask is not None and mask.producer() is None
    if fixed or any(v.type is None for v in inputs) or any(map(_has_graph, nodes)):
        return None
    scale = node.attributes.get_float("scale", 0.0)
    return Layer(
        index=index,
        query=node.inputs[0].name,
        key=new["key"].name,
        value=new["value"].name,
        mask="" if mask is None else mask.name,
        scale=scale or None,
        softcap=node.attributes.get_float("softcap", 0.0),
        stored={places[v.name][2]: v.name for v in inputs if v.name in places},
        others=[v.name for v in inputs if v.name not in places],
        reader=_reader(model, nodes, inputs, weights, node.inputs[1:3]),
    )


def _certified(model: ir.Model, node: ir.Node, places: _Places) -> Layer:
    """A CertifiedAttention as a Layer: its caches are read by functions made for the purpose."""
    query, *presents, total = node.inputs[:8]
    scheme = parse(node.attributes.get_string("scheme"))
    opset = model.opset_imports[""]
    functions, reads = [], []
    for side, buffers in (("key", presents[:3]), ("value", presents[3:])):
        _, heads, capacity, size = buffers[2].shape  # of the copy
        functions.append(read_function(Cached(scheme, side, heads, size, capacity), opset))
        reads.append(ir.node(functions[-1].name, [*buffers, total], domain=DOMAIN))
        made = reads[-1].outputs[0]
        made.name, made.type, made.shape = f"read_{side}", ir.TensorType(ir.DataType.FLOAT), buffers[2].shape
    keys, values = (n.outputs[0] for n in reads)
    view = ir.GraphView(
        [*presents, total],
        [keys, values],
        nodes=reads,
        opset_imports=model.graph.opset_imports,
        name="read",
    )
    run = ReferenceRunner(ir.Model(view.clone(), ir_version=model.ir_version, functions=functions)).run

    def read(fed: Feeds) -> tuple[np.ndarray, np.ndarray]:
        found = run(fed)
        return found[keys.name], found[values.name]

    return Layer(
        index=places[presents[0].name][0],
        query=query.name,
        key=_appended(presents[0]).name,
        value=_appended(presents[3]).name,
        mask=node.inputs[8].name if len(node.inputs) > 8 else "",
        scale=node.attributes.get_float("scale"),
        softcap=node.attributes.get_float("softcap"),
        stored={places[v.name][2]: v.name for v in presents},
        others=[total.name],
        reader=read,
    )


def _side(place: tuple[int, str, str]) -> str:
    """Of what kind a buffer is: there may be others than the one that keeps the cache's own name."""
    return place[1].split("_")[0]


def _has_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


def _nearest(value: ir.Value, places: _Places) -> ir.Value | None:
    """The first cache output met on the way back from `value`."""
    queue, seen = deque([value]), {value}
    while queue:
        v = queue.popleft()
        if v.name in places and v.is_graph_output():
            return v
        for source in _sources(v):
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return None


def _sources(value: ir.Value) -> list[ir.Value]:
    node = value.producer()
    return [] if node is None else [v for v in node.inputs if v is not None]


def _appended(present: ir.Value) -> ir.Value | None:
    """The floats that become the new part of a cache buffer."""
    node = present.producer()
    if node is None:
        return None
    if node.op_type.startswith("AppendCache"):
        floats = [v for v in node.inputs if v is not None and not v.is_graph_input()]
        return next((v for v in floats if v.shape is None or len(v.shape) == 4), None)
    if node.op_type != "TensorScatter":
        return None
    value = node.inputs[1]
    while value.producer() is not None and value.producer().op_type in _STORING:
        value = value.producer().inputs[0]
    return value


def _after(values: Iterable[ir.Value]) -> set[ir.Value]:
    """Everything that depends on one of `values`, and they."""
    stack = list(values)
    found = set(stack)
    while stack:
        for node, _ in stack.pop().uses():
            fresh = [v for v in node.outputs if v not in found]
            found.update(fresh)
            stack += fresh
    return found


def _between(
    wanted: Sequence[ir.Value], stored: set[ir.Value], moving: set[ir.Value]
) -> tuple[set[ir.Node], list[ir.Value], list[ir.Value]]:
    """Nodes from `stored` to `wanted`, the values they read, and their weights. `moving` are the values that
    some input of the model reaches: one that `stored` does not reach is read, not computed again."""
    after = _after(stored)
    nodes: set[ir.Node] = set()
    inputs: dict[ir.Value, None] = {}
    weights: dict[ir.Value, None] = {}
    stack = list(wanted)
    while stack:
        value = stack.pop()
        if value.is_initializer():
            weights[value] = None
        elif value in stored or value.is_graph_input() or (value in moving and value not in after):
            inputs[value] = None
        elif value.producer() not in nodes:
            nodes.add(value.producer())
            stack += _sources(value)
    return nodes, list(inputs), list(weights)


def _reader(
    model: ir.Model,
    nodes: set[ir.Node],
    inputs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> Callable[[Feeds], tuple[np.ndarray, np.ndarray]]:
    """What runs these nodes of the model; a value that is input and output is handed on."""
    made = [v for v in outputs if v.producer() in nodes]
    run: Callable[[Feeds], Feeds] = lambda fed: {}  # noqa: E731
    if made:
        view = ir.GraphView(
            inputs,
            made,
            nodes=[n for n in model.graph if n in nodes],
            initializers=weights,
            opset_imports=model.graph.opset_imports,
            name="read",
        )
        functions = list(model.functions.values())
        run = ReferenceRunner(ir.Model(view.clone(), ir_version=model.ir_version, functions=functions)).run

    def read(fed: Feeds) -> tuple[np.ndarray, np.ndarray]:
        found = {**fed, **run(fed)}
        return found[outputs[0].name], found[outputs[1].name]

    return read

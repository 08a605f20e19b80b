"""Sweep: run a model piece by piece over calibration feeds, while a pass edits what was not run yet.

A method that works layer by layer wants each layer's input as the already quantized layers before it make
it. Running the whole model once for every layer costs the square of the depth; a sweep costs one forward
pass: between two calls it keeps the frontier, the values that were computed and are still to be read.

    sweep = Sweep(model, feeds)
    for weight, x in in_graph_order:          # x is the value that the weight multiplies
        gram = Gram(channels)
        for array in sweep.advance(x):        # one array a feed
            gram.add(array)
        ...                                   # replace the weight; the next advance runs the new one
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from porter.context import Feeds
from porter.errors import EnvironmentFailure, OptionError, PassError
from porter.graph.untrusted import shown
from porter.run.reference import ReferenceRunner

MEMORY = 64 << 20  # bytes of the frontier that stay in memory; what is more is mapped from a file
SMALL = 4096  # an array up to this size (shapes, positions) always stays in memory


class Sweep:
    """A model, calibration feeds (one dict a feed, all inputs of the model), and how far they were run.

    The graph may be edited between calls wherever it was not run yet; weights are read when a node that needs
    them runs. What depends on no input (a transposed or dequantized weight) is never kept, but computed
    wherever it is read, so that it is always the present one. Nodes run in ONNX Runtime as `ReferenceRunner`
    runs them, a piece of the graph at a time. In memory are the weights of one piece, the activations of one
    feed, and MEMORY bytes of the frontier besides small arrays; the rest of the frontier lies in nameless
    files in `folder` (None: where temporary files go).

    `briefly` is that of `ReferenceRunner`, for few feeds.
    Raises OptionError PORT-0290 without feeds, PORT-0293 when a feed lacks an input.
    """

    def __init__(
        self, model: ir.Model, feeds: Sequence[Feeds], folder: Path | None = None, *, briefly: bool = False
    ) -> None:
        self._briefly = briefly
        if not feeds:
            raise OptionError("PORT-0290", "there is nothing to calibrate on", hint="give --calibration FILE")
        self._inputs = {v for v in model.graph.inputs if not v.is_initializer()}
        for i, feed in enumerate(feeds):
            for value in self._inputs:
                if value.name not in feed:
                    what = f"calibration feed {i} has no value for the input {shown(value.name)!r}"
                    hint = "calibrate before passes that change the model's inputs"
                    raise OptionError("PORT-0293", what, hint=hint)
        self._model, self._feeds = model, feeds
        self._frontier = _Frontier(folder)
        self._done: set[ir.Node] = set()

    def advance(self, value: ir.Value) -> Iterator[np.ndarray]:
        """Run all that `value` depends on and that did not run yet, and answer its array for each feed.

        All feeds have run when this returns; the arrays are read back one by one, and are not to be written
        to. Raises PassError PORT-0291 when something that is needed was let go: no node that had not run
        read it at the time; and for a value that depends on no input.
        """
        piece = self._piece([value])
        if piece.nodes:
            self._run(piece, value)
        return self._arrays(value)

    def peek(self, values: Sequence[ir.Value]) -> Iterator[tuple[np.ndarray, ...]]:
        """The arrays that `values` have for each feed in the graph as it is now, without advancing.

        Nothing is kept, so everything that was not run before can still be edited, and will run again. One
        feed runs for each step of the iterator. Raises what `advance` does.
        """
        piece = self._piece(values)
        made = [v for v in values if v.producer() in piece.nodes]
        runner = self._runner(piece, made) if made else None

        def arrays() -> Iterator[tuple[np.ndarray, ...]]:
            for i in range(len(self._feeds)):
                found = runner.run(self._fed(piece, i)) if runner else {}
                yield tuple(found[v.name] if v in made else self._array(v, i) for v in values)

        return arrays()

    def trial(self, values: Sequence[ir.Value], instead: Sequence[ir.Value]) -> Trial:
        """What runs all from here to `values` with other arrays in place of `instead`, again and again:
        initializers, or values that were advanced to. Nothing is kept of it. Raises what `advance`
        does."""
        piece = self._piece(values, instead)
        return Trial(self, piece, self._runner(piece, values))

    def _run(self, piece: _Piece, value: ir.Value) -> None:
        """Run the piece for all feeds, keep what is still read of it, and forget what no longer is."""
        done = self._done | piece.moving
        wanted = {value, *_unread(self._model.graph, done | piece.constant)}
        made = [v for n in piece.nodes if n in piece.moving for v in n.outputs if v in wanted]
        runner = self._runner(piece, made)
        new = self._frontier.begin(made)
        for i in range(len(self._feeds)):
            outputs = runner.run(self._fed(piece, i))
            for v in made:
                new.add(v, outputs.pop(v.name))
        self._done = done
        self._frontier.commit(new, wanted)

    def _piece(self, values: Sequence[ir.Value], instead: Sequence[ir.Value] = ()) -> _Piece:
        """What has to run for `values`, and what it reads; `instead` is fed."""
        constant, found, inputs, weights = _constant_nodes(self._model.graph), set(), {}, {}
        for value in values:
            if value.is_initializer() or value.producer() in constant:
                raise PassError("PORT-0291", "no input reaches the value", where=shown(value.name))
        stack = list(values)
        seen = set(stack)
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in instead or value in self._frontier or value in self._inputs:
                inputs[value] = None
            elif value.is_initializer():
                weights[value] = None
            elif node is None or node in self._done:
                what = f"the value {shown(value.name)!r} was run past, and nothing kept it"
                hint = "ask for values in the order of the graph"
                raise PassError("PORT-0291", what, where=shown(values[0].name), hint=hint)
            elif node not in found:
                found.add(node)
                fresh = [v for v in _reads(node) if v not in seen]
                seen.update(fresh)
                stack += fresh
        nodes = {n: None for n in self._model.graph if n in found}
        return _Piece(nodes, list(inputs), list(weights), constant)

    def _runner(self, piece: _Piece, outputs: Sequence[ir.Value]) -> ReferenceRunner:
        """The piece as a model of its own."""
        graph, model = self._model.graph, self._model
        view = ir.GraphView(
            piece.inputs,
            outputs,
            nodes=list(piece.nodes),
            initializers=piece.weights,
            opset_imports=graph.opset_imports,
            name="piece",
        )
        apart = view.clone()
        for value, original in zip(apart.inputs, piece.inputs, strict=True):
            array = self._array(original, 0)
            value.const_value = None
            value.type = original.type or ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape([None] * array.ndim)  # sizes may differ from feed to feed
        functions = list(model.functions.values())
        whole = ir.Model(apart, ir_version=model.ir_version, functions=functions)
        return ReferenceRunner(whole, briefly=self._briefly)

    def _fed(self, piece: _Piece, feed: int) -> Feeds:
        return {v.name: self._array(v, feed) for v in piece.inputs}

    def _array(self, value: ir.Value, feed: int) -> np.ndarray:
        if value in self._frontier:
            return self._frontier.arrays(value)[feed]
        if value.is_initializer():
            return value.const_value.numpy()
        return self._feeds[feed][value.name]

    def _arrays(self, value: ir.Value) -> Iterator[np.ndarray]:
        kept = self._frontier.arrays(value) if value in self._frontier else None
        return iter(kept) if kept is not None else (feed[value.name] for feed in self._feeds)


@dataclass(frozen=True)
class Trial:
    """The rest of a model, from where a sweep is, in one session: what it computes once something is changed.

    It is for the sweep as it was; after the next advance it must not be run.
    """

    sweep: Sweep
    piece: _Piece
    runner: ReferenceRunner

    def run(self, feed: int, arrays: Mapping[ir.Value, np.ndarray]) -> Feeds:
        """Outputs by name of feed number `feed`, with `arrays` for the values that were to be replaced; each
        other one is what it was."""
        fed = self.sweep._fed(self.piece, feed)
        return self.runner.run(fed | {value.name: array for value, array in arrays.items()})


@dataclass(frozen=True)
class _Piece:
    """Nodes in graph order, the values that come in, and the initializers; `constant`: all such nodes."""

    nodes: dict[ir.Node, None]
    inputs: list[ir.Value]
    weights: list[ir.Value]
    constant: set[ir.Node]

    @property
    def moving(self) -> set[ir.Node]:
        """The nodes that depend on the model's inputs."""
        return self.nodes.keys() - self.constant


def _constant_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on no input."""
    found: set[ir.Node] = set()
    for node in graph:
        if all(v.is_initializer() or v.producer() in found for v in _reads(node)):
            found.add(node)
    return found


def _unread(graph: ir.Graph, done: Collection[ir.Node]) -> set[ir.Value]:
    """Values that a node besides `done` reads.

    A node that only ends in the graph's outputs and has no weight (a cache's Cast or Concat) does not count:
    nobody calibrates on it, and it would hold its inputs to the end.
    """
    found: set[ir.Value] = set()
    for node in graph:
        if node in done:
            continue
        reads = _reads(node)
        if any(v.uses() for v in node.outputs) or any(v.is_initializer() for v in reads):
            found.update(reads)
    return found


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values of its own graph that a node reads, itself or in the graphs it holds."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        one = attribute.type == ir.AttributeType.GRAPH
        for graph in [attribute.as_graph()] if one else attribute.as_graphs():
            inner = [*graph.outputs, *(v for n in graph.all_nodes() for v in n.inputs if v is not None)]
            found += [v for v in inner if v.graph is node.graph]
    return found


class _Frontier:
    """Arrays of values, one a feed; in memory up to MEMORY bytes, then in files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: dict[ir.Value, _Arrays] = {}

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._kept

    def arrays(self, value: ir.Value) -> list[np.ndarray]:
        """What is kept of a value."""
        return self._kept[value].arrays

    def begin(self, values: Sequence[ir.Value]) -> _Adding:
        """Take arrays of new values; they count when `commit` is told of them."""
        held = sum(kept.held for kept in self._kept.values())
        return _Adding({v: _Arrays([]) for v in values}, MEMORY - held, self._folder)

    def commit(self, new: _Adding, wanted: Collection[ir.Value]) -> None:
        """Keep the new, and let go of what is not wanted."""
        self._kept = {v: a for v, a in (self._kept | new.arrays).items() if v in wanted}


@dataclass
class _Arrays:
    """The arrays of one value; `held` of their bytes are in memory, the others in `file`."""

    arrays: list[np.ndarray]
    held: int = 0
    file: BinaryIO | None = None


@dataclass
class _Adding:
    """Values whose arrays are coming in, and how many bytes may still stay in memory."""

    arrays: dict[ir.Value, _Arrays]
    room: int
    folder: Path | None

    def add(self, value: ir.Value, array: np.ndarray) -> None:
        """Keep the next feed's array of a value. Raises EnvironmentFailure PORT-0901: the disk is full."""
        kept = self.arrays[value]
        if array.nbytes > SMALL and array.nbytes > self.room and array.dtype != object:
            array = self._spooled(kept, array)
        else:
            array = array.copy()  # the runtime's own would keep the memory of its session alive
            if array.nbytes > SMALL:
                self.room -= array.nbytes
                kept.held += array.nbytes
        array.flags.writeable = False
        kept.arrays.append(array)

    def _spooled(self, kept: _Arrays, array: np.ndarray) -> np.ndarray:
        if kept.file is None:
            kept.file = tempfile.TemporaryFile(prefix="porter-", dir=self.folder)  # noqa: SIM115
        start = kept.file.seek(0, 2)
        try:
            kept.file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            kept.file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = str(self.folder or tempfile.gettempdir())
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=where) from error
        return np.asarray(np.memmap(kept.file, array.dtype, "r", start, array.shape))

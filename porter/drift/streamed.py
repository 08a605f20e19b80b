"""Large models run on whole texts, without a cache: opened, or a piece of the graph at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import graph
from porter.calibrate import Sweep
from porter.context import Feeds
from porter.decoder import Decoder
from porter.drift.feeds import Factory
from porter.errors import EnvironmentFailure
from porter.run.feeds import empty_caches, feeds
from porter.run.reference import spec


@dataclass(frozen=True)
class Forward:
    """A model whose sessions take each text in one step: stepping would decode every weight each time."""

    session: Factory

    def whole(self, texts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [batch, n, vocabulary] for each int64 [batch, n]."""
        return (self.session(len(tokens)).step(tokens) for tokens in texts)


@dataclass(frozen=True)
class Streamed:
    """The ONNX file `path`, run a piece of the graph at a time.

    A piece has weights of `piece` bytes as float32, or a single one that is larger. Frontiers lie in `folder`
    (None: where temporary files go). `briefly` is that of `ReferenceRunner`. Raises what `graph.load` and
    `Sweep` do.
    """

    path: Path
    decoder: Decoder
    piece: int
    folder: Path | None = None
    briefly: bool = False

    def whole(self, texts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [batch, n, vocabulary] for each int64 [batch, n]; all texts go through a piece together."""
        model = graph.load(self.path)
        inputs = {v.name: spec(v) for v in model.graph.inputs if not v.is_initializer()}
        fed = [feeds(self.decoder, t, 0, empty_caches(self.decoder, inputs, len(t)), inputs) for t in texts]
        sweep = Sweep(model, fed, self.folder, briefly=self.briefly)
        for value in stops(model, self.piece):
            sweep.advance(value)
        logits = next(v for v in model.graph.outputs if v.name == self.decoder.output)
        return (np.asarray(array, np.float32) for array in sweep.advance(logits))


class Interface:
    """A Runner of a model that is too large to be opened: it has inputs and outputs, and refuses to run."""

    def __init__(self, model: ir.Model) -> None:
        self.inputs = {v.name: spec(v) for v in model.graph.inputs if not v.is_initializer()}
        self.outputs = {v.name: spec(v) for v in model.graph.outputs if v.shape is not None and v.dtype}
        self.in_place: dict[str, str] = {}
        self.bounds: dict[str, int] = {}

    def run(self, feeds: Feeds) -> Feeds:
        """Raises EnvironmentFailure PORT-0907."""
        what = "the model is too large for the memory to write text itself"
        raise EnvironmentFailure(
            "PORT-0907", what, hint="give text or tokens: --data FILE, --calibration FILE"
        )


def stops(model: ir.Model, piece: int) -> list[ir.Value]:
    """Values in graph order between which the weights take about `piece` bytes as float32."""
    found: list[ir.Value] = []
    constant: dict[ir.Node, int] = {}  # nodes that depend on no input: elements of the weights behind them
    held = 0
    for node in model.graph:
        behind = [_elements(v, constant) for v in node.inputs if v is not None]
        if None not in behind:
            constant[node] = sum(n for n in behind if n is not None)
            continue
        held += 4 * sum(n for n in behind if n)
        if held >= piece:
            found.append(node.outputs[0])
            held = 0
    return found


def _elements(value: ir.Value, constant: dict[ir.Node, int]) -> int | None:
    """Elements of the weights that a value is made of; None for one that depends on the model's inputs."""
    if value.is_initializer():
        return value.const_value.size if value.const_value is not None else 0
    return constant.get(value.producer())

"""Players: models that go through the same steps side by side, each with its own caches.

A player is told tokens, tells what its values are, and takes other values in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from porter.context import Feeds
from porter.decoder import Decoder
from porter.drift.blame.pieces import Given, Pieces, Seen
from porter.run.feeds import empty_caches, feeds
from porter.run.protocol import TensorSpec
from porter.run.reference import spec


class Player(Protocol):
    """Goes through steps."""

    def step(self, tokens: np.ndarray, given: Given, seen: Seen) -> np.ndarray:
        """Feed int64 [batch, n] after all that was fed before; logits float32 [batch, n, vocabulary].

        `seen` is told the name and array of each wanted value; `given` is asked for those that are cut.
        """
        ...

    def tap(self, value: str) -> None:
        """Keep what the next step is fed (`fed`), and of a lowered program the call that makes `value`."""
        ...

    fed: Feeds
    call: Call | None


@dataclass(frozen=True)
class Call:
    """A call of a kernel in a library: its arguments before it, in order, and which of them is the result."""

    library: Path
    kernel: str
    arguments: Sequence[np.ndarray]
    result: int


class Session:
    """The caches and the length of one player; what it is fed."""

    def __init__(self, decoder: Decoder, inputs: Mapping[str, TensorSpec]) -> None:
        self.decoder, self.inputs = decoder, inputs
        self.length, self.caches = 0, None

    def fed(self, tokens: np.ndarray) -> Feeds:
        """The feeds of the next step."""
        if self.caches is None:
            self.caches = empty_caches(self.decoder, self.inputs, len(tokens))
        return feeds(self.decoder, tokens, self.length, self.caches, self.inputs)

    def took(self, tokens: np.ndarray, outputs: Feeds) -> np.ndarray:
        """Keep the caches of a step that answered `outputs`; its logits."""
        if self.decoder.caches:
            self.caches = {c.past: outputs[c.present] for c in self.decoder.caches}
            self.length += tokens.shape[1]
        return outputs[self.decoder.output].astype(np.float32, copy=False)


class OnnxPlayer:
    """An ONNX model in ONNX Runtime; see `Player`."""

    def __init__(
        self, model: ir.Model, decoder: Decoder, wanted: Collection[str] = (), cut: Collection[str] = ()
    ) -> None:
        inputs = {v.name: spec(v) for v in model.graph.inputs if not v.is_initializer()}
        self._session = Session(decoder, inputs)
        self._pieces = Pieces(model, wanted, cut)
        self.fed: Feeds = {}
        self.call = None

    def step(self, tokens: np.ndarray, given: Given, seen: Seen) -> np.ndarray:
        """As `Player` says."""
        self.fed = self._session.fed(tokens)
        return self._session.took(tokens, self._pieces.run(self.fed, given, seen))

    def tap(self, value: str) -> None:
        """Nothing is overwritten here: what was fed stays as it is."""

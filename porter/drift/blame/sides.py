"""Sides: the two things that are compared, each a model whose values have names.

An ONNX model runs in ONNX Runtime; a lowered program runs as it is, and its values are those of the model
it was compiled from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from porter.context import Feeds
from porter.decoder import Decoder
from porter.drift.blame.pieces import Given, Seen, constant_nodes
from porter.drift.blame.player import Call, OnnxPlayer, Player, Session

if TYPE_CHECKING:
    from porter.run.watched import Watched


@dataclass(frozen=True)
class Side:
    """A runnable thing. `values` can be read and replaced, in the order they are made; `kernels` are those
    that make nodes of a lowered program, by node, the main one first; empty for ONNX."""

    name: str
    model: ir.Model
    decoder: Decoder
    values: tuple[str, ...]
    player: Callable[[Collection[str], Collection[str]], Player]
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def lowered(self) -> bool:
        """Whether it is a lowered program."""
        return bool(self.kernels)


def onnx(name: str, model: ir.Model, decoder: Decoder) -> Side:
    """An ONNX model."""
    constant = constant_nodes(model.graph)
    values = tuple(v.name for n in model.graph if n not in constant for v in n.outputs if v.name)
    return Side(name, model, decoder, values, lambda wanted, cut: OnnxPlayer(model, decoder, wanted, cut))


def program(name: str, folder: Path, model: ir.Model, decoder: Decoder) -> Side:
    """The lowered program in a bundle's folder, which was compiled from `model`."""
    from porter.run.watched import Watched

    watched = Watched(folder, model)
    values = tuple(dict.fromkeys(r.name for r in watched.results))

    def player(wanted: Collection[str], cut: Collection[str]) -> Player:
        return _ProgramPlayer(watched, decoder, wanted, cut)

    return Side(name, model, decoder, values, player, watched.kernels)


class _ProgramPlayer:
    """A lowered program; see `Player`."""

    def __init__(
        self, watched: Watched, decoder: Decoder, wanted: Collection[str], cut: Collection[str]
    ) -> None:
        self._watched, self._wanted, self._cut = watched, {*wanted}, {*cut}
        self._session = Session(decoder, watched.runner.inputs)
        self._tapped = ""
        self.fed: Feeds = {}
        self.call: Call | None = None

    def step(self, tokens: np.ndarray, given: Given, seen: Seen) -> np.ndarray:
        """As `Player` says."""
        fed = self._session.fed(tokens)
        if self._tapped:  # caches are written in place
            self.fed = {name: np.array(array) for name, array in fed.items()}
        outputs = self._watched.run(fed, self._wanted, self._cut, given, seen, self._tapped)
        if self._tapped:
            self.call = Call(*self._watched.tapped)
        return self._session.took(tokens, outputs)

    def tap(self, value: str) -> None:
        """As `Player` says."""
        self._tapped = value

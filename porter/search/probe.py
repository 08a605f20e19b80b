"""Probe: a part of the feeds run through the model with one thing changed, from where the change is on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from porter import decoder as decoders
from porter.calibrate.sweep import Sweep, Trial
from porter.drift.compare import Window, cut
from porter.drift.feeds import TokenFeeds
from porter.drift.measures import Accumulator, Drift, score, score_hidden
from porter.run.feeds import empty_caches, feeds
from porter.run.reference import spec

TOKENS = 1024  # of the feeds
LENGTH = 256  # of one of their texts at most
ROWS = 8  # texts of one length side by side
LOGITS = 256 << 20  # bytes of the reference's logits, which are kept


class Probe:
    """`model` (its caches empty), the texts that it runs on, and its own answers to them.

    Of each text the first LENGTH tokens are taken, of texts spread evenly over the feeds, TOKENS in all. In
    memory are the reference's answers, and what a `Sweep` keeps.
    """

    def __init__(self, model: ir.Model, texts: TokenFeeds, vocabulary: int) -> None:
        self.model, self.decoder = model, decoders.recognise(model)
        values = (*model.graph.outputs, *(v for n in model.graph for v in n.outputs))
        self.output = next(v for v in values if v.name == self.decoder.output)
        self._groups = _side_by_side(_picked(texts, self.decoder, vocabulary))
        inputs = {v.name: spec(v) for v in model.graph.inputs if not v.is_initializer()}
        self.feeds = []
        for group in self._groups:
            caches = empty_caches(self.decoder, inputs, len(group))
            self.feeds.append(feeds(self.decoder, self._tokens(group), 0, caches, inputs))
        trial = self.sweep().trial([self.output], [])
        self._reference = [self._answer(trial, i, {}) for i in range(len(self.feeds))]

    @property
    def tokens(self) -> int:
        """How many are scored."""
        return sum(w.fed for group in self._groups for w in group)

    def sweep(self) -> Sweep:
        """A sweep over the texts, from the model's inputs."""
        return Sweep(self.model, self.feeds)

    def drift(self, trial: Trial, arrays: Sequence[Mapping[ir.Value, np.ndarray]]) -> Drift:
        """How far the answers move with `arrays`, one mapping for each of the feeds, or one for all."""
        total = Accumulator()
        for i, group in enumerate(self._groups):
            made = self._answer(trial, i, arrays[i % len(arrays)])
            for row, w in enumerate(group):
                a, b = self._reference[i][row], made[row]
                encoder = self.decoder.cache == "none"
                total.add(score_hidden(a, b) if encoder else score(a, b, w.tokens[1:]), w.text)
        return total.drift()

    def _answer(self, trial: Trial, feed: int, arrays: Mapping[ir.Value, np.ndarray]) -> np.ndarray:
        return np.asarray(trial.run(feed, arrays)[self.output.name], np.float32)

    def _tokens(self, group: Sequence[Window]) -> np.ndarray:
        return np.stack([w.tokens[:-1] for w in group])


def _picked(texts: TokenFeeds, known: decoders.Decoder, vocabulary: int) -> list[Window]:
    """The beginnings of texts spread evenly over the feeds, as many as TOKENS and LOGITS allow."""
    longest = min(n for n in (LENGTH, known.context, known.capacity) if n)
    pieces = [Window(w.text, w.tokens[: longest + 1]) for w in cut(texts, known.context or None)]
    allowed = min(TOKENS, max(1, LOGITS // (4 * vocabulary)))
    count = max(1, int(allowed / (sum(w.fed for w in pieces) / len(pieces))))
    return [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, count).astype(int))]


def _side_by_side(pieces: Sequence[Window]) -> list[list[Window]]:
    """Windows of the same length together: no padding, which would count in sums over inputs."""
    by_length: dict[int, list[Window]] = {}
    for w in pieces:
        by_length.setdefault(w.fed, []).append(w)
    return [same[i : i + ROWS] for same in by_length.values() for i in range(0, len(same), ROWS)]

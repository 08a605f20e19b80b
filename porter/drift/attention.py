"""What a quantized cache does to each head's attention, at several context lengths.

Text goes through the lowered program and, step by step, through the same graph in ONNX Runtime:

    q, k, v    of the graph: each Attention's query, and all floats that were appended to its cache
    k', v'     of the lowered program: its cache buffers after the step, decoded by the graph's own nodes
               between the buffers and Attention

and attention over k', v' is compared with that over k, v under the same q, in float64. So a figure is what
this one cache costs this one head, without what layers before it changed. Rotations and normalizers stand
before both, and change neither logits nor angles. The cache's contents are measured; the softmax over them is
numpy's, not the kernel's, whose own error is the lowering's drift.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.context import Feeds
from porter.decoder import Decoder
from porter.drift.compare import CONTEXTS, DECODE, cut, padded, schedule, singles
from porter.drift.feeds import TokenFeeds
from porter.drift.layers import Layer, find
from porter.run.decode import Decode
from porter.run.protocol import Runner
from porter.run.reference import ReferenceRunner

ROWS = 8  # texts side by side at most
STEPS = 4  # single tokens before each context length, each a query of every head, unless said otherwise
MEMORY = 64 << 20  # bytes of exact keys, values and logits: as many texts run side by side as fit

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Head:
    """One query head with `tokens` tokens in its cache, over `queries` queries, one for each text and step.

    `logit_max` is the largest change of a logit; `tv` the mean total variation between the two attention
    distributions, half the sum of |p - p'|, 0 to 1; `cosine` the mean cosine between the two outputs. What is
    not a number has an infinite change, a total variation of 1 and a cosine of 0.
    """

    layer: int
    head: int
    tokens: int
    queries: int
    logit_max: float
    tv: float
    cosine: float


def heads(
    model: ir.Model,
    decoder: Decoder,
    port: Runner,
    feeds: TokenFeeds,
    steps: int = STEPS,
    progress: Progress = lambda f: None,
) -> list[Head]:
    """Measure every head of every Attention over a cache; `port` is `model` lowered, `decoder` its interface.

    Lengths are those of CONTEXTS that a text reaches, else the longest text; `steps` tokens before each are
    queries. `model` gets more outputs. A
    layer that attends otherwise than by Attention is left out. Memory: the exact keys and values of all
    layers for the texts side by side, and one layer's decoded cache.
    """
    layers = find(model, decoder)
    if not layers:
        return []
    names = dict.fromkeys(n for layer in layers for n in layer.wanted)
    _add_outputs(model, names)
    window = min((n for n in (decoder.capacity, decoder.context) if n), default=None)
    texts = sorted(cut(feeds, window), key=lambda w: -w.fed)
    recorder = _Recorder(ReferenceRunner(model), port.bounds, names)
    texts = texts[: _side_by_side(layers, recorder, decoder, texts[0].fed)]
    lengths = [n for n in CONTEXTS if n <= texts[0].fed] or [texts[0].fed]
    tokens = padded([w.tokens[:-1] for w in texts])[0]
    exact, lowered = (Decode(r, decoder, len(texts)) for r in (recorder, port))
    sums = {(layer.index, n): _Sum() for n in lengths for layer in layers}
    for part in schedule(lengths[-1], singles(lengths, steps)):
        piece = tokens[:, part.start : part.stop]
        exact.step(piece)
        lowered.step(piece)
        for layer in layers:
            layer.append(recorder.seen)
        if part.phase == DECODE:
            rows = [i for i, w in enumerate(texts) if w.fed >= part.stop]
            length = next(n for n in lengths if part.stop <= n)
            _measure(layers, sums, length, recorder.seen[-1], lowered.caches, rows, part.stop)
        recorder.seen.clear()
        progress(part.stop / lengths[-1])
    return [head for (layer, n), found in sums.items() for head in found.heads(layer, n)]


def _add_outputs(model: ir.Model, names: Mapping[str, None]) -> None:
    """Let the model answer these values too."""
    known = {v.name for v in (*model.graph.outputs, *model.graph.inputs)}
    values = {v.name: v for n in model.graph for v in n.outputs}
    model.graph.outputs.extend(values[n] for n in names if n not in known)


class _Recorder:
    """A Runner that keeps the values `names` of each run; it takes as many tokens at once as the port."""

    def __init__(self, runner: Runner, bounds: Mapping[str, int], names: Collection[str]) -> None:
        self.inputs, self.outputs, self.in_place, self.bounds = runner.inputs, runner.outputs, {}, bounds
        self._runner, self._names = runner, names
        self.seen: list[Feeds] = []

    def run(self, feeds: Feeds) -> Feeds:
        """Run, and remember."""
        found = self._runner.run(feeds)
        self.seen.append({name: found[name] if name in found else feeds[name] for name in self._names})
        return found


def _side_by_side(layers: Sequence[Layer], runner: Runner, decoder: Decoder, tokens: int) -> int:
    """How many texts run in one batch: each token has keys, values and logits."""
    sizes = [runner.outputs[n].shape for layer in layers for n in (layer.key, layer.value)]
    sizes.append((0, 1, 0, runner.outputs[decoder.output].shape[-1]))
    known = [s[1] * s[3] for s in sizes if isinstance(s[1], int) and isinstance(s[3], int)]
    return max(1, min(ROWS, MEMORY // max(1, 4 * tokens * sum(known))))


def _measure(
    layers: Sequence[Layer],
    sums: Mapping[tuple[int, int], _Sum],
    length: int,
    step: Feeds,
    caches: Feeds,
    rows: Sequence[int],
    tokens: int,
) -> None:
    """Add one query of each row to every layer's sums."""
    for layer in layers:
        (keys, values), (held_keys, held_values) = layer.exact(), layer.held(step, caches)
        for row in rows:
            query = step[layer.query][row, :, -1].astype(np.float64)
            mask = _row(step[layer.mask], row, len(query), tokens) if layer.mask else None
            pairs = ((keys, values), (held_keys, held_values))
            a, b = (layer.attend(query, k[row, :, :tokens], v[row, :, :tokens], mask) for k, v in pairs)
            sums[layer.index, length].add(a, b)


def _row(mask: np.ndarray, row: int, heads: int, tokens: int) -> np.ndarray:
    """The last query's mask of one row: bool or float [heads or 1, tokens]."""
    whole = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return whole[min(row, len(whole) - 1), :, -1, :tokens]


class _Sum:
    """Figures of a layer's heads, over queries."""

    def __init__(self) -> None:
        self.queries, self.logit, self.tv, self.cosine = 0, np.zeros(0), np.zeros(0), np.zeros(0)

    def add(self, a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> None:
        """One query: logits, distribution and output of all heads, exact and held."""
        logit, tv, cosine = distance(a, b)
        self.logit = np.maximum(self.logit, logit) if self.queries else logit
        self.tv = self.tv + tv if self.queries else tv
        self.cosine = self.cosine + cosine if self.queries else cosine
        self.queries += 1

    def heads(self, layer: int, tokens: int) -> Iterator[Head]:
        """The figures of each head."""
        for i in range(len(self.logit)):
            means = float(self.tv[i] / self.queries), float(self.cosine[i] / self.queries)
            yield Head(layer, i, tokens, self.queries, float(self.logit[i]), *means)


def distance(
    a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of logits [H,T], distributions [H,T] and outputs [H,D]: each head's largest logit change, total
    variation and cosine."""
    with np.errstate(invalid="ignore", over="ignore"):
        logit = np.abs(a[0] - b[0]).max(axis=-1)
        tv = 0.5 * np.abs(a[1] - b[1]).sum(axis=-1)
        norms = np.linalg.norm(a[2], axis=-1) * np.linalg.norm(b[2], axis=-1)
        cosine = np.where(norms > 0, (a[2] * b[2]).sum(axis=-1) / np.where(norms > 0, norms, 1), 0)
    cosine = np.where((a[2] == b[2]).all(axis=-1), 1.0, cosine)  # two zero vectors are equal
    bad = ~np.isfinite(tv) | ~np.isfinite(cosine)
    logit = np.where(np.isnan(logit) | bad, np.inf, logit)
    return logit, np.where(bad, 1.0, tv), np.where(bad, 0.0, cosine)

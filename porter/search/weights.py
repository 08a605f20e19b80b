"""Sensitivities of weights: what each matrix alone, in each format, does to the drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from porter.calibrate import Gram
from porter.calibrate.sweep import Trial
from porter.context import Context
from porter.search import additive
from porter.search.candidates import Tried, error, few, rounded
from porter.search.choices import Item, Option
from porter.search.costs import Costs
from porter.search.probe import Probe
from porter.target import TargetSpec
from porter.weights.base import WeightPass
from porter.weights.layers import layers
from porter.weights.select import Matrix

Progress = Callable[[float], None]


def items(
    probe: Probe,
    matrices: Sequence[Matrix],
    casts: Sequence[WeightPass],
    spec: TargetSpec,
    costs: Costs,
    measures: tuple[str, ...],
    progress: Progress,
) -> list[Item]:
    """Each matrix with the options that are worth it, the one that it has among them, which costs no drift.

    A matrix is changed in a run that starts at its layer's input, in the order of the graph; one that tokens
    pick from, at the model's. In memory are the weights behind the layer.
    """
    found: dict[str, Item] = {}
    for trial, gram, group in _stations(probe, matrices):
        for matrix in group:
            values = matrix.read()
            tried = few([_tried(cast, matrix, values, gram, spec, costs) for cast in casts])
            size = matrix.tensor.nbytes
            options = [Option("as it is", size, costs.weight(matrix, "", size), (0.0,) * len(measures))]
            for t in tried:
                stored = np.swapaxes(t.values, -1, -2) if matrix.turned else t.values
                array = np.ascontiguousarray(stored, matrix.tensor.dtype.numpy())
                amounts = additive.amounts(probe.drift(trial, [{matrix.value: array}]), measures)
                options.append(Option(_name(t.cast), t.bytes, t.seconds, tuple(amounts.tolist()), t.cast))
            found[matrix.name] = Item(matrix.name, "weight", int(np.prod(matrix.shape)), tuple(options))
            matrix.forget()
            progress(len(found) / len(matrices))
    return [found[m.name] for m in matrices]


def _stations(
    probe: Probe, matrices: Sequence[Matrix]
) -> Iterator[tuple[Trial, np.ndarray | None, Sequence[Matrix]]]:
    """Where runs start: the rest of the model, the mean of x x^T there, and the matrices that x meets."""
    early = [m for m in matrices if "embedding" in m.roles]
    found, tables = layers(probe.model.graph, [m for m in matrices if m not in early])
    sweep = probe.sweep()
    if early + tables:
        yield sweep.trial([probe.output], [m.value for m in early + tables]), None, early + tables
    for layer in found:
        gram = Gram(layer.channels, np.float32)
        for x in sweep.advance(layer.input):
            gram.add(x)
        trial = sweep.trial([probe.output], [m.value for m in layer.matrices])
        yield trial, gram.matrix / max(gram.count, 1), layer.matrices


def _tried(
    cast: WeightPass,
    matrix: Matrix,
    values: np.ndarray,
    gram: np.ndarray | None,
    spec: TargetSpec,
    costs: Costs,
) -> Tried:
    form = cast.form(Context(spec))
    rows, columns = matrix.shape[-2:]
    size = form.bits_per_weight(rows, columns) * values.size / 8
    made = rounded(cast, form, values, gram)
    seconds = costs.weight(matrix, form.name, size)
    return Tried(cast, made, size, seconds, costs.of(size, seconds), error(values, made, gram))


def _name(cast: WeightPass) -> str:
    words = (cast.name.removeprefix("quantize."), cast.format, f"scales={cast.scales}" if cast.scales else "")
    return " ".join(filter(None, words))

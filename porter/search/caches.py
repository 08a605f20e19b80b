"""Sensitivities of a cache: what keys, or values, of each layer alone do to the drift in each scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from porter import kv
from porter.kv.cache import Cache
from porter.kv.constants import calibrated
from porter.kv.scheme import Scheme, Side
from porter.kvgraph.graph import Layer, layers
from porter.search import additive
from porter.search.choices import Item, Option
from porter.search.costs import Costs
from porter.search.probe import Probe
from porter.target import TargetSpec

EXACT = Side("fp32")
Progress = Callable[[float], None]


def sides(spec: TargetSpec, name: str) -> dict[str, Side]:
    """How the target's schemes store `key` or `value`, by the name of the first scheme that does.

    Schemes that are more than two sides (windows, normalizers, tags, an exact copy) are no candidates: what
    they add holds for keys and values together.
    """
    found: dict[Side, str] = {}
    for scheme_name in spec.kv:
        scheme = kv.parse(scheme_name)
        if scheme == Scheme(scheme.key, scheme.value) and scheme.side(name) != EXACT:
            found.setdefault(scheme.side(name), scheme_name)
    return {label: side for side, label in found.items()}


def items(
    probe: Probe, spec: TargetSpec, costs: Costs, measures: tuple[str, ...], progress: Progress
) -> list[Item]:
    """Both sides of each layer with their options, exact float32 among them.

    What a layer writes is rounded as the cache would (`porter.kv.cache`), and the rest of the model runs on
    it. Static steps are those of the same texts.
    """
    found: list[Item] = []
    sweep, every = probe.sweep(), layers(probe.model.graph)
    for i, layer in enumerate(every):
        values = {side: layer.scatter(side).inputs[1] for side in ("key", "value")}
        arrays = {side: [np.array(a) for a in sweep.advance(v)] for side, v in values.items()}
        for side, value in values.items():
            trial = sweep.trial([probe.output], [value])
            _, heads, _, size = arrays[side][0].shape
            options = []
            for name, form in {"fp32": EXACT, **sides(spec, side)}.items():
                amounts = np.zeros(len(measures))
                if form != EXACT:
                    changed = [{value: x} for x in rounded(side, form, arrays)]
                    amounts = additive.amounts(probe.drift(trial, changed), measures)
                held, seconds = costs.side(form, heads, size)
                options.append(Option(name, held, seconds, tuple(amounts.tolist()), side=form))
            numbers = costs.batch * heads * size * costs.context
            found.append(Item(_name(layer, side), side, numbers, tuple(options), i))
            progress(len(found) / (2 * len(every)))
    return found


def rounded(name: str, side: Side, arrays: dict[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
    """What a cache reads back of the keys or values [B,H,T,D] that it was given, feed by feed."""
    scheme = Scheme(**{"key": EXACT, "value": EXACT, name: side})
    keys, values = (np.concatenate([_flat(x) for x in arrays[s]], axis=1) for s in ("key", "value"))
    constants = calibrated(scheme, keys, values)
    found = []
    for k, v in zip(arrays["key"], arrays["value"], strict=True):
        batch, heads, tokens, size = k.shape
        cache = Cache(scheme, size, heads, tokens, batch, constants)
        cache.append(k.astype(np.float32), v.astype(np.float32))
        read = cache.keys if name == "key" else cache.values
        found.append(np.stack([read(row) for row in range(batch)]).astype(arrays[name][0].dtype))
    return found


def _flat(x: np.ndarray) -> np.ndarray:
    """[B,H,T,D] -> float32 [H,B*T,D]."""
    return np.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[3]).astype(np.float32)


def _name(layer: Layer, side: str) -> str:
    return str(layer.scatter(side).inputs[0].name)

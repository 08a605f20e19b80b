"""A scheme's constants of every layer, from the keys and values that calibration feeds make.

The feeds are for the model as it came; here its caches are static. Their tokens are fed again, from the
first, into empty caches of the new form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from porter import decoder
from porter.calibrate import Sweep
from porter.context import Feeds
from porter.errors import OptionError
from porter.kv.constants import Constants, calibrated
from porter.kv.scheme import Scheme, Side
from porter.kvgraph.folding import Fold
from porter.kvgraph.graph import Layer
from porter.kvgraph.sensitivity import Tagged, tags_of
from porter.run.feeds import feeds as step

TOKENS = 1 << 14  # of the feeds, the first so many: their keys and values are held a layer at a time


def wanted(scheme: Scheme) -> bool:
    """Whether there are constants to find: static steps, a normalizer, channels that come first, tags."""
    return scheme.tagged or _measured(scheme)


def _measured(scheme: Scheme) -> bool:
    return scheme.normalize or any(map(_static, scheme.sides))


def constants(
    model: ir.Model,
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    folds: Sequence[Fold | None],
    feeds: Sequence[Feeds],
) -> list[Constants]:
    """Those of each layer, with normalizers that its fold can take; empty where its scheme wants none, or
    goes without since there are no feeds.

    Raises PassError PORT-0272 when a scheme cannot do without, OptionError PORT-0293 for feeds without the
    model's tokens.
    """
    found = [Constants() for _ in layers]
    if feeds and any(map(wanted, schemes)):
        adapted = list(_adapted(model, feeds))
        tagged = Tagged([tags_of(model, given, fed) for given, fed in zip(feeds, adapted, strict=False)])
        sweep = Sweep(model, adapted)
        for i, (layer, scheme, fold) in enumerate(zip(layers, schemes, folds, strict=True)):
            if wanted(scheme):
                arrays = [list(sweep.advance(layer.scatter(side).inputs[1])) for side in ("key", "value")]
                if _measured(scheme):
                    joined = (np.concatenate([_tokens(a) for a in each], axis=1) for each in arrays)
                    alike = (fold.pairs, fold.shared) if fold else ()
                    found[i] = calibrated(scheme, *joined, *alike)
                if scheme.tagged:
                    queries = sweep.advance(layer.attention.inputs[0])
                    tagged.add(layer.attention, scheme, found[i], *arrays, list(queries))
        more = tagged.chosen(layers[0].key.inputs[0].shape[2])
        found = [replace(c, more=more) if s.tagged else c for c, s in zip(found, schemes, strict=True)]
    for scheme, made in zip(schemes, found, strict=True):
        made.check(scheme)
    return found


def _static(side: Side) -> bool:
    return bool(side.static) or side.mixed


def _tokens(x: np.ndarray) -> np.ndarray:
    """[B,H,S,D] -> float32 [H,B*S,D]."""
    return np.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[3]).astype(np.float32)


def _adapted(model: ir.Model, feeds: Sequence[Feeds]) -> Iterator[Feeds]:
    """Feeds of the model with static caches, as many tokens as these hold, TOKENS in all."""
    known, left = decoder.recognise(model), TOKENS
    inputs = {v.name: v for v in model.graph.inputs}
    for feed in feeds:
        if known.tokens not in feed:
            hint = "give the feeds of the model as it came"
            raise OptionError("PORT-0293", f"a calibration feed has no {known.tokens!r}", hint=hint)
        tokens = feed[known.tokens][:, : known.capacity]
        batch = len(tokens)
        caches = {c.past: _empty(inputs[c.past], batch) for c in known.caches}
        others = {n: feed[n] for n in known.others if n in feed}
        yield step(known, tokens, 0, caches) | others
        left -= tokens.size
        if left <= 0:
            return


def _empty(value: ir.Value, batch: int) -> np.ndarray:
    return np.zeros((batch, *list(value.shape)[1:]), value.dtype.numpy())

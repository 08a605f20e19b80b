"""Needs: the bytes that a chip must hold, and how many chips it takes until each holds its part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from porter import kv
from porter.estimate.model import Attention, Linear, Model
from porter.estimate.work import WORD, Stored, bytes_of, heads_of, part
from porter.kv.scheme import Scheme
from porter.target import TargetSpec


@dataclass(frozen=True)
class Bytes:
    """What one chip holds."""

    weights: float
    kv: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.kv + self.workspace


def needed(model: Model, stored: Stored, scheme: Scheme, batch: int, prompt: int, context: int) -> Bytes:
    """What one of `stored.tp` chips holds: its part of the weights, the cache at `context` tokens of each
    row, and the largest values of a prefill that live at once."""
    weights = sum(_held(w, stored) * w.count * w.experts for w in model.linears) + model.small * WORD
    weights += _held(model.head, stored)
    weights += 0 if model.tied and stored.tp == 1 else model.vocab * model.hidden * WORD
    return Bytes(
        weights, _cache(model, stored.tp, scheme, batch, context), _workspace(model, stored.tp, batch, prompt)
    )


def _held(linear: Linear, stored: Stored) -> float:
    k, n = part(linear, stored.tp)
    return bytes_of(linear, k, n, stored)


def _cache(model: Model, tp: int, scheme: Scheme, batch: int, context: int) -> float:
    total = 0.0
    for attention in model.attention:
        _, heads = heads_of(attention, tp)
        tokens = min(context, attention.window or context)
        numbers = batch * tokens * heads * (attention.size + attention.value)
        total += attention.count * numbers * cache_bits(scheme, attention, tokens, model.layers) / 8
    return total


def cache_bits(scheme: Scheme, attention: Attention, tokens: int, layers: int, copy: bool = True) -> float:
    """Bits of a cached number over all layers, at so many tokens; `copy`: an exact copy counts."""
    size = max(attention.size, attention.value)
    return kv.bits_per_value(scheme, size, attention.kv_heads, max(1, tokens), layers, copy)


def _workspace(model: Model, tp: int, batch: int, prompt: int) -> float:
    """The residual and the widest product's inputs and outputs of all rows of a prefill; logits of a step."""
    widest = max(sum(part(w, tp)) * w.chosen for w in model.linears)
    return float(batch * prompt * (model.hidden + widest) * WORD + batch * model.vocab * 4)


def chips_needed(model: Model, spec: TargetSpec, held: Callable[[int], Bytes]) -> int:
    """The fewest chips that hold it, `held` giving the bytes of one of so many; a count that divides the
    heads, or when even that is too few, what all of the weights and the cache take, in chips."""
    size = int(next(iter(spec.memory.values())).size.value)
    for chips in range(1, model.heads + 1):
        if model.heads % chips == 0 and held(chips).total <= size:
            return chips
    return max(model.heads + 1, math.ceil(held(model.heads).total * model.heads / size))

"""Which tags' tokens get more bits, so that the loss is least within a budget of bytes.

All tokens of a tag (`porter.kv.tags`) get the same bits, while there is room. What a tag gains is measured:
the squared change of the attention's output when its tokens alone are rounded to the fewer bits, less that
with more, in parts of the output's own square, so that layers can be added. A token of any tag costs the same
bytes more, so the choice is a knapsack whose weights are counts of tokens. After TriAxialKV (2605.17170),
whose abstract gives the idea; the measure and the solution are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from porter.errors import PassError
from porter.kv import rounding, tags
from porter.kv.layout import Sizes, model_bytes, pools
from porter.kv.scheme import Scheme, Side


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row of a layer: float32 keys and values [H,T,D] as they are stored (normalized, turned), queries
    [Hq,S,D] as they meet them, which stand at the positions `at`, int [S]; tags int [T]; the softmax's scale
    (None: 1/sqrt(D)) and soft cap."""

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    at: np.ndarray
    tags: np.ndarray
    scale: float | None = None
    softcap: float = 0.0


def gains(scheme: Scheme, sample: Sample) -> np.ndarray:
    """What each tag gains by more bits, float64 [tags]; 0 for a tag without tokens. A token counts where it
    is a code: not as a sink, nor for the queries that have it in their recent window."""
    length = np.arange(len(sample.tags))
    coded = (length >= scheme.sink) & (length < sample.at[:, None] + 1 - scheme.recent)
    exact, found = _attend(sample, np.zeros_like(coded), sample.keys, sample.values), np.zeros(tags.COUNT)
    power = np.square(exact).sum() or 1.0
    for tag in range(tags.COUNT):
        mine = sample.tags == tag
        rounded = coded & mine
        if not rounded.any():
            continue
        lost = []
        for more in (False, True):
            sides = ((scheme.key, sample.keys), (scheme.value, sample.values))
            keys, values = (_rounded(side, x, mine, more) for side, x in sides)
            lost.append(np.square(_attend(sample, rounded, keys, values) - exact).sum())
        found[tag] = (lost[0] - lost[1]) / power
    return found


def choose(scheme: Scheme, gain: np.ndarray, tokens: np.ndarray, capacity: int) -> np.ndarray:
    """Which tags get more bits in a cache of `capacity` tokens, bool [tags], by what tags gained in samples
    with `tokens` int [tags] of each. A full cache has as many tokens of each band as the band has positions,
    of the same kinds as the samples. Tags that no sample has go with the usual kind of their band."""
    usual, more = pools(scheme, capacity)
    places = tags.default(np.arange(scheme.sink, scheme.sink + usual + more))
    each = np.bincount(places, minlength=tags.BANDS)
    bands = tags.band(np.arange(tags.COUNT))
    seen = np.bincount(bands, weights=tokens, minlength=tags.BANDS)
    shares = tokens / np.maximum(seen, 1)[bands]
    expected = np.rint(shares * each[bands]).astype(int)
    chosen = assign(gain / np.maximum(tokens, 1) * expected, expected, more) & (expected > 0)
    return np.where(tokens > 0, chosen, chosen[bands])


def assign(gain: np.ndarray, tokens: np.ndarray, room: int) -> np.ndarray:
    """Which tags get more bits, bool [tags]: the set with the largest total gain among those with at most
    `room` tokens in all; of equal ones, one that leaves later tags out. Exact, in tags * room steps.

    `tokens`: int [tags], the tokens that each tag is expected to have.
    """
    best = np.zeros(room + 1)  # best[r]: the largest gain of the tags so far in r tokens' room
    taken = np.zeros((len(gain), room + 1), bool)
    for tag, (value, count) in enumerate(zip(gain, tokens, strict=True)):
        if value > 0 and count <= room:
            with_it = best[: room + 1 - count] + value
            taken[tag, count:] = with_it > best[count:]
            best[count:] = np.maximum(best[count:], with_it)
    chosen = np.zeros(len(gain), bool)
    for tag in reversed(range(len(gain))):
        chosen[tag] = taken[tag, room]
        room -= int(tokens[tag]) if chosen[tag] else 0
    return chosen


def within(scheme: Scheme, layers: Sequence[Sizes], capacity: int) -> Scheme:
    """The scheme with the largest `share` whose caches keep its budget of `bits` per cached number, over all
    layers. Raises PassError PORT-0273 when even caches without tokens of more bits are larger."""
    total = scheme.rounded(scheme.key, capacity)
    values = sum(heads * capacity * (key + value) for heads, key, value in layers)
    budget = int(scheme.bits * values / 8)

    def shared(more: int) -> Scheme:  # half a token over, so that rounding does not lose one
        share = min(1.0, (more + 0.5) / max(total, 1)) if more else 0.0
        return dataclasses.replace(scheme, share=share, bits=0.0)

    least = model_bytes(shared(0), layers, capacity)
    if least > budget:
        what = (
            f"the caches take {8 * least / values:.4f} bits per number, {least} bytes, with the fewest bits, "
            f"and the budget is {scheme.bits:g}"
        )
        raise PassError("PORT-0273", what, hint="give a larger budget, or a smaller recent window")
    low, high = 0, total  # the most tokens that fit lie between
    while low < high:
        middle = (low + high + 1) // 2
        fits = model_bytes(shared(middle), layers, capacity) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return shared(low)


def _attend(sample: Sample, rounded: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Outputs float64 [Hq,S,D] of queries that see `keys` and `values` where `rounded`, bool [S,T], says so,
    the exact ones elsewhere."""
    shared = len(sample.queries) // len(keys)
    pairs = [[np.repeat(x.astype(np.float64), shared, axis=0) for x in pair]
             for pair in ((sample.keys, sample.values), (keys, values))]  # fmt: skip
    queries = sample.queries.astype(np.float64)
    scale = queries.shape[-1] ** -0.5 if sample.scale is None else sample.scale
    exact, other = (queries @ k.swapaxes(-1, -2) * scale for k, _ in pairs)
    logits = np.where(rounded, other, exact)
    if sample.softcap:
        logits = sample.softcap * np.tanh(logits / sample.softcap)
    seen = np.arange(keys.shape[1]) <= sample.at[:, None]
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights * ~rounded) @ pairs[0][1] + (weights * rounded) @ pairs[1][1]


def _rounded(side: Side, x: np.ndarray, mine: np.ndarray, more: bool) -> np.ndarray:
    """float32 [H,T,D] with the tokens of `mine` rounded."""
    element = side.more if more else side.element
    parts = rounding.encode(side, element, x[:, mine])
    changed = x.copy()
    changed[:, mine] = rounding.decode(side, element, parts, x.shape[-1])
    return changed

"""Which tags' tokens get more bits, so that the loss is least within a budget of bytes.

A token's tag says how recent it is, its modality and its role; all tokens of a tag get the same bits, while
there is room. What a tag gains is measured: the squared change of the attention's output when its tokens
alone are rounded to the fewer bits, less that with more. A token of any tag costs the same bytes more, so the
choice is a knapsack whose weights are counts of tokens. After TriAxialKV (2605.17170), whose abstract gives
the idea; the measure and the solution are ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from porter.errors import PassError
from porter.kv import rounding
from porter.kv.attention import attend
from porter.kv.layout import bytes_of
from porter.kv.scheme import Scheme, Side


def gains(
    scheme: Scheme, keys: np.ndarray, values: np.ndarray, queries: np.ndarray, tags: np.ndarray, count: int
) -> np.ndarray:
    """What each of `count` tags gains by more bits, float64 [count]; 0 for a tag without tokens.

    Float32 keys and values [H,T,D] as they are stored (normalized, turned), queries [Hq,S,D] of the last S
    tokens as they meet them, tags int [T].
    """
    exact = attend(keys, values, queries).output
    found = np.zeros(count)
    for tag in np.unique(tags):
        mine = tags == tag
        lost = []
        for more in (False, True):
            k, v = (_rounded(side, x, mine, more) for side, x in ((scheme.key, keys), (scheme.value, values)))
            lost.append(np.square(attend(k, v, queries).output - exact).sum())
        found[tag] = lost[0] - lost[1]
    return found


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


def within(scheme: Scheme, head_size: int, heads: int, capacity: int, budget: int) -> Scheme:
    """The scheme with the largest `share` whose cache has at most `budget` bytes in a layer.

    Raises PassError PORT-0273 when even a cache without tokens of more bits is larger.
    """
    total = scheme.rounded(scheme.key, capacity)

    def shared(more: int) -> Scheme:  # half a token over, so that rounding does not lose one
        return dataclasses.replace(scheme, share=min(1.0, (more + 0.5) / max(total, 1)) if more else 0.0)

    least, most = (bytes_of(shared(more), head_size, heads, capacity) for more in (0, total))
    if least > budget:
        what = f"the cache has {least} bytes in a layer with the fewest bits, and the budget is {budget}"
        raise PassError("PORT-0273", what, hint="give a larger budget or a smaller capacity")
    each = (most - least) // max(total, 1)
    return shared(min(total, (budget - least) // each) if each else 0)


def _rounded(side: Side, x: np.ndarray, mine: np.ndarray, more: bool) -> np.ndarray:
    """float32 [H,T,D] with the tokens of `mine` rounded."""
    element = side.more if more else side.element
    parts = rounding.encode(side, element, x[:, mine])
    changed = x.copy()
    changed[:, mine] = rounding.decode(side, element, parts, x.shape[-1])
    return changed

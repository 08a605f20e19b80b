"""Search: the tiling of a product that takes least time, of those that fit.

Every tiling is weighed (`porter.lower.tile.weights`), and the best are simulated
(`porter.lower.tile.skeleton`); the fastest is taken.
"""

from __future__ import annotations

import heapq
import math

from porter.lower.tile.candidates import chunks, tiles
from porter.lower.tile.chip import Chip
from porter.lower.tile.skeleton import skeleton
from porter.lower.tile.tiling import Sizes, Tiling, grouped
from porter.lower.tile.weights import Weights
from porter.simulate import simulate

OFF = 1.15  # how much longer a tiling may be weighed to be than another that it may beat
SIMULATED = 12  # ways to cut rows and columns whose chunks are simulated


def choose(sizes: Sizes, chip: Chip) -> Tiling:
    """The best tiling; where nothing fits, the smallest, which is then refused for what it overflows."""
    found = shortlist(sizes, chip, SIMULATED)
    if len(found) < 2:
        return found[0] if found else _least(sizes, chip)
    weights, best, shortest = Weights(sizes, chip), found[0], math.inf
    for tiling in found:
        if weights.seconds(tiling) < shortest * OFF:
            seconds = float(simulate(skeleton(tiling, sizes, chip), chip.spec).seconds)
            if seconds < shortest:
                best, shortest = tiling, seconds
    return best


def shortlist(sizes: Sizes, chip: Chip, count: int) -> list[Tiling]:
    """The best ways to cut rows and columns, each with its two best chunks, by `Weights`; best first.

    Ways are tried from the one that promises most, until none that is left can be among the best.
    """
    weights = Weights(sizes, chip)
    ways = sorted(((weights.least(t), i, t) for i, t in enumerate(tiles(sizes, chip))), key=lambda o: o[:2])
    best: list[tuple[float, int, Tiling]] = []  # of each the longest first, negative
    for least, i, tile in ways:
        if len(best) == 2 * count and least > -best[0][0]:
            break
        found = [(weights.seconds(t), t) for t in chunks(grouped(tile, chip), sizes, chip)]
        for n, (seconds, t) in enumerate(heapq.nsmallest(2, found, key=lambda one: one[0])):
            heapq.heappush(best, (-seconds, 2 * i + n, t))
            if len(best) > 2 * count:
                heapq.heappop(best)
    return [t for *_, t in sorted(best, key=lambda one: -one[0])]


def _least(sizes: Sizes, chip: Chip) -> Tiling:
    """Unit steps by themselves."""
    *_, last = tiles(sizes, chip)
    return grouped(last, chip)

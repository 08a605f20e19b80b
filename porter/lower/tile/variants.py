"""Variants: a product whose number of rows shows at run time, scheduled once for each of a few sizes.

    if rows <= 32:                     one token of each sequence: columns are dealt out
      y = x Wᵀ in tiles of 32 rows
    else if rows <= 128:
      ...
    else:                              a prompt: W comes once for 512 rows
      y = x Wᵀ in tiles of 512 rows

A tile of rows reads all of W, so a program in small tiles reads it often where there are many rows; large
tiles compute rows that are none where there are few. Every variant sums along k in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from tvm import tirx

from porter.lower.tile.bounds import most
from porter.lower.tile.capacity import check, overflowing
from porter.lower.tile.chip import Chip, up
from porter.lower.tile.nests import branched, renewed
from porter.lower.tile.product import rows_of, sizes_of
from porter.lower.tile.product import schedule as tiled
from porter.lower.tile.search import choose
from porter.lower.tile.tiling import UNKNOWN

LARGER = (128, 256, 512)  # up to 128 rows W binds everywhere, and rows that are none cost nothing


def schedule(
    function: tirx.PrimFunc, name: str, form: str, chip: Chip, bounds: Mapping[str, int]
) -> tirx.PrimFunc:
    """A kernel of `porter.lower.blocks.product` or `pairs`, multiplied in the unit's `form`, scheduled.

    Raises TargetError PORT-0435 where the smallest tiles do not fit, PORT-0436 where a unit step breaks a
    limit. Larger ones that do not fit are left out, and the next smaller serve in their place.
    """
    extent = rows_of(function)
    found: list[tuple[int, tirx.PrimFunc]] = []
    for rows in _sizes(1 if isinstance(extent, tirx.IntImm) else most(extent, bounds)):
        own = renewed(function)
        made = tiled(own, form, chip, choose(sizes_of(own, form, rows), chip))
        if found and overflowing(made, chip, bounds):
            break
        check(made, name, chip, bounds)
        found.append((rows, made))
    *fewer, (_, result) = found
    for rows, made in reversed(fewer):
        result = branched(made, extent <= rows, result)
    return result


def _sizes(largest: int) -> list[int]:
    """Rows of the tiles of a kernel with at most `largest` rows."""
    larger = [
        min(size, up(largest, UNKNOWN)) for last, size in pairwise((UNKNOWN, *LARGER)) if largest > last
    ]
    return [UNKNOWN, *larger]

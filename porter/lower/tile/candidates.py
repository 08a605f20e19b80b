"""Candidates: ways to cut a product up that fit the memories of a chip.

Tiles are whole unit steps, and as equal as they can be: rows and columns are cut into so many parts, not
into parts of a size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from porter.lower.tile.chip import Chip, Step, up
from porter.lower.tile.tiling import Sizes, Tiling, divisors, fits
from porter.lower.tile.weights import rate_of

PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256)


def tiles(sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
    """Ways to cut rows and columns, with chunks of one step of k."""
    rows, columns, steps = sizes.supposed()
    step = chip.step(sizes.form)
    takers, seen = chip.clusters if chip.clusters > 1 else chip.cores, set()
    for unit, (side_rows, side_columns) in _units(rows, columns, step, chip):
        for down in _parts(-(-rows // (side_rows * unit[0]))):
            tile_rows = up(-(-rows // (down * side_rows)), unit[0])
            for across in _parts(-(-columns // (side_columns * unit[1]))):
                for groups in _groups(sizes.lead * down, across, takers, sizes.columns is not None):
                    pieces = -(-across // groups)
                    tile_columns = up(-(-columns // (groups * pieces * side_columns)), unit[1])
                    real = -(-rows // (side_rows * tile_rows))
                    key = (side_rows, side_columns, tile_rows, tile_columns, groups, pieces)
                    if key in seen:
                        continue
                    seen.add(key)
                    yield Tiling(
                        step, *unit, tile_rows, tile_columns, side_rows, side_columns, real, groups, pieces,
                        steps, 1, 1, False, *unit, 1, unit[0],
                    )  # fmt: skip


def _units(
    rows: int, columns: int, step: Step, chip: Chip
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Unit steps, and how cores of a cluster stand side by side. Where too few rows keep the unit
    busy, half a step's columns deal out more evenly."""
    whole = min(step.rows, rows), min(step.columns, columns)
    units = [whole]
    while chip.clusters > 1 and rows <= step.rows and units[-1][1] % 16 == 0:
        units.append((whole[0], units[-1][1] // 2))
    for unit in units:
        for side in _sides(rows, columns, unit, chip):
            yield unit, side


def _sides(rows: int, columns: int, unit: tuple[int, int], chip: Chip) -> list[tuple[int, int]]:
    """How cores of a cluster may stand side by side: as many as there is work for."""
    if chip.clusters == 1:
        return [(1, 1)]
    most = -(-rows // unit[0]), -(-columns // unit[1])
    found = {(min(a, most[0]), min(chip.cores // a, most[1])) for a in range(1, chip.cores + 1)}
    return [s for s in found if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in found)]


def _parts(most: int) -> list[int]:
    return sorted({min(most, p) for p in PARTS} | {most})


def _groups(down: int, across: int, takers: int, known: bool) -> list[int]:
    """To how many groups columns are dealt, so that every cluster (or core) has as much work as others."""
    if not known:
        return [across]
    even = takers // math.gcd(down, takers)
    return sorted(
        {min(across, max(1, takers // down)), min(across, even), min(across, max(1, -(-takers // down)))}
    )


def chunks(tile: Tiling, sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
    """A tile with strips of y, and chunks of k from the largest that fit down to an eighth of them."""
    strips = _strips(tile, chip)
    for strip in strips:
        for kept in (True, False):
            base = replace(tile, strip=strip, kept=kept)
            if chip.clusters == 1:
                yield from _largest(base, sizes, chip, [])
                continue
            for outer in _outer(base, sizes, chip):
                yield from _largest(base, sizes, chip, [outer])


def _strips(tile: Tiling, chip: Chip) -> list[int]:
    """Rows of y that leave at a time: all, or as few as fill a copy's fixed cost."""
    dma = chip.spec.dma[chip.path[-1].dma]
    rate = rate_of(chip, chip.path[-1].dma, chip.cores * chip.clusters)
    enough = dma.fixed.value * rate / (4 * tile.columns)
    most = tile.rows // tile.turns[0]
    small = next(r for r in divisors(most, tile.step_rows) if r >= min(enough, most))
    return sorted({small, most})


def _outer(tile: Tiling, sizes: Sizes, chip: Chip) -> list[int]:
    """Chunks of the cluster's memory."""
    fit = [
        c
        for c in divisors(tile.steps, 1)
        if fits(replace(tile, outer_chunk=c, strip=tile.step_rows), sizes, chip)
    ]
    return fit[-4:]


def _largest(tile: Tiling, sizes: Sizes, chip: Chip, outer: list[int]) -> Iterator[Tiling]:
    found = []
    for chunk in reversed(divisors(outer[0] if outer else tile.steps, 1)):
        made = replace(tile, chunk=chunk, outer_chunk=outer[0] if outer else chunk)
        if fits(made, sizes, chip):
            found.append(made)
            if len(found) == 4:
                break
    yield from found

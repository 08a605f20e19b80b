"""Search: the tiling of a product that takes least time, of those that fit.

Tiles are whole unit steps, and as equal as they can be: rows and columns are cut into so many parts, not
into parts of a size. Every tiling is weighed by a sum that takes microseconds, and the best of those are
simulated (`porter.lower.tile.skeleton`); the fastest is taken.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace

from porter.lower.tile.chip import Chip, Step, up
from porter.lower.tile.skeleton import skeleton
from porter.lower.tile.tiling import Operand, Sizes, Tiling, divisors, fits, grouped
from porter.simulate import simulate

OFF = 1.15  # how much longer a tiling may be weighed to be than another that it may beat
SIMULATED = 12  # ways to cut rows and columns whose chunks are simulated
PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256)


def choose(sizes: Sizes, chip: Chip) -> Tiling:
    """The best tiling; where nothing fits, the smallest, which is then refused for what it overflows."""
    found = shortlist(sizes, chip, SIMULATED)
    if len(found) < 2:
        return found[0] if found else _least(sizes, chip)
    weights, best, shortest = _Weights(sizes, chip), found[0], math.inf
    for tiling in found:
        if weights.seconds(tiling) < shortest * OFF:
            seconds = float(simulate(skeleton(tiling, sizes, chip), chip.spec).seconds)
            if seconds < shortest:
                best, shortest = tiling, seconds
    return best


def shortlist(sizes: Sizes, chip: Chip, count: int) -> list[Tiling]:
    """The best ways to cut rows and columns, each with its two best chunks, by `_Weights`; best first.

    Ways are tried from the one that promises most, until none that is left can be among the best.
    """
    weights = _Weights(sizes, chip)
    tiles = sorted(((weights.least(t), i, t) for i, t in enumerate(_tiles(sizes, chip))), key=lambda o: o[:2])
    best: list[tuple[float, int, Tiling]] = []  # of each the longest first, negative
    for least, i, tile in tiles:
        if len(best) == 2 * count and least > -best[0][0]:
            break
        found = [(weights.seconds(t), t) for t in _chunks(grouped(tile, chip), sizes, chip)]
        for n, (seconds, t) in enumerate(heapq.nsmallest(2, found, key=lambda one: one[0])):
            heapq.heappush(best, (-seconds, 2 * i + n, t))
            if len(best) > 2 * count:
                heapq.heappop(best)
    return [t for *_, t in sorted(best, key=lambda one: -one[0])]


def candidates(sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
    """All tilings that fit, as far as they are tried."""
    for tile in _tiles(sizes, chip):
        yield from _chunks(grouped(tile, chip), sizes, chip)


def _tiles(sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
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


def _units(rows: int, columns: int, step: Step, chip: Chip) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Unit steps, and how cores of a cluster stand side by side. Where there are too few rows to keep the unit
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
    return sorted({min(across, max(1, takers // down)), min(across, even), min(across, max(1, -(-takers // down)))})


def _chunks(tile: Tiling, sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
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
    rate = _rate(chip, chip.path[-1].dma, chip.cores * chip.clusters)
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


def _least(sizes: Sizes, chip: Chip) -> Tiling:
    """Unit steps by themselves."""
    last = None
    for last in _tiles(sizes, chip):
        pass
    assert last is not None
    return grouped(last, chip)


def _rate(chip: Chip, name: str, takers: int) -> float:
    """Bytes a second of one of `takers` that use a DMA at the same time."""
    dma = chip.spec.dma[name]
    rates = [
        level.bandwidth.value / max(1, takers // level.copies)
        for level in (chip.level(dma.source), chip.level(dma.to))
        if level.bandwidth
    ]
    if dma.rate:
        rates.append(dma.rate.value * dma.engines.value / max(takers, chip.level(dma.to).copies))
    return min(rates, default=math.inf)


class _Weights:
    """What a tiling costs: of each queue the time that it is busy; the longest is what binds.

    Besides, what nothing runs beside: the first copies, and between pieces what sums become and the first
    operands of the next.
    """

    def __init__(self, sizes: Sizes, chip: Chip) -> None:
        self.sizes, self.chip = sizes, chip
        self.total = chip.cores * chip.clusters
        self.takers = chip.clusters if chip.clusters > 1 else chip.cores
        self.vector = chip.spec.vector.rate.value / self.total
        vector = chip.spec.vector
        self.start = vector.fixed.value / vector.clock.value if vector.fixed and vector.clock else 0.0
        operand = chip.operand(sizes.form)
        units = chip.matrix.units.value / self.total
        m, n, k = operand.step.value
        self.step = operand.cycles.value / chip.matrix.clock.value / units
        least = chip.matrix.least
        self.shortest = least.value / operand.cycles.value if least else 0.0
        self.unit_n = n
        self.rows, self.columns, _ = sizes.supposed()
        self.row_bytes, self.column_bytes = (
            sum(p.elements * p.bits / 8 for p in o.parts) for o in (sizes.x, sizes.w)
        )

    def copy(self, name: str, rows: int, operand: Operand, share: float, active: int) -> float:
        dma = self.chip.spec.dma[name]
        engines = dma.engines.value / active if active >= self.takers else dma.engines.value / self.total
        engines = dma.engines.value / max(active, self.chip.level(dma.to).copies)
        total = 0.0
        for part in operand.parts:
            count = part.elements * share
            rate = _rate(self.chip, name, active)
            run = count * part.bits / 8 * (rows if share == 1 else 1)
            if dma.contiguous and run < dma.contiguous.value:
                whole = dma.rate.value * engines if dma.rate else rate
                rate = min(rate, whole * run / dma.contiguous.value)
            total += max(dma.fixed.value / engines, rows * count * part.bits / 8 / rate)
        return total

    def least(self, t: Tiling) -> float:
        """What no chunks can better: the matrix unit's work, and the bytes of the outermost memory."""
        outer = self.sizes.lead * t.down * t.groups
        rounds, active = -(-outer // self.takers), min(self.takers, outer)
        columns = t.core_columns * t.columns
        rows = min(t.row_multiple, self.rows)
        moved = rows * self.row_bytes / t.pieces + columns * self.column_bytes + 4 * rows * columns
        whole = self._matrix(t) * t.steps / t.chunk
        return rounds * t.pieces * max(whole, moved / _rate(self.chip, self.chip.path[0].dma, active))

    def seconds(self, t: Tiling) -> float:
        """An estimate, for comparing tilings."""
        sizes, chip = self.sizes, self.chip
        outer = sizes.lead * t.down * t.groups
        active = min(self.takers, outer)
        rounds = -(-outer // self.takers)
        clustered = chip.clusters > 1
        cores = t.core_rows * t.core_columns if clustered else 1
        rows = min(t.row_multiple, self.rows)
        columns = t.core_columns * t.columns
        chunks, inner = t.steps // t.outer_chunk, t.outer_chunk // t.chunk
        part, small = t.outer_chunk / t.steps, t.chunk / t.steps
        first, last = chip.path[0].dma, chip.path[-1].dma
        x_first = self.copy(first, rows, sizes.x, 1 if t.kept else part, active)
        w_first = self.copy(first, columns, sizes.w, part, active)
        y_first = self._out(first, rows * columns * 4, active, 1 if clustered else t.rows * t.turns[1] // t.strip)
        hbm = w_first * chunks + (0 if t.kept else x_first * chunks) + y_first
        hbm += x_first / t.pieces if t.kept else 0
        hbm += (sizes.last - 1) * self._out(first, columns * 4, active, 1)
        decode_x = 0 if sizes.x.plain else (t.rows * t.chunk * t.step.k * len(sizes.x.parts)) / self.vector
        decode_w = 0 if sizes.w.plain else (t.columns * t.chunk * t.step.k * len(sizes.w.parts)) / self.vector
        decode = decode_x + decode_w + 2 * self.start
        again = chunks * inner
        if t.kept and not clustered:
            decode_x = decode_x * again / t.pieces / again
        results = t.rows * t.columns
        strips = t.rows * t.turns[1] // t.strip
        y = results * sizes.last / self.vector + strips * self.start
        matrix = self._matrix(t) * again
        vector = (decode_x + decode_w + 2 * self.start) * again + y
        local = 0.0
        if clustered:
            everyone = active * cores
            fill = self.copy(last, t.rows, sizes.x, small, everyone)
            fill += self.copy(last, t.columns, sizes.w, small, everyone)
            local = fill * again + self._out(last, results * 4, everyone, strips)
        else:
            fill = 0.0
        if t.spilled:
            groups = results / (t.group_rows * t.group_columns)
            if chip.spilling:
                moved = self._out(chip.spilling, results * 4, active * cores, groups)
                local = max(local, 2 * moved * again)
                matrix += 2 * moved * again if t.turns == (1, 1) else 0
            else:
                moved = 2 * (results / self.vector + groups * self.start) * again
                matrix, vector = matrix + moved, vector + moved
        between = y + decode
        piece = max(hbm, local, vector, matrix + between)
        begin = x_first + w_first + fill + decode + y_first / max(1, 1 if clustered else strips)
        return rounds * t.pieces * piece + begin + chip.spec.dma[first].fixed.value

    def _out(self, name: str, size: float, active: int, count: float) -> float:
        dma = self.chip.spec.dma[name]
        engines = dma.engines.value / max(active, self.chip.level(dma.to).copies)
        return max(count * dma.fixed.value / engines, size / _rate(self.chip, name, active))

    def _matrix(self, t: Tiling) -> float:
        """Of a chunk."""
        step, (m, n) = t.step, t.step.mnk(t.step_rows, t.step_columns)[:2]
        each = max(n / self.unit_n, self.shortest) if self.shortest else 1.0
        return (t.rows // t.step_rows) * (t.columns // t.step_columns) * t.chunk * each * self.step

"""Weights: what a tiling costs, in a sum that takes microseconds; good enough to compare tilings by."""

from __future__ import annotations

import math

from porter.lower.tile.chip import Chip
from porter.lower.tile.tiling import Operand, Sizes, Tiling

ROUGH = 0.02  # of each queue's time that does not run beside the others


def rate_of(chip: Chip, name: str, takers: int) -> float:
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


class Weights:
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
        n = operand.step.value[1]
        self.step = operand.cycles.value / chip.matrix.clock.value / units
        least = chip.matrix.least
        self.shortest = least.value / operand.cycles.value if least else 0.0
        self.unit_n = n
        self.rows, self.columns, _ = sizes.supposed()
        self.row_bytes, self.column_bytes = (
            sum(p.elements * p.bits / 8 for p in o.parts) for o in (sizes.x, sizes.w)
        )

    def copy(self, name: str, rows: int, operand: Operand, share: float, active: int) -> float:
        """Of the buffers of an operand, so many rows of a share of k, for one of `active`."""
        dma = self.chip.spec.dma[name]
        engines = dma.engines.value / max(active, self.chip.level(dma.to).copies)
        total = 0.0
        for part in operand.parts:
            count = part.elements * share
            rate = rate_of(self.chip, name, active)
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
        return rounds * t.pieces * max(whole, moved / rate_of(self.chip, self.chip.path[0].dma, active))

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
        y_first = self._out(
            first, rows * columns * 4, active, 1 if clustered else t.rows * t.turns[1] // t.strip
        )
        hbm = w_first * chunks + (0 if t.kept else x_first * chunks) + y_first
        hbm += x_first / t.pieces * (rounds - 1) / rounds if t.kept else 0
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
        piece = max(hbm, local, vector, matrix + between) + ROUGH * (hbm + local + vector + matrix)
        begin = x_first + w_first + fill + decode + y_first / max(1, 1 if clustered else strips)
        return rounds * t.pieces * piece + begin + chip.spec.dma[first].fixed.value

    def _out(self, name: str, size: float, active: int, count: float) -> float:
        dma = self.chip.spec.dma[name]
        engines = dma.engines.value / max(active, self.chip.level(dma.to).copies)
        return max(count * dma.fixed.value / engines, size / rate_of(self.chip, name, active))

    def _matrix(self, t: Tiling) -> float:
        """Of a chunk."""
        n = t.step.mnk(t.step_rows, t.step_columns)[1]
        each = max(n / self.unit_n, self.shortest) if self.shortest else 1.0
        return (t.rows // t.step_rows) * (t.columns // t.step_columns) * t.chunk * each * self.step

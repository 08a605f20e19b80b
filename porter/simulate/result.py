"""Results of the simulator: times are exact fractions of a second; simulated, not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

KIND = "simulated"
COLUMNS = ("kernel", "calls", "time", "share", "bound by", "matrix", "vector", "dma", "traffic")


@dataclass(frozen=True)
class Use:
    """What a kind of unit did: `busy` seconds, summed over the cores, `utilisation` of all cores' time."""

    unit: str
    operations: int
    busy: Fraction
    utilisation: Fraction

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "unit": self.unit,
            "operations": self.operations,
            "busy_s": float(self.busy),
            "utilisation": float(self.utilisation),
        }


@dataclass(frozen=True)
class Traffic:
    """Bytes that DMA read from a memory level and wrote into it, all cores together."""

    level: str
    read: int
    written: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"level": self.level, "read_bytes": self.read, "written_bytes": self.written}


@dataclass(frozen=True)
class KernelTime:
    """One call of a kernel.

    `cycles` are those of the matrix unit's clock, `flop` twice the multiply-adds of the matrix unit.
    `bound_by` is what keeps the busiest queue of the slowest cores busy, or `latency` when even that one
    waits for more than half of the time.
    """

    name: str
    seconds: Fraction
    cycles: Fraction | None
    cores: int
    bound_by: str
    flop: int
    uses: tuple[Use, ...]
    traffic: tuple[Traffic, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "kind": KIND,
            "seconds": float(self.seconds),
            "cycles": None if self.cycles is None else float(self.cycles),
            "cores": self.cores,
            "bound_by": self.bound_by,
            "flop": self.flop,
            "units": [use.to_dict() for use in self.uses],
            "levels": [level.to_dict() for level in self.traffic],
        }


@dataclass(frozen=True)
class StepTime:
    """The kernels of a step of a program, one after the other: (kernel, how many calls like it).

    `untimed` are kernels without a time: (how many calls, why), by name.
    """

    calls: tuple[tuple[KernelTime, int], ...]
    untimed: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Sequence[StepTime]) -> StepTime:
        """Several steps as one, one after the other."""
        calls: Counter[KernelTime] = Counter()
        untimed: dict[str, tuple[int, str]] = {}
        for step in steps:
            calls.update(dict(step.calls))
            for name, (number, why) in step.untimed.items():
                untimed[name] = (untimed.get(name, (0, ""))[0] + number, why)
        return cls(tuple(calls.items()), untimed)

    @property
    def seconds(self) -> Fraction:
        """Of the whole step."""
        return sum((kernel.seconds * calls for kernel, calls in self.calls), Fraction(0))

    @property
    def cycles(self) -> Fraction | None:
        """Of the matrix unit's clock, where it has one."""
        each = [(kernel.cycles, calls) for kernel, calls in self.calls]
        if any(cycles is None for cycles, _ in each):
            return None
        return sum((cycles * calls for cycles, calls in each if cycles is not None), Fraction(0))

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """What DMA moved, by level, the order that of the kernels."""
        moved: dict[str, Traffic] = {}
        for kernel, calls in self.calls:
            for level in kernel.traffic:
                known = moved.get(level.level, Traffic(level.level, 0, 0))
                read, written = known.read + level.read * calls, known.written + level.written * calls
                moved[level.level] = Traffic(level.level, read, written)
        return tuple(moved.values())

    @property
    def utilisation(self) -> dict[str, Fraction]:
        """Of each unit, the share of all cores' time that it is busy for."""
        busy: dict[str, Fraction] = {}
        for kernel, calls in self.calls:
            for use in kernel.uses:
                shared = use.utilisation * kernel.seconds * calls
                busy[use.unit] = busy.get(use.unit, Fraction(0)) + shared
        return {unit: part / (self.seconds or Fraction(1)) for unit, part in sorted(busy.items())}

    @property
    def bound_by(self) -> str:
        """What binds for most of the time."""
        spent: dict[str, Fraction] = {}
        for kernel, calls in self.calls:
            spent[kernel.bound_by] = spent.get(kernel.bound_by, Fraction(0)) + kernel.seconds * calls
        return max(spent, key=lambda name: spent[name], default="")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `seconds` of a kernel are those of one call."""
        untimed = [{"name": n, "calls": calls, "why": why} for n, (calls, why) in self.untimed.items()]
        return {
            "kind": KIND,
            "seconds": float(self.seconds),
            "cycles": None if self.cycles is None else float(self.cycles),
            "calls": sum(calls for _, calls in self.calls),
            "bound_by": self.bound_by,
            "utilisation": {unit: float(share) for unit, share in self.utilisation.items()},
            "levels": [level.to_dict() for level in self.traffic],
            "kernels": [kernel.to_dict() | {"calls": calls} for kernel, calls in self.calls],
            "not_simulated": untimed,
        }

    def rows(self) -> list[dict[str, str]]:
        """A row of `COLUMNS` for each kernel, the longest first, and one for the whole."""
        total = self.seconds or Fraction(1)
        ordered = sorted(self.calls, key=lambda call: -call[0].seconds * call[1])
        rows = [_row(kernel, calls, total) for kernel, calls in ordered]
        whole = {"kernel": f"all ({KIND})", "calls": str(sum(calls for _, calls in self.calls))}
        whole |= {"time": _time(self.seconds), "share": "100 %", "bound by": self.bound_by}
        return [*rows, {column: whole.get(column, "") for column in COLUMNS}]


def _row(kernel: KernelTime, calls: int, total: Fraction) -> dict[str, str]:
    used = {use.unit: f"{float(use.utilisation):.0%}" for use in kernel.uses}
    dma = [f"{name.removeprefix('dma ')} {share}" for name, share in used.items() if name.startswith("dma")]
    traffic = [f"{level.level} {_bytes(level.read + level.written)}" for level in kernel.traffic]
    return {
        "kernel": kernel.name,
        "calls": str(calls),
        "time": _time(kernel.seconds * calls),
        "share": f"{float(kernel.seconds * calls / total):.0%}",
        "bound by": kernel.bound_by,
        "matrix": used.get("matrix", "–"),
        "vector": used.get("vector", "–"),
        "dma": ", ".join(dma),
        "traffic": ", ".join(traffic),
    }


def _scaled(number: float, units: Sequence[tuple[str, float]]) -> str:
    name, size = next((pair for pair in units if number >= pair[1]), units[-1])
    return f"{number / size:.3g} {name}"


def _time(seconds: Fraction) -> str:
    return _scaled(float(seconds), (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def _bytes(number: int) -> str:
    return _scaled(number, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))

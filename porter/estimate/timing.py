"""Timing: how long one kernel takes on a chip, by a roofline of its spec.

    time = fixed + (C^p + M^p)^(1/p)    C = operations / (compute * peak)    M = bytes / (memory * bandwidth)

with the constants of `spec.efficiency` for the kernel and format, else of the nearest one that is there, else
`ASSUMED`. A product's m, n and k are rounded up to what the matrix unit takes at once; where instructions
have a least time, the operand that moves past the other may be as short as that. A prompt's attention takes
(1 + half / tokens) as long to compute: short rows leave the units waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from porter.errors import SpecError
from porter.estimate.work import Work
from porter.target import TargetSpec
from porter.target.costs import Efficiency
from porter.target.placing import base, same

Kind = Literal["estimated", "simulated", "measured"]
Bound = Literal["compute", "memory", "overhead", "links"]


@dataclass(frozen=True)
class Time:
    """Seconds of one run of a kernel: `fixed` ones, and those that `compute` and `memory` alone would take.

    `links` are a collective's beyond `fixed`. `assumed` are the constants that no file has, by name. Of a
    simulated kernel all seconds are those of what binds it.
    """

    seconds: float
    compute: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    fixed: float = 0.0
    kind: Kind = "estimated"
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """All runs of a kernel in a step and how long they take together."""

    work: Work
    time: Time

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return self.work.count * self.time.seconds


ASSUMED = {
    "compute": (0.75, "the middle of what GPUs reach in BF16 products"),
    "memory": (0.8, "the middle of what GPUs and TPU v6e reach"),
    "fixed": (4e-6, "as on H100"),
    "overlap": (4.0, "as on GPUs"),
    "half": (2000.0, "as on H100"),
}
"""Constants for chips without measurements, and why."""
_NEAREST = {
    ("gemm", "compute"): (("gemm", "bf16"),),
    ("gemm", "memory"): (("gemm", "bf16"), ("copy", "bf16")),
    ("copy", "memory"): (("gemm", "bf16"),),
    ("decode-attention", "memory"): (("copy", "bf16"), ("gemm", "bf16")),
    ("prefill-attention", "memory"): (("copy", "bf16"), ("gemm", "bf16")),
    ("prefill-attention", "compute"): (("gemm", "bf16"),),
    ("decode-attention", "compute"): (("gemm", "bf16"),),
}
"""Where a constant comes from when the kernel has none; `fixed` and `overlap` are the BF16 product's."""


def roofline(work: Work, spec: TargetSpec) -> Time:
    """The time of one run, from the spec. Raises SpecError PORT-0332 where it lacks a rate or bandwidth."""
    known = Constants(spec, work)
    compute = 0.0
    if work.operations:
        reached = known["compute"] * rate(work, spec)
        compute = operations(work, spec) / reached
        if work.kernel == "prefill-attention":
            compute *= 1 + known["half"] / work.tokens
    memory = work.bytes / (known["memory"] * bandwidth(spec))
    fixed, overlap = known["fixed"], known["overlap"]
    longest = max(compute, memory)
    together = longest * sum((t / longest) ** overlap for t in (compute, memory)) ** (1 / overlap)
    return Time(fixed + together, compute, memory, 0.0, fixed, assumed=tuple(known.assumed))


def operations(work: Work, spec: TargetSpec) -> float:
    """Those of one run, with m, n and k rounded up to a step of the matrix unit, whichever way round m and n
    are cheaper."""
    if work.kernel != "gemm" or work.unit != "matrix" or spec.matrix is None:
        return work.operations
    m, n, k = work.shape
    operand, least = spec.matrix.formats[work.format], spec.matrix.least
    a, b, c = operand.step.value
    shortest = b * least.value / operand.cycles.value if least and operand.cycles else 0.0

    def padded(stays: int, moves: int) -> float:
        return _up(stays, a) * (max(moves, shortest) if shortest else _up(moves, b))

    return 2.0 * _up(k, c) * work.groups * min(padded(m, n), padded(n, m))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def rate(work: Work, spec: TargetSpec) -> float:
    """Operations a second of a kernel at its peak: of both formats that it multiplies where they differ."""
    for mixed in spec.matrix.mixed if spec.matrix and work.activations else ():
        if same(mixed.activations, base(work.activations)) and same(mixed.weights, base(work.weights)):
            return float(mixed.rate.value)
    return peak(spec, work.format, work.unit)


def peak(spec: TargetSpec, name: str, unit: str) -> float:
    """Operations a second in a format."""
    if unit == "matrix" and spec.matrix and name in spec.matrix.formats:
        return float(spec.matrix.formats[name].rate.value)
    if spec.vector and spec.vector.rate:
        return float(spec.vector.rate.value)
    raise _too_little(spec, f"how fast it multiplies {name}")


def bandwidth(spec: TargetSpec) -> float:
    """Bytes a second of the outermost memory."""
    outer = next(iter(spec.memory.values()), None)
    if outer is None or outer.bandwidth is None:
        raise _too_little(spec, "how fast its memory is")
    return float(outer.bandwidth.value)


def _too_little(spec: TargetSpec, what: str) -> SpecError:
    hint = "give it in a .toml of your own; docs/targets.md lists the keys"
    return SpecError("PORT-0332", f"no estimate for {spec.name}: its file does not say {what}", hint=hint)


class Constants:
    """The constants of a kernel in a format; `assumed` collects the names of those that no file has."""

    def __init__(self, spec: TargetSpec, work: Work) -> None:
        self.spec, self.work = spec, work
        self.assumed: list[str] = []

    def __getitem__(self, key: str) -> float:
        for entry in self._entries(key):
            figure = getattr(entry, key)
            if figure is not None:
                return float(figure.value)
        self.assumed.append(key)
        return ASSUMED[key][0]

    def _entries(self, key: str) -> Iterator[Efficiency]:
        table: dict[Any, dict[str, Efficiency]] = self.spec.efficiency
        kernel, names = (
            self.work.kernel,
            (self.work.weights, base(self.work.weights), self.work.format, "bf16"),
        )
        own = table.get(kernel, {})
        if kernel != "gemm":
            names = ("bf16",)
        elif self.work.format != base(self.work.weights):
            names = (self.work.format, "bf16")  # widened: the product is that of the wider format
        yield from (own[name] for name in names if name in own)
        fallback = (
            ((kernel, "bf16"), ("gemm", "bf16"))
            if key in ("fixed", "overlap")
            else _NEAREST.get((kernel, key), ())
        )
        yield from (table[a][b] for a, b in fallback if b in table.get(a, {}))

"""Attribution: which step of a port brought how much of its drift, by cumulative prefixes of the pipeline.

The port is a chain of models: the reference, the model after each group of passes, the lowered program in
float32, and the lowered program in the target's numerics. With d the mean KL divergence (for a model without
logits: noise over signal power),

    own_i   = d(model i-1, model i)      what step i changed, against the model that it was given
    after_i = d(reference, model i)      what it left of the whole chain so far
    interaction_i = after_i - after_(i-1) - own_i

so that the own parts and the interactions add up to the total, exactly and for any d. Both measures are
quadratic in small errors e: |e_1 + e_2|^2 = |e_1|^2 + |e_2|^2 + 2 e_1.e_2 (for KL in the metric of the
reference's Fisher information). The interaction is that cross term: near 0 where the errors of two steps have
nothing to do with each other, positive where they add up, negative where one undoes part of the other. Each
step applied alone to the reference would say less: quantizing a cache whose keys are exact is another thing
than quantizing the keys of quantized weights.

Every model is run once: what the one before it answered is compared with as the reference's answers are.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from porter import graph
from porter.drift.measures import Drift
from porter.explain import Misses, near_misses
from porter.pipeline import Pass, Pipeline, Promise, Step

if TYPE_CHECKING:
    from porter.drift.compare import Comparison

# What passes are about, by the folder they are in or by name; others are named after themselves.
CAUSES = {
    "clean": "fusion",
    "fuse": "fusion",
    "quantize": "weights",
    "quantize.activations": "activations",
    "kv": "KV cache",
}
EXACT, PASSES, TOTAL = "lowered in fp32", "passes", "total"  # the last models of a chain
LOWERING, NUMERICS, EXPORT = "lowering", "target numerics", "export"


@dataclass(frozen=True)
class Group:
    """Consecutive passes of one cause: those from number `first` up to `last`, which is not among them."""

    cause: str
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """One step of the chain: its passes (none: not made of passes), what it changed by itself, what there is
    after it, and how the two came about. Of the export, whose end is where the chain begins, both are one."""

    name: str
    passes: Sequence[str]
    own: Drift
    after: Drift
    kind: str = "measured"


@dataclass(frozen=True)
class Attribution:
    """The parts in order; `skipped` says why there are none. `measure` is the d of the module's text:
    "kl_mean", or "noise" (power, over that of the signal)."""

    parts: Sequence[Part] = ()
    skipped: str = ""
    measure: str = field(init=False)

    def __post_init__(self) -> None:
        scored = any(p.own.kl_mean is not None for p in self.parts if p.name != EXPORT)
        object.__setattr__(self, "measure", "kl_mean" if scored or not self.parts else "noise")

    def amount(self, drift: Drift) -> float:
        """d of one comparison; not a number where it was not measured."""
        if self.measure == "kl_mean":
            return math.nan if drift.kl_mean is None else drift.kl_mean
        return math.nan if drift.sqnr_db is None else 10 ** (-drift.sqnr_db / 10)

    @property
    def chain(self) -> list[Part]:
        """The parts between the reference and what runs: all but the export."""
        return [p for p in self.parts if p.name != EXPORT]

    @property
    def total(self) -> float:
        """d of the whole chain."""
        return self.amount(self.chain[-1].after) if self.chain else math.nan

    def interaction(self, part: Part) -> float:
        """The cross term of a part's error with that of all before it; 0 for the first."""
        chain = self.chain
        at = next((i for i, p in enumerate(chain) if p is part), 0)
        if not at:
            return 0.0
        return self.amount(part.after) - self.amount(chain[at - 1].after) - self.amount(part.own)

    @property
    def interactions(self) -> float:
        """The sum of all cross terms: the total less all own parts."""
        return math.fsum(self.interaction(p) for p in self.chain)

    def to_json(self) -> dict[str, object]:
        """Plain data; drifts as in the report."""
        rows = [
            {
                "name": p.name,
                "passes": list(p.passes),
                "own": self.amount(p.own),
                "interaction": self.interaction(p),
                "after": self.amount(p.after),
                "drift": {"own": p.own, "after": p.after},
                "kind": p.kind,
            }
            for p in self.parts
        ]
        sums = {"total": self.total, "interaction": self.interactions} if self.chain else {}
        return {"measure": self.measure, "parts": rows, **sums, "skipped": self.skipped}


def groups(passes: Sequence[Pass]) -> list[Group]:
    """The passes in groups: a new one begins with a lossy pass of another cause.

    Passes that keep their promise to lose nothing go with those before them, the first with "fusion".
    """
    found, cause, first = [], CAUSES["fuse"], 0
    for i, step in enumerate(passes):
        if step.promise is Promise.LOSSY and (mine := cause_of(step.name)) != cause:
            found.append(Group(cause, first, i))
            cause, first = mine, i
    return [g for g in [*found, Group(cause, first, len(passes))] if g.last > g.first]


def cause_of(name: str) -> str:
    """What a pass of that name is about."""
    return CAUSES.get(name) or CAUSES.get(name.split(".")[0], name or "other passes")


class Trail:
    """The model at the ends of the groups, each in a file, as a pipeline runs over it.

    All lies in `folder` until `close`. With a reason in `skipped` no file is kept. `near_misses` says where
    the cleaning and fusing passes that the pipeline begins with nearly applied.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, skipped: str = "") -> None:
        self.skipped, self._folder, self._passes = skipped, folder, pipeline.passes
        self.groups = [] if skipped else groups(pipeline.passes)
        about = [cause_of(p.name) for p in pipeline.passes]
        self._fused = next((i for i, cause in enumerate(about) if cause != CAUSES["fuse"]), len(about))
        self._cuts = {g.first for g in self.groups} | ({self._fused} if self.groups else set())
        self.near_misses: list[Misses] = []

    def reached(self, at: int, model: ir.Model) -> None:
        """So many passes of the pipeline have run on `model`."""
        if at == self._fused:
            self.near_misses = near_misses(self._passes[:at], model)
        if at in self._cuts and 0 < at < len(self._passes):
            graph.save(model, self.folder / _name(at))

    def prefixes(self, steps: Sequence[Step]) -> Iterator[tuple[Group, Path | None]]:
        """The groups that changed what is computed, and the model after each; None for the last one's, which
        the bundle has. `steps` are what the passes did."""
        changed = [
            g for g in self.groups
            if any(s.edits and s.promise is not Promise.EXACT for s in steps[g.first : g.last])
        ]  # fmt: skip
        for group in changed:
            yield group, None if group is changed[-1] else self._folder / _name(group.last)

    def fused(self, source: Path, ported: Path) -> Path:
        """The model after those: of `source` where there are none, `ported` where there are no others."""
        places = {0: source, len(self._passes): ported}
        return places.get(self._fused, self._folder / _name(self._fused))

    @property
    def folder(self) -> Path:
        """Where more may lie for as long."""
        self._folder.mkdir(exist_ok=True)
        return self._folder

    def close(self) -> None:
        """Let go of all files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(at: int) -> str:
    return f"after-{at}.onnx"


@dataclass(frozen=True)
class Chain:
    """The models of a port by name, in order, and which group of passes each is the result of."""

    steps: Mapping[str, Group | None]

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The comparisons of neighbours that `after` does not have: by the later's name."""
        names = list(self.steps)
        return {_own(b): (a, b) for a, b in itertools.pairwise(names)}

    def parts(self, found: Mapping[str, Comparison], steps: Sequence[Step], *, executed: bool) -> list[Part]:
        """The parts; `found` has every model against the reference, and the pairs."""
        parts = []
        for name, group in self.steps.items():
            own = found.get(_own(name), found[name]).total
            passes = [s.name for s in steps[group.first : group.last] if s.edits] if group else []
            cause = group.cause if group else NUMERICS if name == TOTAL and EXACT in self.steps else LOWERING
            kind = "simulated" if cause == NUMERICS and not executed else "measured"
            parts.append(Part(cause, passes, own, found[name].total, kind))
        return parts


def _own(name: str) -> str:
    return f"{name} alone"

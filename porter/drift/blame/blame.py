"""Blame: which nodes made the drift, between a reference and a candidate that run the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from porter.drift.blame.align import Alignment, align
from porter.drift.blame.judge import FLOAT32, SLOT, Judged, judge
from porter.drift.blame.measure import Measured, lockstep, measure, substituted
from porter.drift.blame.shelf import Shelf
from porter.drift.blame.sides import Side
from porter.drift.blame.sites import Site, sites
from porter.drift.blame.turned import ROUNDS, turned
from porter.drift.blame.weighing import weigh
from porter.errors import DriftError

HOLDS = 3.0  # dB: with less, half of its power is noise, a cache is no copy of the reference's

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Suspect:
    """One node of the candidate, as all aligned values that it makes; `site` is that of the worst.

    `local_db` and `cumulative_db` are over all steps, `steps_db` and `rows_db` the local ones apart;
    `share` is of the drift: how much less there is with the reference's value at the node's output than with
    those at its inputs (None: not tried). `kind`: `spike` stands out from its like, `rounding` does not,
    `exact` is within float32 of the reference.
    """

    stage: str
    site: Site
    values: tuple[str, ...]
    local_db: float
    cumulative_db: float
    steps_db: tuple[float, ...]
    rows_db: tuple[float, ...]
    judged: Judged
    share: float | None = None

    @property
    def kind(self) -> str:
        """See above."""
        if self.judged.below_db > 0:
            return "spike"
        return "exact" if self.local_db >= FLOAT32 else "rounding"


@dataclass(frozen=True)
class Stage:
    """One comparison: `drift` is the distance of the outputs, `suspects` the worst first, `depth` the
    cumulative SQNR of residual values from the first to the last. `pairs`: how many values were compared."""

    name: str
    reference: str
    candidate: str
    drift: float
    pairs: int
    suspects: tuple[Suspect, ...]
    aligned: Alignment
    measured: Measured


def blame(
    name: str,
    reference: Side,
    candidate: Side,
    steps: Sequence[np.ndarray],
    top: int = 8,
    progress: Progress = lambda f: None,
) -> Stage:
    """Compare the two on `steps` (int64 [batch, n], one after the other through the caches).

    The `top` worst are tried by substitution. Raises DriftError PORT-0611 when no values can be paired.
    """
    aligned = align(reference, candidate, _short(steps))
    if not aligned.pairs:
        raise DriftError("PORT-0611", "no values of the two models mean the same", where=candidate.name,
                         hint="are both made from one checkpoint?")  # fmt: skip
    progress(0.2)
    looked = _look(reference, candidate, aligned, steps)
    if _turned(aligned, looked.measured):
        looked = _look(reference, candidate, aligned.without(aligned.slots), steps)
    looked = _settled(looked, reference, candidate, steps)
    aligned, found, measured, judged = looked.aligned, looked.sites, looked.measured, looked.judged
    progress(0.6)
    suspects = _ranked(_suspects(name, found, measured, judged))
    tried = shares(reference, candidate, aligned, steps, suspects[:top], measured.drift)
    progress(1.0)
    return Stage(
        name, reference.name, candidate.name, measured.drift, len(aligned.pairs),
        tuple(_ranked([*tried, *suspects[top:]])), aligned, measured,
    )  # fmt: skip


@dataclass(frozen=True)
class _Look:
    """One measurement with one alignment."""

    aligned: Alignment
    sites: list[Site]
    measured: Measured
    judged: dict[str, Judged]


def _look(reference: Side, candidate: Side, aligned: Alignment, steps: Sequence[np.ndarray]) -> _Look:
    found = sites(reference, candidate, aligned)
    channels = {str(s.node.inputs[0].name) for s in found if s.op == "MatMul"}
    measured = measure(reference, candidate, aligned, steps, channels)
    signals = {n: float(sum(s.sum() for s in noise.signal)) for n, noise in measured.local.items()}
    weighed = weigh(reference, candidate, aligned, found, measured.powers, signals)
    return _Look(aligned, found, measured, judge(found, measured, weighed))


def _settled(look: _Look, reference: Side, candidate: Side, steps: Sequence[np.ndarray]) -> _Look:
    """Without values that a pass stores otherwise; as it was where that explains nothing."""
    first = look
    for _ in range(ROUNDS):
        values = turned(look.sites, look.measured, look.judged) - {candidate.decoder.output}
        if not values:
            return look
        look = _look(reference, candidate, look.aligned.without(values), steps)
    return first


def _turned(aligned: Alignment, measured: Measured) -> bool:
    """Whether caches hold something else than the reference's keys and values: turned or scaled ones."""
    return bool(aligned.slots) and float(np.median([measured.local[n].db for n in aligned.slots])) < HOLDS


def total(reference: Side, candidate: Side, steps: Sequence[np.ndarray]) -> float:
    """The distance of the outputs of two sides as they run."""
    nothing = Alignment()
    players = {"free": (candidate.player((), ()), lambda name, array: None)}
    return lockstep(reference, players, nothing, steps, Shelf())["free"]


def _suspects(
    stage: str, found: Sequence[Site], measured: Measured, judged: dict[str, Judged]
) -> list[Suspect]:
    """One for each main node: as its worst value is."""
    groups: dict[object, list[Site]] = {}
    for site in found:
        groups.setdefault(site.node, []).append(site)
    result = []
    for group in groups.values():
        worst = max(group, key=lambda s: (judged[s.value].below_db, -measured.local[s.value].db))
        if judged[worst.value].why == SLOT:
            worst = _writer(worst)
        local, cumulative = measured.local[worst.value], measured.cumulative[worst.value]
        result.append(
            Suspect(
                stage, worst, tuple(s.value for s in group), local.db, cumulative.db,
                tuple(local.steps()), tuple(local.rows()), judged[worst.value],
            )
        )  # fmt: skip
    return result


def _writer(site: Site) -> Site:
    """The site, as one whose main node is what writes to the cache."""
    writers = [n for n in site.nodes if n.op_type == "TensorScatter" or n.op_type.startswith("AppendCache")]
    return replace(site, node=writers[0]) if writers else site


def _ranked(suspects: Sequence[Suspect]) -> list[Suspect]:
    """What stands out first, the more the drift owes to it; then by share, then by local SQNR."""

    def key(s: Suspect) -> tuple:
        share = s.share if s.share is not None and math.isfinite(s.share) else -math.inf
        tiny = share < 0.01  # within what substituting a healthy node gives
        return (s.kind != "spike", tiny, -share if not tiny else 0.0, -s.judged.below_db, s.local_db)

    return sorted(suspects, key=key)


def shares(
    reference: Side,
    candidate: Side,
    aligned: Alignment,
    steps: Sequence[np.ndarray],
    suspects: Sequence[Suspect],
    drift: float,
) -> list[Suspect]:
    """The suspects with their shares."""
    sets = {}
    for i, s in enumerate(suspects):
        inputs = {n for n in s.site.inputs if n in aligned.pairs}
        sets[f"{i} before"], sets[f"{i} after"] = inputs, {*s.values}
    left = substituted(reference, candidate, aligned, steps, sets) if drift > 0 else {}
    return [_with_share(s, left, i, drift) for i, s in enumerate(suspects)]


def _with_share(suspect: Suspect, left: dict[str, float], i: int, drift: float) -> Suspect:
    if not drift > 0:
        return suspect
    before, after = left[f"{i} before"], left[f"{i} after"]
    if math.isfinite(drift) and max(before, after) > 2 * drift:
        return suspect  # reference values among others only made it worse: it tells nothing
    share = (before - after) / drift if math.isfinite(drift) else float(math.isfinite(after))
    return replace(suspect, share=share)


def _short(steps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A few tokens of the first step and two single ones: enough to see shapes."""
    first = steps[0][:, : max(2, min(5, steps[0].shape[1]))]
    return [first, steps[-1][:, :1], steps[-1][:, :1]]

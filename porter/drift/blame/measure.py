"""Measuring: local and cumulative noise of every aligned value, over several steps and rows.

    local       what a piece of the candidate makes of the reference's values at its inputs, against the
                reference's value: its own error
    cumulative  what the candidate's value is as it runs, against the reference's: all errors up to there

Both players go through the same steps: the one whose every aligned value is replaced keeps caches that were
filled from the reference's keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from porter.drift.blame.align import Alignment
from porter.drift.blame.player import Player
from porter.drift.blame.shelf import Shelf
from porter.drift.blame.sides import Side
from porter.drift.measures import log_softmax

CAP = 200.0  # dB: no float32 is nearer, so an equal value counts as this where values are compared


@dataclass
class Noise:
    """Sums of squares of a reference and of the difference, for each step and row: float64 [steps][rows]."""

    signal: list[np.ndarray] = field(default_factory=list)
    noise: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: np.ndarray, candidate: np.ndarray, rows: int) -> None:
        """One step. A value that is not a number has infinite noise."""
        a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64).reshape(reference.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(a == b, 0.0, a - b)
        difference[~np.isfinite(difference)] = np.inf
        split = rows if a.ndim and a.shape[0] == rows else 1
        self.signal.append((np.where(np.isfinite(a), a, 0) ** 2).reshape(split, -1).sum(axis=1))
        self.noise.append((difference**2).reshape(split, -1).sum(axis=1))

    @property
    def db(self) -> float:
        """10 log10 of signal over noise over all steps and rows; inf when equal."""
        return decibels(sum(s.sum() for s in self.signal), sum(n.sum() for n in self.noise))

    @property
    def worst(self) -> float:
        """The least over steps."""
        return min((decibels(s.sum(), n.sum()) for s, n in zip(self.signal, self.noise, strict=True)),
                   default=math.inf)  # fmt: skip

    def steps(self) -> list[float]:
        """Of each step."""
        return [decibels(s.sum(), n.sum()) for s, n in zip(self.signal, self.noise, strict=True)]

    def rows(self) -> list[float]:
        """Of each row, over the steps where the value has rows."""
        wide = max((len(s) for s in self.signal), default=0)
        own = [(s, n) for s, n in zip(self.signal, self.noise, strict=True) if len(s) == wide]
        return [decibels(sum(s[i] for s, _ in own), sum(n[i] for _, n in own)) for i in range(wide)]


def decibels(signal: float, noise: float) -> float:
    """10 log10 signal / noise; inf without noise, -inf for noise without signal."""
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 or not math.isfinite(noise) else 10 * math.log10(signal / noise)


def worst_slot(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The least SQNR of a row's token in a cache, [batch, heads, tokens, size]; a token far below the usual
    power counts as a tenth of that."""
    signal = (reference.astype(np.float64) ** 2).sum(axis=(1, 3))
    noise = ((candidate.astype(np.float64) - reference) ** 2).sum(axis=(1, 3))
    ratio = noise / np.maximum(signal, max(signal.mean() / 10, 1e-30))
    return decibels(1.0, float(np.where(np.isfinite(ratio), ratio, np.inf).max(initial=0.0)))


@dataclass(frozen=True)
class Measured:
    """By value of the candidate: `local` and `cumulative` noise; `drift`: distance of the outputs; `powers`:
    the reference's sum of squares of each channel (last axis); `slots`: of values that stand for a cache, the
    local SQNR of the worst token."""

    local: Mapping[str, Noise]
    cumulative: Mapping[str, Noise]
    drift: float
    powers: Mapping[str, np.ndarray]
    slots: Mapping[str, float]


def measure(
    reference: Side,
    candidate: Side,
    aligned: Alignment,
    steps: Sequence[np.ndarray],
    channels: Collection[str] = (),
) -> Measured:
    """Run the reference, the candidate as it is, and the candidate with every aligned value replaced.

    `powers` are those of the values `channels`."""
    pairs = aligned.pairs
    local, cumulative = {n: Noise() for n in pairs}, {n: Noise() for n in pairs}
    shelf = Shelf()
    rows = len(steps[0])

    powers: dict[str, np.ndarray] = {}
    slots = dict.fromkeys(aligned.slots, math.inf)

    def free(name: str, array: np.ndarray) -> None:
        truth = shelf[pairs[name]]
        cumulative[name].add(truth, aligned.comparable(name, array, truth), rows)

    def forced(name: str, array: np.ndarray) -> None:
        truth = shelf[pairs[name]]
        array = aligned.comparable(name, array, truth)
        local[name].add(truth, array, rows)
        if name in slots:
            slots[name] = min(slots[name], worst_slot(truth, array))
        if name in channels:
            power = np.square(shelf[pairs[name]], dtype=np.float64)
            powers[name] = powers.get(name, 0) + power.reshape(-1, power.shape[-1]).sum(axis=0)

    players = {
        "free": (candidate.player({*pairs}, ()), free),
        "forced": (candidate.player({*pairs}, {*pairs}), forced),
    }
    distances = lockstep(reference, players, aligned, steps, shelf)
    return Measured(local, cumulative, distances["free"], powers, slots)


def substituted(
    reference: Side,
    candidate: Side,
    aligned: Alignment,
    steps: Sequence[np.ndarray],
    sets: Mapping[str, Collection[str]],
) -> dict[str, float]:
    """The distance of the outputs with each of these sets of values replaced by the reference's."""
    players = {name: (candidate.player((), cut), _ignore) for name, cut in sets.items()}
    return lockstep(reference, players, aligned, steps, Shelf()) if players else {}


def lockstep(
    reference: Side,
    players: Mapping[str, tuple[Player, Callable[[str, np.ndarray], None]]],
    aligned: Alignment,
    steps: Sequence[np.ndarray],
    shelf: Shelf,
) -> dict[str, float]:
    """Let all go through the steps; the mean distance of each one's outputs from the reference's."""
    pairs = aligned.pairs
    lead = reference.player({*pairs.values()}, ())
    sums, count = dict.fromkeys(players, 0.0), 0
    hidden = reference.decoder.cache == "none"

    def given(name: str) -> np.ndarray:
        return aligned.given(name, shelf[pairs[name]])

    for tokens in steps:
        shelf.clear()
        truth = lead.step(tokens, given, shelf.put)
        count += tokens.size
        for name, (player, seen) in players.items():
            sums[name] += distance(truth, player.step(tokens, given, seen), hidden=hidden)
    return {name: total / count for name, total in sums.items()}


def distance(reference: np.ndarray, candidate: np.ndarray, *, hidden: bool) -> float:
    """Sum over tokens of KL(reference || candidate) in nats, or for hidden states of noise over signal."""
    if not np.isfinite(candidate).all():
        return math.inf
    if hidden:
        a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
        power = (a**2).sum(axis=-1)
        return float((((a - b) ** 2).sum(axis=-1) / np.where(power > 0, power, 1)).sum())
    p, q = log_softmax(reference), log_softmax(candidate)
    return float(np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0).sum())


def _ignore(name: str, array: np.ndarray) -> None:
    pass

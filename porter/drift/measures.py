"""Measure how far one model's logits (or hidden states) are from another's, streamed over pairs.

Definitions of KL, top-1 agreement and the change of the true token's probability: llama.cpp's
`perplexity --kl-divergence`, here in float64 and over the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from porter.errors import DriftError

# With fewer texts than this an interval over texts is too wide to say anything: blocks of positions then.
ENOUGH_TEXTS = 8
# Batch means: 10 to 30 blocks (B. Schmeiser, Operations Research 30 (1982) 556), none so short that
# neighbours in a text, which correlate, fall into different ones more often than not.
BLOCKS = 20
SHORTEST_BLOCK = 16
# Float64 work is done on pieces of this many logits (16 MiB an array), whatever the vocabulary.
PIECE = 1 << 21


@dataclass(frozen=True)
class Drift:
    """How far a candidate is from a reference, over `tokens` scored positions. None: not measured.

    `kl_mean` is KL(reference || candidate) in nats per position; `kl_ci95` the half width of the 95 %
    interval of that mean; `kl_p999` its 99.9 % quantile (nearest rank; below 1000 positions the maximum);
    `top1` is the share of positions where both rank the same token first. `rms_dp` is the root mean square
    change of the true token's probability, 0 to 1. `ppl` is the candidate's perplexity, `ppl_ratio` that over
    the reference's. `max_abs` and `sqnr_db` compare the outputs themselves: the largest difference, and
    10 log10 of signal over noise power (inf when equal). `cosine`, a mean over hidden vectors, is for models
    without logits, whose other fields but `max_abs`, `sqnr_db` and `tokens` are None. `…_ci95` is the half
    width of the 95 % interval of a measure that is a mean, or follows from means.

    A candidate that is not a number somewhere has there infinite KL, no agreement, infinite error.
    """

    kl_mean: float | None = None
    kl_ci95: float | None = None
    kl_p999: float | None = None
    top1: float | None = None
    rms_dp: float | None = None
    ppl: float | None = None
    ppl_ratio: float | None = None
    max_abs: float | None = None
    sqnr_db: float | None = None
    tokens: int = 0
    cosine: float | None = None
    top1_ci95: float | None = None
    rms_dp_ci95: float | None = None
    ppl_ratio_ci95: float | None = None
    sqnr_db_ci95: float | None = None

    def to_json(self) -> dict[str, object]:
        """Plain JSON values in field order; what not every model has only where it is known. See `number`."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: number(value) for name, value in pairs if name not in OPTIONAL or value is not None}


OPTIONAL = ("cosine", "top1_ci95", "rms_dp_ci95", "ppl_ratio_ci95", "sqnr_db_ci95")


def number(value: float | None) -> float | str | None:
    """A value as JSON can hold it: "inf", "-inf" and "nan" are strings, since JSON has no such numbers."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


@dataclass(frozen=True)
class Scores:
    """One entry per position, float64 [n] (`agree`: bool [n]); see `score` for what is in them."""

    kl: np.ndarray
    agree: np.ndarray
    dp: np.ndarray
    nll_reference: np.ndarray
    nll_candidate: np.ndarray
    error: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    cosine: np.ndarray

    def __getitem__(self, keep: np.ndarray | slice) -> Scores:
        return Scores(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))

    @classmethod
    def concatenate(cls, parts: list[Scores]) -> Scores:
        """All parts, in order."""
        if not parts:
            return cls(*(np.zeros(0, bool if f.name == "agree" else float) for f in dataclasses.fields(cls)))
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))


def score(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> Scores:
    """Compare logits [n, vocabulary] whose next tokens were `targets`, int [n].

    Raises DriftError PORT-0601 when the shapes differ or a target lies outside the vocabulary.
    """
    _check_shapes(reference, candidate)
    targets = np.asarray(targets)
    n, vocabulary = reference.shape
    if targets.shape != (n,) or (n and not 0 <= targets.min() <= targets.max() < vocabulary):
        what = f"{n} rows of {vocabulary} logits do not fit next tokens of shape {targets.shape}"
        raise DriftError("PORT-0601", what, hint="is this the tokenizer the model was made for?")
    parts = [_score_piece(reference[s], candidate[s], targets[s]) for s in _pieces(n, vocabulary)]
    return Scores.concatenate(parts)


def score_hidden(reference: np.ndarray, candidate: np.ndarray) -> Scores:
    """Compare hidden states [n, width]: errors and cosines only, the rest not a number."""
    _check_shapes(reference, candidate)
    parts = [_score_hidden_piece(reference[s], candidate[s]) for s in _pieces(*reference.shape)]
    return Scores.concatenate(parts)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [n, vocabulary] in float64; a row with NaN or +inf, or all -inf, is all NaN."""
    x = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Accumulator:
    """Collects scores, 72 bytes and three small integers a position; logits are not kept.

    Positions are labelled by the text they come from, by how many tokens the model saw, and by phase, so that
    one pass over the texts answers for all of them.
    """

    def __init__(self) -> None:
        self._parts: list[Scores] = []
        self._labels: list[np.ndarray] = []

    def add(self, scores: Scores, text: int = 0, seen: int = 1, phase: int = 0) -> None:
        """Append consecutive positions of one text; the first was computed with `seen` tokens in view."""
        n = len(scores.kl)
        self._parts.append(scores)
        self._labels.append(np.stack([np.full(n, text), np.arange(seen, seen + n), np.full(n, phase)]))

    def drift(self, *, phase: int | None = None, above: int = 0, up_to: int | None = None) -> Drift:
        """Over all positions, or those of one phase, or those with above < tokens seen <= up_to."""
        if not self._parts:
            return Drift()
        text, seen, phases = np.concatenate(self._labels, axis=1)
        keep = (seen > above) & (seen <= (np.inf if up_to is None else up_to))
        keep &= True if phase is None else phases == phase
        return summarize(Scores.concatenate(self._parts)[keep], text[keep])


def summarize(scores: Scores, text: np.ndarray) -> Drift:
    """The measures over positions in reading order; `text`, int [n], says which text each is from."""
    n = len(text)
    if n == 0:
        return Drift()
    common = {
        "max_abs": float(scores.error.max()),
        "sqnr_db": _decibels(scores.signal.sum(), scores.noise.sum()),
        "sqnr_db_ci95": _decibels_half_width(scores.signal, scores.noise, text),
    }
    if np.isnan(scores.kl).all():  # hidden states: `score` itself never leaves a NaN here
        return Drift(**common, cosine=float(scores.cosine.mean()), tokens=n)
    mean = float(scores.kl.mean())
    reference, candidate = float(scores.nll_reference.mean()), float(scores.nll_candidate.mean())
    rms_dp = float(np.sqrt(np.mean(scores.dp**2)))
    ppl_ratio = _exp(candidate - reference) if math.isfinite(reference) else math.nan
    with np.errstate(invalid="ignore"):
        change = scores.nll_candidate - scores.nll_reference
    return Drift(
        kl_mean=mean,
        kl_ci95=half_width(scores.kl, text),
        kl_p999=float(np.partition(scores.kl, (rank := math.ceil(0.999 * n) - 1))[rank]),
        top1=float(scores.agree.mean()),
        top1_ci95=half_width(scores.agree.astype(float), text),
        rms_dp=rms_dp,
        rms_dp_ci95=_scaled(half_width(scores.dp**2, text), 0.5 / rms_dp if rms_dp else 0.0),
        ppl=_exp(candidate),
        ppl_ratio=ppl_ratio,
        ppl_ratio_ci95=_scaled(half_width(change, text), ppl_ratio),
        tokens=n,
        **common,
    )


def half_width(values: np.ndarray, text: np.ndarray) -> float | None:
    """Half width of the 95 % confidence interval of the mean of `values`, whose neighbours are correlated.

    Positions of one text are not independent, so the unit is the text: with clusters of size n_i and sum s_i
    the mean m is a ratio of sums, and its variance is G/(G-1) sum (s_i - m n_i)^2 / N^2 (W. Cochran, Sampling
    Techniques, 3rd ed., 1977, chapters 6 and 9A), times Student's t with G-1 degrees of freedom. With fewer
    than 8 texts each is cut into blocks of consecutive positions, about 20 in all (batch means).
    None when there is but one cluster; inf when the mean is not finite.
    """
    clusters = _clusters(text)
    count = np.bincount(clusters)
    groups = len(count)
    if groups < 2:
        return None
    if not np.isfinite(values).all():
        return math.inf
    spread = np.bincount(clusters, weights=values) - values.mean() * count
    variance = groups / (groups - 1) * float(spread @ spread) / len(values) ** 2
    return student_t975(groups - 1) * math.sqrt(variance)


def _scaled(width: float | None, slope: float) -> float | None:
    """The half width of f(mean) with that derivative there (the delta method: to first order)."""
    if width is None or not (math.isfinite(width) and math.isfinite(slope)):
        return None if width is None else math.inf
    return width * abs(slope)


def _decibels_half_width(signal: np.ndarray, noise: np.ndarray, text: np.ndarray) -> float | None:
    """That of 10 log10 of a ratio of sums: its residuals, noise less ratio times signal, are a mean's."""
    total, power = float(noise.sum()), float(signal.sum())
    if not power or not total:
        return None
    with np.errstate(invalid="ignore"):
        residuals = (noise - total / power * signal) / signal.mean()
    return _scaled(half_width(residuals, text), 10 / math.log(10) * power / total)


def student_t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: tabulated to 6, then the series of Abramowitz and Stegun 26.7.5."""
    if freedom <= 6:
        return (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)[freedom - 1]
    z, v = 1.959963984540054, freedom
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / v**power for power, term in enumerate(terms))


def _clusters(text: np.ndarray) -> np.ndarray:
    """A cluster number, from 0 without gaps, for each position."""
    names, which = np.unique(text, return_inverse=True)
    if len(names) >= ENOUGH_TEXTS:
        return which
    length = max(SHORTEST_BLOCK, math.ceil(len(text) / BLOCKS))
    order = np.zeros(len(text), dtype=np.int64)
    for i in range(len(names)):
        order[which == i] = np.arange(np.count_nonzero(which == i))
    return np.unique(which * len(text) + order // length, return_inverse=True)[1]


def _check_shapes(reference: np.ndarray, candidate: np.ndarray) -> None:
    if reference.shape != candidate.shape or reference.ndim != 2:
        what = f"outputs of shape {candidate.shape} cannot be compared with {reference.shape}"
        raise DriftError("PORT-0601", what, hint="both models need the same inputs and vocabulary")


def _pieces(n: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // max(1, width))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _score_piece(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> Scores:
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    bad = np.isnan(log_p).any(axis=1) | np.isnan(log_q).any(axis=1)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # 0 * (-inf + inf): a token neither model allows
        kl = np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1)
    rows = np.arange(len(targets))
    true_p, true_q = log_p[rows, targets], log_q[rows, targets]
    return Scores(
        # KL is not negative; what is below zero is the rounding of a sum of terms that cancel.
        kl=np.where(bad, np.inf, np.maximum(kl, 0)),
        agree=(np.argmax(reference, axis=1) == np.argmax(candidate, axis=1)) & ~bad,
        dp=np.where(bad, np.inf, np.exp(true_q) - np.exp(true_p)),
        nll_reference=np.where(np.isnan(true_p), np.inf, -true_p),
        nll_candidate=np.where(np.isnan(true_q), np.inf, -true_q),
        **_errors(reference, candidate),
        cosine=np.full(len(rows), np.nan),
    )


def _score_hidden_piece(reference: np.ndarray, candidate: np.ndarray) -> Scores:
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1), 0)
        cosine = np.where(np.isnan(norms), np.nan, cosine)
    nothing = np.full(len(a), np.nan)
    return Scores(
        kl=nothing,
        agree=np.zeros(len(a), bool),
        dp=nothing,
        nll_reference=nothing,
        nll_candidate=nothing,
        **_errors(reference, candidate),
        cosine=np.where((a == b).all(axis=1), 1.0, cosine),  # two zero vectors have no angle but are equal
    )


def _errors(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Per row: the largest absolute difference, and sums of squares of the reference and the difference."""
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(a == b, 0.0, np.abs(a - b))  # a == b also where both are -inf
        difference[np.isnan(difference)] = np.inf
        signal = np.where(np.isfinite(a), a, 0.0)
        return {
            "error": difference.max(axis=1, initial=0.0),
            "signal": (signal**2).sum(axis=1),
            "noise": (difference**2).sum(axis=1),
        }


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 or math.isinf(noise) else 10 * math.log10(signal / noise)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # e**709.8 is the largest float64

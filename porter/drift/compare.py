"""Run a reference and its candidates over the same texts in lockstep, and measure how far each drifted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from porter.drift.feeds import Factory, Session, TokenFeeds
from porter.drift.measures import Accumulator, Drift, Scores, log_softmax, score, score_hidden
from porter.errors import DriftError

PREFILL, DECODE = 0, 1
# Drift is shown up to each of these context lengths, from the one before.
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
REFERENCE = "reference"

Progress = Callable[[int, int], None]
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """A candidate's drift over all scored positions, by phase, and by context length.

    `prefill` are positions computed many at a time, `decode` those computed one token at a time through the
    cache. `context` holds (up to so many tokens in view, drift), each from the one before, over the positions
    of `context_phase`: `decode`, or `all`. `decode_steps` is the smallest and largest number of decode steps
    among the texts; `short` of `texts` had room for fewer than were asked for.
    """

    total: Drift
    prefill: Drift = field(default_factory=Drift)
    decode: Drift = field(default_factory=Drift)
    context: tuple[tuple[int, Drift], ...] = ()
    texts: int = 0
    decode_steps: tuple[int, int] = (0, 0)
    short: int = 0
    context_phase: str = "all"

    def context_json(self) -> list[dict[str, object]]:
        """One object a bucket: `tokens` is the context length, `positions` how many were scored."""
        rows = ((up_to, drift.to_json()) for up_to, drift in self.context)
        return [
            {**row, "tokens": up_to, "positions": row["tokens"], "phase": self.context_phase}
            for up_to, row in rows
        ]


@dataclass(frozen=True)
class Perplexity:
    """`ppl` = exp(`nll`), nats per token over `tokens` scored tokens."""

    ppl: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text, int64 [n + 1]: n are fed, and each predicts the next."""

    text: int
    tokens: np.ndarray

    @property
    def fed(self) -> int:
        """How many tokens are fed."""
        return len(self.tokens) - 1


def compare(
    reference: Factory,
    candidates: Mapping[str, Factory],
    feeds: TokenFeeds,
    *,
    prefill: int | None = None,
    decode_steps: int = 64,
    window: int | None = None,
    at: Sequence[int] = (),
    batch: int = 1,
    also: Mapping[str, tuple[str, str]] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Comparison]:
    """Feed every text to all models, the true tokens each time, and compare logits position by position.

    A text longer than `window` (the context length) is cut into windows, each starting from an empty cache.
    A window is a prefill of `prefill` tokens (default: all but the last `decode_steps`), then
    `decode_steps` single tokens through the cache, then what is left in one piece, which counts as prefill.
    With context lengths `at`, the `decode_steps` tokens up to each of them are single instead, and drift by
    context length is that of these alone: what a cache costs whose newest tokens are kept apart shows only
    there, since in a longer piece every query sees what the last one's step made of the cache.
    `batch` windows of similar length run side by side; the shorter are padded at the end, where a causal
    model cannot look. `also` names more pairs (from, to) among "reference" and the candidates: {"lowering":
    ("passes", "total")}. Only the logits of one step of each model are in memory at a time. `progress` gets
    windows done and in all.

    Raises DriftError PORT-0601 when logits do not fit together, PORT-0602 when the reference's are not
    numbers.
    """
    pairs = {name: (REFERENCE, name) for name in candidates} | dict(also or {})
    makers = {**candidates, REFERENCE: reference}
    sums = {name: Accumulator() for name in pairs}
    windows = cut(feeds, window)
    done, steps = 0, []
    for group in _groups(windows, batch):
        longest = max(w.fed for w in group)
        first = _prefilled(group, prefill, decode_steps)
        single = singles(at, decode_steps) if at else range(first, first + decode_steps)
        parts = list(schedule(longest, single))
        _run(group, parts, makers, pairs, sums)
        steps += [_decoded(w, parts) for w in group]
        done += len(group)
        progress(done, len(windows))
    wanted = max(steps) if at else decode_steps
    phase = DECODE if at else None
    return {name: _comparison(s, len(feeds.sequences), steps, wanted, phase) for name, s in sums.items()}


def encode(
    reference: Encode,
    candidates: Mapping[str, Encode],
    feeds: TokenFeeds,
    *,
    window: int | None = None,
    batch: int = 1,
    also: Mapping[str, tuple[str, str]] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Comparison]:
    """Compare encoders: each maps tokens and mask, int64 [batch, n], to hidden states [batch, n, width].

    Texts are cut at `window` tokens. Positions under the padding (mask 0) are not compared; with `batch` 1
    there is none, and the mask may be ignored.
    """
    pairs = {name: (REFERENCE, name) for name in candidates} | dict(also or {})
    sums = {name: Accumulator() for name in pairs}
    limit = window or max(len(t) for t in feeds.sequences)
    pieces = [
        Window(i, t[at : at + limit]) for i, t in enumerate(feeds.sequences) for at in range(0, len(t), limit)
    ]
    done = 0
    for group in _groups(pieces, batch):
        tokens, mask = padded([w.tokens for w in group])
        hidden = {name: run(tokens, mask) for name, run in {REFERENCE: reference, **candidates}.items()}
        for name, (a, b) in pairs.items():
            for row, piece in enumerate(group):
                keep = mask[row] > 0
                sums[name].add(score_hidden(hidden[a][row][keep], hidden[b][row][keep]), piece.text)
        done += len(group)
        progress(done, len(pieces))
    return {name: Comparison(s.drift(), texts=len(feeds.sequences)) for name, s in sums.items()}


def perplexity(
    session: Factory,
    feeds: TokenFeeds,
    *,
    window: int | None = None,
    batch: int = 1,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """exp of the mean of -ln p over every token but the first of each text; each text by itself.

    Texts longer than `window` are scored in windows of that many tokens, each starting from an empty cache
    and each token but a text's first scored exactly once.
    """
    windows = cut(feeds, window)
    total, count, done = 0.0, 0, 0
    for group in _groups(windows, batch):
        part = Part(0, max(w.fed for w in group), PREFILL)
        logits = _step(session(len(group)), group, part)
        for row, w in enumerate(group):
            log_p = log_softmax(logits[row, : w.fed])[np.arange(w.fed), w.tokens[1:]]
            total -= float(np.where(np.isnan(log_p), -np.inf, log_p).sum())
        count += sum(w.fed for w in group)
        done += len(group)
        progress(done, len(windows))
    nll = total / count
    return Perplexity(float(np.exp(nll)) if nll < 709 else float("inf"), nll, count)


def _run(
    group: Sequence[Window],
    parts: Sequence[Part],
    makers: Mapping[str, Factory],
    pairs: Mapping[str, tuple[str, str]],
    sums: Mapping[str, Accumulator],
) -> None:
    """All steps of one group, in fresh sessions that are gone before the next group's are made."""
    sessions = {name: make(len(group)) for name, make in makers.items()}
    for part in parts:
        logits = {name: _step(session, group, part) for name, session in sessions.items()}
        _check_reference(logits[REFERENCE], group, part)
        for name, (a, b) in pairs.items():
            _add(sums[name], logits[a], logits[b], group, part)


def cut(feeds: TokenFeeds, window: int | None) -> list[Window]:
    """Windows that feed at most `window` tokens; the last token of one is the first of the next."""
    out = []
    for i, tokens in enumerate(feeds.sequences):
        step = window or len(tokens)
        out += [Window(i, tokens[at : at + step + 1]) for at in range(0, len(tokens) - 1, step)]
    return out


@dataclass(frozen=True)
class Part:
    """Positions [start, stop) of every window in a group, computed in one step."""

    start: int
    stop: int
    phase: int


def _groups(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Windows of similar length together: padding is wasted work."""
    order = sorted(windows, key=lambda w: len(w.tokens), reverse=True)
    return ([*order[i : i + batch]] for i in range(0, len(order), batch))


def _prefilled(group: Sequence[Window], prefill: int | None, decode_steps: int) -> int:
    """How many tokens the first step takes: at least one, and no more than the shortest window has."""
    shortest = min(w.fed for w in group)
    wanted = shortest - decode_steps if prefill is None else prefill
    return min(max(1, wanted), shortest)


def singles(at: Sequence[int], steps: int) -> set[int]:
    """Positions of the last `steps` tokens of each context length; a text's first is never one of them."""
    return {i for length in at for i in range(max(1, length - steps), length)}


def schedule(longest: int, single: Collection[int]) -> Iterator[Part]:
    """Steps over `longest` positions: those of `single` one by one, each run of others in one piece."""
    start = 0
    for i in range(1, longest + 1):
        if i == longest or i in single or i - 1 in single:
            yield Part(start, i, DECODE if start in single else PREFILL)
            start = i


def _decoded(w: Window, parts: Sequence[Part]) -> int:
    return sum(part.phase == DECODE and part.start < w.fed for part in parts)


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows side by side, int64 [batch, longest], padded with their last token; and the mask, 1 where real."""
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
    return tokens, (np.arange(longest) < np.array([[len(row)] for row in rows])).astype(np.int64)


def _step(session: Session, group: Sequence[Window], part: Part) -> np.ndarray:
    tokens = padded([w.tokens[:-1] for w in group])[0][:, part.start : part.stop]
    logits = np.asarray(session.step(tokens))
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        what = f"logits of shape {logits.shape} for tokens of shape {tokens.shape}"
        raise DriftError("PORT-0601", what, hint="the model must return logits for every position")
    return logits


def _rows(group: Sequence[Window], part: Part) -> Iterator[tuple[int, Window, int]]:
    """(row, window, how many positions of this part are the window's own)."""
    owned = ((row, w, min(part.stop, w.fed) - part.start) for row, w in enumerate(group))
    return ((row, w, n) for row, w, n in owned if n > 0)


def _check_reference(logits: np.ndarray, group: Sequence[Window], part: Part) -> None:
    for row, w, n in _rows(group, part):
        x = logits[row, :n]
        if np.isnan(x).any() or np.isposinf(x).any():
            where = f"text {w.text}, positions {part.start} to {part.start + n - 1}"
            hint = "the model is broken before any pass: check the export"
            raise DriftError("PORT-0602", "the reference's logits are not numbers", where=where, hint=hint)


def _add(to: Accumulator, a: np.ndarray, b: np.ndarray, group: Sequence[Window], part: Part) -> None:
    for row, w, n in _rows(group, part):
        scores: Scores = score(a[row, :n], b[row, :n], w.tokens[part.start + 1 : part.start + 1 + n])
        to.add(scores, w.text, part.start + 1, part.phase)


def _comparison(
    sums: Accumulator, texts: int, steps: list[int], wanted: int, phase: int | None
) -> Comparison:
    drifts = [
        (up_to, sums.drift(phase=phase, above=below, up_to=up_to))
        for below, up_to in zip((0, *CONTEXTS[:-1]), CONTEXTS, strict=True)
    ]
    return Comparison(
        total=sums.drift(),
        prefill=sums.drift(phase=PREFILL),
        decode=sums.drift(phase=DECODE),
        context=tuple((up_to, drift) for up_to, drift in drifts if drift.tokens),
        texts=texts,
        decode_steps=(min(steps), max(steps)),
        short=sum(s < wanted for s in steps),
        context_phase="all" if phase is None else "decode",
    )

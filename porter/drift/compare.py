"""Run a reference and its candidates over the same texts, one model after the other, and measure the drift.

What a model answered waits in a file for those that are compared with it, so two models need never be open at
the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from porter.drift.feeds import Factory, Session, TokenFeeds
from porter.drift.measures import Accumulator, Drift, Scores, log_softmax, score, score_hidden
from porter.drift.record import Record
from porter.errors import DriftError

PREFILL, DECODE = 0, 1
# Drift is shown up to each of these context lengths, from the one before.
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
REFERENCE = "reference"

# Positions whose logits wait in a file at a time; with more, the models take turns.
POSITIONS = 1 << 40

Progress = Callable[[int, int], None]
Done = Callable[[str], None]
Step = TypeVar("Step")
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


@runtime_checkable
class Whole(Protocol):
    """A model that is run on whole texts, without a cache, many at once."""

    def whole(self, texts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [batch, n, vocabulary] for each int64 [batch, n], in order."""
        ...


Maker = Factory | Whole


def compare(
    reference: Maker,
    candidates: Mapping[str, Maker],
    feeds: TokenFeeds,
    *,
    prefill: int | None = None,
    decode_steps: int = 64,
    window: int | None = None,
    at: Sequence[int] = (),
    batch: int = 1,
    also: Mapping[str, tuple[str, str]] | None = None,
    positions: int = POSITIONS,
    folder: Path | None = None,
    done: Done = lambda name: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Comparison]:
    """Feed every text to all models, the true tokens each time, and compare logits position by position.

    A text longer than `window` (the context length) is cut into windows, each starting from an empty cache.
    A window is a prefill of `prefill` tokens (default: all but the last `decode_steps`), then
    `decode_steps` single tokens through the cache, then what is left in one piece, which counts as prefill.
    With context lengths `at`, the `decode_steps` tokens up to each are single instead, and `context` is of
    these alone: in a longer piece every query sees what the piece's last token made of the cache. `batch`
    windows of similar length run side by side; the shorter are padded at the end, where a causal model cannot
    look. `also` names more pairs (from, to) among "reference" and the candidates: {"lowering": ("passes",
    "total")}.

    The models take turns, the reference first; `done` is told the name of one that has had its turn. Logits
    that another model is compared with wait in a nameless file in `folder`, those of `positions` at most:
    with more, every model has several turns. A `Whole` model is run on whole windows instead, and its logits
    are cut where the others' steps are: those of a causal model are the same either way, up to rounding.
    `progress` gets windows done and in all, each counted once for every model.

    Raises DriftError PORT-0601 when logits do not fit together, PORT-0602 when the reference's are not
    numbers, EnvironmentFailure PORT-0901 when the disk is full.
    """
    pairs = {name: (REFERENCE, name) for name in candidates} | dict(also or {})
    makers = {REFERENCE: reference, **candidates}
    sums = {name: Accumulator() for name in pairs}
    windows, count = cut(feeds, window), 0
    groups = [(g, _parts(g, prefill, decode_steps, at)) for g in _groups(windows, batch)]

    def run(turn: list[_Group], name: str) -> Iterator[tuple[_Place, np.ndarray]]:
        nonlocal count
        for place, logits in _logits(makers[name], turn):
            if name == REFERENCE:
                _check_reference(logits, *place)
            yield place, logits
            if place[1].stop == max(w.fed for w in place[0]):
                count += len(place[0])
                progress(count, len(windows) * len(makers))

    def add(pair: str, a: np.ndarray, b: np.ndarray, place: _Place) -> None:
        _add(sums[pair], a, b, *place)

    for turn in _turns(groups, positions):
        _in_turn(list(makers), pairs, partial(run, turn), add, folder, done)
    steps = [_decoded(w, parts) for group, parts in groups for w in group]
    asked = (max(steps) if at else decode_steps, bool(at))
    return {name: _comparison(s, len(feeds.sequences), steps, *asked) for name, s in sums.items()}


def encode(
    reference: Encode,
    candidates: Mapping[str, Encode],
    feeds: TokenFeeds,
    *,
    window: int | None = None,
    batch: int = 1,
    also: Mapping[str, tuple[str, str]] | None = None,
    folder: Path | None = None,
    done: Done = lambda name: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Comparison]:
    """Compare encoders: each maps tokens and mask, int64 [batch, n], to hidden states [batch, n, width].

    Texts are cut at `window` tokens. Positions under the padding (mask 0) are not compared; with `batch` 1
    there is none, and the mask may be ignored. Models take turns as in `compare`.
    """
    pairs = {name: (REFERENCE, name) for name in candidates} | dict(also or {})
    makers = {REFERENCE: reference, **candidates}
    sums = {name: Accumulator() for name in pairs}
    limit = window or max(len(t) for t in feeds.sequences)
    pieces = [
        Window(i, t[at : at + limit]) for i, t in enumerate(feeds.sequences) for at in range(0, len(t), limit)
    ]
    count = 0

    def run(name: str) -> Iterator[tuple[list[Window], np.ndarray]]:
        nonlocal count
        for group in _groups(pieces, batch):
            yield group, makers[name](*padded([w.tokens for w in group]))
            count += len(group)
            progress(count, len(pieces) * len(makers))

    def add(pair: str, a: np.ndarray, b: np.ndarray, group: list[Window]) -> None:
        for row, piece in enumerate(group):
            n = len(piece.tokens)
            sums[pair].add(score_hidden(a[row, :n], b[row, :n]), piece.text)

    _in_turn(list(makers), pairs, run, add, folder, done)
    return {name: Comparison(s.drift(), texts=len(feeds.sequences)) for name, s in sums.items()}


def _in_turn(
    order: Sequence[str],
    pairs: Mapping[str, tuple[str, str]],
    run: Callable[[str], Iterator[tuple[Step, np.ndarray]]],
    add: Callable[[str, np.ndarray, np.ndarray, Step], None],
    folder: Path | None,
    done: Done,
) -> None:
    """Run the models in order, and `add` each pair's answers to a step when the later of the two runs."""
    records: dict[str, Record] = {}
    for i, name in enumerate(order):
        earlier = {other for pair in pairs.values() for other in pair if name in pair and other in order[:i]}
        if any(name in pair and set(pair) & set(order[i + 1 :]) for pair in pairs.values()):
            records[name] = Record(folder)
        kept = {other: iter(records[other]) for other in earlier}
        for step, answer in run(name):
            answers = {name: answer, **{other: next(arrays) for other, arrays in kept.items()}}
            for pair, (a, b) in pairs.items():
                if name in (a, b) and {a, b} <= answers.keys():
                    add(pair, answers[a], answers[b], step)
            if name in records:
                records[name].append(answer)
        later = {other for pair in pairs.values() if set(pair) & set(order[i + 1 :]) for other in pair}
        records = {other: record for other, record in records.items() if other in later}
        done(name)


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


_Place = tuple[list["Window"], "Part"]
_Group = tuple[list["Window"], list["Part"]]


def _turns(groups: Sequence[_Group], positions: int) -> Iterator[list[_Group]]:
    """Groups whose positions are no more than so many, or a single one."""
    turn: list[_Group] = []
    held = 0
    for group, parts in groups:
        size = len(group) * max(w.fed for w in group)
        if turn and held + size > positions:
            yield turn
            turn, held = [], 0
        turn.append((group, parts))
        held += size
    if turn:
        yield turn


def _logits(maker: Maker, turn: Sequence[_Group]) -> Iterator[tuple[_Place, np.ndarray]]:
    """The logits of all steps in order; the sessions of one group are gone before the next group's are
    made."""
    if isinstance(maker, Whole):
        texts = [padded([w.tokens[:-1] for w in group])[0] for group, _ in turn]
        for (group, parts), tokens, logits in zip(turn, texts, maker.whole(texts), strict=True):
            _check_shape(logits, tokens)
            yield from (((group, part), logits[:, part.start : part.stop]) for part in parts)
        return
    for group, parts in turn:
        session = maker(len(group))
        yield from (((group, part), _step(session, group, part)) for part in parts)


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


def _parts(group: Sequence[Window], prefill: int | None, steps: int, at: Sequence[int]) -> list[Part]:
    """The steps of a group: see `compare`."""
    first = _prefilled(group, prefill, steps)
    single = singles(at, steps) if at else range(first, first + steps)
    return list(schedule(max(w.fed for w in group), single))


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
    tokens, mask = (x[:, part.start : part.stop] for x in padded([w.tokens[:-1] for w in group]))
    logits = np.asarray(session.step(tokens, mask.astype(bool)))
    _check_shape(logits, tokens)
    return logits


def _check_shape(logits: np.ndarray, tokens: np.ndarray) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        what = f"logits of shape {logits.shape} for tokens of shape {tokens.shape}"
        raise DriftError("PORT-0601", what, hint="the model must return logits for every position")


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


def _comparison(sums: Accumulator, texts: int, steps: list[int], wanted: int, decoded: bool) -> Comparison:
    phase = DECODE if decoded else None
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
        context_phase="decode" if decoded else "all",
    )

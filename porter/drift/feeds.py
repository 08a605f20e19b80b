"""The token sequences that drift is measured on: from a file, by the model itself, or random on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from porter.errors import DriftError, OptionError

if TYPE_CHECKING:
    from porter.tokenizer import Tokenizer

KINDS = ("text", "tokens", "self-generated", "random")
# A feeds file is read whole; one larger than this is a mistake.
MAX_BYTES = 256 << 20


class Session(Protocol):
    """A decoder with its cache, as `porter.run.decode.Decode` is one."""

    def step(self, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
        """Feed int64 [batch, n] after all that was fed before; logits float32 [batch, n, vocabulary].

        `real`, bool [batch, n]: which tokens are no padding (None: all)."""
        ...


Factory = Callable[[int], Session]


@dataclass(frozen=True)
class TokenFeeds:
    """Token sequences, each int64 [n] with n >= 2 (the first token predicts the second), and their origin.

    `kind` is "text", "tokens" (a file of ids), "self-generated" (sampled from the reference itself) or
    "random"; the last says little about real use, and reports say so.
    """

    sequences: tuple[np.ndarray, ...]
    kind: str
    source: str
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.sequences:
            raise OptionError("PORT-0806", "there is no text to measure on", where=self.source)
        for i, tokens in enumerate(self.sequences):
            if len(tokens) < 2:
                what = f"sequence {i} has {len(tokens)} token(s), and scoring needs two"
                raise OptionError("PORT-0806", what, where=self.source, hint="remove empty texts")

    def check(self, vocabulary: int) -> None:
        """Raise OptionError PORT-0807 when a token is not in a vocabulary of that size."""
        for i, tokens in enumerate(self.sequences):
            if tokens.min() < 0 or tokens.max() >= vocabulary:
                stray = int(tokens[(tokens < 0) | (tokens >= vocabulary)][0])
                what = f"sequence {i} holds token {stray}; the vocabulary ends at {vocabulary - 1}"
                hint = "is this the tokenizer the model was made for?"
                raise OptionError("PORT-0807", what, where=self.source, hint=hint)

    def to_json(self) -> dict[str, object]:
        """What a report says of the feeds."""
        scored = sum(len(t) - 1 for t in self.sequences)
        counts = {"sequences": len(self.sequences), "tokens": scored}
        return {"kind": self.kind, "source": self.source, **counts, "seed": self.seed}


def from_file(path: Path | str, tokenizer: Tokenizer | None) -> TokenFeeds:
    """Read feeds.

    `.txt` is one text; `.json` is a list of texts, a list of ids, a list of lists of ids, or an object
    whose values are such lists (all are taken, in order); `.npy` is an integer array [n] or [sequences, n].
    Texts get BOS first when the tokenizer has one; ids are taken as they are.
    Raises OptionError PORT-0804 when the file cannot be read, PORT-0805 when text comes without a
    tokenizer, PORT-0806 when a sequence has fewer than two tokens.
    """
    path = Path(path)
    read = {".txt": _read_text, ".json": _read_json, ".npy": _read_array}.get(path.suffix.lower())
    if read is None:
        raise OptionError("PORT-0804", "feeds are .txt, .json or .npy", where=str(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        found = read(path)
    except (OSError, ValueError, EOFError, RecursionError) as error:
        raise OptionError("PORT-0804", f"cannot read the feeds: {error}", where=str(path)) from error
    if not found or not isinstance(found[0], str):
        return TokenFeeds(tuple(np.asarray(t, np.int64) for t in found), "tokens", path.name)
    if tokenizer is None:
        hint = "put the tokenizer beside the model, or give token ids"
        raise OptionError(
            "PORT-0805", "text needs a tokenizer, and the model has none", where=str(path), hint=hint
        )
    return TokenFeeds(tuple(tokenizer.encode(t) for t in found), "text", path.name)


def self_generated(
    session: Factory,
    *,
    bos: int,
    length: int,
    count: int = 8,
    seed: int = 0,
    eos: Sequence[int] = (),
    temperature: float = 0.8,
) -> TokenFeeds:
    """Sequences of up to `length` tokens that the model samples, each from `bos` up to an `eos`.

    One batch of `count` rows, one uniform number a row and step from numpy's default generator, inverted
    through the cumulative probabilities in float64: same logits, same text. Text of the model's own needs no
    data set and is what the model meets when it generates.
    Raises DriftError PORT-0602 when a logit is not a number.
    """
    rng = np.random.default_rng(seed)
    decode = session(count)
    rows = np.full((count, 1), bos, dtype=np.int64)
    done = np.zeros(count, dtype=bool)
    while rows.shape[1] < length and not done.all():
        logits = decode.step(rows[:, -1:])[:, -1]
        rows = np.concatenate([rows, sample(logits, temperature, rng)[:, None]], axis=1)
        done |= np.isin(rows[:, -1], list(eos))
    source = f"sampled from the reference at temperature {temperature:g}"
    return TokenFeeds(tuple(_until(row, eos) for row in rows), "self-generated", source, seed)


def random_tokens(
    vocabulary: int, *, count: int = 8, length: int = 128, seed: int = 0, bos: int | None = None
) -> TokenFeeds:
    """Uniform tokens, `bos` first when given: no text looks like this, so drift on it means little."""
    rows = np.random.default_rng(seed).integers(0, vocabulary, (count, length), dtype=np.int64)
    if bos is not None:
        rows[:, 0] = bos
    return TokenFeeds(tuple(rows), "random", f"uniform over {vocabulary} tokens", seed)


def sample(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One token id a row from logits [batch, vocabulary]; one uniform number is drawn for each row."""
    x = np.asarray(logits, np.float64) / temperature
    if np.isnan(x).any() or np.isposinf(x).any():
        hint = "the model is broken before any pass: check the export"
        raise DriftError("PORT-0602", "the model's own logits are not numbers", hint=hint)
    p = np.exp(x - x.max(axis=-1, keepdims=True)).cumsum(axis=-1)
    # Scaled by the last sum, which no u in [0, 1) reaches: the index stays inside the vocabulary.
    u = rng.random(len(p))[:, None] * p[:, -1:]
    return np.minimum((p <= u).sum(axis=-1), p.shape[1] - 1)


def _until(row: np.ndarray, eos: Sequence[int]) -> np.ndarray:
    """The row up to and with its first end; the first token does not count: some models begin with an end."""
    ends = np.flatnonzero(np.isin(row[1:], list(eos)))
    return row[: ends[0] + 2] if len(ends) else row


def _read_text(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_array(path: Path) -> list[np.ndarray]:
    # Mapped, so that a header that promises more than the file holds is refused before memory is taken.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError("wanted an array of integers of one or two dimensions")
    return list(np.atleast_2d(np.array(array)))


def _read_json(path: Path) -> list[str] | list[list[int]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    lists = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(part, list) for part in lists):
        raise ValueError("wanted a list, or an object of lists")
    items = [item for part in lists for item in ([part] if part and _is_id(part[0]) else part)]
    texts = all(isinstance(item, str) for item in items)
    if not texts and not all(isinstance(item, list) and all(map(_is_id, item)) for item in items):
        raise ValueError("wanted texts only, or token ids only")
    return items


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31

"""Text to token ids and back, from the tokenizer files that lie beside a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from porter import vocabulary
from porter.errors import OptionError

_BOS = ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_EOS = (
    "</s>",
    "<|eos|>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<end_of_turn>",
)


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes.

    `bos` starts a text when the model has such a token, and `encode` puts it there unless the files say
    `add_bos_token: false`; any id in `eos` ends a text.
    """

    backend: vocabulary.Backend
    bos: int | None
    eos: tuple[int, ...]
    source: Path
    adds_bos: bool = True

    @property
    def size(self) -> int:
        """Number of ids; a model's vocabulary may be padded beyond it."""
        return self.backend.size

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Token ids, int64 [n], with BOS first (and whatever an encoder wants around a text) when `special`.

        Raises OptionError PORT-0803 when the text holds half a surrogate pair, which no encoding can write.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            hint = "the text was probably read with the wrong encoding"
            raise OptionError("PORT-0803", "the text is not Unicode", where=str(error), hint=hint) from error
        ids = self.backend.encode(text, special)
        if special and self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens vanish, an id the tokenizer does not know becomes U+FFFD."""
        return "".join(map(self._run, _runs(list(map(int, ids)), self.size)))

    def stream(self) -> Stream:
        """A decoder that takes one token at a time."""
        return Stream(self)

    def _run(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids) if ids[0] in range(self.size) else "\ufffd" * len(ids)


class Stream:
    """Decodes one token at a time and never hands out half a character.

    The text of all `push` calls and the final `flush` is `Tokenizer.decode` of all ids. Ids are decoded in a
    window that begins one emission back, because the first piece of a decode loses its leading space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # how many ids of the window were handed out

    def push(self, token: int) -> str:
        """The text that became certain with this token: often a piece, sometimes nothing."""
        self._window.append(int(token))
        return self._emit(hold=True)

    def flush(self) -> str:
        """What was held back; bytes that never became a character come out as U+FFFD."""
        return self._emit(hold=False)

    def _emit(self, *, hold: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._emitted])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or (hold and after.endswith("\ufffd")):
            return ""
        self._window, self._emitted = self._window[self._emitted :], len(self._window) - self._emitted
        return after[len(before) :]


def load(path: Path | str, *, bos: int | None = None, eos: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a folder, or of one file; `bos` and `eos` overrule what the files say.

    Reads `tokenizer.json` (tokenizers), `tokenizer.model` (SentencePiece), `vocab.json` holding
    `{pieces, scores, types}` (the same, spelled out) and `vocab.txt` (WordPiece).
    Raises OptionError PORT-0801 when there is none, PORT-0802 when the file cannot be read as one.
    """
    source = _source(Path(path))
    backend = vocabulary.read(source)
    said = vocabulary.said(source.parent)
    begin = _ids([bos], backend) or _ids([said.get("bos_token_id")], backend)
    begin = begin or _ids([said.get("bos_token")], backend) or _ids(_BOS, backend)
    end = _ids(eos, backend) or _ids(_many(said.get("eos_token_id")), backend)
    end = end or _ids([said.get("eos_token")], backend) or _ids(_EOS, backend)
    adds = said.get("add_bos_token") is not False
    return Tokenizer(backend, begin[0] if begin else None, end, source, adds)


def files(folder: Path | str) -> list[Path]:
    """The tokenizer files of a folder, in the order a bundle copies them; none is no error."""
    return [p for name in (*vocabulary.SOURCES, *vocabulary.BESIDE) if (p := Path(folder) / name).is_file()]


def _source(path: Path) -> Path:
    if path.is_file():
        return path
    found = [p for name in vocabulary.SOURCES if (p := path / name).is_file()]
    if not found:
        hint = f"porter looks for {', '.join(vocabulary.SOURCES)}"
        raise OptionError("PORT-0801", "there is no tokenizer", where=str(path), hint=hint)
    return found[0]


def _runs(ids: list[int], size: int) -> list[list[int]]:
    """Split ids where known ones meet unknown ones."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and (0 <= i < size) == (0 <= runs[-1][0] < size):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _many(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]


def _ids(candidates: Iterable[object], backend: vocabulary.Backend) -> tuple[int, ...]:
    """The ids among candidates that exist; a candidate is an id, a piece, or a piece wrapped in a dict."""
    named = [c.get("content") if isinstance(c, dict) else c for c in candidates]
    found = [backend.find(c) if isinstance(c, str) else c for c in named]
    valid = [i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < backend.size]
    return tuple(dict.fromkeys(valid))

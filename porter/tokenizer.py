"""Text to token ids and back, from the tokenizer files that lie beside a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from porter.errors import OptionError, PorterError

# The order is the order of preference when a folder holds several.
SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Files that say which tokens begin and end a text.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CONFIG = "config.json"  # the model's own, read where it is there
# Far above any real tokenizer (the largest known are near 40 MB): a hostile file is refused, not read.
MAX_BYTES = 256 << 20

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


class Backend(Protocol):
    """What a tokenizer library has to offer; ids handed to `decode` are below `size`."""

    size: int

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids; `special` adds what the tokenizer itself puts around a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens left out, bytes that are not UTF-8 as U+FFFD."""
        ...

    def find(self, piece: str) -> int | None:
        """The id of a piece, or None."""
        ...


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes.

    `bos` starts a text when the model has such a token, and `encode` puts it there unless the files say
    `add_bos_token: false`; any id in `eos` ends a text.
    """

    backend: Backend
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
    if source.stat().st_size > MAX_BYTES:
        raise OptionError("PORT-0802", f"the tokenizer is larger than {MAX_BYTES} bytes", where=str(source))
    try:
        backend = (_READERS.get(source.name) or _READERS[source.suffix])(source)
        if not backend.size:
            raise ValueError("it has no tokens")
    except PorterError:
        raise
    # Each library fails in its own way on a damaged file; `tokenizers` raises bare Exception.
    except Exception as error:
        hint = "save it again from the library that made it, as tokenizer.json or tokenizer.model"
        what = f"this is not a tokenizer: {type(error).__name__}: {str(error)[:200]}"
        raise OptionError("PORT-0802", what, where=str(source), hint=hint) from error
    said = _said(source.parent)
    begin = _ids([bos], backend) or _ids([said.get("bos_token_id")], backend)
    begin = begin or _ids([said.get("bos_token")], backend) or _ids(_BOS, backend)
    end = _ids(eos, backend) or _ids(_many(said.get("eos_token_id")), backend)
    end = end or _ids([said.get("eos_token")], backend) or _ids(_EOS, backend)
    adds = said.get("add_bos_token") is not False
    return Tokenizer(backend, begin[0] if begin else None, end, source, adds)


def files(folder: Path | str) -> list[Path]:
    """The tokenizer files of a folder, in the order a bundle copies them; none is no error."""
    return [p for name in (*SOURCES, *BESIDE) if (p := Path(folder) / name).is_file()]


def _source(path: Path) -> Path:
    if path.is_file():
        return path
    found = [p for name in SOURCES if (p := path / name).is_file()]
    if not found:
        hint = f"porter looks for {', '.join(SOURCES)}"
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


def _said(folder: Path) -> dict[str, object]:
    """What the files beside a tokenizer say; the last one wins, and the model's config is the last."""
    said: dict[str, object] = {}
    for path in (
        p for name in (*BESIDE, CONFIG) if (p := folder / name).is_file() and p.stat().st_size < MAX_BYTES
    ):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise OptionError("PORT-0802", f"this is not JSON: {error}", where=str(path)) from error
        said |= {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}
    return said


def _many(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]


def _ids(candidates: Iterable[object], backend: Backend) -> tuple[int, ...]:
    """The ids among candidates that exist; a candidate is an id, a piece, or a piece wrapped in a dict."""
    named = [c.get("content") if isinstance(c, dict) else c for c in candidates]
    found = [backend.find(c) if isinstance(c, str) else c for c in named]
    valid = [i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < backend.size]
    return tuple(dict.fromkeys(valid))


@dataclass(frozen=True)
class _Fast:
    """The `tokenizers` library."""

    inner: object

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)  # type: ignore[attr-defined]

    def encode(self, text: str, special: bool) -> list[int]:
        return self.inner.encode(text, add_special_tokens=special).ids  # type: ignore[attr-defined]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)  # type: ignore[attr-defined]

    def find(self, piece: str) -> int | None:
        return self.inner.token_to_id(piece)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Pieces:
    """The SentencePiece library."""

    inner: object

    @property
    def size(self) -> int:
        return self.inner.get_piece_size()  # type: ignore[attr-defined]

    def encode(self, text: str, special: bool) -> list[int]:
        return self.inner.encode(text)  # type: ignore[attr-defined]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids))  # type: ignore[attr-defined]

    def find(self, piece: str) -> int | None:
        found = self.inner.piece_to_id(piece)  # type: ignore[attr-defined]
        return found if self.inner.id_to_piece(found) == piece else None  # type: ignore[attr-defined]


def _read_fast(path: Path) -> Backend:
    from tokenizers import Tokenizer as Fast

    inner = Fast.from_str(path.read_text(encoding="utf-8"))
    # A saved truncation would cut an evaluation text short, and padding would add tokens to it.
    inner.no_truncation()
    inner.no_padding()
    return _Fast(inner)


def _read_pieces(path: Path) -> Backend:
    from sentencepiece import SentencePieceProcessor

    return _Pieces(SentencePieceProcessor(model_proto=path.read_bytes()))


def _read_spelled_out(path: Path) -> Backend:
    """SentencePiece again, its model built from the pieces, scores and types of a `vocab.json`."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as proto

    vocab = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(vocab, dict) or not {"pieces", "scores", "types"} <= vocab.keys():
        raise ValueError("wanted pieces, scores and types")
    model = proto.ModelProto()
    for piece, score, kind in zip(vocab["pieces"], vocab["scores"], vocab["types"], strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = 6 in vocab["types"]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(vocab.get("add_dummy_prefix", True))
    # SentencePiece would drop a second space; a plain list of pieces asks for nothing of the kind.
    model.normalizer_spec.remove_extra_whitespaces = bool(vocab.get("remove_extra_whitespaces", False))
    return _Pieces(SentencePieceProcessor(model_proto=model.SerializeToString()))


def _read_words(path: Path) -> Backend:
    """WordPiece as BERT has it: one piece a line, lower case unless the config beside it says otherwise."""
    from tokenizers import BertWordPieceTokenizer

    lower = _said(path.parent).get("do_lower_case") is not False
    return _Fast(BertWordPieceTokenizer(str(path), lowercase=lower))


_READERS = {
    "tokenizer.json": _read_fast,
    "vocab.json": _read_spelled_out,
    ".json": _read_fast,
    ".model": _read_pieces,
    ".txt": _read_words,
}

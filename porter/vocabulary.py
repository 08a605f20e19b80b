"""The tokenizer libraries behind one small interface, and one reader for each kind of file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from porter.errors import OptionError

T = TypeVar("T")

# The order is the order of preference when a folder holds several.
SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Files that say which tokens begin and end a text.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CONFIG = "config.json"  # the model's own, read where it is there
# Far above any real tokenizer (the largest known are near 40 MB): a hostile file is refused, not read.
MAX_BYTES = 256 << 20


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


def read(source: Path) -> Backend:
    """The tokenizer in a file, by its name or ending. Raises OptionError PORT-0802 when it is none."""
    if source.stat().st_size > MAX_BYTES:
        raise OptionError("PORT-0802", f"the tokenizer is larger than {MAX_BYTES} bytes", where=str(source))
    return guarded(lambda: _read(source), source)


def guarded(call: Callable[[], T], source: Path) -> T:
    """The result of a library's call; what it raises becomes OptionError PORT-0802.

    `tokenizers` raises bare Exception for a damaged file, and its panics are no Exception at all.
    """
    try:
        return call()
    except OptionError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"this is not a tokenizer: {type(error).__name__}: {str(error)[:200]}"
        hint = "save it again from the library that made it, as tokenizer.json or tokenizer.model"
        raise OptionError("PORT-0802", what, where=str(source), hint=hint) from error


def _read(source: Path) -> Backend:
    backend = (_READERS.get(source.name) or _READERS[source.suffix])(source)
    if not backend.size:
        raise ValueError("it has no tokens")
    return backend


def said(folder: Path) -> dict[str, object]:
    """What the files beside a tokenizer say; the last one wins, and the model's config is the last.

    Raises OptionError PORT-0802 when one of them is not JSON.
    """
    found: dict[str, object] = {}
    paths = [p for name in (*BESIDE, CONFIG) if (p := folder / name).is_file()]
    for path in (p for p in paths if p.stat().st_size < MAX_BYTES):
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise OptionError("PORT-0802", f"this is not JSON: {error}", where=str(path)) from error
        found |= {k: v for k, v in read.items() if v is not None} if isinstance(read, dict) else {}
    return found


@dataclass(frozen=True)
class _Fast:
    """The `tokenizers` library."""

    inner: object
    source: Path
    size: int

    def encode(self, text: str, special: bool) -> list[int]:
        encode = self.inner.encode  # type: ignore[attr-defined]
        return guarded(lambda: encode(text, add_special_tokens=special).ids, self.source)

    def decode(self, ids: Sequence[int]) -> str:
        decode = self.inner.decode  # type: ignore[attr-defined]
        return guarded(lambda: decode(list(ids), skip_special_tokens=True), self.source)

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


def _fast(inner: object, path: Path) -> Backend:
    ids = inner.get_vocab(with_added_tokens=True).values()  # type: ignore[attr-defined]
    return _Fast(inner, path, max(ids, default=-1) + 1)  # ids may have gaps


def _read_fast(path: Path) -> Backend:
    from tokenizers import Tokenizer as Fast

    inner = Fast.from_str(path.read_text(encoding="utf-8"))
    # A saved truncation would cut an evaluation text short, and padding would add tokens to it.
    inner.no_truncation()
    inner.no_padding()
    return _fast(inner, path)


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

    lower = said(path.parent).get("do_lower_case") is not False
    return _fast(BertWordPieceTokenizer(str(path), lowercase=lower), path)


_READERS = {
    "tokenizer.json": _read_fast,
    "vocab.json": _read_spelled_out,
    ".json": _read_fast,
    ".model": _read_pieces,
    ".txt": _read_words,
}

"""What a model's inputs and outputs mean: tokens, positions, mask, past and present, logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: the input it comes in by, the output it goes out by, and its kind (`key`, `value_scale`, …)."""

    past: str
    present: str
    layer: int
    kind: str


@dataclass(frozen=True)
class Decoder:
    """The interface of a model that reads tokens.

    `cache` is `none` (an encoder, or no cache), `concat` (present is past with the new tokens at its end) or
    `static` (past is a preallocated buffer of `capacity` tokens, written in place; the input `lengths`, int64
    [batch], says how many of its tokens are valid). `output` is the logits [batch, sequence, vocabulary], or an
    encoder's hidden states. `others` are inputs porter has no meaning for.
    """

    tokens: str
    output: str
    cache: str
    caches: tuple[CacheTensor, ...] = ()
    positions: str = ""
    mask: str = ""
    lengths: str = ""
    capacity: int = 0
    token_types: str = ""
    others: tuple[str, ...] = ()

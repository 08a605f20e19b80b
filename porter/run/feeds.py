"""What a decoder is fed: tokens, positions, mask and lengths of a step, and caches to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from porter.context import Feeds
from porter.errors import ModelError, OptionError
from porter.kv import tags

if TYPE_CHECKING:
    from porter.decoder import Decoder
    from porter.run.protocol import TensorSpec


def feeds(
    decoder: Decoder,
    tokens: np.ndarray,
    past: int | np.ndarray,
    caches: Mapping[str, np.ndarray],
    inputs: Mapping[str, TensorSpec] | None = None,
) -> Feeds:
    """A step's feeds: `tokens` [batch, sequence] after `past` cached ones (one length, or int64 [batch]).

    Positions are past + arange; the mask is ones [batch, past + sequence], or up to the longest row, and 0
    for what a shorter row has not; token types are zeros; tags are those of text by its positions
    (`porter.kv.tags.default`); `last` and `total` count valid tokens. Types are
    int64 unless `inputs` says otherwise, and positions that `inputs` has with one axis get one row.
    """
    batch, sequence = tokens.shape
    before = np.broadcast_to(np.asarray(past, np.int64), (batch,))
    made: Feeds = {decoder.tokens: tokens}
    if decoder.positions:
        made[decoder.positions] = before[:, None] + np.arange(sequence)
    if decoder.mask:
        made[decoder.mask] = _mask(before, sequence)
    if decoder.lengths:
        made[decoder.lengths] = before
    if decoder.last:
        made[decoder.last] = before + sequence - 1
    if decoder.total:
        made[decoder.total] = np.array(before.max(initial=0) + sequence)
    if decoder.token_types:
        made[decoder.token_types] = np.zeros((batch, sequence), np.int64)
    if decoder.tags:
        made[decoder.tags] = tags.default(before[:, None] + np.arange(sequence))
    return {n: _fitted(a, (inputs or {}).get(n)) for n, a in made.items()} | dict(caches)


def _mask(before: np.ndarray, sequence: int) -> np.ndarray:
    """1 where a row has a token: its past, then (after a gap in rows that are shorter) the new ones."""
    longest = int(before.max(initial=0))
    return np.hstack([np.arange(longest) < before[:, None], np.ones((len(before), sequence))]).astype(
        np.int64
    )


def _fitted(array: np.ndarray, spec: TensorSpec | None) -> np.ndarray:
    if spec is not None and len(spec.shape) == 1 and array.ndim == 2:
        array = array[0]
    if spec is not None and array.ndim == 0:  # a single number, in as many axes as the model wants
        array = array.reshape((1,) * len(spec.shape))
    return np.asarray(array, spec.dtype if spec is not None else np.int64, order="C")


def empty_caches(decoder: Decoder, inputs: Mapping[str, TensorSpec], batch: int) -> Feeds:
    """Zeroed caches of no tokens (`concat`) or of the full capacity (`static`), by input name.

    Buffers start at a multiple of 64 bytes, since compiled kernels load whole vectors. Raises OptionError
    PORT-0141 when the model has another fixed batch, ModelError PORT-0132 when a cache has an axis of unknown
    size.
    """
    return {c.past: _empty_cache(c.past, inputs[c.past], batch) for c in decoder.caches}


def _empty_cache(name: str, spec: TensorSpec, batch: int) -> np.ndarray:
    rows, heads, tokens, size = spec.shape
    if isinstance(rows, int) and rows != batch:
        raise OptionError("PORT-0141", f"the model has a fixed batch of {rows}, not {batch}", where=name)
    if isinstance(heads, str) or isinstance(size, str):
        what = f"the cache's heads and head size must be numbers, not {heads} and {size}"
        raise ModelError("PORT-0132", what, where=name, hint="export with a dynamic batch and past only")
    return aligned_zeros((batch, heads, tokens if isinstance(tokens, int) else 0, size), spec.dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Zeros whose first byte lies at a multiple of `alignment`."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(count + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + count].view(dtype).reshape(shape)

"""What each tag gains by more bits, over the layers and the calibration feeds of a model.

A layer's own keys, values and queries are those that meet in its Attention; a mask that it has is not looked
at. Queries are taken evenly from all places of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from porter import decoder
from porter.context import Feeds
from porter.kv import tags, triaxial
from porter.kv.constants import Constants, matrix
from porter.kv.rotation import turn
from porter.kv.scheme import Scheme, Side

QUERIES = 64  # of a text at most
TEXTS = 16  # of the feeds at most: each layer costs two attentions of such queries for each tag


class Tagged:
    """Sums over layers. `given`: tags int64 [B,S] of each feed."""

    def __init__(self, given: Sequence[np.ndarray]) -> None:
        self._given = [row for each in given for row in each][:TEXTS]
        self._gain, self._scheme = np.zeros(tags.COUNT), None

    def add(
        self,
        attention: ir.Node,
        scheme: Scheme,
        constants: Constants,
        keys: Sequence[np.ndarray],
        values: Sequence[np.ndarray],
        queries: Sequence[np.ndarray],
    ) -> None:
        """A layer: float [B,H,S,D] of each feed."""
        self._scheme = scheme
        scale = attention.attributes.get_float("scale", 0.0) or None
        softcap = attention.attributes.get_float("softcap", 0.0)
        rows = zip(*([row for x in each for row in x] for each in (keys, values, queries)), strict=True)
        for given, (key, value, query) in zip(self._given, rows, strict=False):
            at = np.unique(np.linspace(0, len(given) - 1, QUERIES).astype(int))
            key, query = _keys(scheme, constants, key, query[:, at])
            value = _turned(scheme.value, value.astype(np.float32))
            sample = triaxial.Sample(key, value, query, at, given, scale, softcap)
            self._gain += triaxial.gains(scheme, sample)

    def chosen(self, capacity: int) -> np.ndarray | None:
        """Which tags get more bits in a cache of so many tokens, bool [tags]; None without a tagged layer."""
        if self._scheme is None:
            return None
        known = [each[(each >= 0) & (each < tags.COUNT)] for each in self._given]
        count = sum(np.bincount(each, minlength=tags.COUNT) for each in known)
        return triaxial.choose(self._scheme, self._gain, count, capacity)


def _keys(
    scheme: Scheme, constants: Constants, keys: np.ndarray, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys [H,T,D] as they are stored, and queries [Hq,S,D] as they meet them, float32."""
    by_head = queries.reshape(len(keys), -1, keys.shape[-1]).astype(np.float32)
    keys = keys.astype(np.float32)
    if scheme.normalize:
        keys, by_head = keys / constants.normalizer[:, None], by_head * constants.normalizer[:, None]
    return _turned(scheme.key, keys), _turned(scheme.key, by_head).reshape(queries.shape)


def _turned(side: Side, x: np.ndarray) -> np.ndarray:
    return turn(x, matrix(side, x.shape[-1])).astype(np.float32) if side.rotate else x


def tags_of(model: ir.Model, feed: Feeds, adapted: Feeds) -> np.ndarray:
    """The tags of a feed's tokens, int64 [B,S]: its own, or the usual ones."""
    rows, count = adapted[decoder.recognise(model).tokens].shape
    if tags.INPUT in feed:
        return np.asarray(feed[tags.INPUT], np.int64)[:, :count]
    return np.broadcast_to(tags.default(np.arange(count)), (rows, count))

"""What a scheme takes from calibration and the model then holds: steps, normalizers, which channels come
first, the tags that earn more bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from porter.errors import PassError
from porter.formats.elements import ELEMENTS
from porter.kv import rotation
from porter.kv.scheme import Scheme, Side


@dataclass(frozen=True, eq=False)
class Constants:
    """One layer's constants; None where the scheme has no use for it, or goes without.

    `key_step`, `value_step`: static steps, float32 [1,1,1] (tensor), [H,1,1] (head) or [H,1,D] (channel).
    `normalizer` float32 [H,D] > 0: keys are divided by it, queries multiplied. `key_first`, `value_first`:
    int [H,n], the channels that have one bit more. `more`: bool for each tag, whether its tokens want more
    bits.
    """

    key_step: np.ndarray | None = None
    value_step: np.ndarray | None = None
    normalizer: np.ndarray | None = None
    key_first: np.ndarray | None = None
    value_first: np.ndarray | None = None
    more: np.ndarray | None = None

    def check(self, scheme: Scheme) -> None:
        """Raise PassError PORT-0272 when a constant is missing that `scheme` cannot do without."""
        needs = {
            "key_step": bool(scheme.key.static),
            "value_step": bool(scheme.value.static),
            "normalizer": scheme.normalize,
            "more": scheme.tagged,
        }
        for name, needed in needs.items():
            if needed and getattr(self, name) is None:
                what = f"the cache scheme needs a calibrated {name}"
                raise PassError("PORT-0272", what, hint="give calibration feeds")


def calibrated(
    scheme: Scheme,
    keys: np.ndarray,
    values: np.ndarray,
    pairs: np.ndarray | None = None,
    shared: bool = False,
) -> Constants:
    """The constants of a layer from sample keys and values, float32 [H,T,D] (all but `more`).

    `pairs`, `shared`: what has to be alike in a normalizer that folds into weights before it, as `normalizer`
    takes them.
    """
    norm = normalizer(keys, pairs, shared) if scheme.normalize else None
    keys = keys if norm is None else keys / norm[:, None]
    first = {name: _first(side, x) for name, side, x in _sides(scheme, keys, values)}
    step = {}
    for name, side, x in _sides(scheme, keys, values):
        turned = x if not side.rotate else rotation.turn(x, matrix(side, x.shape[-1], first[name]))
        step[name] = _step(side, turned) if side.static else None
    return Constants(step["key"], step["value"], norm, first["key"], first["value"])


def normalizer(keys: np.ndarray, pairs: np.ndarray | None = None, shared: bool = False) -> np.ndarray:
    """InnerQ's sqrt(max over tokens |K_c|), float32 [H,D]; 1 for a channel that is always 0 (2602.23200).

    `pairs`: int [D], the channel that each one is rotated with (itself where it is not): the larger of both
    holds for both. `shared`: the largest of the heads holds for all.
    """
    peak = np.abs(keys).max(axis=1)
    if shared:
        peak = np.broadcast_to(peak.max(axis=0), peak.shape)
    if pairs is not None:
        peak = np.maximum(peak, peak[:, pairs])
    return np.where(peak > 0, np.sqrt(peak), 1).astype(np.float32)


def matrix(side: Side, head_size: int, first: np.ndarray | None = None) -> np.ndarray:
    """What turns a side's vectors, float64 [1 or H, D, D]: one rotation, or one for each set of channels."""
    if not side.mixed:
        return rotation.rotation(head_size)[None]
    return rotation.of_sets([n for n, _ in side.sets(head_size)], first)


def _sides(scheme: Scheme, keys: np.ndarray, values: np.ndarray) -> list[tuple[str, Side, np.ndarray]]:
    return [("key", scheme.key, keys), ("value", scheme.value, values)]


def _first(side: Side, x: np.ndarray) -> np.ndarray | None:
    """The channels with the largest mean square, ascending, int [H,n]."""
    count = side.extra(x.shape[-1])
    if not count:
        return None
    power = np.square(x.astype(np.float64)).mean(axis=1)
    return np.sort(np.argsort(-power, axis=-1, kind="stable")[:, :count], axis=-1)


def _step(side: Side, x: np.ndarray) -> np.ndarray:
    axes = {"tensor": (0, 1, 2), "head": (1, 2), "channel": (1,)}[side.static]
    peak = np.abs(x).max(axis=axes, keepdims=True).astype(np.float32)
    step = peak / np.float32(ELEMENTS[side.element].largest)
    return np.where(step > 0, step, np.float32(1))

"""Alignment: which values of two models mean the same.

Passes keep the name of what they replace, so names say most of it. A name is believed when both values have
the same shape at every step, and for integers (positions, lengths) the same entries: a pass may count them
otherwise. What attention reads of a cache of fixed length is the reference's growing cache, padded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from porter.drift.blame.sides import Side


@dataclass
class Alignment:
    """`pairs`: value of the candidate -> of the reference, in the candidate's order; `dtypes` are the
    candidate's. `slots`: of values that stand for a cache, how many tokens they have room for.
    `doubtful` are integers of the same name and shape whose entries differ."""

    pairs: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, np.dtype] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> Alignment:
        """The same but for some values."""
        pairs = {n: other for n, other in self.pairs.items() if n not in names}
        slots = {n: size for n, size in self.slots.items() if n not in names}
        return Alignment(pairs, self.dtypes, slots, self.doubtful)

    def given(self, name: str, array: np.ndarray) -> np.ndarray:
        """The reference's array as readers of the candidate's value want it."""
        if name in self.slots:
            room = np.zeros((*array.shape[:2], self.slots[name], array.shape[3]), array.dtype)
            room[:, :, : array.shape[2]] = array
            array = room
        return array.astype(self.dtypes[name], copy=False)

    def comparable(self, name: str, array: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The candidate's array in the reference's shape."""
        if name in self.slots:
            array = array[:, :, : reference.shape[2]]
        return array.reshape(reference.shape)


def align(reference: Side, candidate: Side, steps: Sequence[np.ndarray]) -> Alignment:
    """Run both on `steps` (int64 [batch, n] each, one after the other) and pair their values."""
    known = {*reference.values}
    named = {n: n for n in candidate.values if n in known}
    caches = _caches(reference, candidate)
    return _checked(reference, candidate, caches | named, {*caches} - {*named}, steps)


def _caches(reference: Side, candidate: Side) -> dict[str, str]:
    """What attention reads of the candidate's caches, where these have a fixed length and the reference's
    grow: keys and values of each layer, told by the buffer that they come from."""
    if candidate.lowered or (candidate.decoder.cache, reference.decoder.cache) != ("static", "concat"):
        return {}
    theirs = {(c.layer, c.kind): c.present for c in reference.decoder.caches}
    ours = {c.present: (c.layer, c.kind.split("_")[0]) for c in candidate.decoder.caches}
    known, found = {*candidate.values}, {}
    for node in candidate.model.graph:
        for value in node.inputs[1:3] if node.op_type == "Attention" else ():
            buffer = _buffer(value, ours)
            if value is not None and value.name in known and ours.get(buffer) in theirs:
                found[value.name] = theirs[ours[buffer]]
    return found


def _buffer(value: ir.Value | None, buffers: Collection[str]) -> str:
    """The first cache that is met on the way back from a value; "" for none."""
    queue, seen = deque([value]), {value}
    while queue:
        v = queue.popleft()
        if v is not None and v.name in buffers:
            return str(v.name)
        before = v.producer().inputs if v is not None and v.producer() is not None else ()
        queue += [i for i in before if i not in seen]
        seen.update(before)
    return ""


def _checked(
    reference: Side,
    candidate: Side,
    named: Mapping[str, str],
    caches: Collection[str],
    steps: Sequence[np.ndarray],
) -> Alignment:
    """What of `named` is the same at all steps; `caches` are compared as far as they are filled."""
    a = reference.player({*named.values()}, ())
    b = candidate.player({*named}, ())
    bad: set[str] = set()
    doubtful: set[str] = set()
    found = Alignment()
    for tokens in steps:
        kept: dict[str, np.ndarray] = {}

        def seen(name: str, array: np.ndarray, kept: dict = kept) -> None:
            other = kept.get(named[name])
            found.dtypes[name] = array.dtype
            if name in caches:
                found.slots[name] = array.shape[2]
                if other is None or not _holds(other, array):
                    bad.add(name)
            elif other is None or not _alike(other, array, exact=not candidate.lowered):
                bad.add(name)
            elif array.dtype.kind in "iub" and not np.array_equal(other.reshape(array.shape), array):
                doubtful.add(name)

        a.step(tokens, _none, lambda n, x, kept=kept: kept.__setitem__(n, np.array(x)))
        b.step(tokens, _none, seen)
    doubtful = set() if candidate.lowered else doubtful - bad
    found.pairs = {n: named[n] for n in candidate.values if n in found.dtypes and n not in bad | doubtful}
    found.doubtful = {n: named[n] for n in candidate.values if n in doubtful}
    found.slots = {n: size for n, size in found.slots.items() if n in found.pairs}
    return found


def _holds(reference: np.ndarray, array: np.ndarray) -> bool:
    """Whether a cache of fixed length, [batch, heads, slots, size], can hold the reference's."""
    if array.ndim != 4 or reference.ndim != 4 or array.shape[2] < reference.shape[2]:
        return False
    return array.shape[:2] + array.shape[3:] == reference.shape[:2] + reference.shape[3:]


def _alike(a: np.ndarray, b: np.ndarray, *, exact: bool) -> bool:
    """A lowered program keeps the elements, and may see them in another shape."""
    return (a.shape == b.shape if exact else a.size == b.size) and (a.dtype.kind == b.dtype.kind or not exact)


def _none(name: str) -> np.ndarray:
    raise KeyError(name)

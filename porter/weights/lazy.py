"""Results that several tensors are parts of: computed once for all parts when one is read, then let go.

Whoever writes a model reads the parts of a weight (codes, scales, zero points) one after the other, perhaps
from several threads. The first reader computes; the others wait for it and take what it left. A result whose
parts were all read is forgotten, and computed again for who asks again. A `Shelf` bounds how many results
wait for their other readers, so that reading only the scales of a whole model does not keep its codes.
"""

from __future__ import annotations

import dataclasses
import mmap
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from porter.formats import Encoded

SHELF = 4  # results that may wait: as many as there are threads that read ahead


class Shelf:
    """At most `capacity` results that still have parts to be read; the longest untouched goes first."""

    def __init__(self, capacity: int = SHELF) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[Parts, None] = OrderedDict()

    def touch(self, parts: Parts, waits: bool) -> None:
        """Note that `parts` was read and whether others of it wait; let go of what is beyond the capacity."""
        with self._lock:
            self._kept.pop(parts, None)
            if waits:
                self._kept[parts] = None
            doomed = [self._kept.popitem(last=False)[0] for _ in range(len(self._kept) - self.capacity)]
        for other in doomed:
            other.drop()


class Parts:
    """One result of `count` parts: `compute` gives them all, `take` one of them."""

    def __init__(self, compute: Callable[[], Sequence[np.ndarray]], count: int, shelf: Shelf) -> None:
        self._compute, self._count, self._shelf = compute, count, shelf
        self._lock = threading.Lock()
        self._left: dict[int, np.ndarray] = {}

    def take(self, part: int) -> np.ndarray:
        """Part number `part`; computes where it was taken already or nothing was computed."""
        with self._lock:
            if part not in self._left:
                self._left = dict(enumerate(self._compute()))
                assert len(self._left) == self._count
            array = self._left.pop(part)
            waits = bool(self._left)
        self._shelf.touch(self, waits)
        return array

    def drop(self) -> None:
        """Forget the parts that nobody read; not while they are computed, for then somebody reads them."""
        if self._lock.acquire(blocking=False):
            self._left = {}
            self._lock.release()


def tensor(
    parts: Parts, part: int, convert: Callable[[np.ndarray], np.ndarray], dtype: ir.DataType, shape: list[int]
) -> ir.LazyTensor:
    """A tensor that takes `part` and converts it (outside the lock) whenever it is read."""

    def compute() -> ir.Tensor:
        return ir.Tensor(convert(parts.take(part)), dtype=dtype, shape=ir.Shape(shape), name=made.name)

    made = ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape))
    return made


class Spool:
    """Arrays on disk instead of in memory: appended to a temporary file that has no name, mapped when asked.

    For results that must be computed before the model is written. The file goes when nobody maps it any more.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the spool)
        self._lock = threading.Lock()

    def append(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        """Write an array; what is given back maps it, read only, each time it is called."""
        shape, dtype, size = array.shape, array.dtype, array.nbytes
        array = np.ascontiguousarray(array)
        with self._lock:
            start = self._file.seek(0, 2)
            self._file.write(array.reshape(-1).view(np.uint8).data)
            self._file.flush()

        def mapped() -> np.ndarray:
            if not size:
                return np.zeros(shape, dtype)
            before = start % mmap.ALLOCATIONGRANULARITY
            view = mmap.mmap(
                self._file.fileno(), size + before, access=mmap.ACCESS_READ, offset=start - before
            )
            return np.frombuffer(view, np.uint8, offset=before).view(dtype).reshape(shape)

        return mapped

    def keep(self, encoded: Encoded) -> Callable[[], Encoded]:
        """Write the arrays of an Encoded; what is given back is the same Encoded, mapped."""
        form, factor = encoded.form, encoded.factor
        arrays = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
        stored = {n: self.append(a) for n, a in arrays.items() if isinstance(a, np.ndarray)}
        return lambda: Encoded(form, factor=factor, **{name: mapped() for name, mapped in stored.items()})

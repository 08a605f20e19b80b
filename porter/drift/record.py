"""Record: arrays kept in a nameless file in the order they came, to be read back in that order."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from porter.errors import EnvironmentFailure


class Record:
    """Arrays on disk; the file is gone when this object is, or the process.

    `folder` is where it lies (None: where temporary files go). Raises EnvironmentFailure PORT-0901 when the
    disk is full.
    """

    def __init__(self, folder: Path | None) -> None:
        self._where = str(folder or tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (lives as long as this)
        self._kept: list[tuple[np.dtype, tuple[int, ...]]] = []

    def append(self, array: np.ndarray) -> None:
        """Write the next array."""
        array = np.ascontiguousarray(array)
        self._kept.append((array.dtype, array.shape))
        left = memoryview(array.reshape(-1).view(np.uint8))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=self._where) from error

    def __iter__(self) -> Iterator[np.ndarray]:
        """The arrays, each read when it is its turn."""
        self._file.seek(0)
        for dtype, shape in self._kept:
            array = np.empty(shape, dtype)
            left = memoryview(array.reshape(-1).view(np.uint8))
            while left:
                left = left[self._file.readinto(left) :]
            yield array

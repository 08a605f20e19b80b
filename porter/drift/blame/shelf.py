"""Shelf: the values of one step by name; what is more than the memory allows lies in a nameless file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from porter.errors import EnvironmentFailure

MEMORY = 256 << 20  # bytes of arrays that stay in memory


class Shelf:
    """Arrays by name. `folder` is where the file lies (None: where temporary files go).

    `put` raises EnvironmentFailure PORT-0901 when the disk is full.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self._folder, self._memory = folder, memory
        self._arrays: dict[str, np.ndarray] = {}
        self._held = 0
        self._file: BinaryIO | None = None

    def clear(self) -> None:
        """Forget all arrays."""
        self._arrays.clear()
        self._held, self._file = 0, None

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep an array, which may change or go afterwards."""
        if self._held + array.nbytes > self._memory and array.nbytes:
            array = self._filed(array)
        else:
            self._held += array.nbytes
            array = array.copy()
        array.flags.writeable = False
        self._arrays[name] = array

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def _filed(self, array: np.ndarray) -> np.ndarray:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="porter-", dir=self._folder)  # noqa: SIM115
        start = self._file.seek(0, 2)
        try:
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            where = str(self._folder or tempfile.gettempdir())
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=where) from error
        return np.asarray(np.memmap(self._file, array.dtype, "r", start, array.shape))

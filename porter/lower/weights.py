"""Weights: the parameters of a program, packed one at a time into a file that is mapped at run time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tvm import relax

ALIGNMENT = 64  # kernels load whole vectors, so every buffer starts on a cache line


@dataclass(frozen=True)
class Parameter:
    """One buffer: its shape and dtype, and a function that makes its contents when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Weights:
    """Collects parameters in the order in which kernels ask for them; the same key is stored once."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.variables: list[relax.Var] = []
        self._by_key: dict[Hashable, relax.Var] = {}

    def parameter(
        self, key: Hashable, shape: tuple[int, ...], dtype: str, make: Callable[[], np.ndarray]
    ) -> relax.Var:
        """The program's variable for `key`; `make` is called once, when the file is written."""
        if key not in self._by_key:
            name = f"w{len(self.parameters)}"
            self.parameters.append(Parameter(name, tuple(shape), dtype, make))
            self.variables.append(relax.Var(name, relax.TensorType(shape, dtype)))
            self._by_key[key] = self.variables[-1]
        return self._by_key[key]


def offsets(parameters: list[Parameter], alignment: int = ALIGNMENT) -> list[int]:
    """Where each parameter starts in the file."""
    at, starts = 0, []
    for parameter in parameters:
        starts.append(at)
        at += -(-parameter.bytes // alignment) * alignment
    return starts


def write(
    parameters: list[Parameter],
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
    alignment: int = ALIGNMENT,
) -> None:
    """Pack and write every parameter; one is in memory at a time.

    `progress` gets the bytes written so far.
    """
    with path.open("wb") as file:
        for parameter in parameters:
            _write_one(parameter, file, alignment)
            progress(file.tell())


def _write_one(parameter: Parameter, file: BinaryIO, alignment: int) -> None:
    array = np.require(parameter.make(), requirements="C")
    assert array.shape == parameter.shape, (parameter.name, array.shape, parameter.shape)
    assert array.dtype == np.dtype(parameter.dtype), (parameter.name, array.dtype, parameter.dtype)
    file.write(array.data.cast("B") if array.size else b"")
    file.write(b"\0" * (-file.tell() % alignment))

"""Runner: what every runnable thing offers, be it ONNX Runtime or a compiled bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from porter.context import Feeds


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: a numpy dtype and one entry per axis, an int or a symbolic name.

    `rows` is of an input that numbers a table's rows, and says how many there are; 0 of all others.
    """

    dtype: np.dtype
    shape: tuple[int | str, ...]
    rows: int = 0


CPU = "this machine's CPU"


class Runner(Protocol):
    """Runs a model. `inputs` and `outputs` are in graph order; `in_place`: output -> the input it overwrites.

    `bounds` are the largest values that symbolic dimensions may have; a dimension it does not name has none.
    `machine` is what computes, for people.
    """

    machine: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    in_place: Mapping[str, str]
    bounds: Mapping[str, int]

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name. An input that `in_place` names is written to and comes back as that output."""
        ...

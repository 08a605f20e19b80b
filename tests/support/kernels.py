"""Build kernels and call them on numpy arrays, as tests of single kernels want it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from porter import target
from porter.lower import build
from porter.lower.kernels.define import tirx, tvm

UNIT = 2.0**-24  # what one float32 operation may be off by, relative to its result


def built(functions: Iterable[tirx.PrimFunc]) -> list[Callable[..., np.ndarray]]:
    """The kernels, compiled together; each takes its arguments and the shape (and dtype) of its result."""
    named = [f.with_attr("global_symbol", f"kernel_{i}") for i, f in enumerate(functions)]
    module = tvm.IRModule({f.attrs["global_symbol"]: f for f in named})
    library = tvm.tirx.build(module, target=build.tvm_target(target.load("host")))
    return [_caller(library[f.attrs["global_symbol"]]) for f in named]


def _caller(function: Callable[..., None]) -> Callable[..., np.ndarray]:
    def call(*args: object, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        """A result that the kernel leaves unwritten stays 77."""
        result = tvm.runtime.tensor(np.full(shape, 77, dtype))
        function(*[_argument(a) for a in args], result)
        return result.numpy()

    call.in_place = lambda *args: function(*[_argument(a) for a in args])  # type: ignore[attr-defined]
    return call


def _argument(value: object) -> object:
    return tvm.runtime.tensor(value) if isinstance(value, np.ndarray) else value

"""What an ONNX value is at import: a tensor, known integers, a weight, or codes with scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx


@dataclass(frozen=True)
class Ints:
    """Integers known at import, numbers or expressions of symbolic sizes: what shape arithmetic works on.

    `values` is a numpy object array of rank 0 or 1 whose entries are int or Expr; `dtype` is int64, int32 or
    bool.
    """

    values: np.ndarray
    dtype: str = "int64"

    @classmethod
    def of(cls, values: list[object] | object, dtype: str = "int64") -> Ints:
        """From a list (rank 1) or a single entry (rank 0); integer constants become plain ints."""
        if isinstance(values, list | tuple):
            array = np.empty(len(values), object)
            array[:] = [_plain(v) for v in values]
            return cls(array, dtype)
        array = np.empty((), object)
        array[()] = _plain(values)
        return cls(array, dtype)

    def flat(self) -> list[object]:
        """The entries as a list."""
        return list(self.values.reshape(-1))


@dataclass(frozen=True)
class Weight:
    """A constant of the model that no kernel has asked for yet; `transposed` swaps its two axes."""

    value: ir.Value
    transposed: bool = False

    @classmethod
    def of(cls, array: np.ndarray, name: str) -> Weight:
        """A constant made at import."""
        tensor = ir.tensor(array, name=name)
        return cls(ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype)))

    def numpy(self) -> np.ndarray:
        """Read it, as it is seen (transposed or not)."""
        array = read(self.value)
        return array.T if self.transposed else array

    @property
    def type(self) -> ir.DataType:
        """Its element type."""
        return self.value.const_value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is seen."""
        shape = tuple(int(d) for d in self.value.const_value.shape)
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Quantized:
    """Codes and scales that a kernel will decode in registers: a DequantizeLinear not yet computed.

    `axis` is -1 for one scale per tensor; else `block` codes along `axis` share a scale (0: one scale per
    index of `axis`). `codec` names a porter.lower.kernels codec. `transposed` swaps the two axes of what it
    stands for. Without scales it stands for the codes themselves, as int8.
    """

    codes: Weight | relax.Expr
    scales: Weight | relax.Expr | None
    codec: str
    axis: int = -1
    block: int = 0
    transposed: bool = False

    def turned(self) -> Quantized:
        """The transpose of a matrix."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True)
class Sequence:
    """An ONNX sequence whose length is known."""

    parts: tuple[relax.Expr, ...]


def read(value: ir.Value) -> np.ndarray:
    """A constant's array; the tensor does not keep it, so that one weight at a time is in memory."""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    array = tensor.numpy().copy()  # a view would keep the file mapped
    tensor.release()
    return array


Value = Sequence | relax.Expr | Ints | Weight | Quantized


def _plain(value: object) -> object:
    return int(value) if isinstance(value, int | np.integer | tirx.IntImm) else value

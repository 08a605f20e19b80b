"""What an ONNX value is at import: a tensor, known integers, a weight, or codes with scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from porter.lower.kernels.stored import Stored


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
    """A constant of the model that no kernel has asked for yet; `transposed` swaps its last two axes."""

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
        return array.swapaxes(-1, -2) if self.transposed else array

    def turned(self) -> Weight:
        """The transpose of a matrix, or of each matrix of a stack."""
        return replace(self, transposed=not self.transposed)

    @property
    def type(self) -> ir.DataType:
        """Its element type."""
        return self.value.const_value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is seen."""
        shape = tuple(int(d) for d in self.value.const_value.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


@dataclass(frozen=True)
class Quantized:
    """Codes that a kernel will decode in registers, and what turns them into numbers.

    Stands for (element - zero) * 2^-shift * scale, a DequantizeLinear not yet computed; without scales, for
    the elements as float32 (a Cast not yet computed), or if `raw` for the codes themselves.

    `codec` names a porter.lower.kernels codec. `axis` is -1 for one scale per tensor; else `block` codes
    along `axis` share a scale (0: one scale per index of `axis`), and a zero point. `shifts` holds a bit for
    `micro` codes of the last axis. `length`: the codes are packed in bytes along the last axis, so many in a
    row. `factor`: all elements are multiplied by it. `repeat`: row i is repeated `repeat[0]` times, up to
    `repeat[1]` rows. `transposed` swaps the last two axes of what it stands for. Constants are made of
    Weights alone.
    """

    codes: Weight | relax.Expr
    codec: str
    scales: Weight | Quantized | relax.Expr | None = None
    axis: int = -1
    block: int = 0
    zeros: Weight | Quantized | relax.Expr | None = None
    shifts: Quantized | None = None
    micro: int = 0
    length: int = 0
    factor: Weight | None = None
    repeat: tuple[int, int] | None = None
    transposed: bool = False
    raw: bool = False

    def turned(self) -> Quantized:
        """The transpose of a matrix, or of each matrix of a stack."""
        return replace(self, transposed=not self.transposed)

    @property
    def constant(self) -> bool:
        """Is all of it known at import?"""
        parts = [p for p in (self.codes, self.scales, self.zeros) if p is not None]
        return all(isinstance(p, Weight) or (isinstance(p, Quantized) and p.constant) for p in parts)


@dataclass(frozen=True)
class Picked:
    """Matrices of a constant stack by number, not yet copied; `transposed` swaps the last two axes."""

    stack: Weight | Quantized
    ids: relax.Expr | Weight | Ints
    transposed: bool = False

    def turned(self) -> Picked:
        """The transpose of each matrix."""
        return replace(self, transposed=not self.transposed)

    @property
    def matrices(self) -> Weight | Quantized:
        """The stack as the matrices are seen."""
        return self.stack.turned() if self.transposed else self.stack


@dataclass(frozen=True)
class StoredCache:
    """One side of a `porter.kv` scheme's buffers, `shape` [b, heads, capacity, head size] as floats, not yet
    read. `spec` is the kernels' `Stored`; `args` are the buffers it reads; `total` is int64 [b], the tokens
    of each row."""

    spec: Stored
    args: tuple[relax.Expr, ...]
    total: relax.Expr
    shape: tuple[object, ...]


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


Value = Sequence | relax.Expr | Ints | Weight | Quantized | Picked | StoredCache


def _plain(value: object) -> object:
    return int(value) if isinstance(value, int | np.integer | tirx.IntImm) else value

"""Weights stored as blocks of codes: com.microsoft's matrix products and tables become DequantizeLinear.

The bytes of a weight are laid out anew when somebody reads them, a weight at a time. Codes of the usual zero
point 2^(bits-1) become signed ones of zero point 0: code - 2^(bits-1) is the code with its top bit flipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from porter.foreign.editor import Editor
from porter.weights import functions

FLOAT = ir.DataType.FLOAT
TYPES = {
    2: (ir.DataType.INT2, ir.DataType.UINT2),
    4: (ir.DataType.INT4, ir.DataType.UINT4),
    8: (ir.DataType.INT8, ir.DataType.UINT8),
}
NUMPY = {
    ir.DataType.INT2: ml_dtypes.int2,
    ir.DataType.UINT2: ml_dtypes.uint2,
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT8: np.uint8,
}
_SIGNED = tuple(signed for signed, _ in TYPES.values())
TWO_BIT_OPSET, TWO_BIT_IR = 25, 13  # the first that have 2-bit integers


def unpacked(rows: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """uint8 [N, bytes] -> uint8 [N, columns]: the codes of each row, a byte's low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (rows[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*rows.shape[:-1], -1)[..., :columns]


def typed(codes: np.ndarray, dtype: ir.DataType) -> ir.Tensor:
    """Codes, uint8 of which the low bits count, as a tensor of an integer type of that many bits."""
    if dtype in _SIGNED:  # the sign's bit spreads to the left
        top = np.uint8(1 << (dtype.bitwidth - 1))
        codes = ((codes ^ top) - top).view(np.int8)
    return ir.Tensor(codes.astype(NUMPY[dtype]), dtype=dtype)


@dataclass(frozen=True)
class Blocks:
    """A matrix [N, K] as another tool stores it: bytes, and how they hold `bits`-wide codes.

    `tensor` holds uint8 of N rows, each of whole bytes and perhaps of more codes than `columns`; or codes of
    an ONNX type of their own, one an element.
    """

    tensor: ir.TensorProtocol
    bits: int
    rows: int
    columns: int

    def codes(self) -> np.ndarray:
        """uint8 [N, K], the codes as unsigned numbers, and signed ones by their bits."""
        array = self.tensor.numpy()
        if self.tensor.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
            return (array.astype(np.int8).view(np.uint8) & np.uint8(2**self.bits - 1)).reshape(self.rows, -1)
        return unpacked(array.view(np.uint8).reshape(self.rows, -1), self.bits, self.columns)

    def _packed_alike(self) -> bool:
        """Whether rows of whole bytes follow each other as ONNX packs codes, which are in the same order."""
        packed = self.tensor.dtype == ir.DataType.UINT8
        return packed and self.bits < 8 and not self.columns * self.bits % 8

    def stored(self, *, signed: bool, flip: bool) -> ir.LazyTensor:
        """Codes [N, K] of an ONNX type, computed whenever they are read; `flip` flips their top bits."""
        dtype = TYPES[self.bits][0 if signed else 1]
        shape = ir.Shape([self.rows, self.columns])

        def compute() -> ir.Tensor:
            top = np.uint8(2 ** (self.bits - 1) if flip else 0)
            if not self._packed_alike():
                return typed(self.codes() ^ top, dtype)
            tops = np.uint8(sum(int(top) << at for at in range(0, 8, self.bits)))
            rows = self.tensor.numpy().reshape(self.rows, -1)[:, : self.columns * self.bits // 8]
            return ir.PackedTensor((rows ^ tops).reshape(-1), dtype, shape=shape)

        return ir.LazyTensor(compute, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class Stored:
    """What makes a matrix [N, K] of floats: its codes, their block, scale, zero points and name."""

    blocks: Blocks
    block: int
    scale: ir.Value
    zero: ir.Value | None
    signed: bool  # whether the codes are
    middle: bool  # whether they have the zero point 2^(bits-1) where none is given, rather than 0
    name: str


def dequantized(edit: Editor, stored: Stored) -> ir.Value:
    """The floats [N, K]; those of one weight are made once, however many nodes read it."""
    parts = (stored.blocks.tensor, stored.scale, stored.zero)
    key = ("blocks", *(id(p) for p in parts), stored.blocks.bits, stored.block, stored.signed)
    if key not in edit.memo:
        edit.memo[key] = _dequantize(edit, stored)
    return edit.memo[key]


def _dequantize(edit: Editor, stored: Stored) -> ir.Value:
    blocks = stored.blocks
    groups = -(-blocks.columns // stored.block)
    scale = _matrix(edit, stored.scale, (blocks.rows, groups), "scales")
    zero = _zero_codes(edit, stored, groups)  # as bits, whether signed or not
    if isinstance(zero, ir.Value):
        return _shifted(edit, stored, scale, zero)
    usual = not stored.signed and zero is not None and bool((zero == 2 ** (blocks.bits - 1)).all())
    codes = blocks.stored(signed=stored.signed or usual, flip=usual)
    if blocks.bits == 2:
        _raise_opset(edit.model)
    made = [edit.weight(f"{stored.name}.codes", codes), scale]
    if zero is not None and not usual:
        made.append(edit.weight(f"{stored.name}.zero", typed(zero, codes.dtype)))
    return edit.op("DequantizeLinear", *made, axis=1, block_size=stored.block)


def _zero_codes(edit: Editor, stored: Stored, groups: int) -> np.ndarray | ir.Value | None:
    """Zero points uint8 [N, G] (None: 0 of signed codes), or the value of float ones [N, G]."""
    blocks = stored.blocks
    if stored.zero is None:
        usual = np.full((blocks.rows, groups), 2 ** (blocks.bits - 1), np.uint8)
        return usual if stored.middle else None
    tensor = edit.constant(stored.zero, "its zero points")
    if tensor.dtype.is_floating_point():
        return _matrix(edit, stored.zero, (blocks.rows, groups), "zero points")
    found = Blocks(tensor, blocks.bits, blocks.rows, groups)
    _check_size(edit, found, "zero points")
    return found.codes()


def _shifted(edit: Editor, stored: Stored, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """(code - zero) * scale for zero points that are no integers, by porter's own functions in float32."""
    if stored.blocks.bits == 2:
        _raise_opset(edit.model)
    for name in ("SubtractBlocks", "ScaleBlocks"):
        functions.add(edit.model, name)
    codes = edit.weight(f"{stored.name}.codes", stored.blocks.stored(signed=stored.signed, flip=False))
    y, kind = edit.op("Cast", codes, to=FLOAT), edit.constant(scale, "its scales").dtype
    for name, value in (("SubtractBlocks", zero), ("ScaleBlocks", scale)):
        wide = value if value.const_value.dtype == FLOAT else edit.op("Cast", value, to=FLOAT)
        y = edit.op(name, y, wide, domain=functions.DOMAIN, block=stored.block)
    return y if kind == FLOAT else edit.op("Cast", y, to=kind)


def _matrix(edit: Editor, value: ir.Value, shape: tuple[int, int], what: str) -> ir.Value:
    """A constant as [N, G], for some tools store it flat."""
    tensor = edit.constant(value, f"its {what}")
    if tuple(tensor.shape) == shape and value.producer() is None:
        return value
    if tensor.size != shape[0] * shape[1]:
        said = f"{what} of shape {list(tensor.shape)} are not [{shape[0]}, {shape[1]}]"
        raise edit.refusal(said, "PORT-0269")
    key = ("matrix", id(tensor), shape)
    if key not in edit.memo:
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype),
            dtype=tensor.dtype,
            shape=ir.Shape(shape),
        )
        edit.memo[key] = edit.weight(f"{tensor.name or value.name}.matrix", lazy)
    return edit.memo[key]


def _raise_opset(model: ir.Model) -> None:
    """2-bit integers are younger than the opset that all else is written in; functions keep step."""
    for owner in (model, *model.functions.values()):
        owner.opset_imports[""] = max(owner.opset_imports.get("", 0), TWO_BIT_OPSET)
    model.ir_version = max(model.ir_version, TWO_BIT_IR)


def _check_size(edit: Editor, blocks: Blocks, what: str) -> None:
    """Refuse a tensor that does not hold N rows of enough bytes."""
    tensor, per_byte = blocks.tensor, 8 // blocks.bits
    packed = tensor.dtype in (ir.DataType.UINT8, ir.DataType.INT8)
    wanted = -(-blocks.columns // per_byte) if packed else blocks.columns
    if tensor.size % blocks.rows or tensor.size // blocks.rows < wanted:
        said = f"{what} of shape {list(tensor.shape)} do not hold [{blocks.rows}, {blocks.columns}]"
        raise edit.refusal(said, "PORT-0269")


def product(edit: Editor, x: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x [..., K] times the transpose of [N, K], and a bias [N]."""
    y = edit.op("MatMul", x, edit.op("Transpose", matrix, perm=[1, 0]))
    return y if bias is None else edit.op("Add", y, bias)


def _matmul_nbits(edit: Editor) -> None:
    x, b, scale, zero, g_idx, bias = edit.inputs(6)
    if g_idx is not None:
        raise edit.refusal("g_idx, a group for each column")
    if edit.attribute("weight_prepacked", 0):
        raise edit.refusal("its weight is packed for one machine's kernels")
    bits = int(edit.attribute("bits", 4))
    rows, columns = int(edit.attribute("N", 0)), int(edit.attribute("K", 0))
    if bits not in TYPES:
        raise edit.refusal(f"codes of {bits} bits")
    tensor = edit.constant(b, "its weight")
    blocks = Blocks(tensor, bits, rows, columns)
    _check_size(edit, blocks, "codes")
    block, name = int(edit.attribute("block_size", 0)), str(tensor.name or b.name)
    stored = Stored(blocks, block, scale, zero, signed=False, middle=True, name=name)
    edit.replace(product(edit, x, dequantized(edit, stored), bias))


def _gather_block_quantized(edit: Editor) -> None:
    data, indices, scale, zero = edit.inputs(4)
    tensor = edit.constant(data, "its table")
    rank = len(edit.constant(scale, "its scales").shape)  # the table's own, which a Reshape may have made
    axis, blocked = int(edit.attribute("gather_axis", 0)), int(edit.attribute("quantize_axis", 1))
    if rank != 2 or axis % rank or blocked % rank != 1:
        raise edit.refusal("anything but rows of a matrix whose blocks run along them")
    packed = tensor.dtype == ir.DataType.UINT8
    if not packed and tensor.dtype not in (ir.DataType.INT4, ir.DataType.UINT4):
        raise edit.refusal(f"codes of type {tensor.dtype.name.lower()}")
    bits = int(edit.attribute("bits", 4)) if packed else 4
    rows, width = _table_size(edit, tensor, scale)
    columns = width * (8 // bits) if packed else width
    stored = Stored(
        Blocks(tensor, bits, rows, columns),
        int(edit.attribute("block_size", 128)),
        scale,
        zero,
        signed=tensor.dtype == ir.DataType.INT4,
        middle=packed,
        name=str(tensor.name or data.name),
    )
    edit.replace(edit.op("Gather", dequantized(edit, stored), indices))


def _table_size(edit: Editor, tensor: ir.TensorProtocol, scale: ir.Value) -> tuple[int, int]:
    """Rows and elements a row of the table, which a Reshape may have made of a matrix of blocks."""
    rows = int(edit.constant(scale, "its scales").shape[0])
    if not rows or tensor.size % rows:
        raise edit.refusal(f"a table of shape {list(tensor.shape)} has no {rows} rows", "PORT-0269")
    return rows, tensor.size // rows


# bitsandbytes: the quantiles of a normal distribution, and a float of 4 bits; by code.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
_FP4 = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
BNB4 = {
    0: np.array([*_FP4, *(-v for v in _FP4)], np.float32),
    1: np.array(NF4, np.float32),
}


def _matmul_bnb4(edit: Editor) -> None:
    """No kernel decodes these tables, so the weight becomes the floats it stands for, read by read."""
    x, b, absmax = edit.inputs(3)
    if edit.attribute("training_mode", 0) or not edit.attribute("transB", 1):
        raise edit.refusal("a weight that is not transposed, or is trained")
    rows, columns = int(edit.attribute("N")), int(edit.attribute("K"))
    block, table = int(edit.attribute("block_size")), BNB4[int(edit.attribute("quant_type"))]
    codes, scale = edit.constant(b, "its weight"), edit.constant(absmax, "its absmax")
    if codes.size != -(-rows * columns // 2) or scale.size != -(-rows * columns // block):
        raise edit.refusal(f"{codes.size} bytes and {scale.size} scales are not a matrix", "PORT-0269")

    def compute() -> ir.Tensor:
        packed = codes.numpy().reshape(-1)
        pairs = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: rows * columns]  # the high half first
        scales = np.repeat(scale.numpy().reshape(-1), block)[: rows * columns]
        return ir.Tensor(
            (table.astype(scales.dtype)[pairs] * scales).reshape(rows, columns), dtype=scale.dtype
        )

    lazy = ir.LazyTensor(compute, dtype=scale.dtype, shape=ir.Shape([rows, columns]))
    key = ("bnb4", id(codes), id(scale))
    if key not in edit.memo:
        edit.memo[key] = edit.weight(f"{codes.name}.decoded", lazy)
    edit.replace(product(edit, x, edit.memo[key], None))


def _matmul_fp8(edit: Editor) -> None:
    """Scales of 1 x block; where the activations have a scale too, they are rounded to e4m3fn."""
    x, b, scale, a_scale, bias = edit.inputs(5)
    tensor = edit.constant(b, "its weight")
    if tensor.dtype != ir.DataType.FLOAT8E4M3FN or len(tensor.shape) != 2:
        raise edit.refusal(f"a weight of type {tensor.dtype.name.lower()}", "PORT-0269")
    rows, columns = (int(d) for d in tensor.shape)
    block = int(edit.attribute("block_size", 128))
    if a_scale is not None:
        x = edit.op("QuantizeLinear", x, a_scale, output_dtype=ir.DataType.FLOAT8E4M3FN)
        x = edit.op("DequantizeLinear", x, a_scale)
    factors = _matrix(edit, scale, (rows, -(-columns // block)), "scales")
    w = edit.op("DequantizeLinear", b, factors, axis=1, block_size=block)
    edit.replace(product(edit, x, w, bias))


TABLE: dict[str, Callable[[Editor], None]] = {
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulBnb4": _matmul_bnb4,
    "MatMulBlockQuantizedFp8Weight": _matmul_fp8,
}

"""Constant codes: how kernels store them, the arrays that are stored, and what they stand for in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.formats import packing
from porter.formats.elements import ELEMENTS
from porter.lower.importer.values import Quantized, Weight
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.layout import LANES, Layout

CODEC_OF = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "e4m3fn",
    ir.DataType.FLOAT8E5M2: "e5m2",
    ir.DataType.FLOAT8E4M3FNUZ: "e4m3fnuz",
    ir.DataType.FLOAT8E5M2FNUZ: "e5m2fnuz",
    ir.DataType.FLOAT8E8M0: "e8m0",
    ir.DataType.FLOAT4E2M1: "e2m1",
    ir.DataType.INT32: "int32",
    ir.DataType.INT16: "int16",
    ir.DataType.UINT16: "uint16",
    **{ir.DataType[f"{s}{b}"]: f"{s}{b}".lower() for s in ("INT", "UINT") for b in (2, 4, 8)},
}


def shape_of_codes(value: Quantized) -> tuple[int, ...]:
    """The shape of what a constant stands for, before it is transposed."""
    shape = value.codes.shape
    shape = (*shape[:-1], value.length) if value.length else shape
    return (*shape[:-2], value.repeat[1], shape[-1]) if value.repeat else shape


def codes_of(value: Quantized) -> np.ndarray:
    """A code each, before it is transposed and its rows repeated: integers, bytes, or wide floats."""
    array, name = value.codes.numpy(), value.codec
    if value.length:
        signed = name.startswith("int")
        return packing.unpack(array, CODECS[name].bits, value.length, signed=signed)
    if name in ("int2", "int4"):
        return array.astype(np.int8)
    if name in ("uint2", "uint4") or (name == "e2m1" and array.dtype.isbuiltin != 2):
        return array.astype(np.uint8)
    plain = array.dtype.isbuiltin != 2 or name == "bf16"
    return array if plain else np.ascontiguousarray(array).view(np.uint8)


def layout_of(value: Quantized) -> Layout | None:
    """How kernels store this constant matrix, or stack of matrices, as it is seen; None if they cannot."""
    shape = shape_of_codes(value)
    if not value.constant or value.raw or len(shape) not in (2, 3) or value.repeat or value.factor:
        return None
    stack = shape[0] if len(shape) == 3 else 1
    n, k = (shape[-1], shape[-2]) if value.transposed else shape[-2:]
    if value.scales is None:
        plain = value.zeros is None and value.shifts is None
        return Layout(value.codec, n, k, stack=stack) if plain else None
    grid = _grid(value)
    if grid is None or (value.transposed and value.shifts is not None) or 0 in shape:
        return None
    rows, group = grid
    scales = value.scales if isinstance(value.scales, Quantized) else None
    return Layout(
        value.codec,
        n,
        k,
        group or k,
        scale=_codec(value.scales),
        zero="" if value.zeros is None else _codec(value.zeros),
        rows=rows if rows % LANES == 0 else 1,
        micro=value.micro,
        factor=scales is not None and scales.factor is not None,
        stack=stack,
    )


def _grid(value: Quantized) -> tuple[int, int] | None:
    """How many rows of a matrix as it is seen, and codes of a row, share a scale (0: all of them)."""
    shape = shape_of_codes(value)
    n_axis, k_axis = len(shape) - 2, len(shape) - 1
    if value.transposed:
        n_axis, k_axis = k_axis, n_axis
    if value.axis == -1:
        return 0, 0
    if not value.block:
        return {n_axis: (1, 0), k_axis: (0, 1)}.get(value.axis, (0, 0))
    repeats = {_repeat(v) for v in (value.scales, value.zeros) if v is not None}
    block = min(value.block, shape[value.axis])
    if repeats == {0}:
        return {k_axis: (1, block), n_axis: (block, 1)}.get(value.axis)
    if value.axis != k_axis or value.transposed:
        return None
    rows = repeats.pop() if len(repeats) == 1 else 1
    return (0 if rows >= shape[n_axis] else rows), block


def _repeat(value: Weight | Quantized) -> int:
    """How many rows a row of scales or zero points is repeated for; 0 where it is not."""
    return value.repeat[0] if isinstance(value, Quantized) and value.repeat else 0


def _codec(value: Weight | Quantized) -> str:
    """The codec of scales or zero points as they are stored: nibbles become bytes."""
    name = value.codec if isinstance(value, Quantized) else CODEC_OF[value.type]
    return {"int2": "int8", "int3": "int8", "int4": "int8"}.get(
        name, {"uint2": "uint8", "uint3": "uint8", "uint4": "uint8"}.get(name, name)
    )


def arrays(value: Quantized, layout: Layout) -> dict[str, Callable[[], np.ndarray]]:
    """What makes each of the layout's buffers."""
    shape = (layout.stack, layout.n, layout.k)
    return {
        "w": lambda: layout.pack_codes(_as_seen(value, codes_of(value)).reshape(shape)),
        "scale": lambda: layout.pack_scales(_per_group(value, layout, value.scales)),
        "zero": lambda: layout.pack_zeros(_per_group(value, layout, value.zeros)),
        "shift": lambda: layout.pack_shifts(codes_of(value.shifts)),
        "factor": lambda: value.scales.factor.numpy().astype(np.float32).reshape(1),
    }


def _as_seen(value: Quantized, array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2) if value.transposed else array


def _per_group(value: Quantized, layout: Layout, given: Weight | Quantized) -> np.ndarray:
    """Scales or zero points [stack, R, groups] as they are stored, R rows as the layout has them."""
    array = codes_of(given if isinstance(given, Quantized) else Quantized(given, CODEC_OF[given.type]))
    rank = len(shape_of_codes(value))
    if value.axis == -1:
        array = array.reshape(1, 1, 1)
    elif not value.block:
        at = value.axis + (3 - rank)
        array = np.expand_dims(array.reshape(-1), tuple(i for i in range(3) if i != at))
        array = _as_seen(value, array)
    else:
        array = _as_seen(value, array.reshape(layout.stack, *array.shape[-2:]))
    rows = _repeat(given) or (_grid(value) or (1, 0))[0]
    if layout.rows == 1 and array.shape[1] != layout.n:
        array = np.repeat(array, rows or layout.n, axis=1)[:, : layout.n]
    return np.broadcast_to(array, (layout.stack, *array.shape[1:]))


def dense(value: Quantized) -> np.ndarray:
    """What a constant stands for, float32, as ONNX DequantizeLinear has it."""
    shape = shape_of_codes(value)
    result = _elements(value)
    if value.zeros is not None:
        result = result - _spread(value, shape, _floats(value.zeros))
    if value.shifts is not None:
        result = result * np.repeat(dense(value.shifts), value.micro, axis=-1)[..., : shape[-1]]
    if value.scales is not None:
        result = result * _spread(value, shape, _floats(value.scales))
    return _as_seen(value, result)


def _elements(value: Quantized) -> np.ndarray:
    codes, name = codes_of(value), value.codec
    if name == "halving":
        result = np.float32(1) / (np.float32(1) + codes)
    else:
        result = ELEMENTS[name].decode(codes) if name in ELEMENTS else codes.astype(np.float32)
    if value.factor is not None:
        result = result * value.factor.numpy().astype(np.float32).reshape(())
    return np.repeat(result, value.repeat[0], axis=-2)[..., : value.repeat[1], :] if value.repeat else result


def _floats(value: Weight | Quantized) -> np.ndarray:
    return dense(value) if isinstance(value, Quantized) else value.numpy().astype(np.float32)


def _spread(value: Quantized, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Scales or zero points so that they broadcast to `shape`."""
    if value.axis == -1:
        return array.reshape(())
    if not value.block:
        return np.expand_dims(array.reshape(-1), tuple(i for i in range(len(shape)) if i != value.axis))
    return np.take(np.repeat(array, value.block, value.axis), range(shape[value.axis]), value.axis)

"""The functions' bodies, run by ONNX Runtime, beside numpy: every code of every element, odd lengths."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from porter.formats import packing
from porter.formats.elements import ELEMENTS
from porter.weights import functions

BITS = {
    "e2m1": 4, "e2m3": 6, "e3m2": 6, "e3m4": 8, "e4m3": 8, "e4m3b11fnuz": 8,
    "int3": 3, "uint3": 3, "mx9": 8, "mx6": 5,
}  # fmt: skip


def call(
    name: str, inputs: dict[str, np.ndarray], element: str = "", bits: int = 0, **attributes: int
) -> np.ndarray:
    """One function, run."""
    values = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape))
        for n, a in inputs.items()
    ]
    node = ir.node(name, values, attributes, domain="porter")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    model = ir.Model(made, ir_version=12)
    functions.add(model, name, element, bits)
    return decoders.run(model, inputs)["y"]


@pytest.mark.parametrize("element", BITS)
def test_every_code(element: str) -> None:
    bits = BITS[element]
    assert ELEMENTS[element].bits == bits
    codes = np.random.default_rng(0).permutation(np.arange(1 << bits, dtype=np.uint8))
    codes = np.stack([codes, codes[::-1]])
    packed = packing.pack(codes, bits)
    got = call(functions.decoder(element), {"x": packed}, element, bits, length=codes.shape[-1])
    signed = codes.astype(np.int8) - np.int8(8) * (codes > 3) if element == "int3" else codes
    np.testing.assert_array_equal(got, ELEMENTS[element].decode(signed))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("element", ["e2m1", "uint3", "e2m3", "mx6", "e3m4"])
def test_rows_of_any_length(element: str, length: int) -> None:
    bits = BITS[element]
    codes = np.random.default_rng(length).integers(0, 1 << bits, (2, 3, length)).astype(np.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (2, 3, -(-length * bits // 8))
    got = call(functions.decoder(element), {"x": packed}, element, bits, length=length)
    np.testing.assert_array_equal(got, ELEMENTS[element].decode(codes))


def test_the_order_of_bits_is_as_documented() -> None:
    """By hand: codes 1, 2, 3 of three bits are 0b011_010_001, that is 0xD1 and 0x00 with a bit left over."""
    packed = np.array([[0b11_010_001, 0b0]], np.uint8)
    np.testing.assert_array_equal(call("DecodeUint3", {"x": packed}, "uint3", 3, length=3), [[1, 2, 3]])
    np.testing.assert_array_equal(call("DecodeInt3", {"x": packed}, "int3", 3, length=3), [[1, 2, 3]])
    packed = np.array([[0b101]], np.uint8)
    np.testing.assert_array_equal(call("DecodeShifts", {"x": packed}, length=4), [[0.5, 1, 0.5, 1]])


@pytest.mark.parametrize("shape", [(3, 33), (2, 3, 7), (5,)], ids=str)
@pytest.mark.parametrize("block", [1, 2, 4, 33, 40])
def test_blocks(shape: tuple[int, ...], block: int) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype(np.float32)
    each = random.standard_normal((*shape[:-1], -(-shape[-1] // block))).astype(np.float32)
    spread = np.repeat(each, block, axis=-1)[..., : shape[-1]]
    np.testing.assert_array_equal(call("ScaleBlocks", {"x": x, "s": each}, block=block), x * spread)
    np.testing.assert_array_equal(call("SubtractBlocks", {"x": x, "s": each}, block=block), x - spread)


@pytest.mark.parametrize(("rows", "length"), [(1, 3), (4, 9), (128, 300), (9, 27), (40, 81)])
def test_rows_are_repeated(rows: int, length: int) -> None:
    for lead in ((), (2,)):
        scale = np.random.default_rng(0).random((*lead, -(-length // rows), 5)).astype(np.float32)
        got = call("RepeatRows", {"s": scale}, rows=rows, length=length)
        np.testing.assert_array_equal(got, np.repeat(scale, rows, axis=-2)[..., :length, :])

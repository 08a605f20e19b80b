"""PackInt4 and UnpackInt4: model-local functions that keep two 4-bit codes in a byte, in ONNX's order.

ONNX has 4-bit tensors but few operators take them, so a cache of 4-bit codes travels as bytes. The functions'
bodies are plain ONNX, so that any runtime can run them; porter's importer knows them by name. The numpy twin
is `porter.formats.packing`.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

DOMAIN = "porter"

# Mod gives an integer the divisor's sign: -3 mod 16 is 13, the nibble of -3.
PACK = """<domain: "porter", opset_import: ["" : 24]> PackInt4 (codes) => (packed)
{
    sixteen = Constant<value = int32 {16}>()
    zero = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>()
    two = Constant<value_ints = [2]>()
    last = Constant<value_ints = [-1]>()
    end = Constant<value_ints = [9223372036854775807]>()
    wide = Cast<to = 6>(codes)
    nibbles = Mod(wide, sixteen)
    low = Slice(nibbles, zero, end, last, two)
    high = Slice(nibbles, one, end, last, two)
    shifted = Mul(high, sixteen)
    both = Add(low, shifted)
    packed = Cast<to = 2>(both)
}"""

UNPACK = """<domain: "porter", opset_import: ["" : 24]> UnpackInt4 (packed) => (codes)
{
    sixteen = Constant<value = int32 {16}>()
    eight = Constant<value = int32 {8}>()
    last = Constant<value_ints = [-1]>()
    wide = Cast<to = 6>(packed)
    high = Div(wide, sixteen)
    apart_low = Unsqueeze(wide, last)
    apart_high = Unsqueeze(high, last)
    pairs = Concat<axis = -1>(apart_low, apart_high)
    raised = Add(pairs, eight)
    nibbles = Mod(raised, sixteen)
    signed = Sub(nibbles, eight)
    rows = Shape<end = -1>(packed)
    bytes = Shape<start = -1>(packed)
    columns = Add(bytes, bytes)
    shape = Concat<axis = 0>(rows, columns)
    flat = Reshape(signed, shape)
    codes = Cast<to = 3>(flat)
}"""


def add_functions(model: ir.Model) -> None:
    """Give the model both functions, and the import of their domain.

    PackInt4: int8 [..., D] of codes in -8…7, D even, to uint8 [..., D/2]; the first of a pair is the low
    nibble. UnpackInt4: the inverse.
    """
    for text in (PACK, UNPACK):
        function = ir.from_proto(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1

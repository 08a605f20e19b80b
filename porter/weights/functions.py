"""Model-local functions that decode weights for which ONNX, or ONNX Runtime, has no type.

Their bodies are plain ONNX, so any runtime can run them; porter's importer knows them by name (domain
`porter`). All shapes below may have further axes in front.

- `Decode<ELEMENT>{length}(packed uint8 [N, B]) -> float32 [N, length]`: codes of b bits, a row at a time, as
  a little-endian bit stream: element i is bits i*b up to (i+1)*b, counted from the least significant bit of
  the row's byte 0, and B = ceil(length * b / 8). For 2 and 4 bits that is ONNX's order.
- `DecodeShifts{length}(packed uint8 [N, ceil(length/8)]) -> float32 [N, length]`: 0.5 where the bit is 1.
- `ScaleBlocks{block}(x [N, K], scale [N, G]) -> [N, K]`: each block of a row times its scale; the last
  block may be shorter. `SubtractBlocks{block}(x, zero)`: less its zero point.
- `RepeatRows{rows, length}(scale [R, G]) -> [length, G]`: each row `rows` times, the last perhaps fewer.

The numpy twin of the packing is `porter.formats.packing`.
"""

from __future__ import annotations

import math

import numpy as np
import onnx.parser
import onnx_ir as ir

from porter.formats.elements import ELEMENTS
from porter.formats.integers import Integer

DOMAIN = "porter"

# A byte is a code.
_DECODE_BYTES = """<domain: "porter", opset_import: ["" : {opset}]> {name} <length> (packed) => (values)
{{
    codes = Cast<to = 6>(packed)
    table = Constant<value = float[{base}] {{{table}}}>()
    values = Gather(table, codes)
}}"""

# A byte is two codes, the first in its low half. They stay bytes as long as they can: a runtime folds all
# this when it loads a model, and keeps what lies between.
_DECODE_NIBBLES = """<domain: "porter", opset_import: ["" : {opset}]> {name} <length> (packed) => (values)
{{
    zero = Constant<value_ints = [0]>()
    last = Constant<value_ints = [-1]>()
    all = Constant<value_int: int = @length>()
    end = Reshape(all, last)
    lead = Shape<end = -1>(packed)
    four = Constant<value = uint8 {{4}}>()
    fifteen = Constant<value = uint8 {{15}}>()
    low = BitwiseAnd(packed, fifteen)
    high = BitShift<direction = "RIGHT">(packed, four)
    low_apart = Unsqueeze(low, last)
    high_apart = Unsqueeze(high, last)
    pairs = Concat<axis = -1>(low_apart, high_apart)
    row = Concat<axis = 0>(lead, last)
    flat = Reshape(pairs, row)
    halves = Slice(flat, zero, end, last)
    codes = Cast<to = 6>(halves)
    table = Constant<value = float[{base}] {{{table}}}>()
    values = Gather(table, codes)
}}"""

# A word is as many bytes as hold whole codes (3 of 8 codes of 3 bits); the codes are its digits in base 2^b.
_DECODE_WORDS = """<domain: "porter", opset_import: ["" : {opset}]> {name} <length> (packed) => (values)
{{
    zero = Constant<value_ints = [0]>()
    last = Constant<value_ints = [-1]>()
    bytes = Constant<value_ints = [{bytes}]>()
    all = Constant<value_int: int = @length>()
    end = Reshape(all, last)
    lead = Shape<end = -1>(packed)
    stored = Shape<start = -1>(packed)
    short = Neg(stored)
    missing = Mod(short, bytes)
    pads = Concat<axis = 0>(zero, missing)
    nothing = Constant<value = uint8 {{0}}>()
    padded = Pad(packed, pads, nothing, last)
    apart = Concat<axis = 0>(lead, last, bytes)
    grouped = Reshape(padded, apart)
    wide = Cast<to = {word}>(grouped)
    places = Constant<value = {integer}[{bytes}] {{{places}}}>()
    placed = Mul(wide, places)
    words = ReduceSum<keepdims = 1>(placed, last)
    divisors = Constant<value = {integer}[{count}] {{{divisors}}}>()
    shifted = Div(words, divisors)
    base = Constant<value = {integer} {{{base}}}>()
    digits = Mod(shifted, base)
    row = Concat<axis = 0>(lead, last)
    flat = Reshape(digits, row)
    codes = Slice(flat, zero, end, last)
    table = Constant<value = float[{base}] {{{table}}}>()
    values = Gather(table, codes)
}}"""

# Each number per block, as often as the block is long, along the last axis of x.
_BLOCKS = """<domain: "porter", opset_import: ["" : {opset}]> {name} <block> (x, per_block) => (y)
{{
    zero = Constant<value_ints = [0]>()
    last = Constant<value_ints = [-1]>()
    size = Constant<value_int: int = @block>()
    length = Reshape(size, last)
    column = Unsqueeze(per_block, last)
    blocks = Shape(per_block)
    repeated = Concat<axis = 0>(blocks, length)
    wide = Expand(column, repeated)
    lead = Shape<end = -1>(per_block)
    row = Concat<axis = 0>(lead, last)
    flat = Reshape(wide, row)
    end = Shape<start = -1>(x)
    spread = Slice(flat, zero, end, last)
    y = {operator}(x, spread)
}}"""

_ROWS = """<domain: "porter", opset_import: ["" : {opset}]> {name} <rows, length> (scale) => (y)
{{
    zero = Constant<value_ints = [0]>()
    last = Constant<value_ints = [-1]>()
    axis = Constant<value_ints = [-2]>()
    count = Constant<value_int: int = @rows>()
    times = Reshape(count, last)
    all = Constant<value_int: int = @length>()
    end = Reshape(all, last)
    apart = Unsqueeze(scale, axis)
    before = Shape<end = -1>(scale)
    columns = Shape<start = -1>(scale)
    repeated = Concat<axis = 0>(before, times, columns)
    wide = Expand(apart, repeated)
    lead = Shape<end = -2>(scale)
    joined = Concat<axis = 0>(lead, last, columns)
    flat = Reshape(wide, joined)
    y = Slice(flat, zero, end, axis)
}}"""


def decoder(element: str) -> str:
    """The name of the function that decodes an element: `DecodeE2M1` for e2m1, `DecodeInt3` for int3."""
    return "Decode" + (element.upper() if element.startswith("e") else element.capitalize())


def add(model: ir.Model, name: str, element: str = "", bits: int = 0) -> None:
    """Give the model the function called `name`, unless it has it; a decoder is of an element of `bits`."""
    if (DOMAIN, name, "") in model.functions:
        return
    opset = model.opset_imports.get("", 24)
    if element:
        text = _decoder_text(name, values(element, bits), bits, opset)
    elif name == "DecodeShifts":
        text = _decoder_text(name, np.array([1, 0.5], np.float32), 1, opset)
    elif name == "RepeatRows":
        text = _ROWS.format(name=name, opset=opset)
    else:
        operator = {"ScaleBlocks": "Mul", "SubtractBlocks": "Sub"}[name]
        text = _BLOCKS.format(name=name, operator=operator, opset=opset)
    function = ir.from_proto(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


def values(element: str, bits: int) -> np.ndarray:
    """What each bit pattern of an element stands for, float32 [2^bits]."""
    elements = ELEMENTS[element]
    codes = np.arange(1 << bits, dtype=np.uint8)
    if isinstance(elements, Integer) and elements.smallest < 0:
        codes = (codes << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
    return elements.decode(codes).astype(np.float32)


def _decoder_text(name: str, table: np.ndarray, bits: int, opset: int) -> str:
    size = math.lcm(bits, 8) // 8
    body = {8: _DECODE_BYTES, 4: _DECODE_NIBBLES}.get(bits, _DECODE_WORDS)
    return body.format(
        name=name,
        word=int(ir.DataType.INT32 if size < 4 else ir.DataType.INT64),
        integer="int32" if size < 4 else "int64",
        opset=opset,
        bytes=size,
        places=", ".join(str(256**i) for i in range(size)),
        count=8 * size // bits,
        divisors=", ".join(str(2 ** (bits * i)) for i in range(8 * size // bits)),
        base=1 << bits,
        table=", ".join(_number(v) for v in table),
    )


def _number(value: np.float32) -> str:
    return "nan" if np.isnan(value) else repr(float(value)) if np.isfinite(value) else f"{float(value)}"

"""Write quantized weights as ONNX Runtime's own operators, which multiply codes without widening them first.

    MatMul(x, Transpose(DequantizeLinear(Q[N,K], s[, z])))   ->  MatMulNBits(x, B, s, [z])
    MatMul(x, DequantizeLinear(Q[K,N], s[, z], axis=0))      ->  MatMulNBits(x, B, s, [z])
    Gemm(x, DequantizeLinear(Q[N,K], s[, z]), c, transB=1)   ->  MatMulNBits(x, B, s, [z], , c)
    MatMul(x, Transpose(ScaleBlocks(SubtractBlocks(Cast(Q), z), s)))  ->  MatMulNBits with real zero points
    Gather(DequantizeLinear(Q[N,K], s[, z]), ids)            ->  GatherBlockQuantized(Q, ids, s, [z])

for codes of 2, 4 or 8 bits. B is uint8 [N, blocks, block*bits/8], K filled up to whole blocks, the first code
in the low bits. The operators have no sign: a signed code c is stored as c + 2^(bits-1), which is the zero
point that they take where none is given. Scales are float32; those stored in another type are widened. A
block has 16, 32, 64, 128 or 256 codes; a scale for a whole row is repeated over blocks of 128.

The sums are the same sums in another order: with `accuracy-level=1` ONNX Runtime computes in float32; with 4
it rounds activations to int8 blocks as well.

What has no such operator stays: floats of 8 bits and less, stacks of matrices, half-precision models, other
block sizes, and tied tables, whose codes would be stored twice. The count is of weights that were rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter.context import Context
from porter.formats import packing
from porter.match import add_initializer, attribute, given, producer, tidy
from porter.pipeline import Pass, Promise

MICROSOFT = "com.microsoft"
BITS = {
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
}
SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2)
BLOCKS = (16, 32, 64, 128, 256)
ROW_BLOCK = 128  # of a scale for a whole row: 0.25 bits a weight of repeated scales

Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class WriteContrib(Pass):
    """`accuracy_level` is the operators' own: 0 (theirs to choose), 1 float32, 2 float16, 3 bfloat16, 4
    int8."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("quantize.rtn", "kv.quantize", "check.support")

    accuracy_level: int = 1

    def __post_init__(self) -> None:
        if self.accuracy_level not in range(5):
            raise ValueError(f"accuracy-level is 0 to 4, not {self.accuracy_level}")

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite; the count is of weights."""
        found = [weight for node in model.graph if (weight := _weight(node)) is not None]
        for weight in found:
            _rewrite(model.graph, weight, self.accuracy_level)
        if found:
            model.opset_imports[MICROSOFT] = 1
            tidy(model)
            _drop_unread(model.graph)
        return len(found)


@dataclass(frozen=True)
class Weight:
    """Codes [n, k] with a scale, perhaps a zero point, for each block of a row; and who reads their value.

    `codes` is stored [n, k], or [k, n] where it is `turned`. `scales` and `zeros` read [n, blocks].
    """

    codes: ir.Value
    value: ir.Value
    turned: bool
    block: int
    scales: Read
    zeros: Read | None
    readers: tuple[ir.Node, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """n and k."""
        a, b = self.codes.shape.numpy()
        return (b, a) if self.turned else (a, b)

    @property
    def blocks(self) -> int:
        """In a row; the last may be shorter."""
        return -(-self.shape[1] // self.block)

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.codes.dtype]

    def unsigned(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """The codes [n, k] from 0, as uint8."""
        codes = tensor.numpy().astype(np.int16) + (1 << (self.bits - 1)) * (self.codes.dtype in SIGNED)
        return (codes.T if self.turned else codes).astype(np.uint8)


def _weight(node: ir.Node) -> Weight | None:
    """What `node` decodes, if an operator can take it."""
    if node.op_type == "DequantizeLinear" and not node.domain:
        found = _dequantized(node)
    elif node.op_type == "ScaleBlocks" and node.domain == "porter":
        found = _scaled(node)
    else:
        return None
    if found is None or found.value.is_graph_output():
        return None
    gathers = all(reader.op_type == "Gather" for reader in found.readers)
    fits = gathers and not found.turned and _gathers_codes(found)
    return found if fits or all(reader.op_type != "Gather" for reader in found.readers) else None


def _dequantized(node: ir.Node) -> Weight | None:
    codes, scale, zero = given(node, 0), given(node, 1), given(node, 2)
    if not _is_matrix_of_codes(codes) or node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
        return None
    read, zeros = _floats(scale), None if zero is None else _array(zero)
    if read is None or (zero is not None and zeros is None):
        return None
    block, axis = int(attribute(node, "block_size", 0)), int(attribute(node, "axis", 1)) % 2
    turned = _turned(node.outputs[0], rows=True) is None
    readers = _turned(node.outputs[0], rows=not turned)
    k_axis = 0 if turned else 1
    shape = _stored_shape(scale)  # type: ignore[arg-type]
    if readers is None or (axis != k_axis if block else len(shape) > 0 and shape != [1] and axis == k_axis):
        return None
    n, k = codes.shape.numpy()[:: -1 if turned else 1]  # type: ignore[union-attr]
    block = k if block >= k else block

    def per_block(each: Read) -> Read:
        if block and block < k:
            return lambda: each().T if turned else each()
        blocks = -(-k // ROW_BLOCK)  # one for each row, or for all
        return lambda: np.ascontiguousarray(np.broadcast_to(each().reshape(-1, 1), (n, blocks)))

    size = block if block and block < k else ROW_BLOCK
    if size not in BLOCKS:
        return None
    zeros = None if zeros is None else per_block(zeros)
    return Weight(codes, node.outputs[0], turned, size, per_block(read), zeros, readers)  # type: ignore[arg-type]


def _scaled(node: ir.Node) -> Weight | None:
    """Real zero points."""
    block = int(attribute(node, "block", 0))
    shifted, scale = given(node, 0), given(node, 1)
    subtract = None if shifted is None else shifted.producer()
    if subtract is None or subtract.op_type != "SubtractBlocks" or block not in BLOCKS:
        return None
    cast = producer(subtract.inputs[0], "Cast")
    codes = None if cast is None else cast.inputs[0]
    read, zeros = _floats(scale), _floats(subtract.inputs[1])
    readers = _turned(node.outputs[0], rows=True)
    if not _is_matrix_of_codes(codes) or codes.dtype in SIGNED or codes.dtype == ir.DataType.UINT8:  # type: ignore[union-attr]
        return None
    if None in (read, zeros, readers) or any(reader.op_type == "Gather" for reader in readers or ()):
        return None
    return Weight(codes, node.outputs[0], False, block, read, zeros, readers)  # type: ignore[arg-type]


def _is_matrix_of_codes(value: ir.Value | None) -> bool:
    fixed = value is not None and value.const_value is not None and not value.is_graph_input()
    return fixed and value.dtype in BITS and len(value.shape) == 2 and len(value.uses()) == 1  # type: ignore


def _array(value: ir.Value) -> Read | None:
    tensor = value.const_value
    return None if tensor is None or value.is_graph_input() else tensor.numpy


def _floats(value: ir.Value | None) -> Read | None:
    """Reads a float32 constant: an initializer, one cast to float32, or that times a scalar."""
    if value is None:
        return None
    if (cast := producer(value, "Cast")) is not None:
        read = _array(cast.inputs[0]) if attribute(cast, "to", 0) == ir.DataType.FLOAT else None
        return None if read is None else lambda: read().astype(np.float32)
    if (product := producer(value, "Mul")) is not None:
        left, right = map(_floats, product.inputs)
        return None if left is None or right is None else lambda: left() * right()
    return _array(value) if value.dtype == ir.DataType.FLOAT else None


def _stored_shape(value: ir.Value) -> list[int]:
    """The shape of the constant that `_floats` reads."""
    while value.producer() is not None:
        value = value.producer().inputs[0]
    return list(value.const_value.shape.numpy())


def _turned(value: ir.Value, rows: bool) -> tuple[ir.Node, ...] | None:
    """The MatMul, Gemm or Gather nodes that read a matrix [n,k] (`rows`) or [k,n]; None if others read it."""
    found: list[ir.Node] = []
    for node, at in value.uses():
        if node.domain:
            return None
        if rows and node.op_type == "Transpose" and tuple(attribute(node, "perm", (1, 0))) == (1, 0):
            below = _turned(node.outputs[0], rows=False)
            if below is None or node.outputs[0].is_graph_output():
                return None
            found += below
        elif (
            (rows and node.op_type == "Gemm" and at == 1 and _is_plain(node))
            or (rows and node.op_type == "Gather" and at == 0 and attribute(node, "axis", 0) == 0)
            or (not rows and node.op_type == "MatMul" and at == 1)
        ):
            found.append(node)
        else:
            return None
    return tuple(found) or None


def _is_plain(gemm: ir.Node) -> bool:
    """Whether it is x times the transpose of the weight, plus a bias [n]."""
    bias = given(gemm, 2)
    alone = bias is None or (bias.shape is not None and len(bias.shape) == 1 and bias.shape[0] != 1)
    ones = attribute(gemm, "alpha", 1.0) == 1 and (bias is None or attribute(gemm, "beta", 1.0) == 1)
    return bool(attribute(gemm, "transB", 0)) and not attribute(gemm, "transA", 0) and ones and alone


def _gathers_codes(weight: Weight) -> bool:
    """The CPU's kernel takes 4 and 8 bits, and whole blocks."""
    return weight.bits > 2 and weight.shape[1] % weight.block == 0


def _rewrite(graph: ir.Graph, weight: Weight, accuracy_level: int) -> None:
    gathers = weight.readers[0].op_type == "Gather"
    tensor, name, (n, k) = weight.codes.const_value, str(weight.codes.name), weight.shape
    weight.codes.name = f"{name}.before"
    width = weight.block * weight.bits // 8
    shape = [n, k * weight.bits // 8] if gathers else [n, weight.blocks, width]
    packed = _lazy(lambda: _pack(weight, tensor).reshape(shape), ir.DataType.UINT8, shape)  # type: ignore[arg-type]
    inputs = [add_initializer(graph, name, packed)]
    scales = _lazy(weight.scales, ir.DataType.FLOAT, [n, weight.blocks])
    inputs.append(_beside(graph, name, "scale", scales))
    if weight.zeros is not None:
        inputs.append(_beside(graph, name, "zero", _zeros(weight)))
    attributes = {"bits": weight.bits, "block_size": weight.block}
    for node in weight.readers:
        if gathers:
            own = [inputs[0], node.inputs[1], *inputs[1:]]
            made = ir.node("GatherBlockQuantized", own, attributes | {"gather_axis": 0, "quantize_axis": 1},
                           domain=MICROSOFT)  # fmt: skip
        else:
            own = [node.inputs[0], *inputs]
            if node.op_type == "Gemm" and given(node, 2) is not None:
                own += [None] * (5 - len(own)) + [node.inputs[2]]
            sizes = {"K": k, "N": n, "accuracy_level": accuracy_level}
            made = ir.node("MatMulNBits", own, attributes | sizes, domain=MICROSOFT)
        _put(node, made)


def _put(old: ir.Node, new: ir.Node) -> None:
    """Let `new` stand where `old` stood, its output with the same name."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    new.name = old.name
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], [new], [before], [after])  # type: ignore


def _beside(graph: ir.Graph, name: str, part: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer called `name.part`, in place of the one that it was made from."""
    old = graph.initializers.get(f"{name}.{part}")
    if old is not None:
        old.name = f"{name}.{part}.before"
    return add_initializer(graph, f"{name}.{part}", tensor)


def _lazy(read: Read, dtype: ir.DataType, shape: list[int]) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.Tensor(read(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape))


def _pack(weight: Weight, tensor: ir.TensorProtocol) -> np.ndarray:
    """uint8 [n, bytes] of whole blocks; what fills the last one is the code for zero where there is one."""
    codes = weight.unsigned(tensor)
    missing = weight.blocks * weight.block - codes.shape[1]
    codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=1 << (weight.bits - 1))
    return codes if weight.bits == 8 else packing.pack(codes, weight.bits)


def _zeros(weight: Weight) -> ir.LazyTensor:
    """Real zero points as they are; codes from 0 as uint8 [n, ceil(blocks * bits / 8)]."""
    n, read = weight.shape[0], weight.zeros
    assert read is not None
    if weight.value.producer().op_type == "ScaleBlocks":  # type: ignore[union-attr]
        return _lazy(read, ir.DataType.FLOAT, [n, weight.blocks])
    signed = (1 << (weight.bits - 1)) * (weight.codes.dtype in SIGNED)

    def packed() -> np.ndarray:
        codes = (read().astype(np.int16) + signed).astype(np.uint8)
        return codes if weight.bits == 8 else packing.pack(codes, weight.bits)

    return _lazy(packed, ir.DataType.UINT8, [n, -(-weight.blocks * weight.bits // 8)])


def _drop_unread(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]

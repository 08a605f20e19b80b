"""Put a weight into the graph as an Encoded: its arrays as initializers, and the nodes that decode them.

    W [N,K]  ->  DequantizeLinear(W codes, scale[, zero])                         (a)
             ->  [SubtractBlocks(., zero)] -> [ScaleBlocks(., DecodeShifts)] ->
                 ScaleBlocks(Decode...(W bytes) or Cast(W codes), scale)          (b)
             ->  Cast(W)                                                          (c: bf16 and fp16)

(a) is for elements that ONNX Runtime has a DequantizeLinear of, unless the zero point is real or there are
micro-exponents; (b) for the others, with the functions of `porter.weights.functions`. A scale for each row of
a matrix is `axis=0`; for each group, `axis=-1` and `block_size`; for a row of a stack [E,N,K], one block
of K. A scale that is not float32 is followed by a Cast, and multiplied by the factor where there is one; rows
that share scales get them through RepeatRows.

The values are those of `formats.decode`, bit for bit: the same float32 operations in the same order, and
every power of two is exact. A weight of half precision is cast to its own type in the end.

The codes keep the weight's name W; beside it stand `W.scale`, `W.zero`, `W.shifts`, `W.factor`, and the
decoded value is `W.dequantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.formats import Encoded, Format, packing
from porter.match import fresh_name
from porter.weights import functions, lazy
from porter.weights.select import Matrix

TYPED = {
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "int2": ir.DataType.INT2,
    "uint2": ir.DataType.UINT2,
    "e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ,
}
"""Elements with a type that ONNX Runtime decodes."""
HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
SCALES = {
    "fp32": ir.DataType.FLOAT,
    **HALVES,
    "e8m0": ir.DataType.FLOAT8E8M0,
    "e4m3fn": ir.DataType.FLOAT8E4M3FN,
}
OPSET = 21  # the first whose DequantizeLinear takes blocks and 4-bit integers
OPSET_OF = {ir.DataType.FLOAT8E8M0: (24, 12), ir.DataType.INT2: (25, 13), ir.DataType.UINT2: (25, 13)}


def replace(
    model: ir.Model, matrix: Matrix, form: Format, compute: Callable[[], Encoded], shelf: lazy.Shelf
) -> None:
    """Let every use of `matrix` read what the Encoded of `compute` stands for.

    `compute` is called when somebody reads a part of it, once for all parts (see `porter.weights.lazy`), from
    any thread; for an Encoded that was made before, give a function that returns it. Raises PassError
    PORT-0254 when the model's opset is too old.
    """
    _raise_opset(model, form)
    graph = matrix.value.graph
    assert graph is not None
    nodes = {use.node for use in matrix.uses}
    first = next(node for node in graph if node in nodes)
    parts = _parts(form, matrix.shape)

    def take_apart() -> list[np.ndarray]:
        encoded = compute()
        return [part.of(encoded) for part in parts]

    results = lazy.Parts(take_apart, len(parts), shelf)
    made = {}
    for i, part in enumerate(parts):
        name = matrix.name if not i else fresh_name(graph, f"{matrix.name}.{part.name}")
        tensor = lazy.tensor(results, i, part.convert, part.dtype, part.shape)
        tensor.name = name
        made[part.name] = _initializer(graph, matrix.value if not i else None, name, tensor)
    nodes = _Nodes(model, first, matrix, form)
    value = nodes.decoded(**made)
    if matrix.tensor.dtype != ir.DataType.FLOAT:
        value = nodes.op("Cast", [value], matrix.shape, to=matrix.tensor.dtype.value)
    value.name = fresh_name(graph, f"{matrix.name}.dequantized")
    value.type = ir.TensorType(matrix.tensor.dtype)
    _read_decoded(matrix, value)


@dataclass(frozen=True)
class Part:
    """One initializer of a weight: `of` takes its array from the Encoded, `convert` makes it as stored."""

    name: str
    dtype: ir.DataType
    shape: list[int]
    of: Callable[[Encoded], np.ndarray]
    convert: Callable[[np.ndarray], np.ndarray] = lambda array: array


def _parts(form: Format, shape: tuple[int, ...]) -> list[Part]:
    """The initializers of a weight of `shape`, its codes first."""
    *lead, n, k = shape
    scales = [*lead, *form.groups(n, k)]
    parts = [_codes(form, shape)]
    if form.element in HALVES:
        return parts
    flat = _flat_scale(form, shape)
    parts.append(_blocks("scale", SCALES[form.scale], scales, flat, lambda e: e.scales))
    if form.zero:
        dtype = ir.DataType.FLOAT if form.zero == "real" else TYPED.get(form.element, ir.DataType.UINT8)
        if decodes_by_type(form) and flat is None:  # no operator repeats rows of 4-bit codes
            each = [*lead, n, scales[-1]]
            parts.append(_blocks("zero", dtype, each, None, lambda e: _for_each_row(e.zeros, form.rows, n)))
        else:
            parts.append(_blocks("zero", dtype, scales, flat, lambda e: e.zeros))
    if form.micro:
        pairs = -(-k // form.micro)
        packed = [*lead, n, -(-pairs // 8)]
        parts.append(Part("shifts", ir.DataType.UINT8, packed, lambda e: e.shifts, lambda a: _packed(a, 1)))
    if has_factor(form):
        parts.append(Part("factor", ir.DataType.FLOAT, [], lambda e: np.asarray(e.factor, np.float32)))
    return parts


def _codes(form: Format, shape: tuple[int, ...]) -> Part:
    if form.element in HALVES:
        dtype = HALVES[form.element]
        return Part("codes", dtype, list(shape), lambda e: e.codes, lambda a: a.view(dtype.numpy()))
    if form.element not in TYPED:
        packed = [*shape[:-1], -(-shape[-1] * form.bits // 8)]
        return Part("codes", ir.DataType.UINT8, packed, lambda e: e.codes, lambda a: _packed(a, form.bits))
    dtype = TYPED[form.element]
    return Part("codes", dtype, list(shape), lambda e: e.codes, lambda a: _typed(a, dtype))


def _blocks(
    name: str,
    dtype: ir.DataType,
    shape: list[int],
    flat: list[int] | None,
    of: Callable[[Encoded], np.ndarray],
) -> Part:
    """A number a block: stored [..., R, G], or as DequantizeLinear has it without blocks."""
    wanted = flat if flat is not None else shape
    return Part(name, dtype, wanted, of, lambda a: _typed(a, dtype).reshape(wanted))


def _for_each_row(per_block: np.ndarray, rows: int, n: int) -> np.ndarray:
    """[..., R, G] -> [..., n, G]: what `rows` rows share (0: all), for each row."""
    return np.repeat(per_block, rows or n, axis=-2)[..., :n, :]


def _typed(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Codes, a byte each, as ONNX's type; the stored types of scales as they are."""
    wanted = np.dtype(dtype.numpy())
    if array.dtype == wanted:
        return array
    return array.astype(wanted) if dtype.bitwidth < 8 else array.view(wanted)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes.view(np.uint8) if bits == 8 else packing.pack(codes, bits)


def decodes_by_type(form: Format) -> bool:
    """Whether the format is stored as typed codes that DequantizeLinear decodes."""
    return form.element in TYPED and form.zero != "real" and not form.micro


def has_factor(form: Format) -> bool:
    """Whether a float32 for the whole matrix stands beside the scales."""
    return form.scale == "e4m3fn" or bool(form.fraction)


def _flat_scale(form: Format, shape: tuple[int, ...]) -> list[int] | None:
    """The scale's shape where DequantizeLinear takes it without blocks: one for each row, or for all."""
    if not decodes_by_type(form) or form.group:
        return None
    *lead, n, _ = shape
    if form.rows == 0:
        return lead  # a scalar; of a stack, one for each matrix
    return [n] if form.rows == 1 and not lead else None


class _Nodes:
    """The nodes that decode one weight, put before `first`."""

    def __init__(self, model: ir.Model, first: ir.Node, matrix: Matrix, form: Format) -> None:
        self.model, self.first, self.form, self.shape = model, first, form, matrix.shape
        self.name = matrix.name

    def decoded(
        self,
        codes: ir.Value,
        scale: ir.Value | None = None,
        zero: ir.Value | None = None,
        shifts: ir.Value | None = None,
        factor: ir.Value | None = None,
    ) -> ir.Value:
        """float32 [..., N, K]."""
        if scale is None:
            return self._as_float(codes)
        scale = self._as_float(scale)
        scale = scale if factor is None else self.op("Mul", [scale, factor], scale.shape)
        if decodes_by_type(self.form):
            return self._dequantize(codes, scale, zero)
        if self.form.element in TYPED:
            value = self._as_float(codes)
        else:
            value = self._decode(functions.decoder(self.form.element), codes, self.shape[-1])
        group = self.form.group or self.shape[-1]
        if zero is not None:
            zero = self._rows(self._as_float(zero))
            value = self._call("SubtractBlocks", [value, zero], self.shape, block=group)
        if shifts is not None:
            halves = self._decode("DecodeShifts", shifts, -(-self.shape[-1] // self.form.micro))
            value = self._call("ScaleBlocks", [value, halves], self.shape, block=self.form.micro)
        return self._call("ScaleBlocks", [value, self._rows(scale)], self.shape, block=group)

    def _dequantize(self, codes: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
        rank, group = len(self.shape), self.form.group or self.shape[-1]
        if _flat_scale(self.form, self.shape) is not None:
            place = {"axis": 0}
        else:
            place = {"axis": rank - 1, "block_size": group}
            scale = self._rows(scale)
        inputs = [codes, scale, *([] if zero is None else [zero])]
        return self.op("DequantizeLinear", inputs, self.shape, **place)

    def _rows(self, per_block: ir.Value) -> ir.Value:
        """[..., N, G] of [..., R, G]."""
        n = self.shape[-2]
        rows = self.form.rows or n
        if rows == 1 or (n == 1 and per_block.shape[-2] == 1):
            return per_block
        *lead, _, groups = per_block.shape
        return self._call("RepeatRows", [per_block], [*lead, n, groups], rows=rows, length=n)

    def _as_float(self, value: ir.Value) -> ir.Value:
        same = value.dtype == ir.DataType.FLOAT
        return value if same else self.op("Cast", [value], value.shape, to=ir.DataType.FLOAT.value)

    def _decode(self, function: str, packed: ir.Value, length: int) -> ir.Value:
        element = "" if function == "DecodeShifts" else self.form.element
        functions.add(self.model, function, element, self.form.bits)
        shape = [*self.shape[:-1], length]
        return self.op(function, [packed], shape, functions.DOMAIN, length=length)

    def _call(
        self, function: str, inputs: list[ir.Value], shape: Iterable[int], **attributes: int
    ) -> ir.Value:
        functions.add(self.model, function)
        return self.op(function, inputs, shape, functions.DOMAIN, **attributes)

    def op(
        self, kind: str, inputs: list[ir.Value], shape: Iterable[int], domain: str = "", **attributes: int
    ) -> ir.Value:
        """One node before `first`; its output is float32 of that shape, and named after the weight."""
        node = ir.node(kind, inputs, attributes, domain=domain)
        out = node.outputs[0]
        out.name = fresh_name(self.first.graph, f"{self.name}.{kind.lower()}")
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.first.graph.insert_before(self.first, node)
        return out


def _initializer(graph: ir.Graph, value: ir.Value | None, name: str, tensor: ir.LazyTensor) -> ir.Value:
    """The weight's own value with new contents, or a new one right behind what is there."""
    kind = ir.TensorType(tensor.dtype)
    if value is None:
        value = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    value.const_value, value.shape, value.type = tensor, tensor.shape, kind
    return value


def put_parts_together(graph: ir.Graph) -> None:
    """Order the initializers so that who writes them in turn has each weight computed in one go: its scales
    and the rest right behind its codes."""
    names = list(graph.initializers)
    order = {name: i for i, name in enumerate(names)}
    beside: dict[str, str] = {}
    for name in names:
        owner = name.rpartition(".")[0] if name.rpartition(".")[2].split("_")[0] in _SUFFIXES else ""
        beside[name] = owner if owner in order else name
    kept = [graph.initializers[name] for name in sorted(names, key=lambda n: (order[beside[n]], order[n]))]
    graph.initializers.clear()
    for value in kept:
        graph.initializers.add(value)


_SUFFIXES = ("scale", "zero", "shifts", "factor")


def _read_decoded(matrix: Matrix, value: ir.Value) -> None:
    """Let every use read `value` [..., N, K] where it reads the weight."""
    for use in matrix.uses:
        at = next(i for i, v in enumerate(use.node.inputs) if v is matrix.value)
        if use.node.op_type == "Gemm":
            use.node.replace_input_with(at, value)
            use.node.attributes["transB"] = ir.AttrInt64("transB", 1)
        else:
            use.node.replace_input_with(at, value if use.rows else _turned_before(use.node, value))


def _turned_before(node: ir.Node, value: ir.Value) -> ir.Value:
    """The transpose [..., K, N] of `value` [..., N, K], computed before `node`."""
    rank = len(value.shape)
    turn = ir.node("Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
    out = turn.outputs[0]
    out.name = f"{value.name}.{node.outputs[0].name}"
    *lead, n, k = value.shape
    out.shape, out.type = ir.Shape([*lead, k, n]), value.type
    node.graph.insert_before(node, turn)
    return out


def _raise_opset(model: ir.Model, form: Format) -> None:
    """Let the model have the opset that the types of the format need: 24 or 25 where it has an older one."""
    types = {TYPED.get(form.element), SCALES.get(form.scale)}
    opset, version = max([(OPSET, 10), *(OPSET_OF[t] for t in types if t in OPSET_OF)])
    found = model.opset_imports.get("", 0)
    if found < min(opset, 24):
        what = f"weights in {form.name} need opset {opset}, and the model has {found}"
        raise PassError("PORT-0254", what, hint="let clean.opset stand before")
    if found < opset:
        _spell_out_swish(model)
        for graph in (model.graph, *model.functions.values()):
            graph.opset_imports[""] = opset
    model.ir_version = max(model.ir_version, version)


def _spell_out_swish(model: ir.Model) -> None:
    """x * Sigmoid(alpha * x): ONNX Runtime 1.31 computes Swish up to opset 24 only. From 24 to 25 no other
    operator changed but for the types that it takes."""
    for node in [n for n in model.graph.all_nodes() if n.op_type == "Swish" and not n.domain]:
        x, alpha = node.inputs[0], node.attributes.get_float("alpha", 1.0)
        made = []
        if alpha != 1:
            made.append(ir.node("Constant", [], {"value_float": alpha}))
            made.append(ir.node("CastLike", [made[-1].outputs[0], x]))
            made.append(ir.node("Mul", [x, made[-1].outputs[0]]))
        made.append(ir.node("Sigmoid", [made[-1].outputs[0] if made else x]))
        made.append(ir.node("Mul", [x, made[-1].outputs[0]]))
        old, new = node.outputs[0], made[-1].outputs[0]
        for part in made[:-1]:
            part.outputs[0].name = f"{old.name}.{part.op_type.lower()}"
        new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [old], [new])

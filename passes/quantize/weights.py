"""Round the weights of linear layers (and, asked to, of embeddings) to a format, to nearest.

    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose(DequantizeLinear(Q[N,K], scale)))
    MatMul(x, W[K,N])             ->  MatMul(x, Transpose(DequantizeLinear(Q[N,K], scale)))
    Gemm(x, W[N,K], transB=1)     ->  Gemm(x, DequantizeLinear(Q[N,K], scale), transB=1)
    Gemm(x, W[K,N])               ->  Gemm(x, DequantizeLinear(Q[N,K], scale), transB=1)
    Gather(W[N,K], ids)           ->  Gather(DequantizeLinear(Q[N,K], scale), ids)

W ~ Q * scale, with a scale for each row n (`axis=0`, scale [N]) or for each group of a row (`axis=1,
block_size=g`, scale [N, ceil(K/g)]); symmetric, so there is no zero point. How codes and scales are chosen:
`porter.formats.rounding`. The codes keep the weight's name W; beside it stand `W.scale` and the value
`W.dequantized`.

A weight is rounded when every use of it is one of these. Its roles are `linear`, `head` (a linear whose
result, but for a bias and the like, is the model's first output) and `embedding` (a table that the model's
first input indexes); a tied table is both of the last two. `skip` lists roles, and patterns of names
(`*.down_proj.weight`), of weights to leave alone: one skipped role is enough, so a tied table stays whole by
default. Codes and scales are computed when somebody reads them, a weight at a time.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pass, Promise

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
CODES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ,
}
ELEMENTWISE = frozenset(
    {"Add", "Mul", "Div", "Sub", "Cast", "Identity", "Tanh", "Softmax", "LogSoftmax"}
)  # nearly
ROLES = ("linear", "head", "embedding")
OPSET = 21  # the first whose DequantizeLinear takes blocks and 4-bit integers


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """`format` is a name that `porter.formats.parse` reads, or a family (`fp8`) that the target knows.

    `skip` lists roles and patterns of names.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "fuse.matmul")

    format: str = "int8"
    skip: tuple[str, ...] = ("embedding", "head")

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(word for word in self.skip if word))  # `skip=` skips nothing

    def run(self, model: ir.Model, context: Context) -> int:
        """Round; the count is of weights. Raises PassError PORT-0250 to PORT-0256."""
        name = context.target.flavour(self.format) if context.target else self.format
        form = formats.parse(name)
        if form.element == "fp32":
            return 0
        _check(form, model)
        self._check_skip(model.graph)
        chosen = [(value, uses) for value, uses in matrices(model.graph) if not self._skipped(value, uses)]
        for value, _ in chosen:
            _refuse_not_finite(value)
        slot, places = Slot(), {node: i for i, node in enumerate(model.graph)}
        for value, uses in chosen:
            first = min((use.node for use in uses), key=places.__getitem__)
            _read_dequantized(uses, value, _dequantize(first, value, Rounded(value, form, uses, slot)))
        _put_scales_beside_codes(model.graph)
        return len(chosen)

    def _skipped(self, weight: ir.Value, uses: list[Use]) -> bool:
        roles = {use.role for use in uses}
        return any(word in roles or fnmatchcase(weight.name, word) for word in self.skip)

    def _check_skip(self, graph: ir.Graph) -> None:
        for word in self.skip:
            if word not in ROLES and not any(fnmatchcase(name, word) for name in graph.initializers):
                what = f"skip names {word!r}, which is no role and no weight's name"
                raise PassError("PORT-0256", what, where=str(self), hint=f"roles: {', '.join(ROLES)}")


@dataclass(frozen=True)
class Use:
    """How a node reads a weight: in which role, and whether the rows of the weight are its output
    channels."""

    node: ir.Node
    role: str
    rows: bool


class Slot:
    """Holds the half of one (codes, scale) pair that was not asked for yet, so that a weight is rounded once.

    Whoever writes a model reads a weight's codes and scale one after the other; the second reader takes what
    the first one's work left here. One slot serves all weights: no more than one half is ever kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Rounded, int, np.ndarray] | None = None

    def take(self, weight: Rounded, half: int) -> np.ndarray:
        """Half 0 (codes) or 1 (scale) of the weight."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept and kept[0] is weight and kept[1] == half:
            return kept[2]
        both = weight.encode()
        with self._lock:
            self._kept = weight, 1 - half, both[1 - half]
        return both[half]


class Rounded:
    """A weight on its way to its codes [N,K], from its source [N,K], or [K,N] where its rows are inputs."""

    def __init__(self, weight: ir.Value, form: formats.Format, uses: list[Use], slot: Slot) -> None:
        self.source, self.form, self.slot = weight.const_value, form, slot
        self.turned = not uses[0].rows

    def encode(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes [N,K] in the numpy type of their ONNX type, and scales [N] or [N,G] in the source's type."""
        array = self.source.numpy()
        matrix = np.ascontiguousarray(array.T) if self.turned else array
        scale_type = next(name for name, dtype in formats.format.SCALES.items() if dtype == array.dtype)
        encoded = formats.encode(replace(self.form, scale=scale_type), matrix)
        codes, scale = encoded.codes, encoded.scales
        codes = codes.astype(ml_dtypes.int4) if self.form.element == "int4" else codes
        return codes.view(CODES[self.form.element].numpy()), scale if self.form.group else scale[:, 0]

    def codes(self, name: str) -> ir.LazyTensor:
        """The codes [N,K] as a tensor that is computed whenever it is read."""
        return self._lazy(0, name, CODES[self.form.element], self._shape())

    def scale(self, name: str) -> ir.LazyTensor:
        """The scales [N] or [N,G], likewise."""
        (rows, columns), group = self._shape(), self.form.group
        return self._lazy(1, name, self.source.dtype, [rows, -(-columns // group)] if group else [rows])

    def _shape(self) -> list[int]:
        return list(self.source.shape)[::-1] if self.turned else list(self.source.shape)

    def _lazy(self, half: int, name: str, dtype: ir.DataType, shape: list[int]) -> ir.LazyTensor:
        def compute() -> ir.Tensor:
            return ir.Tensor(self.slot.take(self, half), dtype=dtype, name=name)

        return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)


def matrices(graph: ir.Graph) -> list[tuple[ir.Value, list[Use]]]:
    """Each weight all of whose uses are understood, with its uses, in the order of the initializers."""
    heads = _head_nodes(graph)
    found = []
    for value in graph.initializers.values():
        uses = [_use(value, node, heads) for node, _ in value.uses()] if _is_weight(value) else []
        if uses and None not in uses and len({use.rows for use in uses}) == 1:
            found.append((value, uses))
    return found


def _check(form: formats.Format, model: ir.Model) -> None:
    if form.element not in CODES or form.scale != "fp32" or form.rows != 1:
        hint = "use fp8-e4m3fn or another flavour that ONNX has"
        raise PassError("PORT-0253", f"ONNX has no type for the elements of {form.name}", hint=hint)
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        what = f"rounded weights need opset {OPSET}, and the model has {opset}"
        raise PassError("PORT-0254", what, hint="let clean.opset stand before")


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    fixed = tensor is not None and not value.is_graph_input() and not value.is_graph_output()
    return fixed and tensor.dtype in FLOATS and len(tensor.shape) == 2 and 0 not in tensor.shape


def _use(weight: ir.Value, node: ir.Node, heads: set[ir.Node]) -> Use | None:
    """What `node` does with the weight, or None when it is something else."""
    if node.graph is not weight.graph or node.domain:
        return None
    at = [i for i, v in enumerate(node.inputs) if v is weight]
    if node.op_type == "Gather" and at == [0]:
        return Use(node, "embedding", True) if _takes_rows_by_token(node) else None
    if node.op_type == "Gemm" and at == [1]:
        return Use(node, _role([node], heads), bool(node.attributes.get_int("transB", 0)))
    if node.op_type == "MatMul" and at == [1]:
        return Use(node, _role([node], heads), False)
    if node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0):
        readers = [n for n, i in node.outputs[0].uses() if n.op_type == "MatMul" and not n.domain and i == 1]
        only = len(readers) == len(node.outputs[0].uses()) and not node.outputs[0].is_graph_output()
        return Use(node, _role(readers, heads), True) if readers and only else None
    return None


def _takes_rows_by_token(gather: ir.Node) -> bool:
    """Whether the indices are the graph's first input: a table of angles by position is no embedding."""
    ids = gather.inputs[1]
    while ids.producer() is not None and ids.producer().op_type in ("Cast", "Identity"):
        ids = ids.producer().inputs[0]
    return ids in gather.graph.inputs[:1] and gather.attributes.get_int("axis", 0) == 0


def _role(nodes: list[ir.Node], heads: set[ir.Node]) -> str:
    return "head" if heads.intersection(nodes) else "linear"


def _head_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The MatMul or Gemm that the first output is a function of, element by element: none, or one."""
    node = graph.outputs[0].producer() if graph.outputs else None
    while node is not None and not node.domain and node.op_type in ELEMENTWISE:
        moving = [v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is None]
        node = moving[0].producer() if len(moving) == 1 else None
    return {node} if node is not None and node.op_type in ("MatMul", "Gemm") else set()


def _dequantize(first: ir.Node, weight: ir.Value, rounded: Rounded) -> ir.Value:
    """Make the weight's initializer the codes, and compute the dequantized value [N,K] before `first`."""
    codes, scale = rounded.codes(weight.name), rounded.scale(_free(first.graph, f"{weight.name}.scale"))
    weight.const_value, weight.shape, weight.type = codes, codes.shape, ir.TensorType(codes.dtype)
    factor = ir.Value(name=scale.name, type=ir.TensorType(scale.dtype), shape=scale.shape, const_value=scale)
    first.graph.register_initializer(factor)
    group = rounded.form.group
    node = ir.node(
        "DequantizeLinear", [weight, factor], {"axis": 1, "block_size": group} if group else {"axis": 0}
    )
    value = node.outputs[0]
    value.name, value.shape, value.type = f"{weight.name}.dequantized", codes.shape, factor.type
    first.graph.insert_before(first, node)
    return value


def _free(graph: ir.Graph, name: str) -> str:
    """`name`, or the next of `name_1`, `name_2`, … that no initializer has."""
    others = (f"{name}_{i}" for i in itertools.count(1))
    return next(n for n in itertools.chain([name], others) if n not in graph.initializers)


def _put_scales_beside_codes(graph: ir.Graph) -> None:
    """Order the initializers so that who writes them in turn makes each weight's codes and scale in one
    go."""
    order: dict[str, ir.Value] = {}
    for value in graph.initializers.values():
        readers = [node for node, _ in value.uses() if node.op_type == "DequantizeLinear"]
        for each in (value, *readers[0].inputs[1:2]) if readers else (value,):
            order.setdefault(each.name, each)
    kept = [value for name, value in order.items() if name in graph.initializers]
    graph.initializers.clear()
    for value in kept:
        graph.initializers.add(value)


def _read_dequantized(uses: list[Use], weight: ir.Value, value: ir.Value) -> None:
    """Let every use read `value` [N,K] where it reads `weight`."""
    for use in uses:
        at = next(i for i, v in enumerate(use.node.inputs) if v is weight)
        if use.node.op_type == "MatMul":
            use.node.replace_input_with(at, _turned_before(use.node, value))
            continue
        use.node.replace_input_with(at, value)
        if use.node.op_type == "Gemm":
            use.node.attributes["transB"] = ir.AttrInt64("transB", 1)


def _turned_before(node: ir.Node, value: ir.Value) -> ir.Value:
    """The transpose [K,N] of `value` [N,K], computed before `node`."""
    turn = ir.node("Transpose", [value], {"perm": [1, 0]})
    out = turn.outputs[0]
    out.name = f"{value.name}.{node.outputs[0].name}"
    out.shape, out.type = ir.Shape(list(value.shape)[::-1]), value.type
    node.graph.insert_before(node, turn)
    return out


def _refuse_not_finite(weight: ir.Value) -> None:
    """Raise PORT-0255 on NaN or infinity, which no scale can hold; both reach the minimum or the maximum."""
    array = weight.const_value.numpy()
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        bad = np.argwhere(~np.isfinite(array))
        first = f"{array[tuple(bad[0])]} at {bad[0].tolist()}"
        what = f"the weight holds {len(bad)} values that are not finite, the first {first}"
        raise PassError(
            "PORT-0255", what, where=weight.name, hint="check the checkpoint; rounding cannot repair it"
        )

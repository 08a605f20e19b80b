"""Which constants of a graph are matrices of linear layers and tables, and what role each plays; choosing.

A matrix is a constant of floats, [N,K] or a stack of them [E,N,K] (or, where its rows are inputs, [K,N] and
[E,K,N]), all of whose uses are understood: the right side of a MatMul, straight, or turned by a Transpose of
its last two axes, or (of a stack) picked by a Gather along its first axis; B of a Gemm; a table that a Gather
takes rows of. The weight of a linear has its output channels as rows.

Roles, told from the graph:

- `embedding`: a table [N,K] whose rows the graph's first input picks.
- `head`: a linear of which the graph's first output is a function, element by element (a bias, a soft cap).
- `experts`: a stack [E,N,K].
- `attention`: a linear with attention between it and its neighbouring linears. From its result forwards, or
  from its input backwards, through anything but another constant matrix's product, one comes to an
  Attention or RotaryEmbedding operator, or to a product of what a Softmax gives with a computed matrix. What
  a router's softmax gives is no left side of such a product.
- `mlp`: every other linear: gate, up and down, and what else stands between.

A name only helps where the graph shows nothing: an `mlp` named after `attn` or `attention` (a linear
attention, a state-space mixer) is `attention`, one named after `experts` is `experts`. A tied table is both
`embedding` and `head`. `linear` is short for the last three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.graph.mapped import MappedTensor
from porter.match import words

_NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
FLOATS = tuple(_NAMES)
LINEAR = frozenset({"attention", "mlp", "experts"})
ROLES = ("embedding", "head", "attention", "mlp", "experts")
_ELEMENTWISE = words("Add Mul Div Sub Cast Identity Tanh Softmax LogSoftmax")  # nearly
_ATTENTION = words("Attention RotaryEmbedding MultiHeadAttention GroupQueryAttention")
# What may stand between a stored constant and the product that it is a factor of.
_STORAGE = words("Transpose Gather DequantizeLinear Cast Reshape Unsqueeze Squeeze Identity Mul Sub")
_TO_PROBABILITIES = words("Cast Mul Where Reshape Transpose Identity Slice Dropout Expand")


@dataclass(frozen=True)
class Use:
    """One node that reads a matrix. `rows`: whether, there, the stored rows are its output channels."""

    node: ir.Node
    rows: bool


@dataclass(frozen=True, eq=False)
class Matrix:
    """A constant all of whose uses are understood; `tensor` is what it holds before anything is changed."""

    value: ir.Value
    tensor: ir.TensorProtocol
    uses: tuple[Use, ...]
    roles: frozenset[str]

    @property
    def name(self) -> str:
        """The name of the initializer."""
        return str(self.value.name)

    @property
    def turned(self) -> bool:
        """Whether it is stored [..., K, N]."""
        return not self.uses[0].rows

    @property
    def shape(self) -> tuple[int, ...]:
        """[N,K] or [E,N,K], however it is stored."""
        *lead, a, b = self.tensor.shape.numpy()
        return (*lead, b, a) if self.turned else (*lead, a, b)

    def read(self) -> np.ndarray:
        """The values, float32 [..., N, K], contiguous; a view of the file where that already is so."""
        array = self.tensor.numpy()
        array = np.swapaxes(array, -1, -2) if self.turned else array
        return np.ascontiguousarray(array, np.float32)

    def forget(self) -> None:
        """Let the pages of a mapped file, that `read` brought to memory, go."""
        if isinstance(self.tensor, MappedTensor):
            self.tensor.release()
            self.tensor.forget(0, self.tensor.nbytes)


def matrices(graph: ir.Graph) -> list[Matrix]:
    """Every matrix, in the order of the initializers."""
    heads, found = head_nodes(graph), []
    for value in graph.initializers.values():
        uses = [_use(value, node) for node, _ in value.uses()] if _is_weight(value) else []
        if uses and None not in uses and len({use.rows for use in uses}) == 1:
            roles = frozenset(_role(value, use, heads) for use in uses)
            found.append(Matrix(value, value.const_value, tuple(uses), roles))
    return found


def choose(
    graph: ir.Graph, skip: tuple[str, ...], only: tuple[str, ...] = (), where: str = ""
) -> list[Matrix]:
    """The matrices to store in a format: those that `only` names (all, if it is empty) less those of `skip`.

    Both list roles and patterns of names (`*.down_proj.weight`); one role of several is enough. A word that
    stands in both is not skipped, so that `only=head` need not undo a `skip=embedding+head`. Raises PassError
    PORT-0256 for a word that is no role and fits no initializer's name.
    """
    return pick(matrices(graph), graph, skip, only, where)


def pick(
    found: list[Matrix], graph: ir.Graph, skip: tuple[str, ...], only: tuple[str, ...] = (), where: str = ""
) -> list[Matrix]:
    """Those of `found` that `choose` would take. Raises what it does."""
    for option, listed in (("skip", skip), ("only", only)):
        for word in listed:
            if word not in (*ROLES, "linear") and not any(fnmatchcase(n, word) for n in graph.initializers):
                what = f"{option} names {word!r}, which is no role and no weight's name"
                raise PassError("PORT-0256", what, where=where, hint=f"roles: {', '.join(ROLES)}, linear")
    skip = tuple(word for word in skip if word not in only)
    return [m for m in found if (not only or _named(m, only)) and not _named(m, skip)]


def multiplied_codes(graph: ir.Graph) -> list[Matrix]:
    """Every matrix that is stored in codes; its uses are the products that it is the right side of."""
    heads, products = head_nodes(graph), {}
    for node in graph:
        value = _stored(node.inputs[1]) if is_linear(node) and not node.domain else None
        if value is not None and value.const_value.dtype not in (*FLOATS, ir.DataType.DOUBLE):
            products.setdefault(value, []).append(Use(node, True))
    return [
        Matrix(value, value.const_value, tuple(uses), frozenset(_role(value, use, heads) for use in uses))
        for value, uses in products.items()
    ]


def _named(matrix: Matrix, listed: tuple[str, ...]) -> bool:
    roles = matrix.roles | ({"linear"} if matrix.roles & LINEAR else set())
    return any(word in roles or fnmatchcase(matrix.name, word) for word in listed)


@dataclass(frozen=True)
class Kept:
    """Matrices of the same roles that stay floats of one type: how many, and their bytes."""

    roles: tuple[str, ...]
    weights: int
    bytes: int
    dtype: str


def kept(graph: ir.Graph) -> list[Kept]:
    """What is not stored in a format, by roles and type, in the order of `ROLES`."""
    found: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for matrix in matrices(graph):
        roles = tuple(role for role in ROLES if role in matrix.roles)
        found.setdefault((roles, _NAMES[matrix.tensor.dtype]), []).append(matrix.tensor.nbytes)
    order = sorted(found, key=lambda key: ([ROLES.index(role) for role in key[0]], key[1]))
    return [Kept(key[0], len(found[key]), sum(found[key]), key[1]) for key in order]


def refuse_not_finite(matrix: Matrix) -> None:
    """Raise PORT-0255 on NaN or infinity, which no scale can hold; both reach the minimum or the maximum."""
    array = matrix.tensor.numpy()
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        bad = np.argwhere(~np.isfinite(array))
        first = f"{array[tuple(bad[0])]} at {bad[0].tolist()}"
        what = f"the weight holds {len(bad)} values that are not finite, the first {first}"
        hint = "check the checkpoint; rounding cannot repair it"
        raise PassError("PORT-0255", what, where=matrix.name, hint=hint)
    matrix.forget()


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    fixed = tensor is not None and not value.is_graph_input() and not value.is_graph_output()
    return fixed and tensor.dtype in FLOATS and len(tensor.shape) in (2, 3) and 0 not in tensor.shape


def _use(weight: ir.Value, node: ir.Node) -> Use | None:
    """What `node` does with the weight, or None when it is something else."""
    rank, at = len(weight.const_value.shape), [i for i, v in enumerate(node.inputs) if v is weight]
    if node.graph is not weight.graph or node.domain:
        return None
    if rank == 2 and node.op_type == "Gather" and at == [0]:
        return Use(node, True) if _takes_rows_by_token(node) else None
    if rank == 2 and node.op_type == "Gemm" and at == [1]:
        return Use(node, bool(node.attributes.get_int("transB", 0)))
    turned = _turns(weight, node, rank)
    return Use(node, turned) if turned is not None else None


def _turns(value: ir.Value, node: ir.Node, rank: int) -> bool | None:
    """Whether `node` and its readers turn the matrix before each multiplies it from the right; None where
    they do something else with it or do not agree."""
    if node.domain or [i for i, v in enumerate(node.inputs) if v is value] != [_place(node)]:
        return None
    if node.op_type == "MatMul":
        return False
    out = node.outputs[0]
    if node.op_type == "Gather" and rank == 3 and node.attributes.get_int("axis", 0) == 0:
        picked = node.inputs[1].shape
        rank, flips = (2 + len(picked), False) if picked is not None else (0, False)
    elif node.op_type == "Transpose" and _swaps_last_two(node, rank):
        flips = True
    else:
        return None
    if out.is_graph_output() or not out.uses() or not rank:
        return None
    answers = {_turns(out, reader, rank) for reader, _ in out.uses()}
    return answers.pop() ^ flips if len(answers) == 1 and None not in answers else None


def _place(node: ir.Node) -> int:
    return 1 if node.op_type == "MatMul" else 0


def _swaps_last_two(node: ir.Node, rank: int) -> bool:
    wanted = (*range(rank - 2), rank - 1, rank - 2)
    return tuple(node.attributes.get_ints("perm", range(rank)[::-1])) == wanted


def _takes_rows_by_token(gather: ir.Node) -> bool:
    """Whether the indices are the graph's first input: a table of angles by position is no embedding."""
    ids = gather.inputs[1]
    while ids.producer() is not None and ids.producer().op_type in ("Cast", "Identity"):
        ids = ids.producer().inputs[0]
    return ids in gather.graph.inputs[:1] and gather.attributes.get_int("axis", 0) == 0


def head_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The MatMul or Gemm that the first output is a function of, element by element: none, or one."""
    node = graph.outputs[0].producer() if graph.outputs else None
    while node is not None and not node.domain and node.op_type in _ELEMENTWISE:
        moving = [v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is None]
        node = moving[0].producer() if len(moving) == 1 else None
    return {node} if node is not None and node.op_type in ("MatMul", "Gemm") else set()


def _role(weight: ir.Value, use: Use, heads: set[ir.Node]) -> str:
    """The role of a matrix in one of its uses."""
    if use.node.op_type == "Gather" and len(weight.const_value.shape) == 2:
        return "embedding"
    products = list(_products(use.node))
    if heads.intersection(products):
        return "head"
    if len(weight.const_value.shape) == 3:
        return "experts"
    if any(_meets_attention(node) for node in products):
        return "attention"
    name = str(weight.name).lower()
    if re.search(r"\bexperts?\b", name.replace("_", ".")):
        return "experts"
    return "attention" if re.search(r"attn|attention", name) else "mlp"


def _products(node: ir.Node) -> Iterator[ir.Node]:
    """The products that read a matrix through `node`, which may turn or pick it."""
    if node.op_type in ("MatMul", "Gemm"):
        yield node
    else:
        for reader, _ in node.outputs[0].uses():
            yield from _products(reader)


def _meets_attention(linear: ir.Node) -> bool:
    return reaches_attention(linear) or _reaches(
        linear, lambda node: _before(node.inputs[:1] if node is linear else node.inputs)
    )


def reaches_attention(linear: ir.Node) -> bool:
    """Whether the result of a linear comes to attention before it ends at other linears."""
    return _reaches(linear, lambda node: (n for v in node.outputs for n, _ in v.uses()))


def _before(values: Iterable[ir.Value | None]) -> Iterator[ir.Node]:
    return (v.producer() for v in values if v is not None and v.producer() is not None)


def _reaches(start: ir.Node, steps: Callable[[ir.Node], Iterable[ir.Node]]) -> bool:
    """Whether the walk from a linear comes to attention before it ends at other linears."""
    seen, todo = {start}, [start]
    while todo:
        for node in steps(todo.pop()):
            if node.op_type in _ATTENTION or _weighs(node):
                return True
            if node not in seen and not is_linear(node):
                seen.add(node)
                todo.append(node)
    return False


def is_linear(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant matrix, floats or codes: MatMul, Gemm, or com.microsoft's."""
    if node.op_type.startswith("MatMulNBits"):
        return True
    return node.op_type in ("MatMul", "Gemm") and _stored(node.inputs[1]) is not None


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The constant of two axes or more that a factor is, as stored or after decoding; None for all else."""
    while value is not None and value.producer() is not None:
        node = value.producer()
        if node.op_type not in _STORAGE and node.domain != "porter":
            return None
        value = node.inputs[0]
    tensor = None if value is None or value.is_graph_input() else value.const_value
    return value if tensor is not None and len(tensor.shape) > 1 else None


def _weighs(node: ir.Node) -> bool:
    """Whether a node multiplies a computed matrix by what comes from a Softmax: the values of attention."""
    if node.op_type != "MatMul" or is_linear(node):
        return False
    todo, seen = [node.inputs[0]], set()
    while todo:
        before = todo.pop().producer()
        if before is None or before in seen:
            continue
        if before.op_type == "Softmax":
            return True
        seen.add(before)
        todo += [v for v in before.inputs if v is not None and before.op_type in _TO_PROBABILITIES]
    return False

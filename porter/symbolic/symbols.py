"""What is known of a graph before it runs: shapes as expressions, and what small or regular tensors hold.

A dimension is a sympy expression over the names in the graph's inputs (`past + sequence`). A tensor's content
is known when it is a short vector of such expressions (a shape that is being computed), or when each element
follows from its index: an arange, a comparison of two aranges, a choice between two numbers by such a
comparison. The latter is what proves that a mask is causal, whichever operators built it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import sympy
from onnx_ir.passes import common

Dim = sympy.Expr
Shape = tuple[Dim | None, ...]

# The index along the last axis, the one before it, and so on. '@' keeps them apart from any dimension's name.
AXES = tuple(sympy.Symbol(f"@{k}", integer=True, nonnegative=True) for k in range(8))
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


@dataclass(frozen=True)
class All:
    """A boolean content: true where every expression in `atoms` is at most zero; with none, everywhere."""

    atoms: frozenset[Dim] = frozenset()


@dataclass(frozen=True)
class Choice:
    """A number content: `yes` where `test` holds and `no` elsewhere."""

    test: All
    yes: float
    no: float


# A tuple is a short vector, element by element; the others give any element as a function of its index.
Content = tuple[Dim, ...] | Dim | All | Choice | float


def symbol(name: str) -> Dim:
    """The dimension called `name`; it may be zero (an empty past)."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@functools.cache
def dim(text: int | str) -> Dim:
    """Read a dimension as a model file writes it; a text that is no sum or product is one opaque name."""
    if isinstance(text, int):
        return sympy.Integer(text)
    try:
        return _expression(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, ValueError):
        return symbol(text)


def _expression(node: ast.expr) -> Dim:
    """The sum or product that `node` is; KeyError for any other syntax."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return sympy.Integer(node.value)
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.Attribute):
        return symbol(ast.unparse(node))
    if isinstance(node, ast.BinOp):
        kinds = {ast.Add: sympy.Add, ast.Mult: sympy.Mul, ast.Sub: lambda a, b: a - b}
        return kinds[type(node.op)](_expression(node.left), _expression(node.right))
    raise KeyError(type(node))


def declared(value: ir.Value) -> Shape | None:
    """The shape that the model states for `value`, None for a dimension that it leaves open."""
    if value.shape is None:
        return None
    texts = [d if isinstance(d, int) else d.value for d in value.shape]
    return tuple(None if t is None else dim(t) for t in texts)


def text(d: Dim) -> int | str:
    """The form that a model file holds: an int, or a name or sum of names."""
    return int(d) if d.is_Integer else str(d)


def same(a: Dim | None, b: Dim | None) -> bool:
    """Whether two dimensions are surely equal; an unknown one equals nothing."""
    return a is not None and b is not None and (a == b or sympy.expand(a - b) == 0)


def surely_nonnegative(expression: Dim) -> bool:
    """Whether an expression over dimensions cannot be negative, by the signs of its coefficients."""
    terms = sympy.expand(expression).as_coefficients_dict()
    return all(c >= 0 for c in terms.values()) and not any(t.atoms(sympy.Symbol) & set(AXES) for t in terms)


def _highest(expression: Dim, shape: Shape) -> Dim | None:
    """The largest value over all indices of `shape` of an expression that is linear in them."""
    for axis, size in zip(AXES, reversed(shape), strict=False):
        slope = expression.coeff(axis)
        if slope.is_Integer and slope != 0:
            if slope > 0 and size is None:
                return None
            expression = expression.subs(axis, size - 1 if slope > 0 else 0)
    return sympy.expand(expression)


def reduced(test: All, shape: Shape) -> frozenset[Dim]:
    """The atoms of `test` that do not hold for every index of `shape`."""

    def always(atom: Dim) -> bool:
        top = _highest(sympy.expand(atom), shape)
        return top is not None and surely_nonnegative(-top)

    return frozenset(a for a in test.atoms if not always(a))


def is_causal(test: All, shape: Shape) -> bool:
    """Whether `test` over [..., S, T] says exactly: query i sees key j if and only if j <= i + (T - S)."""
    if len(shape) < 2 or shape[-1] is None or shape[-2] is None:
        return False
    wanted = AXES[0] - AXES[1] - (shape[-1] - shape[-2])
    return {sympy.expand(a) for a in reduced(test, shape)} == {sympy.expand(wanted)}


class Facts:
    """Shapes and contents of the values of one graph, computed once in graph order.

    Values that a rule knows nothing of keep the shape that the model declares. `graph` is the main graph;
    `given` is what inputs hold.
    """

    def __init__(self, graph: ir.Graph, given: Mapping[ir.Value, Content] | None = None) -> None:
        self.graph = graph
        self._shapes: dict[ir.Value, Shape] = {}
        self._contents: dict[ir.Value, Content] = dict(given or {})
        self._seen: set[ir.Node] = set()
        for node in graph:
            self._visit(node)

    def _visit(self, node: ir.Node | None) -> None:
        """Infer one node once; a node that was added later is inferred when it is asked about."""
        if node is None or node in self._seen:
            return
        from porter.symbolic import contents, shapes  # they read facts, so they import this module

        self._seen.add(node)
        for value, shape in zip(node.outputs, shapes.infer(self, node), strict=False):
            self._note_shape(value, shape)
        content = contents.infer(self, node)
        if content is not None:
            self._contents[node.outputs[0]] = self._settled(node.outputs[0], content)

    def _note_shape(self, value: ir.Value, shape: Shape | None) -> None:
        stated = declared(value)
        if shape is None:
            return
        if stated is not None and len(stated) == len(shape):
            shape = tuple(s if d is None else d for d, s in zip(shape, stated, strict=True))
        self._shapes[value] = shape

    def _settled(self, value: ir.Value, content: Content) -> Content:
        """Put index 0 for axes of size one, so that a content can be broadcast along them."""
        shape = self.shape(value)
        if shape is None or isinstance(content, tuple):
            return content
        ones = {AXES[k]: ZERO for k, d in enumerate(reversed(shape)) if d == 1}
        return substitute(content, ones) if ones else content

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value; None when not even its rank is known."""
        if value is None:
            return None
        self._visit(value.producer())
        found = self._shapes.get(value)
        if found is None and value.const_value is not None:
            return tuple(sympy.Integer(int(d)) for d in value.const_value.shape)
        return declared(value) if found is None else found

    @property
    def opset(self) -> int:
        """The version of the standard operators that the graph uses."""
        return self.graph.opset_imports.get("", 0)

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes, None when unknown."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def content(self, value: ir.Value | None) -> Content | None:
        """What the tensor holds, None when unknown."""
        if value is None:
            return None
        self._visit(value.producer())
        if value not in self._contents and value.producer() is None:
            from porter.symbolic import contents

            found = contents.of_constant(value)
            if found is not None:
                self._contents[value] = self._settled(value, found)
        return self._contents.get(value)

    def vector(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The elements of a rank 0 or 1 integer tensor of at most 64 elements."""
        content, shape = self.content(value), self.shape(value)
        if isinstance(content, tuple):
            return content
        if not isinstance(content, sympy.Expr) or shape is None or len(shape) > 1:
            return None
        if len(shape) == 0:
            return (content,)
        if shape[0] is None or not shape[0].is_Integer or shape[0] > 64:
            return None
        return tuple(content.subs(AXES[0], i) for i in range(int(shape[0])))

    def element(self, value: ir.Value | None) -> Content | None:
        """The content as a function of the index; a vector only when all its elements are equal."""
        content = self.content(value)
        if isinstance(content, tuple):
            return content[0] if len(set(content)) == 1 else None
        return content

    def number(self, value: ir.Value | None) -> Dim | None:
        """The single integer that a rank 0 tensor or a vector of one element holds."""
        elements = self.vector(value)
        return elements[0] if elements is not None and len(elements) == 1 else None


def substitute(content: Content, by: dict[Dim, Dim]) -> Content:
    """Replace index symbols in a content, all at once."""
    if isinstance(content, sympy.Expr):
        return content.subs(by, simultaneous=True)
    if isinstance(content, All):
        return All(frozenset(sympy.expand(a.subs(by, simultaneous=True)) for a in content.atoms))
    if isinstance(content, Choice):
        return Choice(substitute(content.test, by), content.yes, content.no)
    return content


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements."""
    return sympy.Mul(*dims)


def write_shapes(model: ir.Model) -> None:
    """Write down the type and the shape of every value of the main graph, dimensions by name.

    An output of the graph keeps the names that it declares.
    """
    lists = {v: v.type for n in model.graph if _makes_lists(n) for v in n.outputs}
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for value, kind in lists.items():  # onnx_ir writes the type of a list's elements instead
        value.type, value.shape = kind, None
    facts = Facts(model.graph)
    for node in model.graph:
        for value in node.outputs:
            _write_shape(facts, value)


def _makes_lists(node: ir.Node) -> bool:
    """Whether a node's outputs are sequences or optionals, or may be."""
    return "Sequence" in node.op_type or "Optional" in node.op_type or node.op_type in ("If", "Loop", "Scan")


def _write_shape(facts: Facts, value: ir.Value) -> None:
    shape, stated = facts.shape(value), declared(value)
    if shape is None:
        return
    if value.is_graph_output() and stated is not None and len(stated) == len(shape):
        shape = tuple(d if s is None else s for s, d in zip(stated, shape, strict=True))
    value.shape = ir.Shape([None if d is None else text(d) for d in shape])

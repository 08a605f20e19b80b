"""An annotated block as an operation of the simulator: its domain is its size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from porter.errors import TargetError
from porter.simulate.expression import Expression, conjuncts, variables
from porter.simulate.program import Copy, Loop, Matrix, Node, Vector


@dataclass(frozen=True)
class Access:
    """What a block reads or writes: an element of `bits` at `index` of a buffer of `shape`.

    An index that data decides is `("gathered", ...)`, with what it depends on.
    """

    buffer: str
    writes: bool
    index: tuple[Expression, ...]
    shape: tuple[Expression, ...]
    bits: int
    outermost: bool


@dataclass(frozen=True)
class Domain:
    """The loops of an operation, (variable, extent), and the condition under which an iteration does work."""

    box: tuple[tuple[str, Expression], ...]
    condition: Expression

    def along(self, names: Iterable[str]) -> Expression:
        """How many iterations there are of these loops alone, under the conditions on no others."""
        chosen = frozenset(names)
        inner = frozenset(name for name, _ in self.box)
        parts = [p for p in conjuncts(self.condition) if p != 1 and variables(p) & inner <= chosen]
        box = tuple(pair for pair in self.box if pair[0] in chosen)
        return ("count", box, reduce(lambda a, b: ("and", a, b), parts) if parts else 1)

    def inside(self, expressions: Iterable[Expression]) -> frozenset[str]:
        """The loops of the domain that expressions depend on."""
        names = frozenset(name for name, _ in self.box)
        return frozenset().union(*(variables(e) for e in expressions)) & names


def operation(
    name: str, annotations: Mapping[str, Any], domains: Sequence[Domain], accesses: Sequence[Access]
) -> tuple[Node, ...]:
    """The operation of the block `name`; raises TargetError PORT-0445 where the annotations do not fit it."""
    if "porter.free" in annotations:
        return ()
    for domain in domains:
        if domain.inside(extent for _, extent in domain.box):
            raise _wrong("its inner loops do not make a box", name)
    if "porter.vector" in annotations:
        return tuple(_vector(name, annotations, domain, accesses) for domain in domains)
    if len(domains) != 1:
        raise _wrong("a transfer or a product is one block", name)
    if "porter.copy" in annotations:
        return (_copy(name, str(annotations["porter.copy"]), domains[0], accesses),)
    return _matrix(name, annotations, domains[0], accesses)


def _wrong(what: str, block: str) -> TargetError:
    return TargetError("PORT-0445", f"an operation of a scheduled program cannot be read: {what}", block)


def _names(accesses: Iterable[Access], *, writes: bool) -> tuple[str, ...]:
    return tuple(dict.fromkeys(access.buffer for access in accesses if access.writes == writes))


def _vector(name: str, annotations: Mapping[str, Any], domain: Domain, accesses: Sequence[Access]) -> Vector:
    each = int(annotations.get("porter.vector_ops", 1))
    reads, writes = _names(accesses, writes=False), _names(accesses, writes=True)
    return Vector(name, domain.along(loop for loop, _ in domain.box), each, reads, writes)


def _copy(name: str, dma: str, domain: Domain, accesses: Sequence[Access]) -> Copy:
    sources, targets = ([a for a in accesses if a.writes == way] for way in (False, True))
    if len(sources) > 1:  # what is moved, not the numbers that say from where or to where
        gathered = any(_is_gathered(i) for t in targets for i in t.index)
        sources = [s for s in sources if (not s.outermost if gathered else any(map(_is_gathered, s.index)))]
    if len(sources) != 1 or len(targets) != 1:
        raise _wrong("a transfer has one buffer on each side", name)
    (source,), (target,) = sources, targets
    outer, inner = (target, source) if target.outermost else (source, target)
    elements = domain.along(loop for loop, _ in domain.box)
    run = ("together", tuple(_length(domain, *pair) for pair in zip(outer.index, outer.shape, strict=True)))
    transposing = _transposing(domain, outer, inner)
    return Copy(name, dma, source.buffer, target.buffer, elements, run, source.bits, transposing)


def _is_gathered(index: Expression) -> bool:
    return isinstance(index, tuple) and index[0] == "gathered"


def _length(domain: Domain, index: Expression, size: Expression) -> tuple[Expression, Expression]:
    """Elements along a dimension, and its size; what is gathered lies apart: one of more than one."""
    if _is_gathered(index):
        return 1, 2
    return domain.along(domain.inside((index,))), size


def _transposing(domain: Domain, one: Access, other: Access) -> bool:
    """Whether what lies together on one side does not on the other."""
    if not one.index or not other.index:
        return False
    last, inner = domain.inside(one.index[-1:]), domain.inside(other.index[-1:])
    return bool(last and inner and not last & inner and last & domain.inside(other.index[:-1]))


def _matrix(
    name: str, annotations: Mapping[str, Any], domain: Domain, accesses: Sequence[Access]
) -> tuple[Node, ...]:
    reads, writes = _names(accesses, writes=False), _names(accesses, writes=True)
    output = next((a for a in accesses if a.writes), None)
    operands = [a for a in accesses if not a.writes and a.buffer not in writes]
    given = tuple(int(size) for size in annotations.get("porter.mnk", ()))
    kind = str(annotations["porter.matrix"])
    if not given and output is not None and len(operands) == 2:
        c, a, b = (domain.inside(access.index) for access in (output, *operands))
        batch = a & b & c
        m, n, k = (domain.along(names) for names in ((a & c) - batch, (b & c) - batch, (a & b) - batch))
        if batch and (batch & domain.inside(conjuncts(domain.condition))):
            raise _wrong("a guard stands on a loop over whole products", name)
        made: Node = Matrix(name, kind, m, n, k, reads, writes)
        for loop, extent in reversed(domain.box):
            made = Loop(loop, extent, (made,)) if loop in batch else made
        return (made,)
    if len(given) != 3:
        raise _wrong("the loops do not say its size; give porter.mnk = [m, n, k]", name)
    some = ("<", 0, domain.along(loop for loop, _ in domain.box))
    m, n, k = (("select", some, size, 0) for size in given)
    return (Matrix(name, kind, m, n, k, reads, writes),)

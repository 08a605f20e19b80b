"""Binding: a scheduled kernel for all sizes, and the program that it is for those that are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from porter.errors import TargetError
from porter.simulate.expression import substituted
from porter.simulate.program import Buffer, Loop, Node, Program, When, sizes


@dataclass(frozen=True)
class Kernel:
    """A kernel whose sizes are expressions of its symbols and of the loops around."""

    name: str
    symbols: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    body: tuple[Node, ...]

    def at(self, dimensions: Mapping[str, int]) -> Program:
        """The program of a call with symbols at `dimensions`.

        Raises TargetError PORT-0447 for a symbol without a size.
        """
        if missing := next((name for name in self.symbols if name not in dimensions), None):
            what = f"nothing says how large the dimension {missing!r} is"
            raise TargetError("PORT-0447", what, self.name, f"known: {', '.join(sorted(dimensions))}")
        return Program(self.name, self.buffers, _nodes(self.body, dimensions))


def _nodes(nodes: Sequence[Node], at: Mapping[str, int]) -> tuple[Node, ...]:
    return tuple(_node(node, at) for node in nodes)


def _node(node: Node, at: Mapping[str, int]) -> Node:
    if isinstance(node, Loop):
        return replace(node, extent=substituted(node.extent, at), body=_nodes(node.body, at))
    if isinstance(node, When):
        return When(substituted(node.condition, at), _nodes(node.body, at))
    return replace(node, **{name: substituted(size, at) for name, size in sizes(node)})

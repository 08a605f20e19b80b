"""Weighing: how far a linear layer's weight is from the reference's, and how much noise that explains.

With x the layer's input and E = W' - W the error of its weight, errors that have nothing to do with x give
noise of sum_k |x_k|^2 |E_k|^2. A format's rounding stays near that; a fault of another kind does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.drift.blame.align import Alignment
from porter.drift.blame.measure import decibels
from porter.drift.blame.pieces import constant_nodes, reads
from porter.drift.blame.sides import Side
from porter.drift.blame.sites import Site, segment
from porter.run.reference import ReferenceRunner
from porter.weights.select import is_linear

GROUP = 32  # weights whose error is looked at together, along the input channels
SAME = 0.7  # cosine of two weights that are the same but for rounding


@dataclass(frozen=True)
class Weighed:
    """`db`: signal over error of the weight; `group_db`: of its worst group of GROUP input channels of one
    output; `explained_db`: what local SQNR that error gives by itself."""

    db: float
    group_db: float
    explained_db: float


def weigh(
    reference: Side,
    candidate: Side,
    aligned: Alignment,
    found: Sequence[Site],
    powers: Mapping[str, np.ndarray],
    signals: Mapping[str, float],
) -> dict[str, Weighed]:
    """By value, of sites whose main node is a linear layer on both sides with weights of one shape.

    `powers` has sum x^2 for each channel of the values that linear layers read, `signals` sum y^2 of what
    they make. One weight is in memory at a time.
    """
    constant = constant_nodes(reference.model.graph)
    theirs = {v.name: v for n in reference.model.graph for v in n.outputs}
    result: dict[str, Weighed] = {}
    parts: dict[ir.Node, np.ndarray] = {}
    for site in found:
        if not is_linear(site.node) or site.node.op_type != "MatMul":
            continue
        nodes, _, _ = segment(theirs[aligned.pairs[site.value]], {*aligned.pairs.values()}, constant)
        linear = [n for n in nodes if is_linear(n) and n.op_type == "MatMul"]
        if len(linear) != 1:
            continue
        if site.node not in parts:
            parts = {site.node: evaluated(candidate.model, site.node.inputs[1])}
        weight = evaluated(reference.model, linear[0].inputs[1])
        other = _part(site, parts[site.node], weight.shape[1])
        power = powers.get(str(site.node.inputs[0].name))
        if other is not None and other.shape == weight.shape:
            signal = signals.get(site.value, 0.0)
            result[site.value] = _weighed(weight, other, power, signal)
    return result


def _weighed(weight: np.ndarray, other: np.ndarray, power: np.ndarray | None, signal: float) -> Weighed:
    """`weight` and `other` are float32 [K, N]."""
    error = (other.astype(np.float64) - weight) ** 2
    squares = weight.astype(np.float64) ** 2
    usual = squares.mean() * GROUP
    groups = [(squares[at : at + GROUP].sum(axis=0), error[at : at + GROUP].sum(axis=0))
              for at in range(0, len(weight) - GROUP + 1, GROUP)]  # fmt: skip
    worst = min((_least(s, e, usual) for s, e in groups), default=math.inf)
    explained = math.nan
    if power is not None and len(power) == len(weight):
        explained = decibels(signal, float(power @ error.sum(axis=1)))
    return Weighed(decibels(float(squares.sum()), float(error.sum())), worst, explained)


def _least(signal: np.ndarray, error: np.ndarray, usual: float) -> float:
    """The worst ratio of a group; a group far below the usual power counts as a tenth of that."""
    return decibels(1.0, float((error / np.maximum(signal, usual / 10)).max(initial=0.0)))


def _part(site: Site, weight: np.ndarray, columns: int) -> np.ndarray | None:
    """The columns that belong to the site's value, where a Split hands out those of one product."""
    last = next(n for n in site.nodes if any(v.name == site.value for v in n.outputs))
    if weight.shape[1] == columns:
        return weight
    if last.op_type != "Split":
        return None
    sizes = last.inputs[1].const_value if len(last.inputs) > 1 and last.inputs[1] is not None else None
    if sizes is None:
        return None
    ends = np.cumsum(sizes.numpy())
    at = next(i for i, v in enumerate(last.outputs) if v.name == site.value)
    return weight[:, ends[at] - sizes.numpy()[at] : ends[at]]


def evaluated(model: ir.Model, value: ir.Value) -> np.ndarray:
    """A value that depends on no input."""
    if value.is_initializer():
        return value.const_value.numpy()
    nodes, weights, stack = {value.producer()}, {}, list(reads(value.producer()))
    while stack:
        v = stack.pop()
        if v.is_initializer():
            weights[v] = None
        elif v.producer() not in nodes:
            nodes.add(v.producer())
            stack += reads(v.producer())
    view = ir.GraphView(
        [],
        [value],
        nodes=[n for n in model.graph if n in nodes],
        initializers=list(weights),
        opset_imports=model.graph.opset_imports,
        name="weight",
    )
    functions = list(model.functions.values())
    made = ir.Model(view.clone(), ir_version=model.ir_version, functions=functions)
    return ReferenceRunner(made, briefly=True).run({})[value.name]

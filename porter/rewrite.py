"""Rewrite: a pass made of onnxscript rewrite rules, and why a rule did not match."""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.optimizer import basic_constant_propagation
from onnxscript.rewriter import MatchingTracer, MatchResult, MatchStatus, RewriteRule, RewriteRuleSet
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter._rewrite_rule import RULE_NAME_TAG

from porter.context import Context
from porter.errors import PassError
from porter.match import graphs, tidy
from porter.pipeline import Pass
from porter.symbolic.symbols import Facts, write_shapes

Mismatch = MatchFailureError  # raised by what a check or a rewrite calls: Mismatch(reason, node)
_EACH = 20  # replacements for each node of the graph, after which rules must be chasing each other


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that is a list of rules, applied until none matches.

    A rule is a `RewriteRuleClassBase` with `pattern`, `check` and `rewrite`. A check that declines says why,
    by `MatchResult().fail(reason, node)` or by raising `Mismatch(reason, node)`: `explain` shows it.
    """

    @abstractmethod
    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        """Fresh rules for one sweep over a graph; `facts` knows shapes and masks of its values."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Sweep until no rule matches; the number of replacements. PassError PORT-0210 without end."""
        edits = 0
        budget = _EACH * len(model.graph) + _EACH
        while found := _sweep(model, self.rules(Facts(model.graph)), self.name, budget - edits):
            edits += found
            _forget_rule_names(model)
            tidy(model)
        if edits:
            write_shapes(model)
        return edits


def _sweep(model: ir.Model, rules: Sequence[RewriteRule], where: str, budget: int) -> int:
    """One application of the rules to the graph; functions, which see no initializers, are set aside."""
    count = itertools.count(1)
    for rule in rules:
        rule.try_rewrite = _counted(rule, count, where, budget)
    functions = dict(model.functions)
    model.functions.clear()
    try:
        return RewriteRuleSet(rules).apply_to_model(model)
    finally:
        model.functions.update(functions)


def _counted(rule: RewriteRule, count: Iterator[int], where: str, budget: int) -> Callable[..., object]:
    """The rule's own attempt, refused once more was replaced than the graph can need."""
    attempt = rule.try_rewrite

    def tried(*args: object, **options: object) -> object:
        made = attempt(*args, **options)
        if made is not None and next(count) > budget:
            raise PassError(
                "PORT-0210", "the rules go on rewriting for ever", where=where, hint=f"last: {rule.name}"
            )
        return made

    return tried


def _forget_rule_names(model: ir.Model) -> None:
    """onnxscript writes the rule's name into each new node; a model does not say how it was made."""
    for graph in graphs(model):
        for node in graph:
            node.metadata_props.pop(RULE_NAME_TAG, None)


@dataclass(frozen=True)
class NearMiss:
    """Where a rule matched in part: `matched` nodes from `node` on, until `failed` for this `reason`."""

    rule: str
    node: str
    op: str
    matched: int
    failed: str
    reason: str


def explain(step: Pass, model: ir.Model) -> list[NearMiss]:
    """Where the rules of `step` nearly match what it leaves of `model` (which is not changed), closest first.

    Raises PassError PORT-0211 for a pass that is not made of rules.
    """
    if not isinstance(step, Rewrite):
        raise PassError("PORT-0211", "the pass is not made of rewrite rules", where=step.name)
    model = model.clone()
    step.run(model, Context())
    facts = Facts(model.graph)
    best: dict[tuple[str, int], NearMiss] = {}
    order = {}
    for graph in graphs(model):
        basic_constant_propagation(graph)
        for rule in step.rules(facts):
            for position, node in enumerate(graph):
                order[id(node)] = position
                miss = _near_miss(rule, model, graph, node)
                key = (str(rule.name), id(node))
                if miss and (key not in best or best[key].matched < miss.matched):
                    best[key] = miss
    ranked = sorted(best.items(), key=lambda item: (-item[1].matched, item[1].rule, order[item[0][1]]))
    return [miss for _, miss in ranked]


class _Last(MatchingTracer):
    """Keeps the outcome of one attempt."""

    result: MatchResult | None = None

    def log(
        self, rule: RewriteRule, container: ir.Graph, node: ir.Node, result: MatchResult, status: MatchStatus
    ) -> None:
        self.result, self.status = result, status


def _near_miss(rule: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node) -> NearMiss | None:
    """Try one rule at one node; None when it matches, or when not even the node itself fits."""
    trace = _Last()
    match = rule.match(model, graph, node, check_nodes_are_removable=rule.remove_nodes, tracer=trace)
    result = trace.result
    if match or result is None:
        return None
    matched = [n for n in dict.fromkeys(result.nodes) if n is not _failing(result)]
    if not result.nodes:
        return None
    return NearMiss(
        rule=str(rule.name),
        node=_label(node),
        op=node.op_type,
        matched=len(matched) if trace.status == MatchStatus.NO_MATCH else len(dict.fromkeys(result.nodes)),
        failed=", ".join(dict.fromkeys(_label(x) for x in _sources(result))) or _label(node),
        reason=_plain(result.reason),
    )


def _sources(result: MatchResult) -> Iterator[ir.Node | ir.Value]:
    return (x for x in result.failure_nodes_and_values if isinstance(x, ir.Node | ir.Value))


def _failing(result: MatchResult) -> ir.Node | None:
    return next((x for x in _sources(result) if isinstance(x, ir.Node)), None)


def _label(thing: ir.Node | ir.Value) -> str:
    """A node's name, or its first output's when it has none; a value's name."""
    if isinstance(thing, ir.Node):
        return thing.name or str(thing.outputs[0].name)
    return str(thing.name)


_WORDING = (
    (r"OpType mismatch: expected '?(.*?)'?, got '?(.*?)'?\.?$", r"wanted \1, found \2"),
    (
        r"Domain mismatch: expected '?(.*?)'?, got '?(.*?)'?\.?$",
        r"wanted an operator of domain '\1', found one of '\2'",
    ),
    (r"Attribute (\w+) not found in node\.", r"wanted attribute \1, found none"),
    (r"Attribute (\w+) not expected in node\.", r"found attribute \1, wanted none"),
    (r"Attribute (\w+) mismatch: expected (.*?), got (.*?)\.?$", r"wanted \1=\2, found \3"),
    (
        r"Mismatch: Computed node pattern does not match uncomputed IR value\.",
        "wanted a computed value, found an input",
    ),
    (r"Matched nodes have other uses preventing replacement\.", "an inner value is used elsewhere"),
)


def _plain(reason: str) -> str:
    """onnxscript's wording of a mismatch in porter's words; a check's own reason as it is."""
    for pattern, ours in _WORDING:
        found = re.match(pattern, reason)
        if found:
            return found.expand(ours)
    return reason or "no alternative of the pattern fits"

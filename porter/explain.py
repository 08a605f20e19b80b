"""explain: what a rewriting pass did to a model, and where it nearly applied."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from porter import graph, rewrite, target
from porter.context import Context
from porter.errors import PassError
from porter.options import Options, pipeline_text
from porter.pipeline import Pass, Pipeline
from porter.symbolic.rows import Refusal


def explain(rule: str, path: Path, target_name: str = "host") -> dict[str, Any]:
    """Run what stands before `rule` in the target's pipeline, then it; list near-misses, closest first.

    Near-misses are looked for in what the pass leaves, so they are the places where it did not apply; one
    whose first operator alone matched is not near. A pass that is not made of rules may say why it leaves a
    model alone, by a function `why_not(model)` in its module. Raises what loading does, PassError PORT-0201
    for an unknown pass and PORT-0211 for one that explains nothing.
    """
    spec = target.load(target_name)
    passes = Pipeline.parse(rule).passes
    step = passes[0] if len(passes) == 1 else None
    why_not = getattr(sys.modules[type(step).__module__], "why_not", None)
    if step is None or not (why_not or isinstance(step, rewrite.Rewrite)):
        raise PassError("PORT-0211", "this is not one pass made of rewrite rules", where=rule)
    before = Pipeline.parse(pipeline_text(spec, Options())).passes
    names = [p.name for p in before]
    stop = names.index(step.name) if step.name in names else names.index("kv.static_cache")
    model = graph.load(path)
    Pipeline(before[:stop]).run(model, Context(spec))
    misses = _refusal(step, why_not(model)) if why_not else rewrite.explain(step, model)
    return {
        "rule": str(step),
        "edits": step.run(model, Context(spec)),
        "near_misses": [asdict(m) for m in misses if m.matched > 1 or why_not],
    }


@dataclass(frozen=True)
class Misses:
    """Near-misses of one rule for one reason: how many, and the closest (see `porter.rewrite.NearMiss`)."""

    rule: str
    reason: str
    count: int
    node: str
    op: str
    matched: int
    failed: str


def near_misses(passes: Sequence[Pass], model: ir.Model) -> list[Misses]:
    """Where the rewriting passes among these nearly apply to what they left of `model`, by reason."""
    found: dict[tuple[str, str], list[rewrite.NearMiss]] = {}
    for step in passes:
        for miss in rewrite.explain(step, model) if isinstance(step, rewrite.Rewrite) else []:
            if miss.matched > 1:
                found.setdefault((f"{step.name}: {miss.rule}", miss.reason), []).append(miss)
    return [
        Misses(rule, reason, len(all_), m.node, m.op, m.matched, m.failed)
        for (rule, reason), all_ in found.items()
        for m in all_[:1]
    ]


def _refusal(step: Pass, refusal: Refusal | None) -> list[rewrite.NearMiss]:
    if refusal is None:
        return []
    return [rewrite.NearMiss(step.name, refusal.node, refusal.op, 0, refusal.node, refusal.reason)]

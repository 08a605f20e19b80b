"""explain: where the rules of a pass apply to a model, and where they nearly do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from porter import graph, rewrite
from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pass, Pipeline


def explain(rule: str, path: Path) -> dict[str, Any]:
    """How often the pass `rule` (a pipeline text of one pass) applies to the ONNX file `path`, and its near misses.

    The passes that it must stand `after` run first, and those that they must stand after. Nothing is written. Raises
    PassError PORT-0211 for anything but one pass made of rewrite rules, and what parsing and loading raise.
    """
    passes = Pipeline.parse(rule).passes
    if len(passes) != 1:
        raise PassError("PORT-0211", f"wanted one pass, found {len(passes)}", where=rule)
    (step,) = passes
    model = graph.load(path)
    Pipeline.parse(",".join(_before(step))).run(model, Context())
    misses = rewrite.explain(step, model)
    edits = step.run(model, Context())
    return {"rule": str(step), "matches": edits, "near_misses": [asdict(m) for m in misses]}


def _before(step: Pass) -> list[str]:
    """Names of all passes that must have run, in order."""
    names: list[str] = []
    for name in step.after:
        names += [*_before(Pipeline.parse(name).passes[0]), name]
    return list(dict.fromkeys(names))

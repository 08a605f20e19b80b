"""The report's figures of memory: of the conversion, the program and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from porter import decoder, graph, kv, memory, needs
from porter.kv.layout import pools
from porter.kv.tags import describe
from porter.kvgraph.graph import BITS, CAPACITY, DONE, READ
from porter.report.report import Figure

if TYPE_CHECKING:
    from porter.lower.plan import Plan


def of(
    source: Path,
    model: ir.Model,
    plan: Plan,
    ported: decoder.Decoder,
    needed: needs.Plan,
    watch: memory.Watch,
) -> dict[str, Figure]:
    """All of them."""
    return _of_conversion(source, plan, needed, watch) | _of_cache(model, plan, ported)


def _of_conversion(source: Path, plan: Plan, needed: needs.Plan, watch: memory.Watch) -> dict[str, Figure]:
    """Peaks while converting, weights and workspace."""
    limit = {"peak memory, limit": Figure(needed.limit, "bytes", "measured")} if needed.limit else {}
    return {
        "peak memory": Figure(watch.peak.anonymous, "bytes", "measured"),  # what the kernel cannot drop
        "peak memory, mapped files included": Figure(watch.peak.resident, "bytes", "measured"),
        "peak memory, predicted": Figure(needed.peak, "bytes", "estimated"),
        **limit,
        "weights of the source": Figure(graph.weight_bytes(graph.load(source)), "bytes", "measured"),
        "weights of the port": Figure(sum(w["bytes"] for w in plan.weights), "bytes", "measured"),
        "workspace": Figure(plan.workspace_bytes, "bytes", "estimated"),  # planned, for the largest step
        "workspace, lower bound": Figure(plan.lower_bound_bytes, "bytes", "estimated"),
    }


def _of_cache(model: ir.Model, plan: Plan, ported: decoder.Decoder) -> dict[str, Figure]:
    """What a quantized cache takes, by the buffers of the lowered program; nothing for one of floats."""
    about = model.metadata_props
    if BITS not in about:
        return {}
    caches = {c.past for c in ported.caches}
    rows = [(b, plan.bounds.get(b.shape[0]) or int(b.shape[0])) for b in plan.buffers if b.name in caches]
    held = Figure(sum(b.bytes // batch for b, batch in rows), "bytes", "estimated")
    tagged = {}
    if decoder.TAGS in about:
        scheme, chosen = kv.parse(about[DONE]), about[decoder.TAGS].replace("none", "").split()
        more = pools(scheme, int(about[CAPACITY]))[1]
        words = describe(map(int, chosen)) or "none"
        held_in = f"keys {scheme.key.more}, values {scheme.value.more}"
        what = f"KV cache, places with more bits ({held_in}); tags that ask: {words}"
        tagged = {what: Figure(more, "tokens", "estimated")}
    per_value = {"KV cache, scales and windows included": BITS, "KV cache, read without its exact copy": READ}
    return (
        {f"KV cache, {about[CAPACITY]} tokens x batch 1": held}
        | {
            name: Figure(float(about[key]), "bits per value", "estimated")
            for name, key in per_value.items()
            if key in about
        }
        | tagged
    )

"""The straight path: an ONNX file goes in, a bundle and its drift report come out."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from porter import __version__, bundle, decoder, graph, memory, target
from porter.calibrate.feeds import calibration
from porter.context import Context
from porter.drift import budget as budgets
from porter.drift.attribution import Trail
from porter.drift.measure import tokenizer_files
from porter.errors import DriftError
from porter.estimate import lowered
from porter.evidence import Port, gather, measured, standard
from porter.options import Options, Progress, pipeline_text, searched, single_tokens
from porter.pipeline import Pipeline, Step
from porter.provenance import Provenance
from porter.report import html, junit
from porter.report import memory as figures
from porter.report.report import DriftReport, Figure, Stage
from porter.search import latency
from porter.target import TargetSpec
from porter.weights import select
from porter.weights.base import WeightPass

if TYPE_CHECKING:
    from porter.lower.plan import Plan

MAX_BATCH = 8  # rows that one step may have; memory is planned for them
MAX_STEP = 512  # tokens that one step may feed; longer prompts are fed in pieces
MAX_CONTEXT = 4096  # cached tokens, where the model allows more and --context does not ask for it


def convert(source: Path, out: Path, options: Options) -> DriftReport:
    """Port `source` and write the bundle `out`; the report says what the passes and the lowering cost.

    Formats that are `auto` are searched for first (`porter.search`). Past a budget, raises DriftError
    PORT-0605 with the `report` on it, past a latency PORT-0634, and leaves no bundle (unless
    `options.keep`). Other failures are PorterErrors of the step they happen in, and leave nothing either.
    """
    if searched(options):
        from porter.search.search import convert as search

        return search(source, out, options, _straight)
    return _straight(source, out, options, {})


def _straight(source: Path, out: Path, options: Options, search: Mapping[str, Any]) -> DriftReport:
    """The straight path; `search` is what a search says of how it came to these options."""
    started, limit = time.perf_counter(), memory.parse(options.max_memory)
    spec, allowed = target.load(options.target), budgets.parse(options.budget)
    pipeline = Pipeline.parse(pipeline_text(spec, options))
    bundle.remove_stale(out.absolute())
    with memory.Watch(limit) as watch:
        progress = _checked(options.progress, watch)
        progress("load", 0.0)
        model = graph.load(source)
        evidence = gather(source, model, options, limit, single_tokens(pipeline, options))
        with bundle.writing(out) as folder:
            graph.check_finite(model)
            _copy_tokenizer(source, folder)
            progress("feeds", 0.0)
            feeds = evidence.texts(options)
            evidence.reference.runner  # noqa: B018 (a model that cannot be run is refused before any work)
            calibrated = calibration(pipeline, evidence.reference, options.calibration, options.seed, feeds)
            if evidence.reference.whole:
                evidence.reference.close()
            progress("passes", 0.0)
            trail = Trail(pipeline, folder / ".trail", evidence.unattributed)
            steps = run_passes(
                pipeline, model, Context(spec, calibrated.feeds, options.seed), progress, trail
            )
            ported, kept = decoder.recognise(model), _kept(model, pipeline)
            progress("save", 0.0)
            graph.save(model, folder / bundle.MODEL)
            model = graph.load(folder / bundle.MODEL)
            step = latency.held(model, spec, str(pipeline), ported, options)
            made, times = _lower(standard(model), options.target, folder, ported, progress)
            port = Port(source, model, ported, folder, trail, steps, _exactly(model, spec, ported))
            found = measured(evidence, feeds, port, progress)
            facts = _facts(source, spec, pipeline, options) | {"calibration": dict(calibrated.facts)}
            bundle.write_manifest(folder, ported, facts)
            progress("measure", 1.0)
            report = DriftReport.of(
                found.drift,
                feeds.to_json(),
                model=facts["source"],
                target=spec.name,
                pipeline=str(pipeline),
                stages=[Stage(s.name, s.promise.value, s.edits, s.seconds) for s in steps],
                kept=kept,
                kinds=_kinds(spec, executed=found.executed),
                placement=made.placement,
                estimate=times,
                **found.told(),
                memory=figures.of(source, model, made, ported, evidence.plan, watch),
                seconds={"conversion": Figure(time.perf_counter() - started, "s", "measured")},
                budget=allowed,
                search=search,
                latency=step,
                calibration=calibrated.facts,
                repeat=options.repeat,
                versions=facts["versions"],
            )
            _finish(report, folder, options)
    return report


def _kinds(spec: TargetSpec, *, executed: bool) -> dict[str, str]:
    """How the lowered program's drift came about: by the target itself, or by what computes as it would."""
    return {} if executed or spec.family == "host" else dict.fromkeys(("total", "lowering"), "simulated")


def _checked(progress: Progress, watch: memory.Watch) -> Progress:
    """The progress that is told, of stages whose memory is watched."""

    def told(stage: str, fraction: float) -> None:
        watch.enter(stage)
        progress(stage, fraction)

    return told


def _kept(model: ir.Model, pipeline: Pipeline) -> list[select.Kept]:
    """Matrices that stay floats although a pass of the pipeline casts weights."""
    return select.kept(model.graph) if any(isinstance(p, WeightPass) for p in pipeline.passes) else []


def run_passes(
    pipeline: Pipeline, model: ir.Model, context: Context, progress: Progress, trail: Trail | None = None
) -> list[Step]:
    """Run the pipeline, telling how far it is, and leave a `trail`; nodes then say which pass made them."""
    places, provenance = count(), Provenance(model)

    def reached(done: int, model: ir.Model) -> None:
        if done:
            provenance.after(pipeline.passes[done - 1].name, model)
        if trail is not None:
            trail.reached(done, model)

    def watch(step: object, model: ir.Model) -> None:
        done = next(places)
        progress("passes", done / len(pipeline.passes))
        reached(done, model)

    steps = pipeline.run(model, context, watch)
    reached(len(pipeline.passes), model)
    return steps


def over_budget(report: DriftReport) -> DriftError:
    """The refusal, with the report on it."""
    what = "; ".join(str(v) for v in report.violations)
    slow = all(v.measure == "latency_s" for v in report.violations)
    error = DriftError("PORT-0634" if slow else "PORT-0605", f"the lowered program is over budget: {what}",
                       hint="--keep writes the bundle all the same")  # fmt: skip
    error.report = report  # type: ignore[attr-defined]
    return error


def _lower(
    model: ir.Model, name: str, folder: Path, ported: decoder.Decoder, progress: Progress
) -> tuple[Plan, dict[str, Any] | None]:
    """Lower the model as saved, so that weights are mapped from the bundle and not computed again.

    Of family tile also what the scheduled program takes, simulated; the target's file stays with it.
    """
    progress("lower", 0.0)
    from porter.lower.lower import lower

    spec = target.load(name)
    made = lower(model, spec, folder, _bounds(model, ported), lambda f: progress("lower", f))
    if spec.family != "tile":
        return made, None
    (folder / lowered.TARGET).write_bytes(target.text(name))
    return made, lowered.Lowered.read(folder, ported).report()


def _exactly(model: ir.Model, spec: TargetSpec, ported: decoder.Decoder) -> Callable[[Path], object] | None:
    """What lowers the model for a host that computes in float32; None where the target is one."""
    if spec.family == "host":
        return None
    return lambda folder: _lower(standard(model), "host", folder, ported, lambda stage, fraction: None)


def _bounds(model: ir.Model, ported: decoder.Decoder) -> dict[str, int]:
    """The largest value of each dimension that the interface leaves open, by the model's name for it."""
    context = min(ported.capacity or ported.context or MAX_CONTEXT, MAX_CONTEXT)
    step = context if ported.cache == "none" else min(context, MAX_STEP)
    shapes = {v.name: v.shape for v in model.graph.inputs}
    named = list(zip(shapes[ported.tokens], (MAX_BATCH, step), strict=False))
    named += [(shapes[c.past][2], context) for c in ported.caches if ported.cache == "concat"]
    return {str(dim.value): bound for dim, bound in named if isinstance(dim, ir.SymbolicDim) and dim.value}


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files that lie beside the model into the bundle."""
    for file in tokenizer_files(source):
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "tokenizer" / file.name)


def _finish(report: DriftReport, folder: Path, options: Options) -> None:
    """Write the report in its forms, and hold the port to its budget."""
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    (folder / "report.html").write_text(html.to_html(report, plan), encoding="utf-8")
    (folder / "report.junit.xml").write_text(junit.to_xml(report), encoding="utf-8")
    if not report.ok and not options.keep:
        raise over_budget(report)


def _facts(source: Path, spec: TargetSpec, pipeline: Pipeline, options: Options) -> dict[str, Any]:
    return {
        "source": {"name": source.name, "sha256": graph.digest(source)},
        "target": spec.to_dict(),
        "pipeline": str(pipeline),
        "seed": options.seed,
        "machine": platform.machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of porter and of the packages that a port depends on."""
    packages = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
    return {"porter": __version__, **{p: importlib.metadata.version(p) for p in packages}}

"""The straight path: an ONNX file goes in, a bundle and its drift report come out."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from porter import __version__, bundle, decoder, graph, memory, target
from porter.calibrate.feeds import calibration
from porter.context import Context
from porter.drift import budget as budgets
from porter.drift.measure import tokenizer_files
from porter.errors import DriftError
from porter.evidence import gather, measured, standard
from porter.options import Options, Progress, pipeline_text, single_tokens
from porter.pipeline import Pipeline, Step
from porter.provenance import Provenance
from porter.report import html, junit
from porter.report import memory as figures
from porter.report.report import DriftReport, Figure, Stage
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

    Past a budget, raises DriftError PORT-0605 with the `report` on it, and leaves no bundle (unless
    `options.keep`). Other failures are PorterErrors of the step they happen in, and leave nothing either.
    """
    started = time.perf_counter()
    limit = memory.parse(options.max_memory)
    spec, allowed = target.load(options.target), budgets.parse(options.budget)
    pipeline = Pipeline.parse(pipeline_text(spec, options))
    bundle.remove_stale(out.absolute())
    with memory.Watch(limit) as watch:
        progress = _checked(options.progress, watch)
        progress("load", 0.0)
        model = graph.load(source)
        evidence = gather(source, model, options, limit, single_tokens(pipeline, options))
        reference = evidence.reference
        with bundle.writing(out) as folder:
            graph.check_finite(model)
            _copy_tokenizer(source, folder)
            progress("feeds", 0.0)
            feeds = evidence.texts(options)
            reference.runner  # noqa: B018 (a model that cannot be run is refused before any work)
            calibrated = calibration(pipeline, reference, options.calibration, options.seed, feeds)
            if reference.whole:
                reference.close()
            progress("passes", 0.0)
            steps = run_passes(pipeline, model, Context(spec, calibrated.feeds, options.seed), progress)
            ported = decoder.recognise(model)
            kept = _kept(model, pipeline)
            progress("save", 0.0)
            graph.save(model, folder / bundle.MODEL)
            model = graph.load(folder / bundle.MODEL)
            lowered = _lower(standard(model), spec, folder, ported, progress)
            found = measured(evidence, feeds, model, ported, folder, progress)
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
                placement=lowered.placement,
                attention=found.heads,
                recomputed=found.recomputed,
                memory=figures.of(source, model, lowered, ported, evidence.plan, watch),
                seconds={"conversion": Figure(time.perf_counter() - started, "s", "measured")},
                budget=allowed,
                calibration=calibrated.facts,
                repeat=options.repeat,
                versions=facts["versions"],
            )
            _write_reports(report, folder)
            _hold_budget(report, options)
    return report


def _kinds(spec: TargetSpec, *, executed: bool) -> dict[str, str]:
    """How the lowered program's drift came about: by the target itself, or by what computes as it would."""
    return {} if executed or spec.family == "host" else dict.fromkeys(("total", "lowering"), "simulated")


def _hold_budget(report: DriftReport, options: Options) -> None:
    if not report.ok and not options.keep:
        raise over_budget(report)


def _checked(progress: Progress, watch: memory.Watch) -> Progress:
    """The progress that is told, of stages whose memory is watched."""

    def told(stage: str, fraction: float) -> None:
        watch.enter(stage)
        progress(stage, fraction)

    return told


def _kept(model: ir.Model, pipeline: Pipeline) -> list[select.Kept]:
    """Matrices that stay floats although a pass of the pipeline casts weights."""
    return select.kept(model.graph) if any(isinstance(p, WeightPass) for p in pipeline.passes) else []


def run_passes(pipeline: Pipeline, model: ir.Model, context: Context, progress: Progress) -> list[Step]:
    """Run the pipeline, telling how far it is; each node then says which pass made it what it is."""
    done, provenance = 0, Provenance(model)

    def watch(step: object, model: ir.Model) -> None:
        nonlocal done
        if done:
            provenance.after(pipeline.passes[done - 1].name, model)
        progress("passes", done / len(pipeline.passes))
        done += 1

    steps = pipeline.run(model, context, watch)
    if done:
        provenance.after(pipeline.passes[done - 1].name, model)
    return steps


def over_budget(report: DriftReport) -> DriftError:
    """The refusal, with the report on it."""
    what = "; ".join(str(v) for v in report.violations)
    error = DriftError("PORT-0605", f"the lowered program is over budget: {what}",
                       hint="--keep writes the bundle all the same")  # fmt: skip
    error.report = report  # type: ignore[attr-defined]
    return error


def _lower(
    model: ir.Model, spec: TargetSpec, folder: Path, ported: decoder.Decoder, progress: Progress
) -> Plan:
    """Lower the model as saved, so that weights are mapped from the bundle and not computed again."""
    progress("lower", 0.0)
    from porter.lower.lower import lower

    return lower(model, spec, folder, _bounds(model, ported), lambda f: progress("lower", f))


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


def _write_reports(report: DriftReport, folder: Path) -> None:
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.html").write_text(html.to_html(report), encoding="utf-8")
    (folder / "report.junit.xml").write_text(junit.to_xml(report), encoding="utf-8")


def _facts(source: Path, spec: TargetSpec, pipeline: Pipeline, options: Options) -> dict[str, Any]:
    return {
        "source": {"name": source.name, "sha256": graph.digest(source)},
        "target": spec.to_dict(),
        "pipeline": str(pipeline),
        "seed": options.seed,
        "machine": platform.machine(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
    return {"porter": __version__, **{p: importlib.metadata.version(p) for p in packages}}

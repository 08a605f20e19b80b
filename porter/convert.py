"""The straight path: an ONNX file goes in, a bundle and its drift report come out."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from porter import __version__, bundle, decoder, graph, kv, registry, target
from porter.calibrate.feeds import calibration
from porter.context import Context
from porter.drift import budget as budgets
from porter.drift.measure import Runnable, feeds_for, measure, tokenizer_files
from porter.errors import DriftError, OptionError
from porter.kvgraph.graph import BITS, BYTES, CAPACITY
from porter.pipeline import Pipeline, Step
from porter.report import html, junit
from porter.report.report import DriftReport, Figure, Stage
from porter.run.reference import ReferenceRunner
from porter.target import TargetSpec
from porter.weights import select
from porter.weights.base import WeightPass

if TYPE_CHECKING:
    from porter.lower.plan import Plan
    from porter.run.host import HostRunner

MAX_BATCH = 8  # rows that one step may have; memory is planned for them
MAX_STEP = 512  # tokens that one step may feed; longer prompts are fed in pieces
MAX_CONTEXT = 4096  # cached tokens, where the model allows more and --context does not ask for it
# Passes that a form of quantized weights adds at the end.
FORMS = {"onnx": "", "contrib": ",quantize.contrib"}

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What a conversion may be told. Paths and texts are as the command line takes them."""

    target: str = "host"
    weights: str = ""
    kv: str = ""
    method: str = ""  # how weights are cast; "" rounds them to nearest
    activations: str = ""
    form: str = "onnx"  # or contrib: how bundle/model.onnx spells quantized weights
    pipeline: str = ""
    budget: str = ""
    data: str = ""
    seed: int = 0
    context: int = 0
    keep: bool = False
    calibration: str = ""
    repeat: str = ""  # the command that does this again, for the report
    progress: Progress = field(default=lambda stage, fraction: None, compare=False)


def convert(source: Path, out: Path, options: Options) -> DriftReport:
    """Port `source` and write the bundle `out`; the report says what the passes and the lowering cost.

    With a budget, raises DriftError PORT-0605 and leaves no bundle when the lowered program drifts past it
    (unless `options.keep`); the error's `report` holds the figures. Other failures are PorterErrors of the
    step they happen in, and leave nothing behind either.
    """
    started, progress = time.perf_counter(), options.progress
    spec, allowed = target.load(options.target), budgets.parse(options.budget)
    pipeline = Pipeline.parse(pipeline_text(spec, options))
    with bundle.writing(out) as folder:
        progress("load", 0.0)
        model = graph.load(source)
        graph.check_finite(model)
        _copy_tokenizer(source, folder)
        progress("feeds", 0.0)
        reference = Runnable.of(source)
        feeds = feeds_for(reference, options.data, options.seed)
        calibrated = calibration(pipeline, reference, options.calibration, options.seed, feeds)
        progress("passes", 0.0)
        context = Context(spec, calibrated.feeds, options.seed)
        steps = run_passes(pipeline, model, context, progress)
        ported = decoder.recognise(model)
        kept = _kept(model, pipeline)
        graph.save(model, folder / bundle.MODEL)
        lowered = _lower(_standard(graph.load(folder / bundle.MODEL)), spec, folder, ported, progress)
        progress("measure", 0.0)
        runners = {"passes": ReferenceRunner(folder / bundle.MODEL), "total": _host(folder)}
        ports = {n: Runnable.over(n, r, ported, model, reference.words) for n, r in runners.items()}
        drift = measure(reference, ports, feeds, lambda f: progress("measure", f))
        facts = _facts(source, spec, pipeline, options) | {"calibration": dict(calibrated.facts)}
        bundle.write_manifest(folder, ported, facts)
        report = DriftReport.of(
            drift,
            feeds.to_json(),
            model=facts["source"],
            target=spec.name,
            pipeline=str(pipeline),
            stages=[Stage(s.name, s.promise.value, s.edits, s.seconds) for s in steps],
            kept=kept,
            memory=_memory(source, lowered) | _cache(model),
            seconds={"conversion": Figure(time.perf_counter() - started, "s", "measured")},
            budget=allowed,
            calibration=calibrated.facts,
            repeat=options.repeat,
            versions=facts["versions"],
        )
        _write_reports(report, folder)
        if not report.ok and not options.keep:
            raise over_budget(report)
    return report


def pipeline_text(spec: TargetSpec, options: Options) -> str:
    """The target's pipeline with its slots filled, or the user's own.

    Raises OptionError PORT-0830 for a format or scheme that the target's kernels do not read, PORT-0835
    for both a pipeline and options that fill the target's, PORT-0258 and PORT-0259 for a method or form that
    is none.
    """
    if options.form not in FORMS:
        what = f"there is no form {options.form!r}"
        raise OptionError("PORT-0259", what, where="--form", hint=f"forms: {', '.join(FORMS)}")
    if options.pipeline:
        if options.weights or options.kv or options.context or options.method or options.activations:
            what = "--pipeline says all that is done; --weights, --kv and --context would change nothing"
            raise OptionError("PORT-0835", what, hint="write them into the pipeline, or leave it out")
        return options.pipeline + FORMS[options.form]
    limit = f"{{capacity={options.context}}}" if options.context else ""
    text = spec.pipeline.replace("kv.static_cache", f"kv.static_cache{limit}")
    for slot, filled in (("weights", _weights_text(spec, options)), ("kv", _kv_text(spec, options))):
        text = text.replace(f"{{{slot}}}", filled)
    return text + FORMS[options.form]


def _weights_text(spec: TargetSpec, options: Options) -> str:
    """The passes that cast weights and activations."""
    name, method = spec.flavour(options.weights) or "fp32", options.method or "rtn"
    if not spec.reads(name):
        raise _not_offered(spec, "weights", options.weights, spec.weights)
    if options.method:
        methods = [m for m in registry.builtin() if m.startswith("quantize.") and casts_weights(m)]
        known = [m.removeprefix("quantize.") for m in methods]
        if method not in known:
            what = f"there is no method {method!r}"
            raise OptionError("PORT-0258", what, where="--method", hint=f"methods: {', '.join(known)}")
        if name == "fp32":
            what = "--method says how weights are cast, and nothing says to which format"
            raise OptionError("PORT-0258", what, hint="give --weights FORMAT too, as int4-g32")
    texts = [f"quantize.{method}{{format={name}}}"] if name != "fp32" else []
    if options.activations not in ("", "fp32"):
        wanted = spec.flavour(options.activations)
        if wanted not in spec.activations:
            raise _not_offered(spec, "activations", options.activations, spec.activations)
        texts.append(f"quantize.activations{{format={wanted}}}")
    return ",".join(texts)


def _kv_text(spec: TargetSpec, options: Options) -> str:
    """The pass that quantizes the cache; the text of --kv is that of its options, the scheme's name first."""
    words = options.kv.split() or ["fp32"]
    name = words[0].removeprefix("scheme=")
    if "=" in name:
        name, words = "fp16", ["fp16", *words]
    elif name not in spec.kv:
        raise _not_offered(spec, "kv", name, spec.kv)
    kv.parse(" ".join(words))
    return "kv.quantize{" + " ".join([f"scheme={name}", *words[1:]]) + "}" if words != ["fp32"] else ""


def _not_offered(spec: TargetSpec, slot: str, asked: str, offered: tuple[str, ...]) -> OptionError:
    what = f"{spec.name} has no {slot} format {asked!r}"
    return OptionError("PORT-0830", what, where=f"--{slot}", hint=f"it has: {', '.join(offered)}")


def casts_weights(name: str) -> bool:
    """Whether the pass of that name is a method that casts weights."""
    found = registry.find(name)
    return isinstance(found, type) and issubclass(found, WeightPass)


def _kept(model: ir.Model, pipeline: Pipeline) -> list[select.Kept]:
    """Matrices that stay floats although a pass of the pipeline casts weights."""
    return select.kept(model.graph) if any(isinstance(p, WeightPass) for p in pipeline.passes) else []


def _standard(model: ir.Model) -> ir.Model:
    """The model in the standard operators that the lowering reads."""
    if "com.microsoft" in model.opset_imports:
        Pipeline.parse("clean.contrib,clean.dead").run(model, Context())
    return model


def run_passes(pipeline: Pipeline, model: ir.Model, context: Context, progress: Progress) -> list[Step]:
    """Run the pipeline, telling how far it is."""
    done = 0

    def watch(step: object, model: ir.Model) -> None:
        nonlocal done
        progress("passes", done / len(pipeline.passes))
        done += 1

    return pipeline.run(model, context, watch)


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


def _host(folder: Path) -> HostRunner:
    from porter.run.host import HostRunner

    return HostRunner(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files that lie beside the model into the bundle."""
    for file in tokenizer_files(source):
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "tokenizer" / file.name)


def _memory(source: Path, plan: Plan) -> dict[str, Figure]:
    return {
        "weights of the source": Figure(graph.weight_bytes(graph.load(source)), "bytes", "measured"),
        "weights of the port": Figure(sum(w["bytes"] for w in plan.weights), "bytes", "measured"),
        "workspace": Figure(plan.workspace_bytes, "bytes", "estimated"),  # planned, for the largest step
        "workspace, lower bound": Figure(plan.lower_bound_bytes, "bytes", "estimated"),
    }


def _cache(model: ir.Model) -> dict[str, Figure]:
    """What a quantized cache takes; nothing for one of floats."""
    about = model.metadata_props
    if BYTES not in about:
        return {}
    held = f"KV cache, {about[CAPACITY]} tokens x batch 1"
    return {
        held: Figure(int(about[BYTES]), "bytes", "estimated"),  # planned
        "KV cache, scales and windows included": Figure(float(about[BITS]), "bits per value", "estimated"),
    }


def _write_reports(report: DriftReport, folder: Path) -> None:
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.html").write_text(html.to_html(report), encoding="utf-8")
    (folder / "report.junit.xml").write_text(junit.to_xml(report), encoding="utf-8")


def _facts(source: Path, spec: TargetSpec, pipeline: Pipeline, options: Options) -> dict[str, Any]:
    return {
        "source": {"name": source.name, "sha256": graph.digest(source)},
        "target": spec.model_dump(mode="json"),
        "pipeline": str(pipeline),
        "seed": options.seed,
        "machine": platform.machine(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
    return {"porter": __version__, **{p: importlib.metadata.version(p) for p in packages}}

"""Trial: an assignment's passes run on the whole model, and measured on all feeds in ONNX Runtime."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from porter import bundle, decoder, graph
from porter.calibrate.feeds import Calibration, calibration
from porter.context import Context
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import Runnable, measure
from porter.drift.measures import Drift
from porter.evidence import Evidence, standard
from porter.options import Options
from porter.pipeline import Pipeline
from porter.run.reference import ReferenceRunner
from porter.target import TargetSpec


@dataclass
class Trials:
    """What all trials of a conversion share: `start` is the model after the passes before its weights are
    cast; calibration feeds are made once, when they are wanted."""

    start: ir.Model
    spec: TargetSpec
    options: Options
    evidence: Evidence
    feeds: TokenFeeds
    calibrated: Calibration | None = None

    def drift(self, text: str) -> Drift:
        """The drift of the model after the pipeline `text` from the fp32 reference. Raises what passes do."""
        pipeline = Pipeline.parse(text)
        model = self.passed(pipeline)
        reference = self.evidence.reference
        with tempfile.TemporaryDirectory(prefix="porter-") as folder:
            path = Path(folder) / bundle.MODEL
            graph.save(standard(model), path)
            known = decoder.recognise(model)
            port = Runnable.over(
                "passes", lambda: ReferenceRunner(path), known, model, reference.words, whole=reference.whole
            )
            found = measure(
                reference, {"passes": port}, self.feeds, lambda f: None, Path(folder), self.evidence.single
            )
            port.close()
        return found["passes"].total

    def passed(self, pipeline: Pipeline) -> ir.Model:
        """The model after a pipeline that begins with what `start` is after."""
        model, begun = self.start.clone(), len(Pipeline.parse(before_weights(self.spec)).passes)
        rest = Pipeline(pipeline.passes[begun:])
        rest.run(model, Context(self.spec, self._calibrated(pipeline).feeds, self.options.seed))
        return model

    def _calibrated(self, pipeline: Pipeline) -> Calibration:
        if not any(p.calibrates for p in pipeline.passes):
            return Calibration()
        if self.calibrated is None:
            asked = self.options
            self.calibrated = calibration(
                pipeline, self.evidence.reference, asked.calibration, asked.seed, self.feeds
            )
        return self.calibrated


def before_weights(spec: TargetSpec) -> str:
    """The passes of a target's pipeline that come before its weights are cast."""
    return spec.pipeline.partition("{weights}")[0]


def straight(options: Options, text: str) -> Options:
    """The options of the conversion that runs `text`, and only that."""
    pipeline = Pipeline.parse(text)
    quantized = any(p.name == "kv.quantize" for p in pipeline.passes)
    return replace(
        options,
        pipeline=text,
        weights="",
        kv="",
        method="",
        activations="",
        minimize="",
        context=0,
        calibration=options.calibration if any(p.calibrates for p in pipeline.passes) else "",
        decode=options.decode if quantized else 0,
    )

"""What models lose on each target's numerics: mean KL of the lowered program, run on a CPU, against float32.

python benchmarks/targets.py --models FOLDER [--model NAME …] [--target NAME …] [--format fp32 …] [--work W]

Formats: `fp32` (what the export holds, in the operands that the target makes of it), `fp8` (weights and,
where the target multiplies it natively, activations in its own flavour), `int4` (its int4 weights), `mxfp4`,
where it is native. Rows come out as they are done, a table of Markdown, with the placement of the weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from porter import target
from porter.convert import convert
from porter.export import export
from porter.options import Options
from porter.report.report import DriftReport

DECODERS = ("stories260k", "babyllama-char-1m")
FORMATS = ("fp32", "fp8", "int4", "mxfp4")


def options(name: str, form: str) -> Options | None:
    """What to convert with; None where the target has no such row."""
    spec = target.load(name)
    native = tuple(spec.matrix.formats) if spec.matrix else ()
    if form == "fp32":
        return Options(target=name)
    if form == "fp8":
        flavour = spec.flavour("fp8")
        both = flavour in native and flavour in spec.activations
        return Options(target=name, weights="fp8", activations="fp8" if both else "")
    if form == "mxfp4" and "mxfp4" not in native:
        return None
    return Options(target=name, weights=form)


def row(report: DriftReport, name: str, form: str) -> str:
    """| target | format | KL | of the lowering | weights |"""
    total, lowering = (report.drift[key] for key in ("total", "lowering"))
    weights = "; ".join(str(p) for p in report.placement if p.tensors == "weights")
    figures = f"{total.kl_mean:.2e} ± {total.kl_ci95:.1e} | {lowering.kl_mean:.2e}"
    return f"| {name} | {form} | {figures} | {weights or 'float32'} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=os.environ.get("PORTER_MODELS"), required=False)
    parser.add_argument("--model", nargs="*", default=DECODERS)
    parser.add_argument("--target", nargs="*", default=target.names())
    parser.add_argument("--format", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        for model in given.model:
            source = work / model / "model.onnx"
            if not source.exists():
                source.parent.mkdir(parents=True, exist_ok=True)
                export(str(given.models / model), source)
            print(f"\n{model}\n\n| target | format | KL | of the lowering | weights |\n|---|---|---|---|---|")
            for name in given.target:
                for form in given.format:
                    if (found := options(name, form)) is not None:
                        report = convert(source, work / model / "bundle", found)
                        print(row(report, name, form), flush=True)


if __name__ == "__main__":
    main()

"""Measure what every weight format and method costs: the tables of docs/benchmarks.md.

python benchmarks/formats.py --models FOLDER [--only PATTERN] [--jobs 2] [--json FILE]

Each row is one `porter convert`: its lowered program against the fp32 source on the first 25 stories of the
excerpt, every token of them. Methods that look at activations see text that the model writes itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

from porter import formats
from porter.formats import Format

STORIES = 25
MODELS = ("babyllama-char-1m", "stories260k")
ELEMENTS = ("fp32", "bf16", "fp16", "int8", "uint8", "fp8-e4m3fn", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3fnuz")
ELEMENTS += ("fp8-e5m2fnuz", "fp8-e4m3b11fnuz", "fp8-e3m4", "fp8-e4m3fn-t", "fp8-e4m3fn-b128")
BLOCKS = ("mxfp8", "mxfp8-e5m2", "mxint8", "mx9", "mxfp6-e2m3", "mxfp6-e3m2", "mx6", "nvfp4", "mxfp4")
GROUPS = ("int4-g32", "uint4-g32", "int4-g128", "int3-g32", "uint3-g32", "int2-g32", "uint2-g32")
METHODS = ("hqq", "kquant", "gptq", "awq")
METHOD_FORMATS = ("int4-g32", "uint4-g32", "int3-g32", "uint3-g32", "uint2-g32", "mxfp4", "nvfp4")
ACTIVATIONS = (("int8", "rtn", "int8"), ("int8", "smoothquant", "int8"), ("fp8-e4m3fn", "rtn", "fp8-e4m3fn"))


@dataclass(frozen=True)
class Row:
    """One conversion; `activations` is "" when they stay floats."""

    model: str
    weights: str
    method: str = "rtn"
    activations: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.weights, self.method, self.activations)))


def rows() -> list[Row]:
    """All of them, in the order of the tables."""
    plain = [(w, "rtn", "") for w in (*ELEMENTS, *BLOCKS, *GROUPS)]
    methods = [(w, m, "") for w in METHOD_FORMATS for m in METHODS if reads(m, w)]
    return [Row(model, *each) for model in MODELS for each in (*plain, *methods, *ACTIVATIONS)]


def reads(method: str, weights: str) -> bool:
    """HQQ fits a zero point that is no code, so it wants unsigned codes; k-quants fit integers."""
    if method == "hqq":
        return weights.startswith("uint")
    return method != "kquant" or "int" in weights


def measure(row: Row, source: Path, stories: Path) -> dict[str, object]:
    """Convert and read the report."""
    from porter.convert import Options, convert

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        asked = {} if row.weights == "fp32" else {"weights": row.weights, "method": row.method}
        options = Options(**asked, activations=row.activations, data=str(stories))
        report = convert(source, out, options)
        size = sum(f.stat().st_size for f in out.glob("model.onnx*"))
    drift = report.drift["total"].to_json()
    return {
        "model": row.model,
        "weights": row.weights,
        "method": row.method,
        "activations": row.activations,
        "bits": stored(row).bits_per_weight(*SHAPES[row.model]),
        "bytes": size,
        **{key: drift[key] for key in ("ppl", "kl_mean", "kl_p999", "top1", "tokens")},
    }


def stored(row: Row) -> Format:
    """The format as the method stores it: HQQ and k-quants give unsigned codes a float32 zero point."""
    form = formats.parse(row.weights)
    real = form.zero and row.method in ("hqq", "kquant")
    return dataclasses.replace(form, zero="real") if real else form


SHAPES = {"babyllama-char-1m": (352, 128), "stories260k": (172, 64)}  # of gate and up, most of the weights


def export_once(name: str, models: Path, work: Path) -> Path:
    """The model's ONNX file."""
    from porter.export import export

    out = work / name / "model.onnx"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        export(str(models / name), out)
    return out


def table(found: list[dict[str, object]]) -> str:
    """Markdown, one table a model."""
    lines = []
    for model in MODELS:
        lines += [
            f"\n{model}\n",
            "| weights | method | bits | ppl | mean KL | KL 99.9 % | top-1 | file, kB |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for r in (r for r in found if r["model"] == model):
            method = f"{r['method']}, {r['activations']} activations" if r["activations"] else r["method"]
            lines.append(
                f"| {r['weights']} | {method} | {r['bits']:.2f} | {r['ppl']:.4f} | {r['kl_mean']:.2e} "
                f"| {r['kl_p999']:.2e} | {r['top1']:.4f} | {r['bytes'] / 1000:.0f} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "--models", type=Path, default=os.environ.get("PORTER_MODELS", root.parent / "shared/models")
    )
    parser.add_argument("--only", default="*", help="pattern of MODEL/WEIGHTS/METHOD[/ACTIVATIONS]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, help="keep the figures here; rows that are there are not run again"
    )
    given = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kept = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    todo = [r for r in rows() if fnmatchcase(f"{r.model}/{r}", given.only)]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        texts = json.loads((given.models / "eval-text" / "tinystories_excerpt.json").read_text())
        texts = next(iter(texts.values())) if isinstance(texts, dict) else texts
        stories = work / "stories.json"
        stories.write_text(json.dumps(texts[:STORIES]))
        sources = {name: export_once(name, given.models, work) for name in {r.model for r in todo}}
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            jobs = {
                r: pool.submit(measure, r, sources[r.model], stories)
                for r in todo
                if f"{r.model}/{r}" not in kept
            }
            for row, job in jobs.items():
                try:
                    kept[f"{row.model}/{row}"] = job.result()
                except Exception as error:
                    print(f"{row.model} {row}: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                print(kept[f"{row.model}/{row}"], file=sys.stderr)
                if given.json:
                    given.json.write_text(json.dumps(kept, indent=1))
    found = [kept[f"{r.model}/{r}"] for r in todo if f"{r.model}/{r}" in kept]
    print(table(found))
    return 0 if len(found) == len(todo) else 1


if __name__ == "__main__":
    sys.exit(main())

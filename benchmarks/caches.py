"""Measure what every scheme of the KV cache costs: the tables of docs/benchmarks.md.

python benchmarks/caches.py --models FOLDER [--only PATTERN] [--jobs 2] [--json FILE]

Each row is one `porter convert`: its lowered program against the fp32 source on real text that fills the
context, every token decoded through the cache one at a time. With int4-g32 weights, what the cache costs is
the difference to the row of that model with an fp32 cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 4096  # of text for each model, in sequences as long as its context
MODELS = ("stories260k", "babyllama-char-1m", "bitllama-3m", "pycode-5m")
WEIGHTS = ("fp32", "int4-g32")
# The windows of published schemes hold half of these models' contexts: the same schemes with smaller ones.
SMALL = (
    "kivi2 recent=32",
    "kivi4 recent=32",
    "innerq recent=32 sink=4",
    "innerq-small recent=32 sink=4",
    "innerq-hybrid recent=32 sink=4",
    "triaxial recent=32",
)
FULL = 1 << 20  # more single tokens before each context length than there are: all of them


@dataclass(frozen=True)
class Row:
    """One conversion."""

    model: str
    scheme: str
    weights: str

    def __str__(self) -> str:
        return f"{self.model}/{self.scheme}/{self.weights}"


def rows() -> list[Row]:
    """All of them, in the order of the tables."""
    from porter.kv import PRESETS

    names = {"fp32": [*PRESETS, *SMALL], "int4-g32": [*PRESETS]}
    return [
        Row(model, scheme, weights) for model in MODELS for weights in WEIGHTS for scheme in names[weights]
    ]


def measure(row: Row, source: Path, text: Path) -> dict[str, object]:
    """Convert and read the report."""
    from porter import graph, kv
    from porter.convert import Options, convert

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        asked = {} if row.weights == "fp32" else {"weights": row.weights}
        asked |= {} if row.scheme == "fp32" else {"kv": row.scheme, "decode": FULL}
        report = convert(source, out, Options(**asked, data=str(text)))
    drift = report.drift["total"].to_json()
    layers, heads, size, capacity = shape(graph.load(source))
    bits = kv.bits_per_value(kv.parse(row.scheme), size, heads, capacity, layers)
    lengths = {str(c["tokens"]): c["kl_mean"] for c in report.context}
    worst = max(report.attention, key=lambda h: h.tv, default=None)
    return {
        "model": row.model,
        "scheme": row.scheme,
        "weights": row.weights,
        "bits": bits,
        **{key: drift[key] for key in ("ppl", "kl_mean", "kl_p999", "top1", "tokens")},
        "kl_by_context": lengths,
        "tv": sum(h.tv for h in report.attention) / len(report.attention) if report.attention else 0.0,
        "worst_head": [worst.layer, worst.head, worst.tokens, worst.tv] if worst else None,
    }


def shape(model: object) -> tuple[int, int, int, int]:
    """A decoder's layers, KV heads, head size and context."""
    from porter import decoder

    known = decoder.recognise(model)
    inputs = {v.name: v for v in model.graph.inputs}
    _, heads, _, size = inputs[known.caches[0].past].shape
    return len({c.layer for c in known.caches}), heads, size, known.context


def export_once(name: str, models: Path, work: Path) -> Path:
    """The model's ONNX file."""
    from porter.export import export

    out = work / name / "model.onnx"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        os.environ["BITLLAMA"] = str(models / "bitllama-3m")
        factory = ROOT / "samples" / "02-own-model" / "bitllama.py"
        export(f"{factory}:bitllama" if name.startswith("bitllama") else str(models / name), out)
    return out


def text_once(source: Path, models: Path, tokens: int) -> Path:
    """Tokens of real text beside the model, .npy [sequences, context + 1]: its own validation set, or stories
    one after the other, each after the token that begins a text."""
    from porter.drift.measure import Runnable

    model = Runnable.of(source)
    length = model.decoder.context + 1
    given = models / source.parent.name / "val_tokens.npy"
    if given.exists():
        stream = np.load(given).reshape(-1).astype(np.int64)
    else:
        texts = json.loads((models / "eval-text" / "tinystories_excerpt.json").read_text())
        texts = next(iter(texts.values())) if isinstance(texts, dict) else texts
        stream = np.concatenate([model.words.encode(text) for text in texts])
    count = max(1, min(tokens, len(stream)) // length)
    path = source.parent / "text.npy"
    np.save(path, stream[: count * length].reshape(count, length))
    return path


def table(found: list[dict[str, object]]) -> str:
    """Markdown, one table a model and type of weights."""
    lines = []
    for model, weights in dict.fromkeys((r["model"], r["weights"]) for r in found):
        mine = [r for r in found if (r["model"], r["weights"]) == (model, weights)]
        lengths = list(dict.fromkeys(n for r in mine for n in r["kl_by_context"]))
        lines += [f"\n{model}, {weights} weights\n"]
        heads = ["cache", "bits", "ppl", "mean KL", "KL 99.9 %", "top-1", *(f"KL ≤ {n}" for n in lengths)]
        heads += ["TV, mean", "TV, worst head"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for r in mine:
            by_length = (f"{r['kl_by_context'].get(n, float('nan')):.2e}" for n in lengths)
            cells = [r["scheme"], f"{r['bits']:.2f}", f"{r['ppl']:.4f}", f"{r['kl_mean']:.2e}"]
            cells += [f"{r['kl_p999']:.2e}", f"{r['top1']:.4f}", *by_length, f"{r['tv']:.4f}"]
            layer, head, n, tv = r["worst_head"] or ("", "", "", 0.0)
            cells += [f"{tv:.3f} (layer {layer} head {head}, {n})" if r["worst_head"] else "–"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run the rows that are asked for; those that a conversion refuses are named and left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    models = os.environ.get("PORTER_MODELS", ROOT.parent / "shared" / "models")
    parser.add_argument("--models", type=Path, default=models)
    parser.add_argument("--only", default="*", help="pattern of MODEL/SCHEME/WEIGHTS")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of text for each model")
    parser.add_argument("--json", type=Path, help="keep the figures here; rows that are there are not run")
    parser.add_argument("--work", type=Path, help="keep exported models here")
    given = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kept = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    todo = [r for r in rows() if fnmatchcase(str(r), given.only)]
    new = [r for r in todo if str(r) not in kept]
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        sources = {name: export_once(name, given.models, work) for name in {r.model for r in new}}
        texts = {name: text_once(source, given.models, given.tokens) for name, source in sources.items()}
        failed = run(new, sources, texts, given, kept)
    print(table([kept[str(r)] for r in todo if str(r) in kept]))
    return 1 if failed else 0


def run(
    new: list[Row], sources: dict[str, Path], texts: dict[str, Path], given: argparse.Namespace, kept: dict
) -> int:
    """Add the rows' figures to `kept` as they come; the answer is how many broke, refusals not counted."""
    from porter.errors import PorterError

    failed = 0
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {r: pool.submit(measure, r, sources[r.model], texts[r.model]) for r in new}
        for row, job in jobs.items():
            try:
                kept[str(row)] = job.result()
            except PorterError as error:
                print(f"{row}: refused: {error}", file=sys.stderr)
                continue
            except Exception as error:
                failed += 1
                print(f"{row}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            print(kept[str(row)], file=sys.stderr)
            if given.json:
                given.json.write_text(json.dumps(kept, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())

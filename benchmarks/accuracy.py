"""Measure the accuracy figures of docs/benchmarks.md: lowered programs against ONNX Runtime.

python benchmarks/accuracy.py --models FOLDER [logits] [greedy] [perplexity] [--limit N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from porter.convert import Options, convert
from porter.drift.compare import perplexity
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import Runnable
from porter.export import export
from porter.run.decode import generate

ROOT = Path(__file__).resolve().parent.parent
DECODERS = ("stories260k", "babyllama-char-1m", "bitllama-3m")
TOLERANCE = 1e-4  # of the logits, whose scale is about 10: 100 float32 roundings of the largest


def exported(name: str, models: Path, work: Path) -> Path:
    """The model's ONNX file, exported when it is not there yet."""
    out = work / name / "model.onnx"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        os.environ["BITLLAMA"] = str(models / "bitllama-3m")
        factory = ROOT / "samples" / "02-own-model" / "bitllama.py"
        export(f"{factory}:bitllama" if name.startswith("bitllama") else str(models / name), out)
    return out


def ported(name: str, models: Path, work: Path, **options: object) -> Runnable:
    """The model's bundle, opened."""
    tag = "-".join(f"{k}-{v}" for k, v in options.items()) or "fp32"
    out = work / name / tag
    if not out.exists():
        data = "random" if name.startswith("minilm") else ""
        convert(exported(name, models, work), out, Options(data=data, **options))
    return Runnable.of(out)


def logits(models: Path, work: Path) -> bool:
    """Largest difference to ONNX Runtime over batch 1 and 3, past 0, 1, 7 and full context."""
    good = True
    for name in DECODERS:
        reference, port = Runnable.of(exported(name, models, work)), ported(name, models, work)
        context = reference.decoder.context
        for batch in (1, 3):
            for past in (0, 1, 7, context - 1):
                tokens = np.random.default_rng(past).integers(
                    3, reference.vocabulary, (batch, context), dtype=np.int64
                )
                steps = [n for n in (past, min(5, context - past)) if n]
                worst = _steps(reference, port, tokens, batch, steps)
                good &= worst < TOLERANCE
                print(f"{name:18} batch {batch} past {past:4}: max |Δlogit| {worst:.2e} (measured)")
    return good & _encoder(models, work)


def _steps(reference: Runnable, port: Runnable, tokens: np.ndarray, batch: int, steps: list[int]) -> float:
    a, b, at, worst = reference.session(batch), port.session(batch), 0, 0.0
    for n in steps:
        piece = tokens[:, at : at + n]
        worst, at = max(worst, float(np.abs(a.step(piece) - b.step(piece)).max())), at + n
    return worst


def _encoder(models: Path, work: Path) -> bool:
    reference, port = (
        f("minilm-l6-v2", models, work) for f in (lambda *a: Runnable.of(exported(*a)), ported)
    )
    worst = 0.0
    for batch, length in ((1, 1), (1, 7), (3, 40), (2, 512)):
        tokens = np.random.default_rng(length).integers(1000, 30000, (batch, length), dtype=np.int64)
        mask = (np.arange(length) < np.linspace(length, max(1, length // 2), batch)[:, None]).astype(np.int64)
        found = np.abs(reference.encode(tokens, mask) - port.encode(tokens, mask))[mask.astype(bool)].max()
        worst = max(worst, float(found))
        print(f"{'minilm-l6-v2':18} batch {batch} length {length:4}: max |Δhidden| {found:.2e} (measured)")
    return worst < TOLERANCE


def greedy(models: Path, work: Path) -> bool:
    """200 greedy tokens, the same from the lowered program as from ONNX Runtime."""
    good = True
    for name in DECODERS:
        runs = []
        for model in (Runnable.of(exported(name, models, work)), ported(name, models, work)):
            runs.append(list(generate(model.session(1), [1], 200, eos=())))
        same = runs[0] == runs[1] and len(runs[0]) == 200
        good &= same
        print(f"{name:18} 200 greedy tokens identical: {same}")
    return good


def perplexities(models: Path, work: Path, limit: int) -> bool:
    """babyllama on the excerpt through the lowered program (references: the models' READMEs)."""
    name = "babyllama-char-1m"
    texts = json.loads((models / "eval-text" / "tinystories_excerpt.json").read_text())
    texts = next(iter(texts.values())) if isinstance(texts, dict) else texts
    rows = [("fp32", {}, 2.331, 0.001), ("int8", {"weights": "int8"}, 2.331, 0.005),
            ("fp8", {"weights": "fp8"}, None, None), ("int4-g32", {"weights": "int4-g32"}, None, 2.45),
            ("kv int8", {"kv": "int8"}, None, None), ("kv int4", {"kv": "int4"}, None, None)]  # fmt: skip
    good = True
    for label, options, wanted, bound in rows:
        port = ported(name, models, work, **options)
        found = {}
        for count in sorted({25, len(texts)} if not limit else {limit}):
            feeds = TokenFeeds(tuple(port.words.encode(t) for t in texts[:count]), "text", "excerpt")
            found[count] = perplexity(port.session, feeds, window=port.decoder.context).ppl
        final = found[max(found)]
        if not limit and bound is not None:
            good &= abs(final - wanted) <= bound if wanted else final < bound
        print(f"{label:10} " + ", ".join(f"{n} stories: {p:.4f}" for n, p in found.items()) + " (measured)")
    return good


def main() -> int:
    """Run what is asked for; 1 when a figure is out of its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["logits", "greedy", "perplexity"])
    parser.add_argument(
        "--models", type=Path, default=os.environ.get("PORTER_MODELS", ROOT.parent / "shared" / "models")
    )
    parser.add_argument("--work", type=Path, default=None, help="keep exports and bundles here")
    parser.add_argument("--limit", type=int, default=0, help="stories of the excerpt (0: 25 and all)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        runs = {
            "logits": lambda: logits(given.models, work),
            "greedy": lambda: greedy(given.models, work),
            "perplexity": lambda: perplexities(given.models, work, given.limit),
        }
        results = {what: runs[what]() for what in given.what}
    print(results)
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

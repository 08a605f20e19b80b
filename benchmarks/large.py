"""Convert a synthetic decoder of billions of weights under a memory limit, and say what it took.

python benchmarks/large.py [--size 1b|7b] [--formats int4-g32 fp8-e4m3fn] [--max-memory 3GiB] [--work FOLDER]

The model is written shard by shard (float32 noise, as large as a trained model's weights are), converted by
`porter convert` as a process of its own, whose memory is watched from outside, and removed again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import graph

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("decoders", ROOT / "tests" / "support" / "decoders.py")
decoders = sys.modules["decoders"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(decoders)

SIZES = {
    "100m": {
        "layers": 8,
        "hidden": 1024,
        "heads": 16,
        "kv_heads": 4,
        "head_size": 64,
        "ffn": 2816,
        "vocab": 8000,
    },
    "1b": {
        "layers": 22,
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 4,
        "head_size": 64,
        "ffn": 5632,
        "vocab": 32000,
    },
    "7b": {
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 32,
        "head_size": 128,
        "ffn": 11008,
        "vocab": 32000,
    },
}  # the last two: TinyLlama and Llama 2
BLOCK = 1 << 24  # random numbers that weights are cut from, each from another place


class Large(decoders.Builder):
    """Weights that are made when they are written."""

    def __post_init__(self) -> None:
        self.block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)

    def noise(self, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        if name not in self.weights:
            start, factor = (
                7919 * len(self.weights),
                np.float32(shape[-1] ** -0.5 if scale is None else scale),
            )

            def make() -> ir.Tensor:
                count = int(np.prod(shape))
                around = np.concatenate([self.block[start % BLOCK :], self.block[: start % BLOCK]])
                return ir.Tensor(np.resize(around * factor, count).reshape(shape), name=name)

            lazy = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
            kind = ir.TensorType(lazy.dtype)
            self.weights[name] = ir.Value(name=name, const_value=lazy, type=kind, shape=lazy.shape)
        return self.weights[name]


def write(size: str, path: Path) -> int:
    """Write the model; the number of its weights."""
    decoders.Builder, before = Large, decoders.Builder
    try:
        model = decoders.tiny_decoder(**SIZES[size], tied=False, fused=False, context=2048)
    finally:
        decoders.Builder = before
    graph.save(model, path)
    return graph.weight_bytes(model) // 4


def convert(model: Path, out: Path, form: str, limit: str, tokens: int) -> dict[str, object]:
    """Run `porter convert`; seconds, the report, and the largest memory that was seen, in bytes."""
    feeds = model.parent / "feeds.json"
    feeds.write_text(json.dumps(np.random.default_rng(1).integers(3, 8000, tokens + 1).tolist()))
    options = {"-o": out, "--weights": form, "--data": feeds, "--context": 256, "--max-memory": limit}
    given = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "porter", "convert", str(model), *given, "--json"]
    started, anonymous, stages = time.perf_counter(), 0, {}
    with (
        tempfile.TemporaryFile("w+") as answer,
        subprocess.Popen(command, stdout=answer, stderr=None) as process,
    ):
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            anonymous = max(anonymous, _kib(fields.get("RssAnon", "0 kB")))
            stages["resident"] = max(stages.get("resident", 0), _kib(fields.get("VmHWM", "0 kB")))
            time.sleep(0.02)
        answer.seek(0)
        text = answer.read()
    if process.returncode:
        sys.exit(f"{form}: porter convert ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - started,
        "anonymous": anonymous,
        **stages,
        "report": json.loads(text),
    }


def _kib(text: str) -> int:
    return 1024 * int(text.split()[0])


def main() -> int:
    """Write, convert, print, remove; 1 when a conversion took more memory than it was allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--formats", nargs="*", default=["int4-g32", "fp8-e4m3fn"])
    parser.add_argument("--max-memory", default="3GiB")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that drift is measured on")
    parser.add_argument(
        "--work", type=Path, default=None, help="keep the model here, and take it if it is there"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        model = work / f"{given.size}.onnx"
        if not model.exists():
            work.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            count = write(given.size, model)
            seconds = time.perf_counter() - started
            print(f"{given.size}: {count / 1e9:.2f} billion weights written in {seconds:.0f} s", flush=True)
        for form in given.formats:
            found = convert(model, work / "out", form, given.max_memory, given.tokens)
            _print(form, found)
            shutil.rmtree(work / "out")
    return 0


def _print(form: str, found: dict[str, object]) -> None:
    report, seen = found["report"], "measured from outside"
    print(f"{form}: {found['seconds']:.0f} s ({seen})")
    print(f"    {found['anonymous'] / 2**30:.2f} GiB at most that the kernel cannot drop ({seen})")
    print(f"    {found['resident'] / 2**30:.2f} GiB at most with pages of mapped files ({seen})", flush=True)
    for group in ("memory", "seconds"):
        for name, figure in report[group].items():
            print(f"    {name}: {figure['value']:.4g} {figure['unit']} ({figure['kind']})")
    print(f"    KL {report['drift']['total']['kl_mean']:.4f} on {report['drift']['total']['tokens']} tokens")


if __name__ == "__main__":
    sys.exit(main())

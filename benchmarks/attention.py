"""Time one token's attention over every cache layout, in one interleaved run.

python benchmarks/attention.py [--contexts 2048 8192] [--layouts fp16 kivi2 …] [--rounds 15] [--json FILE]

Head size 128, 32 query heads, 8 KV heads. Every round runs all layouts in a random order; a ratio
is the median over the rounds of (time of the other layout / time of this one) in the same round, with its
quartiles, so that what else the machine does falls on both. The same cache is read again and again: one of
fewer MiB than the processor's own cache is not read from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

LAYOUTS = ("fp32", "fp16", "int8", "int4", "kivi2", "kivi4")
LAYOUTS += ("innerq", "innerq-small", "innerq-hybrid", "turboquant4", "turboquant3")
SIZE, QUERY_HEADS, HEADS = 128, 32, 8
BASES = ("fp16", "kivi2", "kivi4")


class Layout:
    """A compiled kernel and a full cache of one layer."""

    def __init__(self, name: str, context: int, rng: np.random.Generator) -> None:
        from porter import target
        from porter.kv import parse
        from porter.lower import build
        from porter.lower.kernels.attention import Attention, attention
        from porter.lower.kernels.define import tvm
        from porter.lower.kernels.stored import Stored

        self.name, self.context = name, context
        scheme = parse(name)
        sides = [Stored(scheme, side, SIZE, context) for side in ("key", "value")]
        spec = Attention(QUERY_HEADS, HEADS, *sides, length=context, scale=SIZE**-0.5, causal=True,
                         offset="lengths")  # fmt: skip
        kernel = attention(spec).with_attr("global_symbol", "kernel")
        library = tvm.tirx.build(
            tvm.IRModule({"kernel": kernel}), target=build.tvm_target(target.load("host"))
        )
        self.kernel = library["kernel"]
        given = [
            b for side, letter in zip(sides, "kv", strict=True) for b in side.buffers(letter, HEADS, context)
        ]
        arrays = [_random(rng, suffix, (1, *shape[1:]), dtype) for suffix, shape, dtype in given]
        self.bytes = sum(a.nbytes for a in arrays)
        query = rng.standard_normal((1, QUERY_HEADS, 1, SIZE)).astype(np.float32)
        arrays = [query, *arrays, np.array([context]), np.zeros_like(query)]
        self.arguments = [tvm.runtime.tensor(a) for a in arrays]

    def run(self) -> float:
        """Processor seconds of one call: with one thread, what waits for other programs is left out."""
        start = time.process_time()
        self.kernel(*self.arguments)
        return time.process_time() - start


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max + 1, shape, dtype=kind)
    values = rng.random(shape, np.float32) - 0.5
    return (np.abs(values) * 0.1 if name.endswith("_scale") else values).astype(kind)


def measure(layouts: list[Layout], rounds: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Seconds of every layout in every round: the best of three calls, since others use the machine too."""
    times: dict[str, list[float]] = {layout.name: [] for layout in layouts}
    for layout in layouts:
        layout.run()
    for _ in range(rounds):
        for i in rng.permutation(len(layouts)):
            times[layouts[i].name].append(min(layouts[i].run() for _ in range(3)))
    return times


def row(layout: Layout, times: dict[str, list[float]]) -> dict[str, object]:
    """A layout's figures."""
    mine = np.array(times[layout.name])
    found: dict[str, object] = {
        "layout": layout.name,
        "context": layout.context,
        "ms": float(np.median(mine) * 1e3),
        "MiB": layout.bytes / 2**20,
        "GB/s": float(layout.bytes / np.median(mine) / 1e9),
    }
    for base in BASES:
        if base in times:
            found[f"over {base}"] = np.percentile(np.array(times[base]) / mine, (50, 25, 75)).tolist()
    return found


def text(rows: list[dict[str, object]]) -> str:
    """A table."""
    lines = []
    for found in rows:
        over = {n: v for n, v in found.items() if n.startswith("over ")}
        shown = [f"{name} {m:.2f} [{a:.2f}-{b:.2f}]" for name, (m, a, b) in over.items()]
        size = f"{found['MiB']:7.1f} MiB {found['GB/s']:6.2f} GB/s"
        name = f"{found['context']:6} {found['layout']:14} {found['ms']:8.3f} ms"
        lines.append("  ".join([name, size, *shown]))
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    rng, rows = np.random.default_rng(0), []
    for context in given.contexts:
        layouts = [Layout(name, context, rng) for name in given.layouts]
        times = measure(layouts, given.rounds, rng)
        rows += [row(layout, times) for layout in layouts]
        print(text(rows[-len(layouts) :]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Time one token's attention over every cache layout, in one interleaved run.

python benchmarks/attention.py [--contexts 2048 8192] [--layouts fp16 kivi2 …] [--rounds 15] [--threads 1]
    [--json FILE]

Head size 128, 32 query heads, 8 KV heads. As in decoding, each call reads the cache of another layer: there
are as many layers as make 256 MiB of fp16 cache, and every layout has so many, so that none of them is found
in the processor's own cache. Every round runs all layouts in a random order, each over all of its layers; a
ratio is the median over the rounds of (time of the other layout / time of this one) in the same round, with
its quartiles, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

LAYOUTS = ("fp32", "fp16", "int8", "int4", "kivi2", "kivi4")
LAYOUTS += ("kivi3", "innerq", "innerq-small", "innerq-hybrid", "turboquant4", "turboquant3")
KIVI3 = "key=uint3-g32-tokens-fp16 value=uint3-g32-fp16 recent=128"  # KIVI's layout with the bits of InnerQ
SIZE, QUERY_HEADS, HEADS = 128, 32, 8
BASES = ("fp16", "kivi2", "kivi3", "kivi4")
ENOUGH = 256 << 20  # bytes of fp16 caches; what is read again is then not in the processor's cache


class Layout:
    """A compiled kernel and full caches of some layers."""

    def __init__(self, name: str, context: int, rng: np.random.Generator) -> None:
        from porter import target
        from porter.kv import parse
        from porter.lower import build
        from porter.lower.kernels.attention import Attention, attention
        from porter.lower.kernels.define import tvm
        from porter.lower.kernels.stored import Stored

        self.name, self.context = name, context
        scheme = parse(KIVI3 if name == "kivi3" else name)
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
        query = rng.standard_normal((1, QUERY_HEADS, 1, SIZE)).astype(np.float32)
        rest = [tvm.runtime.tensor(a) for a in (query, np.array([context]), np.zeros_like(query))]
        arrays = [_random(rng, suffix, (1, *shape[1:]), dtype) for suffix, shape, dtype in given]
        self.bytes = sum(a.nbytes for a in arrays)
        layers = -(-ENOUGH // (2 * HEADS * context * SIZE * 2))
        self.layers = [[rest[0], *(tvm.runtime.tensor(a) for a in arrays), *rest[1:]] for _ in range(layers)]

    def run(self) -> float:
        """Seconds of one layer's attention, over a pass through all layers.

        With one thread they are the processor's: what waits for other programs is left out.
        """
        clock = time.process_time if os.environ["TVM_NUM_THREADS"] == "1" else time.perf_counter
        start = clock()
        for arguments in self.layers:
            self.kernel(*arguments)
        return (clock() - start) / len(self.layers)


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max + 1, shape, dtype=kind)
    values = rng.random(shape, np.float32) - 0.5
    return (np.abs(values) * 0.1 if name.endswith("_scale") else values).astype(kind)


def measure(layouts: list[Layout], rounds: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Seconds of every layout in every round."""
    times: dict[str, list[float]] = {layout.name: [] for layout in layouts}
    for layout in layouts:
        layout.run()
    for _ in range(rounds):
        for i in rng.permutation(len(layouts)):
            times[layouts[i].name].append(layouts[i].run())
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(given.threads)  # read when TVM is loaded
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

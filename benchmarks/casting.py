"""Measure casting beside ONNX Runtime's MatMulNBits quantizer and beside a plain copy, in one run.

python benchmarks/casting.py [--rounds 5] [--threads 1 2]

Every figure is of float32 bytes that go in, a second, the best of the rounds; the contestants take turns. A
run with fewer threads is a process of its own, kept to so many processors, whatever a library would take.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

SHAPES = (
    (4096, 4096),
    (4096, 11008),
)  # [N, K]: an attention's and a feed-forward's matrix of 7 billion weights
RUNTIME, COPY = "onnxruntime int4, blocks of 32", "copy of the file"
FORMATS = ("int4-g32", "uint4-g32", "int8", "fp8-e4m3fn", "mxfp4", "nvfp4")


Contestant = Callable[[], Callable[[], object]]  # prepares, and gives what is timed


def contestants(values: np.ndarray, folder: Path) -> dict[str, Contestant]:
    """What runs on the matrix [N, K]."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from porter import formats
    from porter.formats import packing
    from porter.lower import casting

    logging.disable(logging.INFO)
    product = _product(values)
    blob = product.SerializeToString()
    source = folder / "source.onnx"
    onnx.save(product, source, save_as_external_data=True, location="source.bin")

    def runtime() -> Callable[[], object]:
        return MatMulNBitsQuantizer(
            onnx.ModelProto.FromString(blob), block_size=32, is_symmetric=True
        ).process

    def cast(name: str) -> Contestant:
        form = formats.parse(name)

        def run() -> None:
            codes = casting.encode(form, values).codes
            packing.pack(codes, form.bits) if form.bits < 8 else codes

        return lambda: run

    made = {RUNTIME: runtime, **{name: cast(name) for name in FORMATS}}
    made[COPY] = lambda: lambda: _copy(folder / "source.bin", folder / "copy.bin")
    for name in ("int4-g32", "fp8-e4m3fn"):
        saving = _saving(source, name, folder)
        made[f"file to file, {name}"] = lambda saving=saving: saving
    return made


def _product(values: np.ndarray) -> onnx.ModelProto:
    n, k = values.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])
    weight = numpy_helper.from_array(np.ascontiguousarray(values.T), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _saving(source: Path, name: str, folder: Path) -> Callable[[], None]:
    """The mapped file through the pass and out again: the weight stands as [N, K] there, as exported."""
    from porter.passes.quantize.rtn import RoundToNearest

    from porter import graph
    from porter.context import Context

    model = graph.load(source)
    weight = model.graph.initializers["w"]
    turned = ir.Tensor(np.ascontiguousarray(weight.const_value.numpy().T), name="w")
    weight.const_value, weight.shape = turned, turned.shape
    node = model.graph.node(0)
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
    model.graph.insert_before(node, transpose)
    node.replace_input_with(1, transpose.outputs[0])
    graph.save(model, folder / "weight.onnx")

    def run() -> None:
        fresh = graph.load(folder / "weight.onnx")
        RoundToNearest(format=name, skip=()).run(fresh, Context())
        graph.save(fresh, folder / f"{name}.onnx")

    return run


def _copy(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while chunk := read.read(1 << 22):
            write.write(chunk)


def race(rounds: int, threads: int) -> None:
    """All contestants in turn, `rounds` times, on each shape; prints the best of each and the ratios."""
    for shape in SHAPES:
        values = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            runs = contestants(values, Path(folder))
            best = dict.fromkeys(runs, np.inf)
            for round_ in range(rounds + 1):
                for name, prepare in runs.items():
                    run = prepare()
                    start = time.perf_counter()
                    run()
                    if round_:  # the first compiles, and warms caches
                        best[name] = min(best[name], time.perf_counter() - start)
        print(f"{shape[0]} x {shape[1]}, {threads} thread(s)")
        for name, seconds in best.items():
            through = name.startswith("file")
            ratio = (
                f"{seconds / best[COPY]:.2f} of a copy's time"
                if through
                else f"{best[RUNTIME] / seconds:.1f} x"
            )
            print(f"    {name:32} {values.nbytes / seconds / 1e9:6.2f} GB/s (measured)  {ratio}", flush=True)


def main() -> None:
    """One process for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--within", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.within:
        race(given.rounds, given.within)
        return
    processors = sorted(os.sched_getaffinity(0))
    for threads in given.threads:
        if threads > len(processors):
            sys.exit(f"there are {len(processors)} processors, fewer than {threads}")
        command = [sys.executable, __file__, "--rounds", str(given.rounds), "--within", str(threads)]
        os.sched_setaffinity(0, processors[:threads])  # the child has it from here
        environment = {**os.environ, "PORTER_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment)
        os.sched_setaffinity(0, processors)


if __name__ == "__main__":
    main()

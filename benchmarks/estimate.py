"""Compare estimates with measurements: kernels, collectives, and whole models that no constant was fitted to.

python benchmarks/estimate.py [--verbose] [--held-out]

Measured values and their sources: benchmarks/measured.toml. For each family the mean of the absolute errors
of the estimate and the worst one; `--verbose` lists every row. `--held-out` fits each family of products anew
to all of its rows but one, and says how far that one is off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from porter import target
from porter.estimate import Model, Options, estimate
from porter.estimate.collectives import collective
from porter.estimate.config import read
from porter.estimate.model import Linear
from porter.estimate.timing import ASSUMED, bandwidth, operations, peak, roofline
from porter.estimate.work import Stored, Work, product
from porter.target import TargetSpec

MEASURED = tomllib.loads((Path(__file__).parent / "measured.toml").read_text("utf-8"))
STEPS = 16  # of a generation, at which a decode step is estimated


class Row(NamedTuple):
    """One measurement; `least` where only a bound was published."""

    family: str
    what: str
    measured: float
    estimated: float
    unit: str
    least: bool = False

    @property
    def error(self) -> float:
        """Relative; of a bound, by how much it is missed."""
        error = self.estimated / self.measured - 1
        return min(0.0, error) if self.least else error


def rows() -> Iterator[Row]:
    for each in (gemm, cubes, attention, all_reduce, maia, whole):
        yield from each()


def multiply(spec: TargetSpec, name: str, m: int, n: int, k: int) -> float:
    """Seconds of one product whose weights and activations are in a format."""
    activations = "" if name == "bf16" else name
    work = product(matrix(k, n), spec, m, Stored(name, activations, 16, 1))
    return roofline(work, spec).seconds


def quantize(spec: TargetSpec, name: str, m: int, k: int) -> float:
    """Seconds of the kernel that quantizes activations [m, k] for such a product: BF16 is read and codes are
    written; what is read before, for the largest value, is still in the cache."""
    told = spec.efficiency.get("quantize", {}).get(name)
    if told is None or told.fixed is None:
        return 0.0
    moved = m * k * (2 + code_bytes(name))
    return float(told.fixed.value) + moved / (_memory(spec, name) * bandwidth(spec))


def code_bytes(name: str) -> float:
    return {"fp8-e4m3fn": 1.0, "nvfp4": 4.5 / 8}[name]


def _memory(spec: TargetSpec, name: str) -> float:
    share = spec.efficiency["gemm"][name].memory
    return float(share.value) if share else ASSUMED["memory"][0]


def gemm() -> Iterator[Row]:
    for row in MEASURED["gemm"]["rows"]:
        spec, name = target.load(row["target"]), row["format"]
        for (m, n, k), us in zip(MEASURED["gemm"]["shapes"], row["us"], strict=True):
            seconds = multiply(spec, name, m, n, k) + quantize(spec, name, m, k)
            yield Row(f"gemm {row['target']} {name}", f"{m} x {n} x {k}", us, 1e6 * seconds, "us")


def part_of(spec: TargetSpec, share: float) -> TargetSpec:
    """The chip that a share of its cores and of its memory's bandwidth makes."""

    def scaled(figure: Any) -> Any:
        return figure.model_copy(update={"value": figure.value * share})

    assert spec.matrix is not None
    formats = {n: o.model_copy(update={"rate": scaled(o.rate)}) for n, o in spec.matrix.formats.items()}
    name, outer = next(iter(spec.memory.items()))
    memory = spec.memory | {name: outer.model_copy(update={"bandwidth": scaled(outer.bandwidth)})}
    return spec.model_copy(
        update={"matrix": spec.matrix.model_copy(update={"formats": formats}), "memory": memory}
    )


def cubes() -> Iterator[Row]:
    for row in MEASURED["cubes"]["rows"]:
        spec = part_of(target.load(row["target"]), row["share"])
        for size, tflops in zip(row["sizes"], row["tflops"], strict=True):
            estimated = 2e-12 * size**3 / multiply(spec, "bf16", size, size, size)
            yield Row(f"gemm {row['target']} bf16", f"{size}^3", tflops, estimated, "TFLOP/s")


def attention() -> Iterator[Row]:
    decode = MEASURED["decode-attention"]
    for name, measured in decode["us"].items():
        spec = target.load(name)
        for (batch, heads, tokens, width), us in zip(decode["calls"], measured, strict=True):
            moved = batch * (tokens * 8 * 256 * width + heads * 256 * 2)
            work = Work(
                "decode-attention", "", 1, moved, 4.0 * batch * heads * tokens * 128, "bf16", tokens=tokens
            )
            what = f"{batch} x {tokens}, {8 * width} bits"
            yield Row(f"decode attention {name}", what, us, 1e6 * roofline(work, spec).seconds, "us")
    for name, calls in MEASURED["prefill-attention"].items():
        spec = target.load(name)
        for heads, tokens, us in calls:
            moved = tokens * 128 * 2 * (2 * heads + 2 * 8)
            operations = 4.0 * heads * 128 * tokens * tokens / 2
            work = Work("prefill-attention", "", 1, moved, operations, "bf16", tokens=tokens)
            before = Work("copy", "rotate and cache", 1, 2.0 * tokens * 128 * 2 * (heads + 2 * 8))
            seconds = roofline(work, spec).seconds + roofline(before, spec).seconds
            yield Row(f"prefill attention {name}", f"{heads} heads, {tokens}", us, 1e6 * seconds, "us")


def all_reduce() -> Iterator[Row]:
    for name, calls in MEASURED["all-reduce"].items():
        spec = target.load(name)
        for chips, size, us in calls:
            seconds = collective(Work("all-reduce", "", 1, size), spec, chips).seconds
            yield Row(f"all-reduce {name}", f"{chips} chips, {size} B", us, 1e6 * seconds, "us")


def maia() -> Iterator[Row]:
    spec = target.load("maia-200")
    for fact in MEASURED["maia"]["gemm"]:
        (m, n, k), name = fact["shape"], fact["format"]
        seconds = multiply(spec, name, m, n, k)
        moved = n * k * (2 if name == "bf16" else 1)
        reached = (
            2.0 * m * n * k / peak(spec, name, "matrix") if fact["of"] == "peak" else moved / bandwidth(spec)
        )
        least = "least" in fact
        measured = fact["least"] if least else fact["share"]
        yield Row(f"gemm maia-200 {name}", fact["what"], 100 * measured, 100 * reached / seconds, "%", least)
    ethernet = spec.model_copy(update={"links": {"ethernet": spec.links["ethernet"]}})
    for chips, size, us in MEASURED["maia"]["all-gather"]:
        seconds = collective(Work("all-gather", "", 1, size), ethernet, chips).seconds
        yield Row("all-gather maia-200", f"{chips} chips, {size} B", us, 1e6 * seconds, "us")


def whole() -> Iterator[Row]:
    told = MEASURED["whole"]
    spec = target.load(told["target"])
    models = {name: config_of(config) for name, config in told["configs"].items()}
    for row in told["rows"]:
        rate = output_rate(models[row["model"]], spec, row["prompt"], row["output"], row["batch"], row["tp"])
        what = f"{row['model']} {row['prompt']}/{row['output']}, batch {row['batch']}, tp {row['tp']}"
        yield Row(f"whole model {told['target']} fp8", what, row["tokens"], rate, "tok/s")


def config_of(config: dict[str, Any]) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), "utf-8")
        return read(path)


def output_rate(model: Model, spec: TargetSpec, prompt: int, output: int, batch: int, tp: int) -> float:
    """Output tokens a second and chip of a static batch: its prefill gives the first, steps the others."""

    def at(tokens: float):
        return estimate(model, spec, Options("fp8", "fp8", "fp8", batch, prompt, round(tokens), tp))

    each = [at(prompt + 1 + (output - 1) * (i + 0.5) / STEPS).decode_s for i in range(STEPS)]
    return batch * output / (at(prompt + output).prefill_s + sum(each) / STEPS * (output - 1)) / tp


def held_out() -> Iterator[Row]:
    """Each product of a GPU from constants that were fitted, on a grid, to the others of its family."""
    shares, fixed = np.arange(0.5, 1, 0.02), np.arange(2, 20, 0.5)
    grid = np.stack(np.meshgrid(shares, shares, fixed, indexing="ij"), -1).reshape(-1, 3)
    for row in MEASURED["gemm"]["rows"]:
        spec, name, us = target.load(row["target"]), row["format"], np.array(row["us"])
        guesses = np.stack([_guessed(spec, name, *shape, grid) for shape in MEASURED["gemm"]["shapes"]], -1)
        errors = np.abs(guesses / us - 1)
        for i, (m, n, k) in enumerate(MEASURED["gemm"]["shapes"]):
            best = np.argmin(errors.sum(-1) - errors[:, i])
            what, family = f"{m} x {n} x {k}", f"gemm {row['target']} {name}, held out"
            yield Row(family, what, us[i], guesses[best, i], "us")


def _guessed(spec: TargetSpec, name: str, m: int, n: int, k: int, grid: np.ndarray) -> np.ndarray:
    """Microseconds of a product for rows of constants [compute, memory, fixed in us]; overlap is 4."""
    work = product(matrix(k, n), spec, m, Stored(name, "" if name == "bf16" else name, 16, 1))
    computing = 1e6 * operations(work, spec) / peak(spec, name, "matrix") / grid[:, 0]
    moving = 1e6 * work.bytes / bandwidth(spec) / grid[:, 1]
    before = 0 if name == "bf16" else 1e6 * m * k * (2 + code_bytes(name)) / bandwidth(spec) / grid[:, 1]
    return grid[:, 2] + before + (computing**4 + moving**4) ** 0.25


def matrix(k: int, n: int) -> Linear:
    return Linear("product", k, n, 1, "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--verbose", action="store_true", help="every row")
    parser.add_argument("--held-out", action="store_true", help="products, each from a fit to the others")
    arguments = parser.parse_args()
    verbose, found = arguments.verbose, list(held_out() if arguments.held_out else rows())
    for family in dict.fromkeys(row.family for row in found):
        mine = [row for row in found if row.family == family]
        mean = sum(abs(row.error) for row in mine) / len(mine)
        worst = max(mine, key=lambda row: abs(row.error))
        errors = f"mean {100 * mean:5.1f} %   worst {100 * worst.error:+6.1f} %"
        print(f"{family:36} {len(mine):2} rows   {errors}  {worst.what}")
        for row in mine if verbose else ():
            bound = "at least " if row.least else ""
            print(
                f"    {row.what:40} measured {bound}{row.measured:10,.1f} {row.unit}"
                f"   estimated {row.estimated:10,.1f}   {100 * row.error:+6.1f} %"
            )


if __name__ == "__main__":
    main()

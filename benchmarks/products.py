"""Products as porter schedules them, simulated, against published measurements and against rooflines.

    python benchmarks/products.py

Prints the tables of docs/simulator.md and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from porter import target
from porter.lower import scheduled
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.products import Activation
from porter.lower.tile import schedule as tile
from porter.simulate import KernelTime, simulate
from porter.target import TargetSpec

# github.com/AI-Hypercomputer/tpu-recipes: (chip, cores, side, FLOP/s of one core), each core rows of its own.
MAIA = (("bf16", 8192), ("bf16", 16384), ("fp8, activations too", 8192), ("fp8, activations too", 16384))
MEASURED = (
    ("tpu-v6e", 1, 8192, 827e12),
    ("tpu-7x", 2, 128, 2.6e12),
    ("tpu-7x", 2, 256, 18.3e12),
    ("tpu-7x", 2, 512, 105e12),
    ("tpu-7x", 2, 1024, 350e12),
    ("tpu-7x", 2, 2048, 679e12),
    ("tpu-7x", 2, 4096, 893e12),
    ("tpu-7x", 2, 16384, 950e12),
    ("tpu-7x", 2, 32768, 956e12),
)
CHIPS = ("maia-200", "tpu-v6e", "tpu-7x", "trainium2", "trainium3")
ROWS = (1, 8, 32, 4096)
SIDE = 8192
FLOATS = Activation("fp32", 0)


@dataclass(frozen=True)
class Weights:
    """A format of weights; `place` is what the target is asked to multiply."""

    name: str
    place: str
    layout: Layout
    activations: Activation

    def kernel(self, spec: TargetSpec) -> Product:
        """The product of it."""
        places = (self.place, self.name) if self.activations.group else (self.place,)
        return Product(self.layout, Profile(spec).unit(*places), self.activations)


def weights(k: int, n: int) -> dict[str, Weights]:
    """Of a matrix [n, k]: plain, with a scale a row, with groups, with activations of 8 bits too."""
    return {
        "bf16": Weights("bf16", "bf16", Layout("bf16", n, k, lanes=1), FLOATS),
        "int8": Weights("int8", "int8", Layout("int8", n, k, group=k, lanes=1), FLOATS),
        "int4-g32": Weights("int4-g32", "int4-g32", Layout("int4", n, k, group=32, lanes=1), FLOATS),
        "mxfp4": Weights("mxfp4", "mxfp4", Layout("e2m1", n, k, group=32, scale="e8m0", lanes=1), FLOATS),
        "fp8, activations too": Weights(
            "fp8-e4m3fn",
            "fp8-e4m3fn",
            Layout("e4m3fn", n, k, group=k, lanes=1),
            Activation("e4m3fn", k),
        ),
    }


def simulated(spec: TargetSpec, kernel: Product, rows: int) -> KernelTime:
    """The time of a product of so many rows."""
    sizes = {"m": rows}
    function = tile.scheduled(kernel.kernel(), "product", spec, sizes, sizes)
    assert function is not None
    return simulate(scheduled.read(function, sizes, spec), spec)


def against_measurements() -> None:
    """The measured products."""
    print("| chip | product, BF16 | measured | simulated | error of time |\n|---|---|---|---|---|")
    errors = []
    for name, cores, side, measured in MEASURED:
        spec = target.load(name)
        found = simulated(spec, weights(side, side)["bf16"].kernel(spec), cores * side)
        rate = 2 * side**3 / float(found.seconds)
        errors.append(measured / rate - 1)
        shown = f"{measured / 1e12:,.4g} | {rate / 1e12:,.4g} | {errors[-1]:+.1%}".replace("%", " %")
        print(f"| {name} | {side:,}^3 | {shown} |")
    print(f"\nmean {sum(map(abs, errors)) / len(errors):.1%}, worst {max(errors, key=abs):+.1%}\n")


def on_maia() -> None:
    """Large products, of whose rate the best is published."""
    spec = target.load("maia-200")
    for form, side in MAIA:
        kernel = weights(side, side)[form].kernel(spec)
        rate = 2 * side**3 / float(simulated(spec, kernel, side).seconds)
        peak = spec.matrix.formats[kernel.unit.name].rate.value
        print(f"maia-200 {form} {side:,}^3: {rate / 1e12:,.0f} TFLOP/s, {rate / peak:.1%}")
    print()


def against_rooflines() -> None:
    """Of each chip and format the share of what HBM's bandwidth, or the unit's rate, would allow."""
    print(f"| chip | weights | {' | '.join(f'm = {m:,}' for m in ROWS)} |\n|---|---|{'---|' * len(ROWS)}")
    for name in CHIPS:
        spec = target.load(name)
        for form in weights(SIDE, SIDE).values():
            if form.activations.group and not spec.matrix.formats.get("fp8-e4m3fn"):
                continue
            kernel, cells = form.kernel(spec), []
            stored = sum(_bytes(shape, dtype) for n, shape, dtype in kernel.layout.buffers() if n)
            for rows in ROWS:
                found = simulated(spec, kernel, rows)
                moved = stored + rows * SIDE * (4 + (1 if form.activations.group else 4))
                hbm = moved / spec.memory["hbm"].bandwidth.value
                matrix = 2 * rows * SIDE**2 / spec.matrix.formats[kernel.unit.name].rate.value
                share = max(hbm, matrix) / float(found.seconds)
                cells.append(
                    f"{float(found.seconds) * 1e6:,.1f} us, {share:.0%}, {found.bound_by}".replace("%", " %")
                )
            print(f"| {name} | {form.name} | {' | '.join(cells)} |", flush=True)


def _bytes(shape: tuple, dtype: str) -> int:
    total = int("".join(c for c in dtype if c.isdigit())) // 8
    for size in shape:
        total *= int(size)
    return total


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    against_measurements()
    on_maia()
    against_rooflines()


if __name__ == "__main__":
    main()

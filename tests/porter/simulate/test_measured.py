"""Products as porter schedules them against published measurements: how far off the simulator is.

Nothing is fitted to them but the fixed cost of a TPU's DMA, from the smallest. The bound is what was found,
rounded up: a change of schedules, specs or simulator that makes it worse shows here.
"""

from __future__ import annotations

import pytest

from porter import target
from porter.lower import scheduled
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.kernels.layout import Layout
from porter.lower.tile import schedule as tile
from porter.simulate import simulate

WORST = 0.20  # TPU7x at 1,024: 18 % too fast


@pytest.mark.parametrize(
    ("name", "cores", "side", "measured"),
    [
        ("tpu-v6e", 1, 8192, 827e12),
        ("tpu-7x", 2, 128, 2.6e12),
        ("tpu-7x", 2, 256, 18.3e12),
        ("tpu-7x", 2, 512, 105e12),
        ("tpu-7x", 2, 1024, 350e12),
        ("tpu-7x", 2, 2048, 679e12),
        ("tpu-7x", 2, 4096, 893e12),
    ],
)
def test_products_take_what_was_measured(name: str, cores: int, side: int, measured: float) -> None:
    """`measured` FLOP/s of one core; on two, each has as many rows of its own."""
    spec, rows = target.load(name), cores * side
    kernel = Product(Layout("bf16", side, side, lanes=1), Profile(spec).unit("bf16")).kernel()
    function = tile.scheduled(kernel, "product", spec, {"m": rows}, {"m": rows})
    assert function is not None
    found = simulate(scheduled.read(function, {"m": rows}, spec), spec)
    rate = 2 * rows * side * side / float(found.seconds) / cores
    assert abs(measured / rate - 1) < WORST

"""The roofline and the simulator on the kernels that a decode step spends its time on, chip by chip.

They are two models: a roofline of what good kernels reach, and porter's own kernels as they are scheduled.
The bounds are what was found, rounded up; docs/simulator.md says where they differ, and why.
"""

from __future__ import annotations

import attentions
import pytest

from porter import target
from porter.estimate.model import Attention, Linear
from porter.estimate.timing import bandwidth, roofline
from porter.estimate.work import Step, Stored, Work, _attention, product
from porter.lower import scheduled
from porter.lower.blocks.attention import attention
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.kernels.layout import Layout
from porter.lower.tile import schedule as tile
from porter.simulate import simulate
from porter.target import TargetSpec

CHIPS = [name for name in target.names() if target.load(name).family == "tile"]
SIDE, LENGTH = 4096, 2048
PRODUCT, MANY, ATTENTION = 1.4, 1.8, 5.1  # found: 0.85 to 1.35, 0.77 to 1.79, and 1.92 to 5.00


def seconds(kernel: object, sizes: dict[str, int], bounds: dict[str, int], spec: TargetSpec) -> float:
    function = tile.scheduled(kernel, "kernel", spec, bounds)
    return float(simulate(scheduled.read(function, sizes, spec), spec).seconds)


def within(simulated: float, work: Work, spec: TargetSpec, factor: float) -> bool:
    """And no kernel is faster than its bytes."""
    assert simulated >= work.bytes / bandwidth(spec)
    return 1 / factor <= simulated / roofline(work, spec).seconds <= factor


@pytest.mark.parametrize("name", CHIPS)
def test_products_agree(name: str) -> None:
    """One program for every number of rows."""
    spec = target.load(name)
    kernel = Product(Layout("bf16", SIDE, SIDE, lanes=1), Profile(spec).unit("bf16")).kernel()
    function = tile.scheduled(kernel, "kernel", spec, {"m": 512})
    for rows, factor in ((1, PRODUCT), (16, PRODUCT), (128, MANY), (512, MANY)):
        work = product(Linear("x", SIDE, SIDE, 1, "whole"), spec, rows, Stored("bf16", "bf16", 16, 1))
        found = float(simulate(scheduled.read(function, {"m": rows}, spec), spec).seconds)
        assert within(found, work, spec, factor)


@pytest.mark.parametrize("name", CHIPS)
def test_attention_of_a_decode_step_is_of_the_same_order(name: str) -> None:
    """32 heads of 8 cached, 128 wide, over a cache of floats in 32 bits, as the kernel reads it."""
    spec = target.load(name)
    unit = Profile(spec).unit("fp32")
    shape = attentions.spec(128, heads=(32, 8), offset="lengths", length=LENGTH)
    work = _attention(Attention(1, 32, 8, 128, 128), Step(1, 1, LENGTH - 1), Stored("bf16", "bf16", 32, 1))
    found = seconds(attention(shape, unit, unit), {"b": 1, "s": 1}, {"b": 8, "s": 512}, spec)
    assert within(found, work, spec, ATTENTION)

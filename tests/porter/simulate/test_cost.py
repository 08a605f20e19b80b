"""What an operation costs, against figures worked out by hand from the made-up chip's."""

from __future__ import annotations

from fractions import Fraction

import pytest

from porter.errors import TargetError
from porter.simulate import Buffer, Copy, Matrix, Vector
from porter.simulate.cost import Core
from porter.target import TargetSpec
from tests.support.chips import chip

NS = Fraction(1, 10**9)
BUFFERS = {
    name: Buffer(name, level, 0)
    for name, level in (("x", "hbm"), ("s", "shared"), ("a", "sram"), ("p", "acc"))
}


def copy(
    spec: TargetSpec, size: int, active: int = 1, *, out: bool = False, run: int = 4096, dma: str = "hbm"
):
    """The cost of a copy of `size` bytes into `sram`, or `out` of it."""
    outer = {"outer": ("x", "s"), "hbm": ("s" if spec.dma["hbm"].source == "shared" else "x", "a")}[dma]
    return Core(spec, active).of(Copy("c", dma, *(outer[::-1] if out else outer), size, run, 8), BUFFERS)


def test_a_copy_takes_its_fixed_cost_and_the_slower_level() -> None:
    cost = copy(chip(), 700)  # 100 GB/s in HBM, 70 GB/s in the core's memory
    assert (cost.queue, cost.why) == ("dma hbm in", "bandwidth of sram")
    assert cost.busy == 10 * NS
    assert cost.length == 17 * NS


def test_small_copies_are_bound_by_their_fixed_cost_on_all_engines() -> None:
    cost = copy(chip(), 70)
    assert cost.busy == Fraction(7, 2) * NS  # two engines take turns
    assert cost.length == 8 * NS
    assert cost.why == "fixed cost of dma hbm"


def test_an_outward_copy_keeps_the_inward_queue_busy() -> None:
    cost = copy(chip(), 700, out=True)
    assert (cost.queue, cost.also) == ("dma hbm out", "dma hbm in")
    assert cost.busy == 10 * NS


def test_cores_share_the_chip_memory_but_not_their_own() -> None:
    spec = chip(4)
    assert copy(spec, 700, active=1).busy == 10 * NS
    assert copy(spec, 700, active=4).busy == 28 * NS  # 25 GB/s each
    assert copy(spec, 700, active=4).why == "bandwidth of hbm"


def test_cores_of_a_cluster_share_its_memory() -> None:
    spec = chip(6, 2)
    assert copy(spec, 900, active=1).why == "bandwidth of sram"
    assert copy(spec, 900, active=6).busy == 30 * NS  # three share 90 GB/s
    assert copy(spec, 900, active=2).busy == Fraction(90, 7) * NS  # one in each cluster: 70 GB/s
    assert copy(spec, 900, active=2, dma="outer").busy == 18 * NS  # two clusters share 100 GB/s


def test_engines_have_a_rate_and_want_long_runs() -> None:
    rate = 'rate = { value = "30 GB/s", published = "T" }'
    assert copy(chip(rate=rate), 600).busy == 10 * NS
    assert copy(chip(rate=rate), 600).why == "engines of dma hbm"
    contiguous = rate + '\ncontiguous = { value = "64 B", published = "T" }'
    assert copy(chip(rate=contiguous), 600, run=64).busy == 10 * NS
    short = copy(chip(rate=contiguous), 600, run=16)
    assert short.busy == 40 * NS
    assert short.why == "short runs of dma hbm"


@pytest.mark.parametrize(
    ("sizes", "cycles"), [((4, 4, 4), 5), ((1, 1, 1), 5), ((5, 4, 4), 10), ((8, 9, 4), 30), ((4, 4, 13), 20)]
)
def test_products_are_whole_instructions(sizes: tuple[int, int, int], cycles: int) -> None:
    cost = Core(chip()).of(Matrix("m", "bf16", *sizes, (), ()), BUFFERS)
    assert cost.busy == cost.length == cycles * NS
    assert cost.lead == 0


@pytest.mark.parametrize(("n", "cycles"), [(1, 2), (2, Fraction(5, 2)), (4, 5), (5, 7), (7, Fraction(35, 4))])
def test_an_instruction_is_shorter_with_its_n(n: int, cycles: Fraction) -> None:
    lines = 'least = { value = "2 cycles", published = "T" }\nload = { value = "3 cycles", published = "T" }'
    cost = Core(chip(least=lines)).of(Matrix("m", "bf16", 4, n, 4, (), ()), BUFFERS)
    assert cost.busy == cycles * NS
    assert cost.lead == 3 * NS


@pytest.mark.parametrize(("elements", "each", "lanes"), [(1, 1, 4), (4, 1, 4), (5, 1, 8), (8, 3, 24)])
def test_vectors_are_whole_instructions_after_a_start(elements: int, each: int, lanes: int) -> None:
    cost = Core(chip(2)).of(Vector("v", elements, each, (), ()), BUFFERS)
    assert cost.busy == Fraction(3, 700_000_000) + Fraction(lanes, 3) * NS  # 3 operations a nanosecond


def test_what_the_chip_lacks_is_said() -> None:
    core = Core(chip())
    for operation in (
        Matrix("m", "fp8-e4m3fn", 1, 1, 1, (), ()),
        Copy("c", "other", "x", "a", 1, 1, 8),
        Copy("c", "hbm", "x", "p", 1, 1, 8),
    ):
        with pytest.raises(TargetError) as error:
            core.of(operation, BUFFERS)
        assert error.value.code == "PORT-0446"

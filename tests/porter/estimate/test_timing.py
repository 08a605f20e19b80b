"""Times of kernels and collectives against formulas by hand, a ring step by step, and measurements."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import ModuleType

import pytest

from porter import target
from porter.errors import SpecError, TargetError
from porter.estimate.collectives import collective, joining
from porter.estimate.model import Linear
from porter.estimate.timing import ASSUMED, operations, rate, roofline
from porter.estimate.work import Stored, Work, product
from porter.target import TargetSpec

ROOT = Path(__file__).parents[3]
US = 1e-6


def gemm(m: int, n: int, k: int, name: str = "bf16") -> Work:
    return Work(
        "gemm", "", 1, 2.0 * (m * k + n * k + m * n), 2.0 * m * n * k, name, weights=name, shape=(m, n, k)
    )


# ---- one kernel


def test_a_product_takes_what_the_formula_says() -> None:
    """The four constants of H100 in BF16, and rows of 64."""
    computing = 2 * 64 * 8192 * 8192 / (0.76 * 989e12)
    moving = 2 * (2 * 8192 + 8192 * 8192) / (0.86 * 3.35e12)
    wanted = 4 * US + (computing**4 + moving**4) ** 0.25
    assert math.isclose(roofline(gemm(1, 8192, 8192), target.load("h100")).seconds, wanted, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("name", "weights", "activations", "tflops", "width"),
    [
        ("maia-200", "mxfp4", "mxfp4", 10145, 4.25),
        ("maia-200", "mxfp4", "mxfp8", 5072, 8.25),
        ("maia-200", "mxfp4", "", 1268, 16),
        ("tpu-7x", "fp8-e4m3fn", "fp8-e4m3fn", 4614, 8 + 32 / 4096),
        ("tpu-7x", "fp8-e4m3fn", "", 2307, 16),  # BF16 by FP8
        ("h100", "fp8-e4m3fn", "", 989, 16),
    ],
)
def test_two_formats_are_multiplied_at_the_rate_of_both(
    name: str, weights: str, activations: str, tflops: float, width: float
) -> None:
    spec = target.load(name)
    linear = Linear("product", 4096, 1024, 1, "whole")
    few, many = (product(linear, spec, rows, Stored(weights, activations, 16, 1)) for rows in (64, 128))
    assert rate(few, spec) == tflops * 1e12
    assert math.isclose(many.bytes - few.bytes, 64 * (4096 * width / 8 + 1024 * 2), rel_tol=1e-9)


def test_without_measurements_constants_are_assumed_and_named() -> None:
    found = roofline(gemm(64, 4096, 4096), target.load("trainium2"))
    assert found.assumed == ("compute", "memory", "fixed", "overlap")
    compute, memory, fixed, overlap = (ASSUMED[key][0] for key in found.assumed)
    parts = 2.0 * 64 * 4096 * 4096 / (compute * 667e12), 2.0 * (4096 * 4096 + 128 * 4096) / (memory * 2.9e12)
    wanted = fixed + sum(t**overlap for t in parts) ** (1 / overlap)
    assert math.isclose(found.seconds, wanted, rel_tol=1e-12)
    assert not roofline(gemm(64, 4096, 4096), target.load("h100")).assumed


@pytest.mark.parametrize(
    ("name", "shape", "padded"),
    [
        ("h100", (1, 512, 512), (64, 512, 512)),
        ("h100", (1, 500, 500), (64, 512, 512)),
        ("h100", (300, 64, 64), (512, 64, 64)),  # as transposed: 64 rows, 300 columns
        ("tpu-v6e", (1, 300, 300), (16, 512, 512)),
        ("trainium2", (1, 512, 512), (64, 512, 512)),  # an instruction takes 64 cycles at least
        ("trainium2", (200, 512, 512), (200, 512, 512)),  # and 200 for 200 columns
    ],
)
def test_small_products_are_rounded_up_to_what_the_unit_takes(
    name: str, shape: tuple[int, int, int], padded: tuple[int, int, int]
) -> None:
    assert operations(gemm(*shape), target.load(name)) == 2 * math.prod(padded)


def test_short_prompts_reach_less() -> None:
    h100 = target.load("h100")

    def computing(tokens: int) -> float:
        return roofline(Work("prefill-attention", "", 1, 1.0, 1e12, "bf16", tokens=tokens), h100).compute

    assert math.isclose(computing(2050), 2 * 1e12 / (0.94 * 989e12), rel_tol=1e-12), "half of it at `half`"
    assert computing(128) > 4 * computing(4096)


def test_a_target_that_says_too_little_has_no_time() -> None:
    with pytest.raises(SpecError) as error:
        roofline(gemm(1, 64, 64), target.load("webgpu"))
    assert error.value.code == "PORT-0332"


# ---- collectives


def plain(spec: TargetSpec, name: str) -> TargetSpec:
    """With only that link, and nothing measured on it."""
    return spec.model_copy(update={"links": {name: spec.links[name].model_copy(update={"collectives": {}})}})


def ring(chips: int, size: float, rate: float, latency: float) -> float:
    """An all-reduce, step by step: each chip sends a piece to its right neighbour at one half of the rate,
    and its left neighbour the mirror image with the other half of the data."""
    held = [[{i} for _ in range(chips)] for i in range(chips)]  # whose sums each chip has, by piece
    seconds = 0.0
    while not all(len(piece) == chips for mine in held for piece in mine):
        step = round(seconds / (latency + size / chips / rate)) if seconds else 0
        sent = [(chip, (chip - step) % chips) for chip in range(chips)]
        arriving = [(chip, piece, set(held[chip][piece])) for chip, piece in sent]
        for chip, piece, whose in arriving:
            held[(chip + 1) % chips][piece] |= whose
        seconds += latency + size / chips / rate
    return seconds


@pytest.mark.parametrize("chips", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [1e3, 1e8])
def test_neighbours_sum_in_a_ring(chips: int, size: float) -> None:
    v5e = plain(target.load("tpu-v5e"), "ici")
    rate = float(v5e.links["ici"].bandwidth.value) * (2 if chips > 2 else 1) / 4
    found = collective(Work("all-reduce", "", 1, size), v5e, chips).seconds
    assert math.isclose(found, ring(chips, size, rate, float(v5e.links["ici"].latency.value)), rel_tol=1e-9)


def test_behind_a_switch_every_chip_sends_to_every_other() -> None:
    h100 = plain(target.load("h100"), "nvlink")
    for work, halves in (("all-reduce", 2), ("all-gather", 1)):
        found = collective(Work(work, "", 1, 1e8), h100, 8).seconds
        assert math.isclose(found, halves * (2.8 * US + 7 / 8 * 1e8 / 450e9), rel_tol=1e-12)


def test_the_faster_measured_way_is_taken() -> None:
    h100 = target.load("h100")
    sizes = [2**i for i in range(9, 30)]
    times = [collective(Work("all-reduce", "", 1, size), h100, 8).seconds for size in sizes]
    assert math.isclose(times[sizes.index(2**18)], 10.2 * US, rel_tol=1e-12), "fused"
    assert math.isclose(times[sizes.index(2**24)], 122 * US, rel_tol=1e-12), "nccl"
    assert times == sorted(times)


def test_more_chips_take_longer_and_the_last_line_goes_on() -> None:
    h100 = target.load("h100")

    def seconds(size: float, chips: int) -> float:
        return collective(Work("all-reduce", "", 1, size), h100, chips).seconds

    assert seconds(2**16, 2) < seconds(2**16, 4) < seconds(2**16, 8)
    assert math.isclose(seconds(2**30, 8) - seconds(2**29, 8), 2**29 * (2111 - 122) * US / (2**29 - 2**24))


def test_the_first_link_that_reaches_is_taken() -> None:
    maia = target.load("maia-200")
    assert joining(maia, 4) is maia.links["quad"]
    assert joining(maia, 5) is maia.links["ethernet"]
    with pytest.raises(TargetError) as error:
        joining(target.load("h100"), 16)
    assert (error.value.code, error.value.exit_code) == ("PORT-0334", 4)


# ---- measurements


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_estimate", ROOT / "benchmarks" / "estimate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_errors_stay_what_the_page_says(benchmark: ModuleType) -> None:
    """The bounds are the aims: 10 % in BF16 and of other kernels, 15 % in narrower formats, 12 % whole."""
    family: Callable = lambda row: row.family  # noqa: E731
    found = {name: list(each) for name, each in groupby(sorted(benchmark.rows(), key=family), family)}
    assert sum(map(len, found.values())) > 100
    for name, rows in found.items():
        bound = 0.12 if name.startswith("whole") else 0.15 if name.endswith(("fp8-e4m3fn", "nvfp4")) else 0.10
        assert sum(abs(row.error) for row in rows) / len(rows) < bound, name


def test_the_page_has_the_figures_of_the_script(benchmark: ModuleType) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    found = list(benchmark.rows())
    for name in dict.fromkeys(row.family for row in found):
        errors = [row.error for row in found if row.family == name]
        worst = max(errors, key=abs)
        mean = sum(map(abs, errors)) / len(errors)
        line = f"| {name} | {len(errors)} | {100 * mean:.1f} % | {100 * worst:+.1f} % |"
        assert line in page, f"docs/benchmarks.md lacks: {line}"

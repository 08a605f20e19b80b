"""The built-in targets: all there, every figure with a source, and figures as the sources have them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from porter import target
from porter.target import Figure, TargetSpec, placement
from porter.target.reading import SHARED

ROOT = Path(__file__).parents[3]
NAMES = (
    *("host", "maia-100", "maia-200", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-7x"),
    *("trainium1", "trainium2", "trainium3", "a100", "h100", "h200", "b200", "webgpu"),
)
CHIPS = [n for n in NAMES if n != "host"]
GIB = 1 << 30
MIB = 1 << 20

# Typed by hand from the published sources, in SI.
SPOT: dict[str, dict[str, Any]] = {
    "maia-100": {
        "memory.hbm.size": 64_000_000_000,
        "memory.hbm.bandwidth": 1_800_000_000_000.0,
        "matrix.formats.bf16.rate": 800e12,
        "matrix.formats.mx9.rate": 1500e12,
        "matrix.formats.mx6.rate": 3000e12,
        "matrix.units": 64,
        "links.ethernet.collectives.all-gather.node.bandwidth": 600e9,
        "power.design": 700.0,
    },
    "maia-200": {
        "memory.hbm.size": 216_000_000_000,
        "memory.hbm.bandwidth": 7e12,
        "memory.tsram.size": 3 * MIB,
        "matrix.formats.bf16.rate": 1268e12,
        "matrix.formats.mxfp4.rate": 10_145e12,
        "matrix.formats.fp8-e4m3fn.step": (32, 32, 32),
        "links.quad.bandwidth": 1e12,
        "power.design": 750.0,
    },
    "tpu-v5e": {
        "memory.hbm.size": 16_000_000_000,
        "memory.hbm.bandwidth": 819e9,
        "memory.vmem.size": 128 * MIB,
        "matrix.formats.bf16.rate": 197e12,
        "matrix.formats.int8.rate": 393e12,
        "matrix.formats.int4.rate": 788e12,
        "links.ici.bandwidth": 200e9,
        "price.per-hour": 1.20,
    },
    "tpu-v5p": {
        "memory.hbm.size": 95 * GIB,
        "memory.hbm.bandwidth": 2.765e12,
        "memory.vmem.count": 2,
        "matrix.formats.bf16.rate": 459e12,
        "matrix.units": 8,
        "links.dcn.bandwidth": 6.25e9,
        "price.per-hour": 4.20,
    },
    "tpu-v6e": {
        "memory.hbm.size": 32_000_000_000,
        "memory.hbm.bandwidth": 1.638e12,
        "matrix.formats.int8.rate": 1836e12,
        "links.ici.collectives.all-reduce.psum.bandwidth": 235.8e9,
        "efficiency.gemm.bf16.compute": 0.90,
        "price.per-hour": 2.70,
    },
    "tpu-7x": {
        "memory.hbm.size": 192 * GIB,
        "memory.hbm.bandwidth": 7.38e12,
        "matrix.formats.bf16.rate": 2307e12,
        "matrix.formats.fp8-e4m3fn.rate": 4614e12,
        "links.ici.bandwidth": 600e9,
        "memory.accumulators.size": 128 * 8 * 256 * 4,
    },
    "trainium1": {
        "memory.hbm.size": 32 * GIB,
        "memory.sbuf.size": 24 * MIB,
        "matrix.formats.fp32.rate": 47.5e12,
        "dma.hbm.rate": 17e9,
        "dma.hbm.fixed": 1.3e-6,
        "price.per-hour": 1.344,
    },
    "trainium2": {
        "memory.hbm.bandwidth": 2.9e12,
        "memory.psum.size": 2 * MIB,
        "matrix.formats.fp8-e4m3.rate": 1299e12,
        "matrix.formats.fp8-e4m3.step": (128, 512, 256),
        "vector.clock": 0.96e9,
        "dma.hbm.engines": 128,
        "limits.bank": 2048,
    },
    "trainium3": {
        "memory.hbm.size": 144 * GIB,
        "memory.hbm.bandwidth": 4.9e12,
        "matrix.formats.mxfp8.rate": 2517e12,
        "matrix.formats.bf16.rate": 671e12,
        "links.neuronlink.chips": 64,
    },
    "a100": {
        "memory.hbm.bandwidth": 2.039e12,
        "memory.smem.size": 164 * 1024,
        "matrix.formats.int8.rate": 624e12,
        "matrix.formats.int4.rate": 1248e12,
        "matrix.units": 108,
        "links.nvlink.collectives.all-reduce.nccl.points": (
            (512, 22.6e-6),
            (16 * MIB, 217e-6),
            (512 * MIB, 4226e-6),
        ),
        "price.per-hour": 3.431,
        "power.design": 400.0,
    },
    "h100": {
        "memory.hbm.size": 80_000_000_000,
        "memory.hbm.bandwidth": 3.35e12,
        "matrix.formats.fp8-e4m3fn.rate": 1979e12,
        "matrix.formats.bf16.step": (64, 256, 16),
        "links.nvlink.bandwidth": 450e9,
        "links.nvlink.collectives.all-reduce.nccl.points": (
            (512, 15.6e-6),
            (16 * MIB, 122e-6),
            (512 * MIB, 2111e-6),
        ),
        "price.per-hour": 6.88,
    },
    "h200": {
        "memory.hbm.size": 141_000_000_000,
        "memory.hbm.bandwidth": 4.8e12,
        "price.per-hour": 7.912,
    },
    "b200": {
        "memory.hbm.size": 180_000_000_000,
        "memory.tmem.size": 128 * 512 * 4,
        "matrix.formats.nvfp4.rate": 9000e12,
        "matrix.formats.bf16.rate": 2250e12,
        "links.nvlink.bandwidth": 900e9,
        "price.per-hour": 14.24,
        "power.design": 1000.0,
    },
    "webgpu": {
        "limits.binding-size": 128 * MIB,
        "limits.buffer-size": 256 * MIB,
        "limits.shared": 16384,
        "limits.workgroup": (256, 256, 64),
        "limits.grid": (65535, 65535, 65535),
    },
}


def test_every_target_of_the_design_is_there() -> None:
    assert target.names() == sorted(NAMES)
    assert SPOT.keys() == set(CHIPS)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_loads_under_its_name(name: str) -> None:
    spec = target.load(name)
    assert spec.name == name
    assert target.load(f"{ROOT / 'targets' / name}.toml") == spec


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_those_of_the_sources(name: str) -> None:
    found = dict(target.figures(target.load(name)))
    assert {path: found[path].value for path in SPOT[name]} == SPOT[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_how_it_is_known(name: str) -> None:
    spec = target.load(name)
    for path, figure in target.figures(spec):
        assert figure.kind in ("published", "derived", "assumed"), path
        assert len(figure.source) > 1, path
    used = " ".join(f"[{f.source}]" if f.kind == "published" else f.source for _, f in target.figures(spec))
    for key, text in spec.sources.items():
        assert re.search(rf"\b{key}\b", used), f"source {key} stands behind nothing"
        assert re.search(r"[a-z]\.(com|org|io)|arXiv:|comparison", text), f"source {key} names no place"


@pytest.mark.parametrize("name", NAMES)
def test_no_number_of_a_file_stands_outside_a_figure(name: str) -> None:
    """So that none can be without a source: all else is text, names and dates."""
    text = (ROOT / "targets" / f"{name}.toml").read_text("utf-8")
    numbers, figures = [], []

    def walk(part: Any, path: str) -> None:
        if isinstance(part, dict) and "value" in part:
            figures.append(path)
        elif isinstance(part, dict):
            for key, value in part.items():
                walk(value, f"{path}.{key}".lstrip("."))
        elif isinstance(part, list):
            for i, value in enumerate(part):
                walk(value, f"{path}.{i}")
        elif isinstance(part, int | float):
            numbers.append(path)

    walk(tomllib.loads(text), "")
    assert numbers == []
    assert figures == [path for path, _ in sorted_as(figures, target.load(name))]


def sorted_as(order: list[str], spec: TargetSpec) -> list[tuple[str, Figure]]:
    """The figures of a spec in the order of its file: the same ones, or the test fails."""
    found = dict(target.figures(spec))
    assert found.keys() == set(order)
    return [(path, found[path]) for path in order]


@pytest.mark.parametrize("name", CHIPS)
def test_what_a_chip_does_not_say_is_as_on_host(name: str) -> None:
    spec, host = target.load(name), target.load("host")
    for key in SHARED:
        assert getattr(spec, key) == getattr(host, key)


FP8 = dict.fromkeys(CHIPS, "fp8-e4m3fn")
FP8 |= dict.fromkeys(("tpu-v5e", "tpu-v5p", "tpu-v6e"), "fp8-e4m3b11fnuz")
FP8 |= dict.fromkeys(("trainium1", "trainium2"), "fp8-e4m3")
MX = {"b200": "ceil", "trainium1": "larger", "trainium2": "larger", "trainium3": "larger"}
MXFP8 = ("mxfp8", "mxfp8-e4m3", "mxfp8-e5m2")
MXFP6 = ("mxfp6-e2m3", "mxfp6-e3m2")
# What is multiplied as it is stored, beside the wide floats.
NATIVE = {
    "maia-100": {"mx9", "mx6"},
    "maia-200": {"fp8-e4m3fn", "fp8-e5m2", *MXFP8, *MXFP6, "mxfp4"},
    "tpu-v5e": {"int8", "int4"},
    "tpu-v5p": {"int8", "int4"},
    "tpu-v6e": {"int8", "int4", "fp8-e4m3b11fnuz", "fp8-e5m2"},
    "tpu-7x": {"fp8-e4m3fn", "fp8-e5m2"},
    "trainium1": {"fp8-e4m3", "fp8-e5m2", "fp8-e3m4"},
    "trainium2": {"fp8-e4m3", "fp8-e5m2", "fp8-e3m4"},
    "trainium3": {"fp8-e4m3fn", "fp8-e5m2", *MXFP8},
    "a100": {"int8", "int4"},
    "h100": {"int8", "fp8-e4m3fn", "fp8-e5m2"},
    "h200": {"int8", "fp8-e4m3fn", "fp8-e5m2"},
    "b200": {"int8", "fp8-e4m3fn", "fp8-e5m2", *MXFP8, *MXFP6, "mxfp4", "nvfp4"},
    "webgpu": set(),
}


@pytest.mark.parametrize("name", CHIPS)
def test_flavours_and_scale_rules_are_the_chips_own(name: str) -> None:
    spec = target.load(name)
    assert spec.flavour("fp8") == FP8[name]
    assert spec.mx == MX.get(name, "floor")


@pytest.mark.parametrize("name", CHIPS)
def test_native_formats_are_those_of_the_sources(name: str) -> None:
    spec = target.load(name)
    alike = {w: placement(spec, w, w) for w in spec.weights}
    assert None not in alike.values()
    narrow = {w for w, p in alike.items() if p.how == "native" and w not in ("fp32", "fp16", "bf16")}
    assert narrow == NATIVE[name]
    for weights in narrow:  # next to floats they are widened, but where the unit mixes the two
        how = placement(spec, weights).how
        assert how == ("native" if (name, weights) == ("tpu-7x", "fp8-e4m3fn") else "widened"), weights


@pytest.mark.parametrize(
    ("name", "weights", "activations", "expected"),
    [
        ("tpu-v5e", "fp32", "", ("bf16", "emulated", "matrix")),
        ("tpu-v5e", "fp8-e4m3b11fnuz", "fp8-e4m3b11fnuz", ("bf16", "emulated", "matrix")),
        ("tpu-v5e", "fp8-e4m3fn", "", ("bf16", "widened", "matrix")),
        ("tpu-7x", "fp8-e4m3fn", "bf16", ("fp8-e4m3fn", "native", "matrix")),
        ("trainium1", "fp32", "", ("fp32", "native", "matrix")),
        ("trainium2", "int4-g32", "", ("bf16", "widened", "matrix")),
        ("trainium3", "mxfp4", "mxfp4", ("mxfp8", "widened", "matrix")),
        ("maia-200", "mxfp4", "mxfp8", ("mxfp4", "native", "matrix")),
        ("maia-200", "fp16", "", ("bf16", "emulated", "matrix")),
        ("maia-100", "mxfp4", "", ("bf16", "widened", "matrix")),
        ("h100", "fp32", "", ("tf32", "emulated", "matrix")),
        ("h100", "fp8-e4m3fn-b128", "fp8-e4m3fn", ("fp8-e4m3fn", "native", "matrix")),
        ("h100", "uint4-g64", "int8", ("bf16", "widened", "matrix")),
        ("b200", "mxfp8-e4m3", "mxfp8", ("mxfp8", "native", "matrix")),
        ("webgpu", "fp32", "", ("fp32", "native", "vector")),
        ("webgpu", "fp16", "", ("fp32", "widened", "vector")),
        ("webgpu", "int4-g32", "", ("fp32", "widened", "vector")),
    ],
)
def test_placement(name: str, weights: str, activations: str, expected: tuple[str, str, str]) -> None:
    found = placement(target.load(name), weights, activations)
    assert (found.format, found.how, found.unit) == expected


def test_host_says_nothing_of_units() -> None:
    assert placement(target.load("host"), "int8") is None

"""Made-up chips of family tile, small enough to simulate event by event."""

from __future__ import annotations

import tomllib

from porter.target import TargetSpec
from porter.target.reading import checked

_CHIP = """
name = "small"
family = "tile"
summary = "a made-up chip"
[tvm]
kind = "llvm"
[sources]
T = "a test"
[memory.hbm]
scope = "chip"
managed = "software"
size = {{ value = "1 GB", published = "T" }}
bandwidth = {{ value = "100 GB/s", published = "T" }}
{middle}
[memory.sram]
scope = "core"
managed = "software"
count = {{ value = {cores}, published = "T" }}
size = {{ value = "1 MB", published = "T" }}
bandwidth = {{ value = "70 GB/s", published = "T" }}
[memory.acc]
scope = "core"
managed = "software"
count = {{ value = {cores}, published = "T" }}
size = {{ value = "256 kB", published = "T" }}
[matrix]
units = {{ value = {cores}, published = "T" }}
clock = {{ value = "1 GHz", published = "T" }}
reads = "sram"
accumulates = "acc"
{least}
[matrix.formats.bf16]
rate = {{ value = "{rate} GFLOP/s", published = "T" }}
step = {{ value = [4, 4, 4], published = "T" }}
cycles = {{ value = "5 cycles", published = "T" }}
accumulator = {{ value = "fp32", published = "T" }}
[vector]
units = {{ value = {cores}, published = "T" }}
lanes = {{ value = 4, published = "T" }}
clock = {{ value = "700 MHz", published = "T" }}
fixed = {{ value = "3 cycles", published = "T" }}
rate = {{ value = "{vector} GOP/s", published = "T" }}
formats = {{ value = ["fp32"], published = "T" }}
{dma}
[limits]
alignment = {{ value = "64 B", published = "T" }}
[numerics]
rounding = {{ value = "nearest-even", published = "T" }}
saturates = {{ value = true, published = "T" }}
subnormals = {{ value = "flush", published = "T" }}
[numerics.widened]
int = {{ value = "bf16", published = "T" }}
fp8 = {{ value = "bf16", published = "T" }}
mx = {{ value = "bf16", published = "T" }}
[numerics.emulated]
fp32 = {{ value = "bf16", published = "T" }}
fp16 = {{ value = "bf16", published = "T" }}
"""
_CLUSTER = """
[memory.shared]
scope = "cluster"
managed = "software"
count = {{ value = {clusters}, published = "T" }}
size = {{ value = "10 MB", published = "T" }}
bandwidth = {{ value = "90 GB/s", published = "T" }}
"""
_DMA = """
[dma.{name}]
from = "{outer}"
to = "{inner}"
engines = {{ value = {engines}, published = "T" }}
fixed = {{ value = "{fixed} ns", published = "T" }}
{rate}
"""


def chip(
    cores: int = 1,
    clusters: int = 0,
    *,
    fixed: int = 7,
    engines: int = 2,
    rate: str = "",
    least: str = "",
) -> TargetSpec:
    """A chip with `cores` cores, in `clusters` clusters or none.

    DMA `hbm` goes to the core's `sram`; with clusters, `outer` to their `shared` and `hbm` from there.
    `rate` and `least` are lines of the DMA's and the matrix unit's tables.
    """
    dma = [("outer", "hbm", "shared", clusters)] if clusters else []
    dma += [("hbm", "shared" if clusters else "hbm", "sram", engines * cores)]
    tables = (
        _DMA.format(name=name, outer=outer, inner=inner, engines=count, fixed=fixed, rate=rate)
        for name, outer, inner, count in dma
    )
    text = _CHIP.format(
        cores=cores,
        middle=_CLUSTER.format(clusters=clusters) if clusters else "",
        rate=2 * 64 * cores / 5,
        vector=3 * cores,
        least=least,
        dma="".join(tables),
    )
    return checked(tomllib.loads(text), "small.toml")

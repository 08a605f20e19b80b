"""What a program for the chip has to keep to."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from porter.target.figure import Alignment, Count, Part, Size, shape


class Limits(Part):
    """Limits of layouts (family tile) and of launches (family simt); what the chip does not limit is absent.

    tile: `alignment` of a buffer in on-chip memory. `partitions` rows that on-chip memory has; a buffer of n
    of them starts at a multiple of the power of two not below n and of `partition-start`. `bank`: bytes of a
    partition that one instruction's results must fit in. `elements`: the longest row of an instruction in
    on-chip memory, `accumulator-elements` in the accumulator's. `block`: what the last two dimensions are
    padded to for 32-bit elements; `rows`: its rows for elements of other widths, by bits.

    simt: `workgroup` is the largest in x, y, z, `invocations` the most in one, `grid` the most workgroups in
    x, y, z, `shared` the bytes that one may share. `warp` threads run in step; a core holds `resident`
    threads and `core-registers` registers, a thread at most `registers`. `bindings` buffers, in `groups`
    groups, of at most `binding-size` bytes each (`uniform-size` for uniforms) in buffers of `buffer-size`,
    at offsets aligned to `offset-alignment`; `immediate-size` bytes come with a launch.
    """

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    alignment: Alignment | None = None
    partitions: Count | None = None
    partition_start: Count | None = None
    bank: Size | None = None
    elements: Count | None = None
    accumulator_elements: Count | None = None
    block: shape(2) | None = None
    rows: dict[Literal["32", "16", "8", "4"], Count] = Field(default_factory=dict)

    workgroup: shape(3) | None = None
    invocations: Count | None = None
    grid: shape(3) | None = None
    shared: Size | None = None
    warp: Count | None = None
    resident: Count | None = None
    registers: Count | None = None
    core_registers: Count | None = None
    bindings: Count | None = None
    groups: Count | None = None
    binding_size: Size | None = None
    uniform_size: Size | None = None
    buffer_size: Size | None = None
    offset_alignment: Alignment | None = None
    immediate_size: Size | None = None

"""WebGPU: the machine of a bundle's WGSL kernels, over wgpu (the extra `webgpu`), on a GPU or in software."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from porter.errors import EnvironmentFailure, TargetError
from porter.run.device import DeviceRunner, Kernel, Step

SLOT = 256  # bytes: what offsets of uniforms are multiples of
MOST = 65535  # groups along an axis
HINT = (
    "install porter[webgpu], and a driver of Vulkan, Metal or Direct3D 12 (in software: mesa-vulkan-drivers)"
)
ORDER = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "CPU")


def runner(folder: Path) -> DeviceRunner:
    """The bundle's program on the best adapter. Raises EnvironmentFailure PORT-0908 when there is none, and
    what DeviceRunner does."""
    return DeviceRunner(folder, WebGPU())


def adapter() -> Any:
    """The best adapter of this machine. Raises EnvironmentFailure PORT-0908 when there is none."""
    try:
        import wgpu
    except ImportError as error:
        raise EnvironmentFailure("PORT-0908", "the package wgpu is not installed", hint=HINT) from error
    found = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] != "OpenGL"]
    if not found:
        raise EnvironmentFailure("PORT-0908", "this machine has no WebGPU adapter", hint=HINT)
    places = {kind: i for i, kind in enumerate(ORDER)}
    return min(found, key=lambda a: places.get(a.info["adapter_type"], len(ORDER)))


class WebGPU:
    """One device. Implements Machine."""

    def __init__(self) -> None:
        chosen = adapter()
        import wgpu

        self.name = str(chosen.info["device"])
        self._device = chosen.request_device_sync()
        self._usage = wgpu.BufferUsage
        self._stage = wgpu.ShaderStage.COMPUTE
        self._pipelines: dict[Kernel, tuple[Any, Any]] = {}

    def allocate(self, size: int) -> Any:
        """See Machine."""
        usage = self._usage.STORAGE | self._usage.COPY_SRC | self._usage.COPY_DST
        return self._device.create_buffer(size=size, usage=usage)

    def write(self, buffer: Any, data: np.ndarray, offset: int = 0) -> None:
        """See Machine."""
        if data.nbytes:
            self._device.queue.write_buffer(buffer, offset, np.ascontiguousarray(data))

    def read(self, buffer: Any, size: int) -> np.ndarray:
        """See Machine."""
        return np.frombuffer(self._device.queue.read_buffer(buffer, 0, size), np.uint8)

    def record(self, steps: Sequence[Step]) -> list[tuple[Any, Any, tuple[int, int, int]]]:
        """Pipelines with their buffers bound, and one buffer for the scalars of all."""
        grids = [_spread(step.grid) for step in steps]
        words = np.zeros((max(1, len(steps)), SLOT // 4), np.uint32)
        for slot, step in zip(words, steps, strict=False):
            values = np.array(step.scalars, np.int64)
            slot[: len(values)] = values.astype(np.uint32) if len(values) else 0
            # The guard lets the group of this number pass, so that it is told the last.
            slot[len(values)] = step.grid[0] - 1
        uniforms = self._device.create_buffer_with_data(data=words, usage=self._usage.UNIFORM)
        ready = []
        for number, (step, grid) in enumerate(zip(steps, grids, strict=True)):
            pipeline, layout = self._pipeline(step.kernel)
            size = 4 * (len(step.scalars) + 1)
            parts = [{"buffer": b.buffer, "offset": b.offset, "size": b.size} for b in step.bindings]
            parts.append({"buffer": uniforms, "offset": number * SLOT, "size": -(-size // 16) * 16})
            entries = [{"binding": i, "resource": part} for i, part in enumerate(parts)]
            ready.append((pipeline, self._device.create_bind_group(layout=layout, entries=entries), grid))
        return ready

    def run(self, record: list[tuple[Any, Any, tuple[int, int, int]]]) -> None:
        """See Machine."""
        encoder = self._device.create_command_encoder()
        compute = encoder.begin_compute_pass()
        for pipeline, bound, grid in record:
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, bound)
            compute.dispatch_workgroups(*grid)
        compute.end()
        self._device.queue.submit([encoder.finish()])

    def _pipeline(self, kernel: Kernel) -> tuple[Any, Any]:
        if kernel not in self._pipelines:
            kinds = ["storage" if w else "read-only-storage" for w in kernel.writes] + ["uniform"]
            entries = [
                {"binding": i, "visibility": self._stage, "buffer": {"type": kind}}
                for i, kind in enumerate(kinds)
            ]
            layout = self._device.create_bind_group_layout(entries=entries)
            whole = self._device.create_pipeline_layout(bind_group_layouts=[layout])
            try:
                module = self._device.create_shader_module(code=kernel.source)
                compute = {"module": module, "entry_point": kernel.name}
                pipeline = self._device.create_compute_pipeline(layout=whole, compute=compute)
            except Exception as error:  # wgpu's errors
                what = f"the adapter refuses the kernel: {str(error).strip().splitlines()[-1].strip()}"
                raise TargetError("PORT-0454", what, where=kernel.name) from error
            self._pipelines[kernel] = pipeline, layout
        return self._pipelines[kernel]


def _spread(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Groups along x that are more than an axis has, over z as well: the kernels count both as one."""
    x, y, z = grid
    while x > MOST:
        x, z = (x + 1) // 2, z * 2
    return x, y, z

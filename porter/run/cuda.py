"""CUDA: the machine of a bundle's CUDA kernels, over the driver's own interface; NVRTC compiles them.

Needs a GPU, its driver and the extra `cuda`. Tested on an emulated driver; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from porter.errors import EnvironmentFailure
from porter.run import nvrtc
from porter.run.device import DeviceRunner, Kernel, Step

HINT = "a GPU of NVIDIA's and its driver are needed"
DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
SCALARS = {
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint32": ctypes.c_uint32,
    "float32": ctypes.c_float,
}


def runner(folder: Path) -> DeviceRunner:
    """The bundle's program on the first GPU. Raises EnvironmentFailure PORT-0908 when there is none, and what
    DeviceRunner does."""
    return DeviceRunner(folder, Cuda())


class _Buffer:
    """Device memory that is given back with its last reference."""

    def __init__(self, driver: Any, size: int) -> None:
        self._driver, self.address = driver, ctypes.c_uint64()
        _checked(driver.cuMemAlloc_v2(ctypes.byref(self.address), ctypes.c_size_t(size)), "cuMemAlloc")

    def __del__(self) -> None:
        if self.address:
            self._driver.cuMemFree_v2(self.address)


class Cuda:
    """The first GPU. Implements Machine."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL(DRIVER)
        except OSError as error:
            raise EnvironmentFailure("PORT-0908", "there is no CUDA driver", hint=HINT) from error
        nvrtc.library()
        _checked(self._driver.cuInit(0), "cuInit")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        _checked(self._driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
        _checked(
            self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain"
        )
        _checked(self._driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        version = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(version, (MAJOR, MINOR), strict=True):
            _checked(self._driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "its version")
        major, minor = (v.value for v in version)
        name = ctypes.create_string_buffer(256)
        _checked(self._driver.cuDeviceGetName(name, len(name), device), "its name")
        self.name = name.value.decode()
        self.arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
        self._modules: dict[str, ctypes.c_void_p] = {}
        self._functions: dict[Kernel, ctypes.c_void_p] = {}

    def allocate(self, size: int) -> _Buffer:
        """See Machine."""
        return _Buffer(self._driver, size)

    def write(self, buffer: _Buffer, data: np.ndarray, offset: int = 0) -> None:
        """See Machine."""
        data = np.ascontiguousarray(data)
        to = ctypes.c_uint64(buffer.address.value + offset)
        if data.nbytes:
            source, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
            _checked(self._driver.cuMemcpyHtoD_v2(to, source, size), "cuMemcpyHtoD")

    def read(self, buffer: _Buffer, size: int) -> np.ndarray:
        """See Machine."""
        found = np.empty(size, np.uint8)
        to = ctypes.c_void_p(found.ctypes.data)
        _checked(self._driver.cuMemcpyDtoH_v2(to, buffer.address, ctypes.c_size_t(size)), "cuMemcpyDtoH")
        return found

    def record(self, steps: Sequence[Step]) -> list[tuple[Any, ...]]:
        """Functions with the addresses of their arguments."""
        return [self._ready(step) for step in steps]

    def run(self, record: list[tuple[Any, ...]]) -> None:
        """See Machine: one stream, so that launches follow each other."""
        for function, grid, block, arguments, _ in record:
            status = self._driver.cuLaunchKernel(function, *grid, *block, 0, None, arguments, None)
            _checked(status, "cuLaunchKernel")

    def _ready(self, step: Step) -> tuple[Any, ...]:
        values: list[Any] = [ctypes.c_uint64(b.buffer.address.value + b.offset) for b in step.bindings]
        values += [SCALARS[k](v) for k, v in zip(step.kernel.scalars, step.scalars, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        kept = values, [b.buffer for b in step.bindings]  # for as long as the record
        return self._function(step.kernel), step.grid, step.kernel.block, pointers, kept

    def _function(self, kernel: Kernel) -> ctypes.c_void_p:
        if kernel.source not in self._modules:
            module, image = ctypes.c_void_p(), nvrtc.compiled(kernel.source, self.arch)
            _checked(self._driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
            self._modules[kernel.source] = module
        if kernel not in self._functions:
            function, name = ctypes.c_void_p(), kernel.name.encode()
            module = self._modules[kernel.source]
            status = self._driver.cuModuleGetFunction(ctypes.byref(function), module, name)
            _checked(status, f"the kernel {kernel.name}")
            self._functions[kernel] = function
        return self._functions[kernel]


def _checked(status: int, what: str) -> None:
    if status:
        raise EnvironmentFailure("PORT-0908", f"the CUDA driver refuses {what}: status {status}", hint=HINT)

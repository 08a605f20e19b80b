"""Quantized caches in WGSL, on an adapter in software where there is no GPU, and in CUDA through NVRTC."""

import numpy as np
import pytest
import tvm
from coded import SCHEMES, Layer
from simt import on_device
from tvm import tirx

from porter import target
from porter.errors import EnvironmentFailure
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.simt import kernels
from porter.lower.simt.language import device, language
from porter.run import nvrtc
from porter.run.webgpu import WebGPU
from porter.target import TargetSpec


def cases(*quick: str) -> list[object]:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.long) for n in SCHEMES]


@pytest.mark.parametrize("name", cases("kivi4", "turboquant3"))
def test_wgsl(machine: WebGPU, webgpu: TargetSpec, name: str) -> None:
    def run(function: tirx.PrimFunc, arguments: list[np.ndarray]) -> list[np.ndarray]:
        return on_device(function, arguments, webgpu, machine)

    Layer(SCHEMES[name], Chip(Profile(webgpu)), run).check()


@pytest.mark.parametrize("name", cases("innerq"))
def test_nvrtc_takes_it(name: str) -> None:
    spec = target.load("h100")
    layer = Layer(SCHEMES[name], Chip(Profile(spec)), lambda *_: [])
    told, found = language(spec), {}
    for i, function in enumerate(layer.functions):
        named = function.with_attr("global_symbol", f"{function.attrs['global_symbol']}_{i}")
        made = kernels.compiled(named, device(spec), told)
        found |= {step.kernel.name: step.kernel.function for step in made.dispatches}
    try:
        cubin = nvrtc.compiled(kernels.source(tvm.IRModule(found), device(spec), told), str(spec.tvm["arch"]))
    except EnvironmentFailure as error:
        pytest.skip(str(error))
    assert all(name.encode() in cubin for name in found)

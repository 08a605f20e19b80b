"""A GPU that is this CPU: the driver's calls and the kernels' CUDA source, compiled by g++.

`porter.run.cuda` runs on it as on a GPU, with the same kernels, launches and arguments. Products and sums are
rounded one by one, as NVRTC is told to; memory behind a buffer may not be touched, and new memory is not
zero. What is not a GPU's: time, the last bits of functions such as sin, and threads side by side, but for
kernels whose threads wait for each other.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from porter import target
from porter.errors import EnvironmentFailure
from porter.run import cuda, nvrtc
from porter.target import TargetSpec

HERE = Path(__file__).parent / "gpu"
OPTIONS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-pthread",
    "-w",
]
KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^)]*\) \{(.*?)^\}", re.S | re.M)
WAITS = re.compile(r"__syncthreads|_sync\(")
INCLUDES = re.compile(r"^\s*#\s*include <(cuda\w*|math_constants)\.h>", re.M)


def spec() -> TargetSpec:
    """A chip of CUDA's whose products are of float32, as WebGPU's are."""
    return target.load("webgpu").model_copy(
        update={"name": "emulated", "tvm": {"kind": "cuda", "arch": "sm_80"}}
    )


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make `porter.run.cuda` find such a GPU; what is compiled lies in `folder`."""
    monkeypatch.setattr(cuda, "DRIVER", str(_compiled(HERE / "driver.cpp", folder / "libcuda.so")))
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    monkeypatch.setattr(nvrtc, "compiled", lambda source, arch: _module(source, folder))


def _module(source: str, folder: Path) -> bytes:
    """The path of a library that launches the source's kernels on this CPU."""
    found = [f"LAUNCHED({name}, {int(bool(WAITS.search(body)))})" for name, body in KERNEL.findall(source)]
    assert len(found) == len(re.findall(r"__global__ .*\{$", source, re.M)), "a kernel was not found"
    text = "\n".join([f'#include "{HERE}/kernels.h"', INCLUDES.sub("", source), *found])
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    file.write_text(text, encoding="utf-8")
    return str(_compiled(file, file.with_suffix(".so"))).encode()


def _compiled(source: Path, to: Path) -> Path:
    done = subprocess.run(
        ["g++", *OPTIONS, source, "-o", to, "-ldl"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EnvironmentFailure("PORT-0908", done.stderr[:2000])
    return to

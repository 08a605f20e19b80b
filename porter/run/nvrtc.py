"""NVRTC: CUDA source to machine code for a chip, without one and without a toolkit (the extra `cuda`)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

from porter.errors import EnvironmentFailure, TargetError

HINT = "install porter[cuda]"
# Where a toolkit lies that is no Python package.
TOOLKITS = ("CUDA_HOME", "CUDA_PATH")
USUAL = Path("/usr/local/cuda")


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, of its Python package or the system. Raises EnvironmentFailure PORT-0908 without one."""
    found = [str(f) for folder in _packages() for f in sorted(folder.glob("lib/libnvrtc.so.*"))]
    for name in (*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise EnvironmentFailure("PORT-0908", "NVRTC, which compiles CUDA, is not installed", hint=HINT)


@functools.cache
def headers() -> tuple[str, ...]:
    """Folders of CUDA's headers, which kernels of 16-bit floats include: those of the Python packages, or
    of a toolkit. Raises EnvironmentFailure PORT-0908 without any."""
    toolkits = [Path(os.environ[name]) for name in TOOLKITS if name in os.environ]
    for folder in (*_packages(), *toolkits, USUAL):
        if (folder / "include" / "cuda_fp16.h").is_file():
            return str(folder / "include"), str(folder / "include" / "cccl")
    raise EnvironmentFailure("PORT-0908", "CUDA's headers are not installed", hint=HINT)


def compiled(source: str, arch: str) -> bytes:
    """A cubin of `source` for `arch` (`sm_90a`), products and sums rounded one by one.

    Raises EnvironmentFailure PORT-0908 when there is no compiler or no headers, TargetError PORT-0454 when it
    refuses the source.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", "-default-device"]
    given = _strings(options + [f"--include-path={folder}" for folder in headers()])
    arguments = (source.encode(), b"kernels.cu", 0, None, None)
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), *arguments), "cannot begin")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(given), given):
            raise TargetError("PORT-0454", f"NVRTC refuses the kernels: {_log(nvrtc, program)}", where=arch)
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _packages() -> list[Path]:
    """Folders that the Python packages of a toolkit's parts lie in, as `nvidia/cu13`."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return [folder for root in roots for folder in sorted(root.glob("*"))]


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    text = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
    return next((line for line in text.splitlines() if "error" in line), text.strip())


def _text(program: ctypes.c_void_p, measure: ctypes._CFuncPtr, get: ctypes._CFuncPtr) -> bytes:
    size = ctypes.c_size_t()
    _checked(measure(program, ctypes.byref(size)), "has no result")
    buffer = ctypes.create_string_buffer(size.value)
    _checked(get(program, buffer), "has no result")
    return buffer.raw


def _strings(texts: list[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(t.encode() for t in texts))


def _checked(status: int, what: str) -> None:
    if status:
        raise EnvironmentFailure("PORT-0908", f"NVRTC {what}: status {status}", hint=HINT)

"""NVRTC: CUDA source to machine code for a chip, without one and without a toolkit (the extra `cuda`)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from porter.errors import EnvironmentFailure, TargetError

HINT = "install porter[cuda]"
# What the source that TVM writes includes, as far as its kernels use it; a toolkit need not be there.
HEADERS = {
    "cuda/std/cstdint": """namespace cuda { namespace std {
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;
using uint64_t = unsigned long long;
} }
""",
    "cuda/std/type_traits": """namespace cuda { namespace std {
template <bool V> struct truth { static constexpr bool value = V; };
template <class A, class B> struct is_same : truth<false> {};
template <class A> struct is_same<A, A> : truth<true> {};
template <class A, class B> inline constexpr bool is_same_v = is_same<A, B>::value;
template <class A> struct is_integral : truth<false> {};
template <class A> struct is_signed : truth<(A(-1) < A(0))> {};
template <class A> struct is_unsigned : truth<(A(0) < A(-1))> {};
template <class A> struct is_floating_point : truth<false> {};
template <bool B, class A = void> struct enable_if {};
template <class A> struct enable_if<true, A> { using type = A; };
template <bool B, class X, class Y> struct conditional { using type = X; };
template <class X, class Y> struct conditional<false, X, Y> { using type = Y; };
} }
""",
    "math_constants.h": """#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ULL)
""",
}


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, of its Python package or the system. Raises EnvironmentFailure PORT-0908 without one."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [str(f) for folder in folders for f in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    for name in (*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise EnvironmentFailure("PORT-0908", "NVRTC, which compiles CUDA, is not installed", hint=HINT)


def compiled(source: str, arch: str) -> bytes:
    """A cubin of `source` for `arch` (`sm_90a`), products and sums rounded one by one.

    Raises EnvironmentFailure PORT-0908 when there is no compiler, TargetError PORT-0454 when it refuses the
    source.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    names, texts = (_strings(list(part)) for part in (HEADERS, HEADERS.values()))
    arguments = (source.encode(), b"kernels.cu", len(HEADERS), texts, names)
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), *arguments), "cannot begin")
    try:
        options = _strings([f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", "-default-device"])
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            raise TargetError("PORT-0454", f"NVRTC refuses the kernels: {_log(nvrtc, program)}", where=arch)
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


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

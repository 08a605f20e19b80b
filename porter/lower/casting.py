"""Fast casting: what `porter.formats.encode` gives, bit by bit, from compiled kernels and several threads.

A matrix goes through in blocks of rows that stay in the cache. Kernels do what is done to each element;
scales, one number a group, are chosen by `porter.formats` itself. What no kernel does goes through
`porter.formats`, in such blocks too where rows are independent of each other.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from porter.formats import Encoded, Format, integers, rounding
from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
import tvm

from porter.lower.kernels import rounding as kernels
from porter.run.feeds import aligned_zeros

BLOCK = 1 << 19  # elements of a block: 2 MiB of float32, which with its codes stays in the cache
SMALL = 1 << 15  # elements of a matrix that is not worth compiling a kernel for


def encode(
    form: Format, values: np.ndarray, scale_dtype: np.dtype | type = np.float32, *, threads: int = 0
) -> Encoded:
    """`porter.formats.encode` of finite floats [N, K] or [E, N, K], the same bits.

    `values` may be any view, of any float type; it is read once, a block of rows at a time. `threads` 0 takes
    PORTER_THREADS, else TVM_NUM_THREADS, else the processors that this process may use.
    """
    if values.ndim < 2 or values.size < SMALL or not _by_rows(form):
        return rounding.encode(form, values, scale_dtype)
    one = rounding.encode(form, np.ones((1, values.shape[-1]), np.float32), scale_dtype)
    codes = np.empty(values.shape, one.codes.dtype)
    scales = np.empty((*values.shape[:-1], one.scales.shape[-1]), one.scales.dtype)
    step = max(1, BLOCK // values.shape[-1])
    blocks = [(*lead, slice(at, at + step))
              for lead in np.ndindex(values.shape[:-2]) for at in range(0, values.shape[-2], step)]  # fmt: skip
    work = _worker(form, step, values.shape[-1], scale_dtype)

    def cast(block: tuple[int | slice, ...]) -> None:
        work(values[block], codes[block], scales[block])

    workers = min(threads or available(), len(blocks))
    with ThreadPoolExecutor(workers, "porter-cast") as pool:
        for _ in pool.map(cast, blocks):
            pass  # raises what a block raised
    return Encoded(form, codes, scales)


def available() -> int:
    """Threads that casting may use."""
    said = os.environ.get("PORTER_THREADS") or os.environ.get("TVM_NUM_THREADS") or "0"
    return int(said) if said.isdecimal() and int(said) else len(os.sched_getaffinity(0))


Work = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def _by_rows(form: Format) -> bool:
    """Whether a row's codes and scales depend on that row alone, and are all that there is."""
    return form.rows == 1 and not form.zero and not form.micro and form.scale in ("fp32", "fp16", "bf16")


def _worker(form: Format, rows: int, columns: int, scale_dtype: np.dtype | type) -> Work:
    """What casts a block of up to `rows` rows into its codes and scales."""
    group = form.group or columns
    whole = columns // group * group
    choose, code = _chooser(form, group), _coder(form, group)

    def plain(values: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
        made = rounding.encode(form, values, scale_dtype)
        codes[...], scales[...] = made.codes, made.scales

    if choose is None or not whole:
        return plain

    def fast(values: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
        n = len(values)
        flat = _scratch("values", (n * whole // group, group), np.float32)
        np.copyto(flat.reshape(n, whole), values[:, :whole], casting="same_kind")
        scale = choose(flat, scale_dtype)
        made = _scratch("codes", flat.shape, codes.dtype)
        code(flat, _lent("scale", scale), made)
        codes[:, :whole] = made.reshape(n, whole)
        scales[:, : whole // group] = scale.reshape(n, -1)
        if whole < columns:
            plain(values[:, whole:], codes[:, whole:], scales[:, -1:])

    return fast


def _chooser(form: Format, group: int) -> Callable[[np.ndarray, np.dtype | type], np.ndarray] | None:
    """What gives each group's scale, as stored, of values [groups, length]; None where no kernel does."""
    if form.element == "int4":
        return _better_of_two(group) if kernels.SUMMED[0] <= group <= kernels.SUMMED[1] else None
    top = form.float8.largest if form.float8 else integers.limits(form.bits)[1]
    peak = _extremes(group)

    def largest(values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        high, low = peak(values)
        return rounding._scale(np.maximum(high, -low), top, dtype)

    return largest


def _better_of_two(group: int) -> Callable[[np.ndarray, np.dtype | type], np.ndarray]:
    """int4: absmax / 7, or the signed absmax / -8 where it makes the smaller squared error."""
    peak, errors = _extremes(group), _compiled("errors", group, -8, 7)

    def better(values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        high, low = peak(values)
        size, signed = np.maximum(high, -low), np.where(high >= -low, high, low)
        seven, eight = rounding._scale(size, 7, dtype), rounding._scale(signed, -8, dtype)
        unit = np.maximum(size, np.finfo(np.float32).tiny)
        lent = [_lent(n, a) for n, a in (("seven", seven), ("eight", eight), ("unit", unit))]
        first, second = (_scratch(n, high.shape, np.float32) for n in ("first", "second"))
        errors(values, *lent, first, second)
        return np.where(second < first, eight, seven)

    return better


def _extremes(group: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What gives the largest and the smallest of each group; of long ones numpy does, as fast."""
    if group > LONG:
        return lambda values: (values.max(axis=-1), values.min(axis=-1))
    kernel = _compiled("extremes", group)

    def both(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high, low = (_scratch(n, values.shape[:1], np.float32) for n in ("high", "low"))
        kernel(values, high, low)
        return high, low

    return both


LONG = 512  # elements of a group from which kernels are not made for its very length


def _coder(form: Format, group: int) -> Callable[..., None] | None:
    """The kernel that divides by scales and rounds to codes."""
    length = group if group <= LONG else None
    if form.float8 is None:
        return _compiled("integers", length, *integers.limits(form.bits))
    f = form.float8
    top = int(np.flatnonzero(f.values[:128] == f.largest)[0])
    return _compiled("floats", length, f.mantissa, f.bias, 8, top, f.special != "fnuz")


@functools.cache
def _compiled(kind: str, *arguments: object) -> Callable[..., None]:
    """A kernel of `porter.lower.kernels.rounding`, for this machine's processor, on arrays at cache lines."""
    function = getattr(kernels, kind)(kind, *arguments)
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    kernel = tvm.tirx.build(tvm.IRModule({kind: function}), target=target)[kind]
    return lambda *arrays: kernel(*map(tvm.runtime.from_dlpack, arrays))


_own = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """This thread's buffer of that name, at a cache line; what was in it before is gone."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    kept = _own.__dict__.get(name)
    if kept is None or kept.size < size:
        kept = _own.__dict__[name] = aligned_zeros((size,), np.dtype(np.uint8))
    return kept[:size].view(dtype).reshape(shape)


def _lent(name: str, array: np.ndarray) -> np.ndarray:
    """A float32 copy where a kernel can read it."""
    copy = _scratch(name, array.shape, np.float32)
    np.copyto(copy, array, casting="unsafe")
    return copy

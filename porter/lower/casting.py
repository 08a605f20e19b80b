"""Fast casting: what `porter.formats.encode` gives, bit by bit, from compiled kernels and several threads.

A matrix goes through in blocks of rows that stay in the cache. Kernels do what is done to each element;
scales, one number a group, are chosen by `porter.formats.scales`. What no kernel does goes through
`porter.formats` in such blocks too.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from porter.formats import Encoded, Format, blocks, rounding
from porter.formats import scales as choice
from porter.formats.elements import Float
from porter.formats.format import Scales
from porter.formats.integers import Integer
from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
import tvm

from porter.lower.kernels import rounding as kernels
from porter.run.feeds import aligned_zeros

BLOCK = 1 << 19  # elements of a block: 2 MiB of float32, which with its codes stays in the cache
SMALL = 1 << 15  # elements of a matrix that is not worth compiling a kernel for
LONG = 512  # elements of a group from which a kernel is not made for its very length

Place = tuple[int | slice, ...]


def encode(form: Format, values: np.ndarray, *, threads: int = 0) -> Encoded:
    """`porter.formats.encode` of finite floats [N, K] or [E, N, K], the same bits.

    `values` may be any view, of any float type; a block of it is in memory as float32 for each thread.
    `threads` 0 takes PORTER_THREADS, else TVM_NUM_THREADS, else the processors that this process may use.
    """
    if values.size < SMALL or (form.rows != 1 and form.rule == "competing"):
        return rounding.encode(form, values)
    step = max(1, BLOCK // values.shape[-1])
    places: list[Place] = [
        (*lead, slice(at, at + step))
        for lead in np.ndindex(values.shape[:-2])
        for at in range(0, values.shape[-2], step)
    ]
    with ThreadPoolExecutor(min(threads or available(), len(places)), "porter-cast") as pool:

        def each(work: Callable[[Place], None]) -> None:
            for _ in pool.map(work, places):
                pass  # raises what a block raised

        caster = _Caster(form, values)
        return caster.by_rows(each) if form.rows == 1 and form.scale != "e4m3fn" else caster.whole(each)


def available() -> int:
    """Threads that casting may use."""
    said = os.environ.get("PORTER_THREADS") or os.environ.get("TVM_NUM_THREADS") or "0"
    return int(said) if said.isdecimal() and int(said) else len(os.sched_getaffinity(0))


class _Caster:
    """One matrix or stack on its way: blocks of rows in, their part of the result out."""

    def __init__(self, form: Format, values: np.ndarray) -> None:
        self.form, self.values = form, values
        self.columns = values.shape[-1]
        self.group = min(form.group or self.columns, self.columns)
        self.full = self.columns // self.group * self.group  # columns in whole groups; the rest is numpy's
        self.groups = self.full // self.group

    def by_rows(self, each: Callable[[Callable[[Place], None]], None]) -> Encoded:
        """Where a row's result depends on that row alone: every block is read once."""
        form = self.form
        one = rounding.encode(form, np.ones((1, self.columns), np.float32))
        made = {n: np.empty((*self.values.shape[:-1], a.shape[-1]), a.dtype) for n, a in _arrays(one).items()}
        choose = self._choose()

        def cast(place: Place) -> None:
            into = {n: a[place] for n, a in made.items()}
            if choose is None:
                _copy(into, rounding.encode(form, self.values[place]))
                return
            flat = self._load(place)
            scales = choose(flat, into["codes"])
            for name, array in _arrays(Encoded(form, flat, *scales)).items():
                if name != "codes":
                    into[name][:, : self.groups] = array.reshape(-1, self.groups)
            if self.full < self.columns:
                last = {n: a[:, self.full :] if n == "codes" else a[:, -1:] for n, a in into.items()}
                _copy(last, rounding.encode(form, self.values[place][:, self.full :]))

        each(cast)
        return Encoded(form, **made, factor=one.factor)

    def whole(self, each: Callable[[Callable[[Place], None]], None]) -> Encoded:
        """Where rows share scales or a factor: the extremes of all blocks first, the codes after."""
        form, n = self.form, self.values.shape[-2]
        shape = (*self.values.shape[:-1], -(-self.columns // self.group))
        high, low = np.empty(shape, np.float32), np.empty(shape, np.float32)

        def measure(place: Place) -> None:
            peaks = _extremes(self.group)(self._load(place))
            for into, peak, f in zip((high, low), peaks, (np.max, np.min), strict=True):
                into[place][:, : self.groups] = peak.reshape(-1, self.groups)
                if self.full < self.columns:
                    into[place][:, -1] = f(self.values[place][:, self.full :], axis=-1)

        each(measure)
        if form.rows != 1:
            high, low = blocks.largest(high, 1, form.rows), blocks.smallest(low, 1, form.rows)
        (scales,) = choice.of_extremes(form, high, low)
        rows = [None if a is None else blocks.spread_over(a, (*a.shape[:-2], n, a.shape[-1]), 1, form.rows)
                for a in (scales.scales, scales.zeros)]  # fmt: skip
        signed = isinstance(form.elements, Integer) and form.elements.signed
        codes = np.empty(self.values.shape, np.int8 if signed else np.uint8)

        def cast(place: Place) -> None:
            own = [None if a is None else a[place] for a in rows]
            cut = [None if a is None else a[:, : self.groups].reshape(-1) for a in own]
            self._code(self._load(place), Scales(*cut, None, scales.factor), codes[place])
            if self.full < self.columns:
                last = Scales(*(None if a is None else a[:, -1:] for a in own), None, scales.factor)
                tail = np.asarray(self.values[place][:, self.full :], np.float32)
                codes[place][:, self.full :] = rounding.nearest(replace(form, rows=1), tail, last).codes

        each(cast)
        return Encoded(form, codes, *scales)

    def _load(self, place: Place) -> np.ndarray:
        """A block's whole groups, float32 [groups, length]."""
        block = self.values[place]
        flat = _scratch("values", (len(block) * self.groups, self.group), np.float32)
        np.copyto(flat.reshape(len(block), self.full), block[:, : self.full], casting="same_kind")
        return flat

    def _choose(self) -> Callable[[np.ndarray, np.ndarray], Scales] | None:
        """What gives the scales of values [groups, length] and puts the codes where it is told; None where no
        kernel does."""
        form, group = self.form, self.group
        if not form.scale or form.micro or not isinstance(form.elements, Float | Integer):
            return None
        peak = _extremes(group)
        if form.rule != "competing":

            def only(flat: np.ndarray, codes: np.ndarray) -> Scales:
                scales = choice.of_extremes(form, *peak(flat))[0]
                self._code(flat, scales, codes)
                return scales

            return only
        if not kernels.SUMMED[0] <= group <= kernels.SUMMED[1]:
            return None
        return self._better_of_two(peak) if form.scale != "fp32" else self._fused()

    def _fused(self) -> Callable[[np.ndarray, np.ndarray], Scales]:
        """The better of two float32 scales, all in one kernel."""
        low, high = self.form.elements.smallest, self.form.elements.largest
        largest = [abs(float(choice.stored(np.float32(np.inf), code, "fp32"))) for code in (high, low)]
        kernel = _compiled("better", self.group, low, high, (float(choice.TINY), *largest))

        def better(flat: np.ndarray, codes: np.ndarray) -> Scales:
            room = [_scratch(f"room {i}", flat.shape[:1], np.float32) for i in range(8)]
            made = _scratch("codes", flat.shape, np.int8)
            kernel(flat, *room, made)
            codes[:, : self.full] = made.reshape(len(codes), self.full)
            return Scales(room[0])

        return better

    def _better_of_two(self, peak: Callable) -> Callable[[np.ndarray, np.ndarray], Scales]:
        """The better of two scales as they are stored, in another type than float32."""
        form, limits = self.form, (self.form.elements.smallest, self.form.elements.largest)
        errors = _compiled("errors", self.group, *limits)

        def better(flat: np.ndarray, codes: np.ndarray) -> Scales:
            high, low = peak(flat)
            first, second = (s.scales for s in choice.of_extremes(form, high, low))
            unit = np.maximum(np.maximum(high, -low), choice.TINY)
            lent = [_lent(n, a) for n, a in (("one", first), ("two", second), ("unit", unit))]
            a, b = (_scratch(n, high.shape, np.float32) for n in ("first", "second"))
            errors(flat, *lent, a, b)
            scales = Scales(np.where(b < a, second, first))
            self._code(flat, scales, codes)
            return scales

        return better

    def _code(self, flat: np.ndarray, scales: Scales, codes: np.ndarray) -> None:
        """The nearest codes of values [groups, length] under a scale each, into [rows, columns]."""
        form, length = self.form, self.group if self.group <= LONG else None
        scale = _lent("scale", scales.scales)
        if scales.factor is not None:
            scale *= scales.factor
        made, more = _scratch("codes", flat.shape, codes.dtype), ()
        if isinstance(form.elements, Integer):
            low = -form.elements.largest if form.fraction else form.elements.smallest
            kernel = _compiled("integers", length, low, form.elements.largest, bool(form.zero))
            more = (_lent("zero", scales.zeros),) if form.zero else ()
        else:
            f = form.elements
            top = int(np.flatnonzero(f.values == f.largest)[0])
            kernel = _compiled("floats", length, f.mantissa, f.bias, f.bits, top, f.special != "fnuz")
        kernel(flat, scale, *more, made)
        codes[:, : self.full] = made.reshape(len(codes), self.full)


def _arrays(encoded: Encoded) -> dict[str, np.ndarray]:
    named = {n: getattr(encoded, n) for n in ("codes", "scales", "zeros", "shifts")}
    return {n: a for n, a in named.items() if a is not None}


def _copy(into: dict[str, np.ndarray], encoded: Encoded) -> None:
    for name, array in _arrays(encoded).items():
        into[name][...] = array


def _extremes(group: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What gives the largest and the smallest of each group [groups, length]; of long ones numpy, as fast."""
    if group > LONG:
        return lambda flat: (flat.max(axis=-1), flat.min(axis=-1))
    kernel = _compiled("extremes", group)

    def both(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high, low = (_scratch(n, flat.shape[:1], np.float32) for n in ("high", "low"))
        kernel(flat, high, low)
        return high, low

    return both


_compiling = threading.Lock()


def _compiled(kind: str, *arguments: object) -> Callable[..., None]:
    """A kernel of `porter.lower.kernels.rounding`, for this machine's processor, on arrays at cache lines."""
    with _compiling:  # once, whoever asks
        return _kernel(kind, *arguments)


@functools.cache
def _kernel(kind: str, *arguments: object) -> Callable[..., None]:
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

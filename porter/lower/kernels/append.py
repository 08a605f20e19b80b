"""Append tokens to one side of a stored cache in place (`porter.kv.cache`): only the bytes of the new tokens,
and of the groups that they complete, are written.

Rounding is that of `porter.kv`, operation by operation in float32, so that the bytes are the same: a group's
step is divided, raised to the smallest normal number of its stored type and rounded to that; codes are
rounded against what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from porter.formats.elements import ELEMENTS, FLOATS
from porter.kv import codebook
from porter.lower.kernels.codecs import encode_float
from porter.lower.kernels.define import Expr, Spec, T, define, f32, i64, local, loop, store, tirx
from porter.lower.kernels.residual import write_residual
from porter.lower.kernels.steps import stored_step
from porter.lower.kernels.stored import WIDE, Stored
from porter.lower.kernels.tagged import slot_of

Value = Callable[[Expr, Expr], Expr]  # (token, channel) -> float32


def append_stored(spec: Stored, heads: int) -> tirx.PrimFunc:
    """The side's buffers…, new [b, heads, s, width] float32, starts [b] int64 (, static steps, slots, or
    what signs are those of).

    Token t of `new` becomes token starts[b] + t. Tokens past the capacity are dropped; with a start below 0
    nothing is written.
    """
    plan = spec.planned(heads)
    names = [f"c{suffix}" for suffix, _, _ in plan]
    buffers: list[Spec] = [
        *((name, ("b", *shape), dtype) for name, (_, shape, dtype) in zip(names, plan, strict=True)),
        ("new", ("b", heads, "s", spec.width), "float32"),
        ("starts", ("b",), "int64"),
        *spec.step("c", heads),
        *([("matrix", (spec.width, spec.width), "float64")] if spec.side.residual else []),
    ]

    def body(*args, b, s):
        caches, (new, starts, *step) = args[: len(plan)], args[len(plan) :]
        state = {suffix: buffer for (suffix, _, _), buffer in zip(plan, caches, strict=True)}
        with loop(b * i64(heads), "parallel") as row:
            at = (row // i64(heads), row % i64(heads))
            start = starts[at[0]]
            end = tirx.min(start + s, i64(spec.capacity))
            with T.If(tirx.all(start >= i64(0), start < end)), T.Then():
                _Append(spec, state, new, at, start, end, *step).emit()

    name = f"append_{spec.name}_{spec.label}_h{heads}_c{spec.capacity}_d{spec.width}"
    return define(name, buffers, body)


@dataclass(frozen=True)
class _Append:
    """One row and head."""

    spec: Stored
    state: dict[str, tirx.Buffer]
    new: tirx.Buffer
    row: tuple[Expr, Expr]
    start: Expr
    end: Expr
    static: tirx.Buffer | None = None  # steps, slots, or what signs are those of

    def emit(self) -> None:
        spec, scheme, side = self.spec, self.spec.scheme, self.spec.side
        if not side.coded:
            self._keep("", self.start, self.end, lambda t: t)
            return
        if scheme.copy:
            self._keep("_copy", self.start, self.end, lambda t: t)
        done, ready = spec.rounded(self.start), spec.rounded(self.end)
        if "_codes" in self.state or "_more_codes" in self.state:
            groups = (ready - done) // i64(side.flush)
            with loop(groups) as i:
                first = done + i * i64(side.flush)
                self._group(first, first) if not scheme.tagged else self._in_its_pool(first)
        if scheme.windowed(side):
            sink = i64(scheme.sink)
            newest = tirx.max(tirx.max(sink, self.end - i64(scheme.ring(side))), self.start)
            self._keep("_window", self.start, tirx.min(self.end, sink), lambda t: t)
            self._keep("_window", newest, self.end, spec.slot)

    def _keep(self, suffix: str, first: Expr, end: Expr, slot: Callable[[Expr], Expr]) -> None:
        """Tokens as floats of the buffer's type."""
        if suffix not in self.state:
            return
        buffer = self.state[suffix]
        with loop(tirx.max(end - first, i64(0))) as i, loop(self.spec.width) as d:
            token = first + i
            value = self._exact(token, d) if suffix == "_copy" else self._copied(token, d)
            store(buffer, _wide(value, str(buffer.dtype)), *self.row, slot(token), d)

    def _exact(self, token: Expr, d: Expr) -> Expr:
        return self.new[(*self.row, token - self.start, d)]

    def _copied(self, token: Expr, d: Expr) -> Expr:
        """A new token as the exact copy holds it."""
        copy = self.spec.scheme.copy if self.spec.side.coded else ""
        value = self._exact(token, d)
        return tirx.Cast("float32", _wide(value, WIDE[copy])) if copy else value

    def _value(self, token: Expr, d: Expr) -> Expr:
        """Token `token`, from the window or new, rounded as the window rounds it."""
        spec, high = self.spec, WIDE[self.spec.scheme.high]
        if not spec.scheme.windowed(spec.side):
            return self._copied(token, d)
        fresh = tirx.Cast("float32", _wide(self._copied(tirx.max(token, self.start), d), high))
        if "_window" not in self.state:
            return fresh
        held = tirx.Cast("float32", self.state["_window"][(*self.row, spec.slot(token), d)])
        return tirx.Select(token < self.start, held, fresh)

    def _in_its_pool(self, token: Expr) -> None:
        """Round a token after the sinks to where its slot says."""
        slot = slot_of(self.static, self.row[0], token)
        for pool in self.spec.pools():
            named = {"_window": "_window"} | {pool.suffix + n: n for n in ("_codes", "_scale", "_min")}
            state = {named[n]: buffer for n, buffer in self.state.items() if n in named}
            with T.If(pool.holds(slot)), T.Then():
                replace(self, spec=pool.spec, state=state)._group(token, pool.place(slot))

    def _group(self, first: Expr, to: Expr) -> None:
        """Round the tokens that are rounded together, from `first` after the sinks on, to the places from
        `to` on."""
        side, width = self.spec.side, self.spec.width
        sink = i64(self.spec.scheme.sink)
        if side.element.startswith("lloyd"):
            self._sets(first)  # which have no pools: `to` is `first`
            return
        step, low = local(width), local(width)
        if side.static:
            head = self.row[1] if side.static != "tensor" else i64(0)
            with loop(width) as d:
                store(step, self.static[head, 0, d if side.static == "channel" else i64(0)], d)
        elif side.along == "tokens":
            place = to // i64(side.group)
            with loop(width) as d:
                number = _Grouping(self, side.group, lambda k: self._value(sink + first + k, d)).emit()
                self._store_group(number, place, d)
                store(step, number.step, d)
                store(low, number.low, d)
        else:
            each = side.group or width
            for g in range(-(-width // each)):
                size = min(each, width - g * each)
                channel = i64(g * each)
                number = _Grouping(self, size, lambda k, c=channel: self._value(sink + first, c + k)).emit()
                self._store_group(number, to, i64(g))
                with loop(size) as k:
                    store(step, number.step, channel + k)
                    store(low, number.low, channel + k)
        with loop(side.flush) as i:
            codes = _padded(width)
            with loop(width) as d:
                value = self._value(sink + first + i, d)
                store(codes, self._code(value, step[d], low[d]), d)
            self._pack(codes, to + i, 0, width, side.bits)

    def _store_group(self, number: _Grouping, place: Expr, index: Expr) -> None:
        scale = self.state["_scale"]
        store(scale, tirx.Cast(str(scale.dtype), number.step), *self.row, place, index)
        if "_min" in self.state:
            store(self.state["_min"], tirx.Cast(str(scale.dtype), number.low), *self.row, place, index)

    def _code(self, value: Expr, step: Expr, low: Expr) -> Expr:
        """int32, in the low bits; a negative step is that of an asymmetric group."""
        element = self.spec.side.element
        if element == "e4m3fn":
            return tirx.Cast("int32", encode_float(FLOATS[element], value / step))
        if self.spec.side.hybrid:
            top = (1 << self.spec.side.bits) - 1
            other = rounded((value - low) / (f32(0) - step), 0, top)
            form = ELEMENTS[element]
            return tirx.Select(step < f32(0), other, rounded(value / step, form.smallest, form.largest))
        form = ELEMENTS[element]
        shifted = value - low if element.startswith("uint") else value
        return rounded(shifted / step, form.smallest, form.largest)

    def _pack(
        self, codes: tirx.Buffer, token: Expr, byte: int, width: int, bits: int, suffix: str = "_codes"
    ) -> None:
        """Codes to the token's bytes from `byte` on."""
        buffer, where = self.state[suffix], (*self.row, token)
        dtype = str(buffer.dtype)
        if bits == 8:
            with loop(width) as d:
                store(buffer, tirx.Cast(dtype, codes[d]), *where, d)
            return
        size = -(-width * bits // 8)
        mask = tirx.IntImm("int32", (1 << bits) - 1)
        with loop(-(-width // 8)) as unit:
            word = local(1, "int32")
            store(word, tirx.IntImm("int32", 0), 0)
            for i in range(8):
                code = codes[unit * i64(8) + i64(i)] & mask
                store(word, word[0] | (code << tirx.IntImm("int32", bits * i)), 0)
            for i in range(bits):
                at = unit * i64(bits) + i64(i)
                part = tirx.Cast(dtype, (word[0] >> tirx.IntImm("int32", 8 * i)) & tirx.IntImm("int32", 255))
                with T.If(at < i64(size)), T.Then():
                    store(buffer, part, *where, i64(byte) + at)

    def _sets(self, token: Expr) -> None:
        """A codebook's sets: the step is norm / sqrt(channels), the code how many midpoints are below."""
        side, scale = self.spec.side, self.state["_scale"]
        sink, byte, channel = i64(self.spec.scheme.sink), 0, 0
        rest = local(self.spec.width) if side.residual else None
        for i, (size, bits) in enumerate(side.sets(self.spec.width)):
            total, step = local(1, "float64"), local(1)
            store(total, tirx.FloatImm("float64", 0.0), 0)
            with loop(size) as d:
                value = tirx.Cast("float64", self._value(sink + token, i64(channel) + d))
                store(total, total[0] + value * value, 0)
            count = local(1, "float64")
            store(count, tirx.FloatImm("float64", float(size)), 0)  # TVM multiplies by a constant's inverse
            root = tirx.Cast("float32", tirx.sqrt(total[0] / count[0]))
            store(step, tirx.Cast("float32", stored_step(root, str(scale.dtype))), 0)
            store(scale, tirx.Cast(str(scale.dtype), step[0]), *self.row, token, i)
            codes = _padded(size)
            with loop(size) as d:
                ratio = self._value(sink + token, i64(channel) + d) / step[0]
                found: Expr = tirx.IntImm("int32", 0)
                for middle in codebook.table(bits)[1]:
                    found = found + tirx.Cast("int32", ratio > f32(float(middle)))
                store(codes, found, d)
            self._pack(codes, token, byte, size, bits)
            if side.residual:
                with loop(size) as d:
                    held = _product(_looked_up(codebook.table(bits)[0], codes[d]), step[0])
                    store(rest, self._value(sink + token, i64(channel) + d) - held, i64(channel) + d)
            byte += -(-size * bits // 8)
            channel += size
        if side.residual:
            signs = _padded(self.spec.width)
            write_residual(
                self.state,
                (*self.row, token),
                rest,
                self.static,
                signs,
            )
            self._pack(signs, token, 0, self.spec.width, 1, "_signs")


class _Grouping:
    """The step and the minimum of a group's values, as they are stored, in float32."""

    def __init__(self, place: _Append, size: int, value: Callable[[Expr], Expr]) -> None:
        self.side, self.dtype = place.spec.side, str(place.state["_scale"].dtype)
        self.size, self.value = size, value
        self.kept = local(2)

    @property
    def step(self) -> Expr:
        """Negative for a hybrid group that is asymmetric."""
        return self.kept[0]

    @property
    def low(self) -> Expr:
        """0 for a symmetric one."""
        return self.kept[1]

    def emit(self) -> _Grouping:
        side = self.side
        if side.element.startswith("uint"):
            self._asymmetric(ELEMENTS[side.element].largest)
        else:
            store(self.kept, self._symmetric(), 0)
            store(self.kept, f32(0), 1)
        if side.hybrid:
            self._better()
        return self

    def _peaks(self) -> tirx.Buffer:
        """The largest, the smallest, the largest magnitude, and the two numbers of levels to divide by."""
        peaks = local(3)
        store(peaks, f32(-np.inf), 0)
        store(peaks, f32(np.inf), 1)
        store(peaks, f32(0), 2)
        with loop(self.size) as k:
            value = self.value(k)
            store(peaks, tirx.max(peaks[0], value), 0)
            store(peaks, tirx.min(peaks[1], value), 1)
            store(peaks, tirx.max(peaks[2], tirx.max(value, f32(0) - value)), 2)
        return peaks

    def _symmetric(self) -> Expr:
        return self._stored(self._peaks()[2], float(ELEMENTS[self.side.element].largest))

    def _asymmetric(self, levels: int) -> None:
        peaks = self._peaks()
        store(self.kept, self._stored(peaks[0] - peaks[1], float(levels)), 0)
        limit = f32(float(np.finfo(self.dtype).max))
        low = tirx.max(tirx.min(peaks[1], limit), f32(0) - limit)
        store(self.kept, tirx.Cast("float32", tirx.Cast(self.dtype, low)), 1)

    def _stored(self, value: Expr, levels: float) -> Expr:
        divisor = local(1)
        store(divisor, f32(levels), 0)  # TVM would multiply by a constant's inverse
        return tirx.Cast("float32", stored_step(value / divisor[0], self.dtype))

    def _better(self) -> None:
        """The asymmetric form where its L1 error is smaller; a sum of many may round otherwise than numpy's,
        so errors that differ by less than that may be taken for equal, or the other way."""
        top, form = (1 << self.side.bits) - 1, ELEMENTS[self.side.element]
        symmetric, errors = local(1), local(2)
        store(symmetric, self.kept[0], 0)
        self._asymmetric(top)
        store(errors, f32(0), 0)
        store(errors, f32(0), 1)
        with loop(self.size) as k:
            value = self.value(k)
            code = rounded(value / symmetric[0], form.smallest, form.largest)
            one = _product(code, symmetric[0]) - value
            code = rounded((value - self.low) / self.step, 0, top)
            two = _product(code, self.step) + self.low - value
            store(errors, errors[0] + tirx.max(one, f32(0) - one), 0)
            store(errors, errors[1] + tirx.max(two, f32(0) - two), 1)
        use = local(1, "bool")
        store(use, errors[1] < errors[0], 0)
        store(self.kept, tirx.Select(use[0], f32(0) - self.step, symmetric[0]), 0)
        store(self.kept, tirx.Select(use[0], self.low, f32(0)), 1)


def _padded(width: int) -> tirx.Buffer:
    """Room for codes in whole units of eight, zeros behind them."""
    whole = -(-width // 8) * 8
    codes = local(whole, "int32")
    for i in range(width, whole):
        store(codes, tirx.IntImm("int32", 0), i)
    return codes


def _looked_up(values: np.ndarray, code: Expr) -> Expr:
    """values[code], float32."""
    found: Expr = f32(float(values[0]))
    for i, value in enumerate(values[1:], 1):
        found = tirx.Select(code >= tirx.IntImm("int32", i), f32(float(value)), found)
    return found


def _product(code: Expr, step: Expr) -> Expr:
    """code * step, rounded to float32 by itself: else LLVM fuses it with the addition behind it."""
    exact = tirx.Cast("float64", code) * tirx.Cast("float64", step)
    return tirx.Cast("float32", exact)


def rounded(value: Expr, low: int, high: int) -> Expr:
    """To the nearest integer, ties to even, between low and high; int32."""
    code = tirx.max(tirx.min(tirx.nearbyint(value), f32(float(high))), f32(float(low)))
    return tirx.Cast("int32", code)


def _wide(value: Expr, dtype: str) -> Expr:
    """To a wide float type, at most its largest number."""
    if dtype == "float32":
        return value
    limit = f32(float(ml_dtypes.finfo(dtype).max))
    value = tirx.max(tirx.min(value, limit), f32(0) - limit)
    return tirx.Cast(dtype, _to_bfloat16(value) if dtype == "bfloat16" else value)


def _to_bfloat16(value: Expr) -> Expr:
    """Rounded to nearest, ties to even, in float32: TVM drops a cast to bfloat16 and back."""
    bits = T.reinterpret("uint32", value)
    odd = (bits >> tirx.IntImm("uint32", 16)) & tirx.IntImm("uint32", 1)
    up = bits + odd + tirx.IntImm("uint32", 0x7FFF)
    return T.reinterpret("float32", up & tirx.IntImm("uint32", 0xFFFF0000))

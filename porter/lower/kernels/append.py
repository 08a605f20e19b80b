"""Append tokens to one side of a stored cache in place (`porter.kv.cache`): only the bytes of the new tokens,
and of the groups that they complete, are written.

Rounding is that of `porter.kv`, operation by operation in float32, so that the bytes are the same: a group's
step is divided, raised to the smallest normal number of its stored type and rounded to that; codes are
rounded against what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from porter.kv import codebook
from porter.lower.kernels.define import Expr, Spec, T, define, f32, i64, local, loop, store, tirx
from porter.lower.kernels.grouping import Grouping, alone, code_of, widened
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
            store(buffer, widened(value, str(buffer.dtype)), *self.row, slot(token), d)

    def _exact(self, token: Expr, d: Expr) -> Expr:
        return self.new[(*self.row, token - self.start, d)]

    def _copied(self, token: Expr, d: Expr) -> Expr:
        """A new token as the exact copy holds it."""
        copy = self.spec.scheme.copy if self.spec.side.coded else ""
        value = self._exact(token, d)
        return tirx.Cast("float32", widened(value, WIDE[copy])) if copy else value

    def _value(self, token: Expr, d: Expr) -> Expr:
        """Token `token`, from the window or new, rounded as the window rounds it."""
        spec, high = self.spec, WIDE[self.spec.scheme.high]
        if not spec.scheme.windowed(spec.side):
            return self._copied(token, d)
        fresh = tirx.Cast("float32", widened(self._copied(tirx.max(token, self.start), d), high))
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
                number = self._grouping(side.group, lambda k: self._value(sink + first + k, d))
                self._store_group(number, place, d)
                store(step, number.step, d)
                store(low, number.low, d)
        else:
            each = side.group or width
            for g in range(-(-width // each)):
                size = min(each, width - g * each)
                channel = i64(g * each)
                number = self._grouping(size, lambda k, c=channel: self._value(sink + first, c + k))
                self._store_group(number, to, i64(g))
                with loop(size) as k:
                    store(step, number.step, channel + k)
                    store(low, number.low, channel + k)
        with loop(side.flush) as i:
            codes = _padded(width)
            with loop(width) as d:
                value = self._value(sink + first + i, d)
                store(codes, code_of(side, value, step[d], low[d]), d)
            self._pack(codes, to + i, 0, width, side.bits)

    def _grouping(self, size: int, value: Callable[[Expr], Expr]) -> Grouping:
        return Grouping(self.spec.side, str(self.state["_scale"].dtype), size, value).emit()

    def _store_group(self, number: Grouping, place: Expr, index: Expr) -> None:
        scale = self.state["_scale"]
        store(scale, tirx.Cast(str(scale.dtype), number.step), *self.row, place, index)
        if "_min" in self.state:
            store(self.state["_min"], tirx.Cast(str(scale.dtype), number.low), *self.row, place, index)

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
                    held = alone(_looked_up(codebook.table(bits)[0], codes[d]), step[0])
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

"""What a packed weight's buffers hold at a place, as expressions: elements, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Expr, Spec, i64, tirx
from porter.lower.kernels.layout import LANES, Layout


@dataclass(frozen=True)
class Reader:
    """Reads matrix `matrix` of the stack; `weight` are the buffers of `layout`, in its order."""

    layout: Layout
    weight: tuple[tirx.Buffer, ...]
    matrix: Expr

    def _buffer(self, name: str) -> tirx.Buffer:
        specs: list[Spec] = self.layout.buffers()
        return next(b for b, (n, _, _) in zip(self.weight, specs, strict=True) if n == name)

    def _block(self, block: Expr) -> Expr:
        return self.matrix * i64(self.layout.blocks) + block if self.layout.stack > 1 else block

    def element(
        self, block: Expr, group: Expr, unit: Expr, which: int, lane: Expr, zero: Expr | None = None
    ) -> Expr:
        """Code `which` of unit `unit` of a group, in float32, less its zero point, halved where it is."""
        value = self._code(block, group, unit, which, lane, self.layout.codec.decode)
        value = value if zero is None else value - zero
        return value * self._shift(block, group, unit, which, lane) if self.layout.micro else value

    def integer(
        self, block: Expr, group: Expr, unit: Expr, which: int, lane: Expr, zero: Expr | None = None
    ) -> Expr:
        """The same of an integer codec, exactly, in int32."""
        value = self._code(block, group, unit, which, lane, self.layout.codec.integer)
        return value if zero is None else value - zero

    def _code(
        self, block: Expr, group: Expr, unit: Expr, which: int, lane: Expr, decode: Callable[..., Expr]
    ) -> Expr:
        layout, codec, codes = self.layout, self.layout.codec, self._buffer("w")
        start = group * i64(codec.words(layout.group or layout.k)) + unit * i64(codec.words(layout.unit))
        start, which = start + i64(which // codec.unit * codec.words(codec.unit)), which % codec.unit
        return decode(lambda i: codes[self._block(block), start + i64(i), lane], which)

    def _shift(self, block: Expr, group: Expr, unit: Expr, which: int, lane: Expr) -> Expr:
        """2^-shift of that code."""
        pair = self.k(group, unit, which) // i64(self.layout.micro)
        byte = self._buffer("shift")[self._block(block), pair // i64(8), lane]
        return CODECS["halving"].decode(lambda _: byte, tirx.Cast("int32", pair % i64(8)))

    def k(self, group: Expr, unit: Expr, which: int) -> Expr:
        """Where that code stands along k."""
        return group * i64(self.layout.group) + unit * i64(self.layout.unit) + i64(which)

    def zero(self, block: Expr, group: Expr, lane: Expr, *, exact: bool = False) -> Expr:
        """A zero point, in float32, or int32 if `exact`."""
        codec = CODECS[self.layout.zero]
        word = self._buffer("zero")[self._place(block, group, lane)]
        return (codec.integer if exact else codec.decode)(lambda _: word, 0)

    def scale(self, block: Expr, group: Expr, lane: Expr) -> Expr:
        """A scale in float32, times the factor where there is one."""
        word = self._buffer("scale")[self._place(block, group, lane)]
        scale = CODECS[self.layout.scale].decode(lambda _: word, 0)
        return scale * self._buffer("factor")[0] if self.layout.factor else scale

    def _place(self, block: Expr, group: Expr, lane: Expr) -> tuple[Expr, Expr, Expr]:
        layout = self.layout
        if layout.rows == 1:
            return self._block(block), group, lane
        row = block // i64(layout.rows // LANES) if layout.rows else i64(0)
        return (self.matrix * i64(layout.row_groups) + row if layout.stack > 1 else row), group, i64(0)

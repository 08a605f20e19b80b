"""Tokens to codes and steps, and back, in nodes: the twin of `porter.kv.rounding`, one side of a layer.

Tokens are float32 [B,H,N,D]; along tokens N is a multiple of the group. Groups are an axis of their own
while they are worked on: [B,H,N,G,group] along channels, where the last one repeats its last channel until it
is whole, [B,H,N/group,group,D] along tokens.
"""

from __future__ import annotations

import math

import numpy as np

from porter.formats.elements import ELEMENTS
from porter.formats.format import SCALES
from porter.kv import codebook
from porter.kv.rotation import rotation
from porter.kv.scheme import ASYMMETRIC, CODEBOOK, Side
from porter.kvgraph import bits, body
from porter.kvgraph.body import Body

Parts = dict[str, str]


class Rounding:
    """Nodes for one side whose vectors have `size` channels; `step`: the value of its static steps, or ""."""

    def __init__(self, b: Body, side: Side, size: int, step: str = "") -> None:
        self.b, self.side, self.size, self.step = b, side, size, step
        self.tokens = side.along == "tokens"
        self.group = min(side.group or size, size) if not self.tokens else side.group
        self.axis = 3 if self.tokens else 4

    def encode(self, x: str) -> Parts:
        """Round tokens: codes as they are stored, and what `porter.kv.layout` plans beside them."""
        element = self.side.element
        if element in CODEBOOK:
            return self._encode_codebook(x)
        if self.step:
            return {"codes": self._stored(self._coded(self.b.op("Div", x, self.step), element))}
        parts = self._grouped(self._split(x, "edge"))
        parts["codes"] = self._stored(self._merged(parts["codes"]))
        found = {name: self.b.op("Squeeze", v, self.b.ints(self.axis))
                 for name, v in parts.items() if name != "codes"}  # fmt: skip
        return {"codes": parts["codes"], **found}

    def decode(self, parts: Parts) -> str:
        """float32 [B,H,N,D] of what is stored."""
        b, element = self.b, self.side.element
        if element in CODEBOOK:
            return self._decode_codebook(parts)
        codes = self._floats(parts["codes"])
        if self.step:
            return b.op("Mul", codes, self.step)
        return self._merged(self._read(self._split(codes, "constant"), self._wide(parts)))

    # Integers and e4m3fn, in groups.

    def _grouped(self, x: str) -> Parts:
        """Codes, steps and minimums (in their stored types) of tokens in groups."""
        element = self.side.element
        if element in ASYMMETRIC:
            return self._asymmetric(x, ELEMENTS[element].largest)
        b = self.b
        peak = b.op("ReduceMax", b.op("Abs", x), b.ints(self.axis), keepdims=1)
        scale = self._step(b.op("Div", peak, b.number(ELEMENTS[element].largest)))
        codes = self._coded(b.op("Div", x, self._float(scale)), element)
        parts = {"codes": codes, "scale": scale}
        return self._hybrid(x, parts) if self.side.hybrid else parts

    def _asymmetric(self, x: str, largest: int) -> Parts:
        b, axes = self.b, self.b.ints(self.axis)
        low, high = (b.op(kind, x, axes, keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
        scale = self._step(b.op("Div", b.op("Sub", high, low), b.number(largest)))
        minimum = self._minimum(low)
        steps = b.op("Div", b.op("Sub", x, self._float(minimum)), self._float(scale))
        return {"codes": self._clipped(b.op("Round", steps), 0, largest), "scale": scale, "min": minimum}

    def _hybrid(self, x: str, symmetric: Parts) -> Parts:
        b, largest = self.b, ELEMENTS[self.side.element].largest
        other = self._asymmetric(x, 2 * int(largest) + 1)
        first, second = (self._error(x, parts) for parts in (symmetric, other))
        use = b.op("Less", second, first)
        zero = b.constant(0, SCALES[self.side.scale])
        return {
            "codes": b.op("Where", use, other["codes"], symmetric["codes"]),
            "scale": b.op("Where", use, b.op("Neg", other["scale"]), symmetric["scale"]),
            "min": b.op("Where", use, other["min"], zero),
        }

    def _error(self, x: str, parts: Parts) -> str:
        """The sum of each group's errors."""
        b = self.b
        read = b.op("Mul", parts["codes"], self._float(parts["scale"]))
        if "min" in parts:
            read = b.op("Add", read, self._float(parts["min"]))
        error = b.op("Abs", b.op("Sub", read, x))
        if not self.tokens and self.size % self.group:  # what fills the last group does not count
            real = (np.arange(-(-self.size // self.group) * self.group) < self.size).reshape(-1, self.group)
            error = b.op("Mul", error, b.constant(real, np.float32))
        return b.op("ReduceSum", error, b.ints(self.axis), keepdims=1)

    def _read(self, codes: str, parts: Parts) -> str:
        """code * |step| + minimum, in groups; under a negative step codes have no sign."""
        b, step = self.b, parts["scale"]
        if self.side.hybrid:
            negative = b.op("And", b.op("Less", step, b.number(0)), b.op("Less", codes, b.number(0)))
            codes = b.op("Where", negative, b.op("Add", codes, b.number(1 << self.side.bits)), codes)
            step = b.op("Abs", step)
        value = b.op("Mul", codes, step)
        return b.op("Add", value, parts["min"]) if "min" in parts else value

    def _wide(self, parts: Parts) -> Parts:
        """Steps and minimums as floats, with the group's axis."""
        axes = self.b.ints(self.axis)
        return {n: self.b.op("Unsqueeze", self._float(v), axes) for n, v in parts.items() if n != "codes"}

    def _split(self, x: str, mode: str) -> str:
        if self.tokens:
            return self.b.reshape(x, 0, 0, -1, self.group, self.size)
        groups = -(-self.size // self.group)
        if missing := groups * self.group - self.size:
            pads = [self.b.ints(0, missing), *([] if mode == "edge" else [self.b.number(0)])]
            x = self.b.op("Pad", x, *pads, *([""] if mode == "edge" else []), self.b.ints(-1), mode=mode)
        return self.b.reshape(x, 0, 0, 0, groups, self.group)

    def _merged(self, x: str) -> str:
        if self.tokens:
            return self.b.reshape(x, 0, 0, -1, self.size)
        flat = self.b.reshape(x, 0, 0, 0, -1)
        return self.b.part(flat, 0, self.size) if self.size % self.group else flat

    # Codes.

    def _coded(self, x: str, element: str) -> str:
        """Quotients to codes: the rounded floats, of e4m3fn the quotient itself."""
        if element == "e4m3fn":
            return x
        return self._clipped(self.b.op("Round", x), ELEMENTS[element].smallest, ELEMENTS[element].largest)

    def _stored(self, codes: str) -> str:
        b, element = self.b, self.side.element
        if element == "e4m3fn":
            return bits.to_e4m3fn(b, codes)
        if element == "int8":
            return b.cast(codes, body.INT8)
        return bits.pack(b, b.cast(codes, body.INT64), self.side.bits, self.size)

    def _floats(self, stored: str) -> str:
        b, element = self.b, self.side.element
        if element == "e4m3fn":
            return bits.from_e4m3fn(b, stored)
        if element == "int8":
            return b.cast(stored, body.FLOAT)
        codes = bits.unpack(b, stored, self.side.bits, self.size, element.startswith("int"))
        return b.cast(codes, body.FLOAT)

    def _clipped(self, x: str, low: float, high: float) -> str:
        b = self.b
        return b.op("Min", b.op("Max", x, b.number(low)), b.number(high))

    # Steps and minimums: `porter.kv.steps`.

    def _step(self, x: str) -> str:
        info = np.finfo(SCALES[self.side.scale])
        return self._narrow(self._clipped(x, info.smallest_normal, info.max))

    def _minimum(self, x: str) -> str:
        largest = np.finfo(SCALES[self.side.scale]).max
        return self._narrow(self._clipped(x, -largest, largest))

    def _narrow(self, x: str) -> str:
        return self.b.cast(x, body.HALF) if self.side.scale == "fp16" else x

    def _float(self, x: str) -> str:
        return self.b.cast(x, body.FLOAT) if self.side.scale == "fp16" else x

    # Codebooks: `porter.kv.codebook`.

    def _encode_codebook(self, x: str) -> Parts:
        b, start, packed, steps = self.b, 0, [], []
        for size, width in self.side.sets(self.size):
            mine = b.part(x, start, start + size)
            steps.append(self._step(self._norm(mine, 1 / size)))
            scaled = b.op("Unsqueeze", b.op("Div", mine, self._float(steps[-1])), b.ints(-1))
            above = b.op("Greater", scaled, b.constant(codebook.table(width)[1], np.float32))
            codes = b.op("ReduceSum", b.cast(above, body.INT64), b.ints(-1), keepdims=0)
            packed.append(bits.pack(b, codes, width, size))
            start += size
        parts = {"codes": self._joined(packed), "scale": self._joined(steps)}
        return parts | self._residual(x, parts) if self.side.residual else parts

    def _norm(self, x: str, factor: float) -> str:
        """sqrt(factor times the sum of squares) of each token, float32 [B,H,N,1], summed in float64."""
        b = self.b
        wide = b.cast(x, body.DOUBLE)
        square = b.op("ReduceSum", b.op("Mul", wide, wide), b.ints(-1), keepdims=1)
        return b.cast(b.op("Sqrt", b.op("Mul", square, b.constant(factor, np.float64))), body.FLOAT)

    def _residual(self, x: str, parts: Parts) -> Parts:
        b = self.b
        rest = b.op("Sub", x, self._without_residual(parts))
        turned = b.op("MatMul", b.cast(rest, body.DOUBLE), b.constant(rotation(self.size).T, np.float64))
        negative = b.cast(b.op("Less", turned, b.constant(0, np.float64)), body.INT64)
        gamma = self._norm(rest, math.pi / 2 / self.size)
        return {"signs": bits.pack(b, negative, 1, self.size), "gamma": self._step(gamma)}

    def _decode_codebook(self, parts: Parts) -> str:
        b, values = self.b, self._without_residual(parts)
        if not self.side.residual:
            return values
        signs = b.cast(bits.unpack(b, parts["signs"], 1, self.size), body.DOUBLE)
        flat = b.op("Sub", b.constant(1, np.float64), b.op("Add", signs, signs))
        back = b.cast(b.op("MatMul", flat, b.constant(rotation(self.size), np.float64)), body.FLOAT)
        return b.op("Add", values, b.op("Mul", back, self._float(parts["gamma"])))

    def _without_residual(self, parts: Parts) -> str:
        b, byte, found = self.b, 0, []
        for i, (size, width) in enumerate(self.side.sets(self.size)):
            after = byte + -(-size * width // 8)
            codes = bits.unpack(b, b.part(parts["codes"], byte, after), width, size)
            values = b.op("Gather", b.constant(codebook.table(width)[0], np.float32), codes)
            step = self._float(b.part(parts["scale"], i, i + 1))
            found.append(b.op("Mul", values, step))
            byte = after
        return self._joined(found)

    def _joined(self, values: list[str]) -> str:
        return values[0] if len(values) == 1 else self.b.op("Concat", *values, axis=-1)

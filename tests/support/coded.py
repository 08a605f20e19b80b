"""One layer's quantized cache in kernels of blocks, whoever runs them, beside `porter.kv`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from kernels import UNIT
from tvm import tirx

from porter.kv import Cache, attend, calibrated, parse
from porter.lower.blocks.templates import Chip
from porter.lower.importer.templates import Append
from porter.lower.kernels.attention import Attention
from porter.lower.kernels.stored import Stored

BATCH, HEADS = 2, 2
SIDES = ("key", "value")
# A kernel and its arguments -> these, as the kernel leaves them.
Run = Callable[[tirx.PrimFunc, list[np.ndarray]], list[np.ndarray]]
SCHEMES = {  # with windows and groups that a short cache fills
    "fp8": "fp8",
    "fp8-dynamic": "fp8-dynamic",
    "int8": "int8 key=int8 value=int8-g8",
    "int4": "int4 key=int4 value=int4-g8",
    "kivi2": "kivi2 recent=12 key=uint2-g8-tokens-fp16 value=uint2-g12-fp16",
    "kivi4": "kivi4 recent=6 sink=3 key=uint4-g5-tokens value=uint4-g8 high=bf16",
    "innerq": "innerq recent=7 sink=2 key=int3-g8-fp16 value=int3-g8-tokens-fp16",
    "innerq-small": "innerq-small recent=8 sink=4 key=int3-g8-fp16 value=int2-g8-tokens-fp16",
    "innerq-hybrid": "innerq-hybrid recent=5 sink=1 key=int3-g8-fp16 value=int2-g8-tokens-fp16-hybrid",
    "turboquant4": "turboquant4",
    "turboquant3": "turboquant3 recent=3",
    "turboquant2.5": "turboquant2.5",
    "rotated": "int4 rotate recent=4 high=fp32",
}


def bytes_of(array: np.ndarray) -> np.ndarray:
    """8-bit floats as bytes: kernels see them so."""
    return array.view(np.uint8) if array.dtype.name == "float8_e4m3fn" else array.copy()


@dataclass
class Layer:
    """`error` is what an operand may be off by when it is rounded, relative to it."""

    text: str
    chip: Chip
    run: Run
    error: float = 0.0
    size: int = 24
    capacity: int = 53
    shared: int = 2

    def __post_init__(self) -> None:
        scheme, self.rng = parse(self.text), np.random.default_rng(0)
        sample = self.rng.standard_normal((HEADS, 64, self.size)).astype(np.float32)
        constants = calibrated(scheme, sample, sample)
        self.oracle = Cache(scheme, self.size, HEADS, self.capacity, BATCH, constants)
        self.sides = {n: Stored(scheme, n, self.size, self.capacity) for n in SIDES}
        self.buffers = {name: bytes_of(array) for name, array in self.oracle.state.items()}
        self.appends: list[tuple[str, Append, tirx.PrimFunc]] = [
            (n, part, part.make())
            for n, side in self.sides.items()
            for part in self.chip.appends(side, HEADS)
        ]
        options = {"length": self.capacity, "scale": self.size**-0.5, "causal": True, "offset": "lengths"}
        spec = Attention(HEADS * self.shared, HEADS, *self.sides.values(), **options)
        self.attention = self.chip.attention(spec)

    @property
    def functions(self) -> list[tirx.PrimFunc]:
        """All kernels."""
        return [*(function for *_, function in self.appends), self.attention]

    def static(self, side: str) -> list[np.ndarray]:
        """The constant of static steps, where there is one."""
        step = self.oracle._steps[side]
        return [] if step is None else [step]

    def append(self, steps: int) -> None:
        """To all rows, in the kernels and the oracle."""
        shape = (2, BATCH, HEADS, steps, self.size)
        # Channels of several sizes and a mean, so that steps and minimums differ.
        new = self.rng.standard_normal(shape) * np.exp(self.rng.standard_normal(self.size)) + 0.5
        new, starts = new.astype(np.float32), self.oracle.lengths.copy()
        self.oracle.append(*new)
        turned = {n: self.oracle._turned(n, x) for n, x in zip(SIDES, new, strict=True)}
        for side, part, function in self.appends:
            names = [side + suffix for suffix in (*part.writes, *part.reads)]
            beside = self.static(side) if part.beside else []
            given = [*(self.buffers[n] for n in names), np.ascontiguousarray(turned[side]), starts, *beside]
            after = self.run(function, given)
            self.buffers |= dict(zip(names[: len(part.writes)], after, strict=False))

    def check_bytes(self) -> None:
        """They are those of the oracle."""
        for name, buffer in self.buffers.items():
            want = self.oracle.state[name].view(np.uint8)
            np.testing.assert_array_equal(buffer.view(np.uint8), want, name)

    def check_attention(self, steps: int) -> None:
        """It is that over the decoded cache, in float64, but for the rounding of operands and of float32."""
        q = self.rng.standard_normal((BATCH, HEADS * self.shared, steps, self.size)).astype(np.float32)
        read = [b for n in SIDES for b in (*self._of(n), *self.static(n))]
        got = self.run(self.attention, [q, *read, self.oracle.lengths.copy(), np.zeros_like(q)])[-1]
        for row in range(BATCH):
            keys, values = (self.oracle.stored(n, row) for n in SIDES)
            wanted = attend(keys, values, q[row]).output
            key = np.repeat(np.abs(keys), self.shared, 0).astype(np.float64)
            size = (np.abs(q[row]) @ key.swapaxes(1, 2)).max() * self.size**-0.5
            # Each product of a score has two rounded operands; its sum and the decoding of a key round D + 6
            # times in float32. So a logit is off by at most `off`, a weight by exp(2 off): once above and
            # once below the fraction. Then the weight and the value are rounded, and the sums over T tokens
            # and exp round in float32.
            off = ((1 + self.error) ** 2 - 1 + (self.size + 6) * UNIT) * size
            bound = np.expm1(2 * off) + (1 + self.error) ** 2 - 1 + (2 * keys.shape[1] + 8) * UNIT
            assert np.abs(got[row] - wanted).max() <= bound * np.abs(values).max()

    def _of(self, name: str) -> list[np.ndarray]:
        return [self.buffers[name + s] for s, *_ in self.sides[name].planned(HEADS) if s != "_copy"]

    def check(self) -> None:
        """Tokens one by one, several, until the cache is nearly full, and one more."""
        for steps in (1, 30, 1):
            self.append(steps)
        self.check_bytes()
        self.check_attention(3)
        self.append(self.capacity - 34)
        for _ in range(2):
            self.append(1)
        self.check_bytes()
        self.check_attention(1)

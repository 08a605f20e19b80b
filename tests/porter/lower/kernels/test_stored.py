"""Stored caches: appending gives `porter.kv.Cache`'s bytes, and attention over them is what it says in
float64."""

import dataclasses

import numpy as np
import pytest
from kernels import UNIT, built

from porter.kv import Cache, attend, calibrated, parse
from porter.lower.kernels.append import append_stored
from porter.lower.kernels.attention import Attention, attention
from porter.lower.kernels.define import tvm
from porter.lower.kernels.stored import Stored

SIDES = ("key", "value")
EXTRA = [
    "innerq recent=3 sink=2",
    "innerq-hybrid recent=0 sink=1 value=int4-g5-tokens-hybrid",
    "kivi2 recent=7 key=uint3-g4-tokens",
    "kivi4 recent=6 sink=3 value=uint3-g5 high=bf16",
    "int8 key=int8-g4-tokens value=int2-channel",
    "key=e4m3fn-head value=e4m3fn-g12-fp16 recent=5 high=fp32",
    "key=lloyd1-rotate value=lloyd3-mixed-rotate-fp16 recent=2",
    "certified copy=fp16",
    "key=uint2 value=bf16",
]
TEXTS = ["fp16", "kivi2", "innerq", "innerq-small", "turboquant4", *EXTRA]
SIZES = (20, 24, 48)
BATCH, HEADS = 2, 2


@dataclasses.dataclass(frozen=True)
class Case:
    text: str
    size: int
    shared: int
    capacity: int

    def sides(self) -> dict[str, Stored]:
        return {n: Stored(parse(self.text), n, self.size, self.capacity) for n in SIDES}

    def attention(self, **options: object) -> Attention:
        sides = self.sides()
        given = {
            "length": self.capacity,
            "scale": self.size**-0.5,
            "causal": True,
            "offset": "lengths",
            **options,
        }
        return Attention(HEADS * self.shared, HEADS, sides["key"], sides["value"], **given)


def capacity_of(text: str) -> int:
    return 45 if text in EXTRA else 215


CASES = [Case(t, SIZES[i % 3], 1 + 2 * (i % 2), capacity_of(t)) for i, t in enumerate(TEXTS)]


def kernels_of(case: Case) -> dict:
    wanted = {(case, name): append_stored(stored, HEADS) for name, stored in case.sides().items()}
    wanted[case, "attention"] = attention(case.attention())
    return dict(zip(wanted, built(wanted.values()), strict=True))


class Held:
    """A cache that kernels append to and read, beside the oracle."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.kernels, self.case, self.rng = kernels_of(case), case, np.random.default_rng(seed)
        scheme = parse(case.text)
        sample = self.rng.standard_normal((HEADS, 64, case.size)).astype(np.float32)
        self.oracle = Cache(
            scheme, case.size, HEADS, case.capacity, BATCH, calibrated(scheme, sample, sample)
        )
        self.buffers = {
            n: [tvm.runtime.tensor(bytes_of(self.oracle.state[n + s[0]])) for s in stored.planned(HEADS)]
            for n, stored in case.sides().items()
        }

    def steps(self, side: str) -> list[np.ndarray]:
        """The constant of static steps, where there is one."""
        step = self.oracle._steps[side]
        return [] if step is None else [step]

    def append(self, steps: int, counts: list[int] | None = None) -> None:
        """`counts`: how many of the steps are of each row; the kernels take them row by row."""
        shape = (2, BATCH, HEADS, steps, self.case.size)
        # Channels of several sizes and a mean, so that steps and minimums differ.
        new = self.rng.standard_normal(shape) * np.exp(self.rng.standard_normal(self.case.size)) + 0.5
        new = new.astype(np.float32)
        starts = self.oracle.lengths.copy()
        self.oracle.append(*new, counts=None if counts is None else np.array(counts))
        for side, x in zip(SIDES, new, strict=True):
            turned = self.oracle._turned(side, x)
            for row, count in enumerate(counts or [steps] * BATCH):
                alone = np.full(BATCH, -1)
                alone[row] = starts[row]
                given = np.ascontiguousarray(turned[:, :, :count])
                self.kernels[self.case, side].in_place(*self.buffers[side], given, alone, *self.steps(side))

    def check_bytes(self) -> None:
        for name, stored in self.case.sides().items():
            for (suffix, _, _), buffer in zip(stored.planned(HEADS), self.buffers[name], strict=True):
                np.testing.assert_array_equal(
                    buffer.numpy().view(np.uint8),
                    self.oracle.state[name + suffix].view(np.uint8),
                    name + suffix,
                )

    def check_attention(self, steps: int) -> None:
        case = self.case
        q = self.rng.standard_normal((BATCH, HEADS * case.shared, steps, case.size)).astype(np.float32)
        read = []
        for name, stored in case.sides().items():
            pairs = zip(stored.planned(HEADS), self.buffers[name], strict=True)
            read += [b for (suffix, _, _), b in pairs if suffix != "_copy"] + self.steps(name)
        got = self.kernels[case, "attention"](q, *read, self.oracle.lengths, shape=q.shape)
        for row in range(BATCH):
            keys, values = (self.oracle.stored(n, row) for n in SIDES)
            wanted = attend(keys, values, q[row]).output
            size = np.abs(q[row]).sum(-1).max() * np.abs(keys).max() * case.size**-0.5
            # A score is a sum of D products of a code, a step and a minimum, D + 6 roundings of its terms'
            # size; it counts once above and once below the fraction. Sums over T tokens and their rescalings
            # add 2 roundings for each token, exp and the division 8, of the largest value.
            bound = 2 * (case.size + 6) * UNIT * size + (2 * keys.shape[1] + 8) * UNIT
            assert np.abs(got[row] - wanted).max() <= bound * np.abs(values).max()


def bytes_of(array: np.ndarray) -> np.ndarray:
    """8-bit floats as bytes: kernels see them so."""
    return array.view(np.uint8) if array.dtype.name == "float8_e4m3fn" else array.copy()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.text} d{c.size} x{c.shared}")
def test_any_cut_of_the_tokens_gives_the_same_bytes_and_reads_right(case: Case) -> None:
    held = Held(case)
    for steps in (1, 1, 3):
        held.append(steps)
        held.check_attention(steps)
    held.append(30, [30, 17])
    held.check_bytes()
    held.check_attention(1)
    rest = case.capacity - 40
    held.append(rest, [rest, rest - 2])
    held.append(1)
    held.check_bytes()
    held.check_attention(1)
    held.check_attention(5)

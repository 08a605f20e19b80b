"""Appending in place writes one token's bytes, or those of the group that it completes, and no other."""

import ml_dtypes
import numpy as np
import pytest
from kernels import built

from porter.kv import PRESETS, parse
from porter.kv.scheme import Scheme
from porter.lower.kernels.append import append_stored
from porter.lower.kernels.define import tvm
from porter.lower.kernels.stored import Stored

HEADS, SIZE, CAPACITY = 2, 20, 45
# Bytes that differ, and are finite numbers in any type: what is written differs from one of the two.
SENTINELS = (0x35, 0x4A)
ROWS = 4
TEXTS = [
    *(p for p in PRESETS if p not in ("triaxial", "fp32", "bf16", "kivi2", "kivi4") and "innerq" not in p),
    "kivi2 recent=8 key=uint2-g8-tokens-fp16",
    "kivi4 recent=3 sink=2 key=uint4-g5-tokens value=uint4-g6-fp16",
    "innerq recent=6 sink=4 value=int3-g4-tokens-fp16",
    "innerq-hybrid recent=6 sink=3 value=int2-g8-tokens-fp16-hybrid",
    "int4 recent=5 sink=2 high=fp32",
    "fp8 recent=4 static=channel",
    "key=lloyd3-fp16-rotate-residual value=lloyd2-fp16-rotate-mixed-residual",
    "key=lloyd4-fp16-rotate-residual value=lloyd1-fp16-rotate-residual recent=5 sink=2",
]


def expected(scheme: Scheme, name: str, suffix: str, start: int, tokens: int) -> set[int]:
    """The places along a buffer's axis of tokens that appending may write, by the layout's documentation."""
    side, end = scheme.side(name), start + tokens
    if suffix in ("", "_copy"):
        return set(range(start, end))
    if suffix == "_window":
        ring = scheme.ring(side)
        late = range(max(scheme.sink, start, end - ring), end)
        return {t for t in range(start, end) if t < scheme.sink} | {
            scheme.sink + (t - scheme.sink) % ring for t in late
        }
    codes = range(scheme.rounded(side, start), scheme.rounded(side, end))
    if suffix in ("_scale", "_min") and side.along == "tokens":
        return {t // side.group for t in codes}
    return set(codes)


def filled(stored: Stored, number: int) -> list[np.ndarray]:
    """The planned buffers as bytes, all of one byte. A window is read, and what comes of it must not be the
    sentinel: it has numbers of its own, every byte of which differs between the two fillings."""
    found = []
    for suffix, shape, dtype in stored.planned(HEADS):
        kind = type_of(dtype)
        size = (ROWS, *shape[:-1], shape[-1] * kind.itemsize)
        if suffix == "_window":
            values = np.random.default_rng(1).standard_normal((ROWS, *shape)).astype(kind)
            found.append(values.view(np.uint8) ^ np.uint8(number))
        else:
            found.append(np.full(size, SENTINELS[number], np.uint8))
    return found


def type_of(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.fixture(scope="module")
def kernels() -> dict:
    sides = {(t, n): Stored(parse(t), n, SIZE, CAPACITY) for t in TEXTS for n in ("key", "value")}
    made = built([append_stored(s, HEADS) for s in sides.values()])
    return {key: (stored, kernel) for (key, stored), kernel in zip(sides.items(), made, strict=True)}


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_other_byte_is_touched(kernels: dict, text: str, side: str) -> None:
    """Four rows of their own lengths, one of them full: it is left as it is."""
    stored, kernel = kernels[text, side]
    scheme, rng = parse(text), np.random.default_rng(0)
    static = stored.step("c", HEADS)
    steps = [np.full(shape, 0.01, np.float32) for _, shape, _ in static]
    matrix = [np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]] if scheme.side(side).residual else []
    plan = stored.planned(HEADS)
    for count in (1, 3):
        for first in range(15):
            starts = np.array([first, first + 15, min(first + 30, CAPACITY - count), CAPACITY], np.int64)
            new = rng.standard_normal((ROWS, HEADS, count, SIZE)).astype(np.float32)
            touched = [False] * len(plan)
            for number in (0, 1):
                before = filled(stored, number)
                after = [
                    tvm.runtime.tensor(b.view(type_of(d))) for b, (*_, d) in zip(before, plan, strict=True)
                ]
                kernel.in_place(*after, new, starts, *steps, *matrix)
                changed = [a.numpy().view(np.uint8) != b for a, b in zip(after, before, strict=True)]
                touched = [t | c for t, c in zip(touched, changed, strict=True)]
            for (suffix, *_), mask in zip(plan, touched, strict=True):
                wanted = np.zeros(mask.shape, bool)
                for row, start in enumerate(starts[:3]):
                    for place in expected(scheme, side, suffix, int(start), count):
                        wanted[row, :, place] = True
                np.testing.assert_array_equal(mask, wanted, f"{suffix} at {starts}")

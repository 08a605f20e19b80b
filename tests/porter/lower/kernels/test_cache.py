"""Appending to a cache in place: never out of bounds, and nothing but the new tokens changes."""

import numpy as np
import pytest
from kernels import built

from porter.lower.blocks import vector
from porter.lower.kernels import cache as host
from porter.lower.kernels.define import tvm

HEADS, CAPACITY, WIDTH = 2, 8, 3
GUARD = 4096  # bytes before and behind the cache
CASES = [(d, c) for d in ("float32", "int8", "uint8", "float16") for c in (False, True)]


@pytest.fixture(scope="module", params=[host, vector], ids=["host", "blocks"])
def kernels(request: pytest.FixtureRequest) -> dict:
    made = (
        request.param.append(HEADS, CAPACITY, WIDTH, dtype, circular=circular) for dtype, circular in CASES
    )
    return dict(zip(CASES, built(made), strict=True))


@pytest.mark.parametrize(("dtype", "circular"), CASES)
@pytest.mark.parametrize("steps", [0, 1, 3, 11])
def test_append(kernels: dict, dtype: str, circular: bool, steps: int) -> None:
    starts = np.array([0, 6, CAPACITY, -2, 2**40, -(2**40)])
    rng = np.random.default_rng(0)
    new = rng.integers(1, 100, (len(starts), HEADS, steps, WIDTH)).astype(dtype)
    # The cache is the middle of a longer buffer, whose ends must stay as they are: what is written beyond
    # shows.
    buffer = aligned(2 * GUARD + len(starts) * HEADS * CAPACITY * WIDTH * np.dtype(dtype).itemsize)
    cache = buffer[GUARD:-GUARD].view(dtype).reshape(len(starts), HEADS, CAPACITY, WIDTH)
    cache[:] = rng.integers(1, 100, cache.shape)
    wanted = cache.copy()
    for row, start in enumerate(starts):
        for t in range(steps):
            at = int(start) + t
            if circular or 0 <= at < CAPACITY:
                wanted[row, :, at % CAPACITY] = new[row, :, t]
    kernels[dtype, circular].in_place(tvm.runtime.from_dlpack(cache), new, starts)
    np.testing.assert_array_equal(cache, wanted)
    assert np.all(buffer[:GUARD] == 77)
    assert np.all(buffer[-GUARD:] == 77)


def aligned(size: int) -> np.ndarray:
    """Bytes that begin on a cache line, as kernels want them, all 77."""
    raw = np.full(size + 64, 77, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]

"""The functions that kernels share."""

import numpy as np
import pytest
from kernels import built

from porter.lower.kernels.define import define, exp_below_zero, i64, loop, store, tanh


def elementwise(name: str, function: object) -> object:
    def body(x, y, n):
        with loop(n // i64(8)) as chunk, loop(8, "vectorized") as v:
            at = chunk * i64(8) + v
            store(y, function(x[at]), at)

    return define(name, [("x", ("n",), "float32"), ("y", ("n",), "float32")], body)


@pytest.fixture(scope="module")
def kernels() -> dict:
    functions = {"exp": exp_below_zero, "tanh": tanh}
    made = built(elementwise(name, f) for name, f in functions.items())
    return dict(zip(functions, made, strict=True))


def test_exp_is_within_a_unit_in_the_last_place(kernels: dict) -> None:
    """Every 64th float32 from -2^-20 to -87, 3 million of them, and the ends."""
    low, high = np.float32([-(2.0**-20), -87.0]).view(np.int32)
    worst = 0.0
    for start in range(low, high, 1 << 24):
        x = np.arange(start, min(start + (1 << 24), high), 64, dtype=np.int32)
        x = x[: len(x) // 8 * 8].view(np.float32)
        wanted = np.exp(x.astype(np.float64))
        worst = max(worst, float((np.abs(kernels["exp"](x, shape=x.shape) - wanted) / wanted).max()))
    assert worst <= 2.0**-23  # a unit in the last place is between 2^-24 and 2^-23 of the value
    ends = np.float32([0, -0.0, -1e-30, -87, -87.0001, -1e4, -np.inf, np.nan])
    got = kernels["exp"](ends, shape=(8,))
    assert got[:3].tolist() == [1, 1, 1]
    assert got[3] > 0
    assert got[4:7].tolist() == [0, 0, 0]
    assert np.isnan(got[7])


def test_tanh_is_right_near_zero_too(kernels: dict) -> None:
    x = np.concatenate([np.linspace(-10, 10, 4000), np.geomspace(1e-30, 1, 4000)]).astype(np.float32)
    wanted = np.tanh(x.astype(np.float64))
    error = np.abs(kernels["tanh"](x, shape=x.shape) - wanted) / np.maximum(np.abs(wanted), 1e-37)
    assert (
        error.max() <= 2.0**-22
    )  # glibc documents two units in the last place, each at most 2^-23 of the value

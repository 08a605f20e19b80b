"""RMS normalization against float64."""

import numpy as np
import pytest
from kernels import UNIT, built

from porter.lower.blocks import vector
from porter.lower.kernels import norm

CASES = [(w, e) for w in (1, 7, 12, 64, 172, 4096) for e in (1e-5, 1e-12)]


@pytest.fixture(scope="module", params=[(norm, 16), (vector, 1)], ids=["host", "blocks"])
def kernels(request: pytest.FixtureRequest) -> dict:
    """The kernels, and in how many lanes they sum."""
    made, lanes = request.param
    found = built(made.rms_norm(*case) for case in CASES)
    return dict(zip(CASES, found, strict=True)) | {"lanes": lanes}


@pytest.mark.parametrize(("width", "epsilon"), CASES)
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e15])
def test_rms_norm(kernels: dict, width: int, epsilon: float, size: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, width)) * size).astype(np.float32)
    x[3] = 0
    weight = rng.standard_normal(width).astype(np.float32)
    got = kernels[width, epsilon](x, weight, shape=x.shape)
    exact = x.astype(np.float64)
    wanted = exact / np.sqrt((exact**2).mean(1, keepdims=True) + np.float32(epsilon)) * weight
    # width/lanes + 16 additions of positive squares, halved by the root; a mean, a root and three products.
    # A square below 1e-38 loses bits, 2^-149 for each, and epsilon is 2^-40 at the least: nothing.
    bound = ((width // kernels["lanes"] + 20) / 2 + 5) * UNIT * np.abs(wanted)
    assert np.all(np.abs(got - wanted) <= bound)
    assert not got[3].any()

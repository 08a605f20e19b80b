"""Rotary embedding against float64."""

import numpy as np
import pytest
from kernels import UNIT, built

from porter.lower.blocks import vector
from porter.lower.kernels import rotary as host

BATCH, HEADS, STEPS, ROWS = 3, 2, 4, 9
# width, rotated channels, interleaved, table, batch of the cosines
CASES = [
    (w, r, i, t, "b")
    for w, r in ((8, 8), (12, 12), (12, 8), (80, 32), (2, 2))
    for i in (False, True)
    for t in (None, ROWS)
] + [(8, 8, False, "rows", "b"), (8, 8, False, None, 1), (8, 4, True, None, 1)]


@pytest.fixture(scope="module", params=[host, vector], ids=["host", "blocks"])
def kernels(request: pytest.FixtureRequest) -> dict:
    made = (request.param.rotary(HEADS, w, r, interleaved=i, table=t, cos_batch=c) for w, r, i, t, c in CASES)
    return dict(zip(CASES, built(made), strict=True))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, count: int, interleaved: bool) -> np.ndarray:
    """cos, sin [batch, steps, count / 2]."""
    y, half = x.copy(), count // 2
    first, second = (
        (slice(0, count, 2), slice(1, count, 2)) if interleaved else (slice(half), slice(half, count))
    )
    c, s = cos[:, None], sin[:, None]
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotary(kernels: dict, case: tuple) -> None:
    width, count, interleaved, table, batch = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, HEADS, STEPS, width)).astype(np.float32)
    lead = (ROWS,) if table else (BATCH if batch == "b" else 1, STEPS)
    angle = rng.random((*lead, count // 2)) * 7
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    positions = rng.integers(0, ROWS, (BATCH, STEPS))
    got = kernels[case](x, cos, sin, *([positions] if table else []), shape=x.shape)
    c, s = (cos[positions], sin[positions]) if table else (cos, sin)
    wanted = rotated(x.astype(np.float64), c.astype(np.float64), s.astype(np.float64), count, interleaved)
    # Two products and a sum, each rounded once, of terms no larger than |x|.
    assert np.abs(got - wanted).max() <= 4 * UNIT * np.abs(x).max()
    np.testing.assert_array_equal(got[..., count:], x[..., count:])


@pytest.mark.parametrize("position", [-1, ROWS, 2**40])
def test_a_position_outside_of_the_table_stops(kernels: dict, position: int) -> None:
    x, table = np.zeros((1, HEADS, 1, 8), np.float32), np.zeros((ROWS, 4), np.float32)
    for case in ((8, 8, False, ROWS, "b"), (8, 8, False, "rows", "b")):
        with pytest.raises(RuntimeError, match="position"):
            kernels[case](x, table, table, np.array([[position]]), shape=x.shape)

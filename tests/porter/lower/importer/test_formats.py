"""Every format as quantize.rtn stores it: lowered, beside `formats.decode` and products in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from lowering import compiled, model, with_weights
from weights import FORMATS, noise

from porter import formats
from porter.context import Context
from porter.pipeline import Pipeline

N, K, E = 37, 75, 3  # no multiple of a group, of a block, of the lanes or of a byte
SCALED = "mxfp4", "nvfp4", "mx9", "int3-g10", "int4-g33", "fp8-e4m3fn-b128"
TEXT = """g (int64[b,s] ids, float[b,s,75] x, int64[b,s] picks, float[37,75] w, float[5,75] v,
  float[3,37,75] u, float[3,75,37] t, float[5] bias, int64[2] shape, int64[1] one, int64[1] two)
  => (float y, float rows, float z, float all, float some) {
  wt = Transpose<perm=[1,0]>(w) y = MatMul(x, wt) rows = Gather(w, ids)
  flat = Reshape(x, shape) z = Gemm<transB=1>(flat, v, bias)
  ut = Transpose<perm=[0,2,1]>(u) wide = Unsqueeze(x, one) all = MatMul(wide, ut)
  some_u = Gather(t, picks) column = Unsqueeze(x, two) some = MatMul(column, some_u) }"""


@dataclass
class Case:
    """One format's lowered program, and the weights it was made of, as their codes stand for."""

    run: object
    weights: dict[str, np.ndarray]
    form: formats.Format


@pytest.fixture(scope="module", params=dict.fromkeys([*FORMATS, *SCALED]))
def case(request: pytest.FixtureRequest) -> Case:
    given = {"w": noise(N, K), "v": noise(5, K, seed=1), "u": noise(E, N, K, seed=2)}
    turned = {"t": noise(E, K, N, seed=3)}  # [E, K, N]: its columns are outputs
    more = {"bias": noise(5), "shape": np.array([-1, K]), "one": np.array([1]), "two": np.array([2])}
    source = with_weights(model(TEXT), **given, **turned, **more)
    Pipeline.parse(f"quantize.rtn{{format={request.param} skip=}}").run(source, Context())
    form = formats.parse(request.param)
    stored = {**given, "t": turned["t"].swapaxes(1, 2)}
    return Case(
        compiled(source), {n: formats.decode(formats.encode(form, a)) for n, a in stored.items()}, form
    )


def product(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x Wᵀ in float64, and what a float32 sum of it may be off by."""
    exact = x.astype(np.float64) @ w.astype(np.float64).swapaxes(-1, -2)
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).swapaxes(-1, -2)
    # The weight is decode's to the bit; a term is rounded once as a product and at most K times as part of
    # the sum (Higham 2002, section 3.1).
    return exact, (w.shape[-1] + 1) * 2.0**-24 * size


def test_every_way_to_read_it(case: Case) -> None:
    rng = np.random.default_rng(0)
    for b, s in ((1, 1), (3, 2)):
        x = rng.standard_normal((b, s, K)).astype(np.float32)
        ids, picks = rng.integers(-N, N, (b, s)), rng.integers(-E, E, (b, s))
        y, rows, z, every, some = case.run({"x": x, "ids": ids, "picks": picks})
        w, v, u, t = (case.weights[n] for n in "wvut")
        np.testing.assert_array_equal(rows, w[ids])
        near(y, *product(x, w))
        exact, bound = product(x.reshape(-1, K), v)
        bias = noise(5).astype(np.float64)
        near(z, exact + bias, bound + 2.0**-24 * (np.abs(exact) + np.abs(bias) + bound))
        near(every, *product(x[:, None], u))
        near(some, *product(x[:, :, None], t[picks]))


def near(got: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> None:
    assert got.shape == exact.shape
    assert np.all(np.abs(got - exact) <= bound)


def test_it_is_stored_as_its_codes(case: Case) -> None:
    """All that is stored is codes, rows padded to 16 and groups to bytes, and what goes with the groups."""
    form = case.form
    rows = sum(
        -(-w.shape[-2] // 16) * 16 * w.size // (w.shape[-1] * w.shape[-2]) for w in case.weights.values()
    )
    group = form.group or K
    codes = -(-K // group) * -(-group * form.bits // 8) + -(-K // 16)  # micro-exponents are a bit a pair
    wide = {"fp32": 4, "fp16": 2, "bf16": 2}.get(form.scale, 1) + (
        4 if form.zero == "real" else bool(form.zero)
    )
    most = rows * (codes + -(-K // group) * wide) + 1000  # the bias and small constants
    stored = sum(p.bytes for p in case.run.imported.parameters)
    assert stored <= most
    assert most < 4 * rows * K, "floats would pass"

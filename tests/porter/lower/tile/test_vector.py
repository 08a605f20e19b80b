"""Scheduled norms, rotations, rows, movements and element-wise work: bit for bit what they were."""

import numpy as np
import pytest
from tiles import CHIPS, both, chip
from tvm import te, tirx, topi

from porter.errors import TargetError
from porter.lower.blocks import vector
from porter.lower.kernels.layout import Layout
from porter.lower.tile.schedule import scheduled

RNG = np.random.default_rng(0)
BOUNDS = {"b": 3, "s": 64, "m": 64, "t": 4}


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def kernel(make: object, *inputs: tuple) -> tirx.PrimFunc:
    """A kernel as Relax makes it from one of TVM's operators."""
    given = [te.placeholder(shape, "float32", name=f"x{i}") for i, shape in enumerate(inputs)]
    return te.create_prim_func([*given, make(*given)]).with_attr("global_symbol", "kernel")


@pytest.mark.parametrize("name", CHIPS)
def test_norms(name: str) -> None:
    before, after = both(vector.rms_norm(100, 1e-5), chip(name), BOUNDS)
    for m in (1, 37):
        x, weight = floats(m, 100), floats(100)
        got = after(x, weight, shape=x.shape)
        np.testing.assert_array_equal(got, before(x, weight, shape=x.shape))


@pytest.mark.parametrize("name", CHIPS)
def test_rotations_by_positions(name: str) -> None:
    rotary = vector.rotary(4, 8, 6, interleaved=False, table=64)
    before, after = both(rotary, chip(name), BOUNDS)
    for b, s in ((1, 1), (3, 40)):
        x, cos, sin = floats(b, 4, s, 8), floats(64, 3), floats(64, 3)
        given = (x, cos, sin, RNG.integers(0, 64, (b, s)))
        got, wanted = (run(*given, shape=x.shape) for run in (after, before))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "layout", [Layout("fp32", 61, 64, lanes=1), Layout("int4", 61, 64, group=32, lanes=1)]
)
@pytest.mark.parametrize("name", CHIPS)
def test_rows_of_a_table(name: str, layout: Layout) -> None:
    before, after = both(vector.rows(layout), chip(name), BOUNDS)
    codes = (
        floats(61, 64, 1)
        if layout.codec_name == "fp32"
        else RNG.integers(0, 256, (61, 32, 1)).astype(np.uint8)
    )
    scale = [] if layout.codec_name == "fp32" else [floats(61, 2, 1)]
    for m in (1, 45):
        rows = RNG.integers(-61, 61, m)
        got, wanted = (run(rows, codes, *scale, shape=(m, 64)) for run in (after, before))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("name", CHIPS)
def test_appending_leaves_the_rest_of_a_cache(name: str, circular: bool) -> None:
    import tvm

    spec = chip(name)
    before, after = both(vector.append(2, 20, 8, "float32", circular=circular), spec, BOUNDS)
    for s in (1, 6):
        cache, new, starts = floats(3, 2, 20, 8), floats(3, 2, s, 8), np.array([0, 7, 17])
        results = []
        for run in (before, after):
            held = tvm.runtime.tensor(cache.copy())
            run.in_place(held, new, starts)
            results.append(held.numpy())
        np.testing.assert_array_equal(results[1], results[0])
        assert np.array_equal(results[1][0, :, s:], cache[0, :, s:])


@pytest.mark.parametrize("name", CHIPS)
def test_tvms_operators(name: str) -> None:
    s = tirx.Var("s", "int64")
    sixty, whole = tirx.IntImm("int64", 60), tirx.IntImm("int64", 1000)
    cases = {
        "softmax": (kernel(lambda x: topi.nn.softmax(x, -1), (s, whole)), [(7, 1000)], (7, 1000)),
        "transpose": (kernel(lambda x: topi.transpose(x, (1, 0)), (s, sixty)), [(40, 60)], (60, 40)),
        "sum": (kernel(lambda x: topi.sum(x, -1), (s, sixty)), [(40, 60)], (40,)),
        "sigmoid": (
            kernel(lambda x, y: topi.sigmoid(x + y) * x, (s, sixty), (s, sixty)),
            [(1, 60)] * 2,
            (1, 60),
        ),
        "known": (kernel(lambda x: topi.exp(x), (sixty, whole)), [(60, 1000)], (60, 1000)),
    }
    for case, (function, shapes, out) in cases.items():
        before, after = both(function, chip(name), BOUNDS)
        given = [floats(*shape) for shape in shapes]
        got = after(*given, shape=out)
        np.testing.assert_array_equal(got, before(*given, shape=out), err_msg=case)
        if case == "softmax":
            wide = np.exp(given[0].astype(np.float64) - given[0].max(-1, keepdims=True))
            wanted = wide / wide.sum(-1, keepdims=True)
            # TVM's exp is within some units; the sum of 1000 terms rounds at each.
            assert np.all(np.abs(got - wanted) <= 1020 * 2.0**-24 * wanted)


def test_one_number_of_a_whole_tensor_is_refused() -> None:
    function = kernel(lambda x: topi.sum(x), (tirx.IntImm("int64", 6), tirx.IntImm("int64", 10)))
    with pytest.raises(TargetError, match=r"PORT-0438: total cannot be scheduled .*one number of a whole"):
        scheduled(function, "total", chip("maia-200"), {})

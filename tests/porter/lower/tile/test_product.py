"""Scheduled products: the numbers of the kernel as it was, bit for bit, and float64's within its rounding."""

import re

import ml_dtypes
import numpy as np
import pytest
from kernels import UNIT
from tiles import CHIPS, both, chip

from porter.lower.blocks.pairs import pairs
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import Profile
from porter.lower.kernels.layout import Layout
from porter.lower.tile.schedule import scheduled

SHAPES = ((100, 70), (256, 512), (31, 1))  # k, n: neither, both and less than a unit step


def inputs(m: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m)
    codes = rng.integers(-127, 128, (n, k, 1)).astype(np.int8)
    return rng.standard_normal((m, k)).astype(np.float32), codes, rng.random((n, 1, 1)).astype(np.float32)


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("name", CHIPS)
def test_of_any_number_of_rows(name: str, k: int, n: int) -> None:
    spec = chip(name)
    unit = Profile(spec).unit("int8")
    kernel = Product(Layout("int8", n, k, group=k, lanes=1), unit).kernel()
    before, after = both(kernel, spec, {"m": 4096})
    for m in (1, 37, 130, 300, 520):  # each in tiles of another size, the last in two of them
        x, codes, scale = inputs(m, k, n)
        got = after(x, codes, scale, shape=(m, n))
        np.testing.assert_array_equal(got, before(x, codes, scale, shape=(m, n)))
        rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
        wide = codes[..., 0].T.astype(np.float64)
        # Products are exact; sums of k of them and one scale round once each.
        bound = (k + 1) * UNIT * (np.abs(rounded) @ np.abs(wide)) * scale[:, 0, 0]
        assert np.all(np.abs(got - rounded @ wide * scale[:, 0, 0]) <= bound)


@pytest.mark.parametrize("m", [1, 160])
@pytest.mark.parametrize("name", CHIPS)
def test_of_rows_that_are_known(name: str, m: int) -> None:
    spec, (k, n) = chip(name), (200, 96)
    kernel = Product(Layout("int8", n, k, group=k, lanes=1), Profile(spec).unit("int8")).kernel()
    before, after = both(kernel, spec, {}, {"m": m})
    given = inputs(m, k, n)
    np.testing.assert_array_equal(after(*given, shape=(m, n)), before(*given, shape=(m, n)))


def test_tiles_of_rows_are_no_larger_than_there_may_be_rows() -> None:
    kernel = Product(Layout("bf16", 64, 64, lanes=1), Profile(chip("tpu-v6e")).unit("bf16")).kernel()
    for most, sizes in ((32, []), (33, [32]), (200, [32, 128]), (4096, [32, 128, 256])):
        found = scheduled(kernel, "kernel", chip("tpu-v6e"), {"m": most})
        assert [int(n) for n in re.findall(r"if m <= T\.int64\((\d+)\)", found.script())] == sizes


def test_tiles_that_do_not_fit_are_left_out() -> None:
    """A unit step on Trainium has all rows of a tile, and more than 32 of this product do not fit."""
    spec = chip("trainium2")
    level = spec.memory["sbuf"]
    small = level.model_copy(update={"size": level.size.model_copy(update={"value": 400_000})})
    narrow = spec.model_copy(update={"memory": {**spec.memory, "sbuf": small}})
    kernel = Product(Layout("int8", 40, 4096, group=4096, lanes=1), Profile(spec).unit("int8")).kernel()
    for of, sizes in ((narrow, ["32"]), (spec, ["32", "128", "256"])):
        found = scheduled(kernel, "kernel", of, {"m": 512})
        assert re.findall(r"if m <= T\.int64\((\d+)\)", found.script()) == sizes


def test_one_row_is_not_padded() -> None:
    kernel = Product(Layout("fp32", 64, 64, lanes=1), Profile(chip("maia-200")).unit("fp32")).kernel()
    found = scheduled(kernel, "kernel", chip("maia-200"), {}, {"m": 1})
    assert '"porter.mnk": [1, ' in found.script()


def test_weights_stay_where_loading_them_costs() -> None:
    """Trainium's stationary operand has 128 columns, its moving one 512 rows: ours are outputs and tokens."""
    kernel = Product(Layout("fp32", 256, 128, lanes=1), Profile(chip("trainium2")).unit("bf16")).kernel()
    found = scheduled(kernel, "kernel", chip("trainium2"), {}, {"m": 40})
    assert '"porter.mnk": [128, 40, 128]' in found.script()


@pytest.mark.parametrize("name", CHIPS)
def test_in_pieces_of_k_where_rows_are_too_long(name: str) -> None:
    spec = chip(name)
    level = spec.memory[spec.matrix.reads]
    small = level.model_copy(update={"size": level.size.model_copy(update={"value": 400_000})})
    outer = {n: small if n == spec.matrix.reads else one for n, one in spec.memory.items()}
    narrow = spec.model_copy(update={"memory": outer})
    k, n, m = 4096, 40, 3
    kernel = Product(Layout("int8", n, k, group=k, lanes=1), Profile(spec).unit("int8")).kernel()
    before, after = both(kernel, narrow, {"m": 8})
    given = inputs(m, k, n)
    np.testing.assert_array_equal(after(*given, shape=(m, n)), before(*given, shape=(m, n)))


@pytest.mark.parametrize("name", CHIPS)
def test_of_two_tensors(name: str) -> None:
    spec = chip(name)
    before, after = both(
        pairs("m", "k", "n", Profile(spec).unit("fp32")), spec, {"t": 3, "m": 40, "k": 70, "n": 50}
    )
    rng = np.random.default_rng(0)
    for t, m, k, n in ((1, 1, 1, 1), (3, 37, 70, 45)):
        x, y = (rng.standard_normal(s).astype(np.float32) for s in ((t, m, k), (t, k, n)))
        got, wanted = (run(x, y, shape=(t, m, n)) for run in (after, before))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", CHIPS)
def test_of_a_stack(name: str) -> None:
    spec, layout = chip(name), Layout("int8", 24, 40, group=40, stack=5, lanes=1)
    kernel = Product(layout, Profile(spec).unit("int8"), stack="all").kernel()
    before, after = both(kernel, spec, {"t": 5, "m": 40})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 33, 40)).astype(np.float32)
    codes = rng.integers(-127, 128, (120, 40, 1)).astype(np.int8)
    scale = rng.random((120, 1, 1)).astype(np.float32)
    got, wanted = (run(x, codes, scale, shape=(5, 33, 24)) for run in (after, before))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("m", [1, 512])
@pytest.mark.parametrize("name", CHIPS)
def test_the_largest_matrices_of_a_70b_decoder_fit(name: str, m: int) -> None:
    spec = chip(name)
    for k, n in ((28672, 8192), (8192, 57344)):
        kernel = Product(Layout("bf16", n, k, lanes=1), Profile(spec).unit("bf16")).kernel()
        for sizes in ({"m": m}, {}):
            assert scheduled(kernel, "kernel", spec, {"m": 512}, sizes) is not None

import layers
import numpy as np
import pytest

from porter import formats
from porter.errors import PassError
from porter.formats import Encoded, Format, parse
from porter.methods import gptq
from porter.methods.grid import output_error

FORMATS = (
    *(
        "int2-g8",
        "int3-g16",
        "int4-g16",
        "int4-r",
        "int8-g8",
        "uint2-g8",
        "uint3-g16",
        "uint4-g16",
        "uint4-r",
    ),
    *(
        "int4-b16",
        "int8-t",
        "fp8-e4m3fn",
        "fp8-e5m2-g16",
        "mxfp4",
        "mxfp6-e3m2",
        "mxint8",
        "nvfp4",
        "mx9",
        "mx6",
    ),
)
SHAPES = [(5, 44), (3, 16), (4, 1), (1, 33)]  # ragged last groups, one column, one row


def values_of(encoded: Encoded, column: int) -> np.ndarray:
    """What every code of the format would stand for at each row of a column, float64 [codes, N]."""
    form = encoded.form
    codes = np.arange(1 << form.bits).astype(np.uint8)
    if form.elements.encode(np.zeros(1)).dtype == np.int8:
        half = 1 << (form.bits - 1)
        codes = np.arange(-half + (form.fraction > 0), half).astype(np.int8)
    found = []
    for code in codes:
        every = np.full_like(encoded.codes, code)
        found.append(formats.decode(Encoded(form, every, *rest_of(encoded)))[:, column])
    return np.nan_to_num(np.array(found, np.float64), nan=1e9, posinf=1e9, neginf=-1e9)


def rest_of(encoded: Encoded) -> tuple:
    return encoded.scales, encoded.zeros, encoded.shifts, encoded.factor


def damped_of(hessian: np.ndarray, damp: float) -> np.ndarray:
    return hessian + damp * np.diagonal(hessian).mean() * np.eye(len(hessian))


def greedy(
    weight: np.ndarray, hessian: np.ndarray, form: Format, order: np.ndarray, fixed: bool
) -> tuple[np.ndarray, float]:
    """OBQ column by column in float64, with the remaining Hessian inverted anew for each, and its cost.

    The nearest value is searched among the values of all codes.
    """
    encoded = formats.encode(form, weight)
    now, done, cost = weight.astype(np.float64), np.zeros(weight.shape), 0.0
    for at, column in enumerate(order):
        if not fixed and column % form.group == 0:
            part = slice(column, column + form.group)
            mine = formats.encode(form, now[:, part])
            group = column // form.group
            encoded.scales[:, group] = mine.scales[:, 0]
            if mine.zeros is not None:
                encoded.zeros[:, group] = mine.zeros[:, 0]
            if mine.shifts is not None:
                pairs = slice(column // form.micro, column // form.micro + mine.shifts.shape[1])
                encoded.shifts[:, pairs] = mine.shifts
        options = values_of(encoded, column)
        done[:, column] = options[np.abs(options - now[:, column]).argmin(0), np.arange(len(weight))]
        left = order[at:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        error = now[:, column] - done[:, column]
        cost += (error**2).sum() / inverse[0, 0]
        now[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        # What is left is the best answer to what is done: the gradient of tr(D H D^T) vanishes there.
        rest = order[at + 1 :]
        change = np.where(np.isin(np.arange(len(hessian)), rest), now, done) - weight
        gradient = change @ hessian[:, rest]
        assert np.abs(gradient).max(initial=0) < 1e-9 * np.abs(hessian).max()
    return done, cost


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", ["", "static_groups", "act_order"])
def test_codes_are_those_of_the_greedy_solution_with_explicit_inverses(name, shape, how):
    form = parse(name)
    weight, inputs = layers.layer(*shape, seed=len(name) + shape[1])
    hessian = layers.moments(inputs)
    damped = damped_of(hessian, 0.01)
    order = np.argsort(-np.diagonal(hessian)) if how == "act_order" else np.arange(shape[1])
    fixed = bool(how) or not form.group or form.rows != 1 or form.scale == "e4m3fn" or bool(form.fraction)
    wanted, cost = greedy(weight, damped, form, order, fixed)
    got = gptq.quantize(weight, hessian, form, **({how: True} if how else {}))
    # The same real numbers; codes could differ only where a value lies within 1e-7 of a midpoint between two,
    # since the ratio to the scale is taken in float32. These seeds have none.
    np.testing.assert_array_equal(formats.decode(got), wanted.astype(np.float32))
    # Frantar et al., equation 2: the costs of the steps add up to the error of all outputs.
    assert cost == pytest.approx(output_error(wanted - weight, damped), rel=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_do_not_go_together_leave_rounding_to_nearest(name):
    weight, inputs = layers.layer(6, 40)
    got = gptq.quantize(weight, np.diag(np.mean(inputs**2, 0)), parse(name))
    wanted = formats.encode(parse(name), weight)
    np.testing.assert_array_equal(got.codes, wanted.codes)
    np.testing.assert_array_equal(got.scales, wanted.scales)


@pytest.mark.parametrize("name", ["int3-g16", "uint4-g16", "int4-r", "mxfp4", "nvfp4"])
def test_outputs_err_less_than_rounded_to_nearest(name):
    weight, inputs = layers.layer(32, 64)
    hessian, form = layers.moments(inputs), parse(name)
    nearest = output_error(formats.decode(formats.encode(form, weight)) - weight, hessian)
    for options in ({}, {"static_groups": True}, {"act_order": True}):
        found = formats.decode(gptq.quantize(weight, hessian, form, **options))
        explicit = np.mean(np.sum((inputs @ (found - weight).T) ** 2, axis=1))
        assert output_error(found - weight, hessian) == pytest.approx(explicit, rel=1e-9)
        assert explicit < 0.7 * nearest


@pytest.mark.parametrize("block", [1, 3, 16, 24, 40, 64, 1000])
@pytest.mark.parametrize("name", ["int4-g16", "int4-g40", "int4-r", "mx6"])
def test_blocks_change_no_code(name, block):
    weight, inputs = layers.layer(7, 100)
    whole = gptq.quantize(weight, layers.moments(inputs), parse(name), block=100)
    pieces = gptq.quantize(weight, layers.moments(inputs), parse(name), block=block)
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.scales, pieces.scales)


@pytest.mark.parametrize("name", ["int4-g16", "mx9", "uint4-g16"])
def test_rows_do_not_depend_on_each_other(name, monkeypatch):
    weight, inputs = layers.layer(11, 40)
    whole = gptq.quantize(weight, layers.moments(inputs), parse(name))
    monkeypatch.setattr(gptq, "ROWS", 4)
    pieces = gptq.quantize(weight, layers.moments(inputs), parse(name))
    for a, b in zip((whole.codes, *rest_of(whole)), (pieces.codes, *rest_of(pieces)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["int4-b16", "int8-t", "nvfp4"])
def test_rows_that_share_scales_stay_together(name, monkeypatch):
    weight, inputs = layers.layer(50, 40)
    whole = gptq.quantize(weight, layers.moments(inputs), parse(name))
    monkeypatch.setattr(gptq, "ROWS", 20)
    pieces = gptq.quantize(weight, layers.moments(inputs), parse(name))
    np.testing.assert_array_equal(formats.decode(whole), formats.decode(pieces))


@pytest.mark.parametrize("name", ["int4-g16", "uint3-g16", "int4-b16", "mx9"])
def test_a_stack_is_its_matrices(name):
    one, other = (layers.layer(6, 40, seed=seed) for seed in (0, 1))
    hessians = [layers.moments(x) for _, x in (one, other)]
    got = gptq.quantize(np.stack([one[0], other[0]]), hessians, parse(name))
    for e, (weight, _) in enumerate((one, other)):
        alone = gptq.quantize(weight, hessians[e], parse(name))
        np.testing.assert_array_equal(formats.decode(got)[e], formats.decode(alone))


def test_a_stack_has_one_factor():
    (one, x), (other, y) = (layers.layer(6, 40, seed=seed) for seed in (0, 1))
    weight, hessians = np.stack([one, other * 8]), [layers.moments(x), layers.moments(y)]
    got = gptq.quantize(weight, hessians, parse("nvfp4"))
    assert got.factor == formats.encode(parse("nvfp4"), weight).factor
    for e in range(2):
        errors = [
            formats.decode(each)[e] - weight[e] for each in (got, formats.encode(parse("nvfp4"), weight))
        ]
        assert output_error(errors[0], hessians[e]) < 0.8 * output_error(errors[1], hessians[e])


def test_only_the_hessians_shape_counts():
    weight, inputs = layers.layer(6, 40)
    hessian, form = layers.moments(inputs), parse("int4-g16")
    wanted = gptq.quantize(weight, hessian, form).codes
    np.testing.assert_array_equal(gptq.quantize(weight, hessian * 1024, form).codes, wanted)
    np.testing.assert_array_equal(gptq.quantize(weight, hessian.astype(np.float32), form).codes, wanted)


@pytest.mark.parametrize("how", ["", "act_order"])
def test_dead_inputs_are_rounded_to_nearest_and_move_nothing(how):
    weight, inputs = layers.layer(6, 48)
    dead = np.array([0, 5, 17, 47])
    inputs[:, dead] = 0
    options, form = {how: True} if how else {"static_groups": True}, parse("int4-r")
    got = gptq.quantize(weight, layers.moments(inputs), form, **options)
    nearest = formats.encode(form, weight)
    np.testing.assert_array_equal(got.codes[:, dead], nearest.codes[:, dead])
    silent = weight.copy()
    silent[:, dead] = nearest.scales * 3  # other weights that leave the scales as they are
    assert np.abs(silent[:, dead]).max() < np.abs(weight).max()
    other = gptq.quantize(silent, layers.moments(inputs), form, **options)
    live = np.setdiff1d(np.arange(48), dead)
    np.testing.assert_array_equal(got.scales, other.scales)
    np.testing.assert_array_equal(got.codes[:, live], other.codes[:, live])


def test_nothing_seen_at_all_is_rounding_to_nearest():
    weight, _ = layers.layer(6, 48)
    form = parse("uint3-g16")
    got = gptq.quantize(weight, np.zeros((48, 48)), form)
    np.testing.assert_array_equal(got.codes, formats.encode(form, weight).codes)


@pytest.mark.parametrize("size", [1, 64, 65, 200])
def test_the_factor_is_one_of_the_inverse(size):
    _, inputs = layers.layer(1, size, tokens=3 * size)
    upper = gptq.inverse_factor(layers.moments(inputs), 0.01)
    np.testing.assert_array_equal(upper, np.triu(upper))
    damped = damped_of(layers.moments(inputs), 0.01)
    # A backward stable product with its inverse is off by the condition times the size in roundings.
    bound = np.linalg.cond(damped) * size * np.finfo(np.float64).eps
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(size), rtol=0, atol=10 * bound)


def test_wide_floats_are_only_cast():
    weight, inputs = layers.layer(3, 8)
    got = gptq.quantize(weight, layers.moments(inputs), parse("fp16"))
    np.testing.assert_array_equal(got.codes, weight.astype(np.float16))


@pytest.mark.parametrize("bad", ["nan", "dependent"])
def test_moments_that_have_no_inverse_are_refused(bad):
    weight, inputs = layers.layer(3, 8)
    hessian = layers.moments(inputs)
    if bad == "nan":
        hessian[2, 2] = np.nan
    else:
        hessian = np.ones((8, 8)) - np.eye(8) / 2**40
    with pytest.raises(PassError, match="PORT-0281"):
        gptq.quantize(weight, hessian, parse("int4-g8"), damp=0)

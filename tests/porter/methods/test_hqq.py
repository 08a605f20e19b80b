import dataclasses

import numpy as np
import pytest

from porter import formats
from porter.errors import PassError
from porter.formats import parse
from porter.methods import hqq

NAMES = ["uint4-g16", "uint3-g16", "uint2-g8", "uint8-g32", "uint4-r", "uint4-g7"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, shape).astype(np.float32) * np.float32(0.02)


def fit_group(w: np.ndarray, top: int) -> tuple[float, float, float]:
    """The reference's loop on one group in float64, in units of a step: (step, zero point, mean error)."""
    step = (w.max() - w.min()) / top
    zero, beta, best = -w.min() / step, 10.0, (np.inf, 0.0)
    for _ in range(20):
        q = np.clip(np.round(w / step + zero), 0, top)
        restored = (q - zero) * step
        error = np.abs(w - restored).mean()
        if error >= best[0]:
            break
        best = error, zero
        e = (w - restored) / step
        with np.errstate(divide="ignore"):
            e = np.sign(e) * np.maximum(np.abs(e) - np.abs(e) ** (0.7 - 1) / beta, 0)
        zero = np.mean(q - (w / step - e))
        beta *= 1.01
    return step, best[1], best[0]


@pytest.mark.parametrize("name", NAMES)
def test_scales_and_zero_points_are_those_of_the_loop_by_hand(name):
    form, weight = parse(name), noise(6, 45)
    got = hqq.quantize(weight, form)
    change = formats.decode(got) - weight
    group, top, same = form.group or 45, (1 << form.bits) - 1, 0
    for row in range(6):
        for g, first in enumerate(range(0, 45, group)):
            part = slice(first, first + group)
            step, zero, error = fit_group(weight[row, part].astype(np.float64), top)
            assert got.scales[row, g] == pytest.approx(step, rel=1e-6)
            # With as many errors above as below, a range of zero points has one mean error: float32 and
            # float64 stop at different ends of it, and who goes on finds a smaller one or none.
            assert np.abs(change[row, part]).mean() <= error * (1 + 1e-5) + 1e-6 * step
            same += abs(got.zeros[row, g] - zero) < 1e-4 * top
    assert same >= 0.6 * got.zeros.size


@pytest.mark.parametrize("name", NAMES)
def test_no_group_errs_more_than_where_it_started(name):
    form, weight = parse(name), noise(8, 64)
    got = hqq.quantize(weight, form)
    low = -np.stack([weight[:, i : i + (form.group or 64)].min(1) for i in range(0, 64, form.group or 64)], 1)
    start = formats.rounding.nearest(got.form, weight, formats.format.Scales(got.scales, low / got.scales))
    before, after = (np.abs(formats.decode(e) - weight) for e in (start, got))
    group = form.group or 64
    for first in range(0, 64, group):
        part = slice(first, first + group)
        assert (after[:, part].mean(1) <= before[:, part].mean(1) * (1 + 1e-5)).all()
    assert after.mean() < before.mean()


def test_real_zero_points_of_unsigned_codes_whatever_the_sign():
    weight = noise(4, 40)
    signed, unsigned = hqq.quantize(weight, parse("int4-g16")), hqq.quantize(weight, parse("uint4-g16"))
    assert (signed.form.element, signed.form.zero, signed.form.group) == ("uint4", "real", 16)
    assert signed.codes.dtype == np.uint8
    assert signed.zeros.dtype == np.float32
    for field in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(signed, field), getattr(unsigned, field))


@pytest.mark.parametrize("power", [-60, -3, 5, 60])
def test_the_unit_of_the_weights_does_not_matter(power):
    weight = noise(4, 64)
    one, other = (hqq.quantize(weight * np.float32(2.0**p), parse("uint4-g16")) for p in (0, power))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales * np.float32(2.0**power), other.scales)


def test_rows_are_fitted_apart():
    weight = noise(600, 16)
    whole = hqq.quantize(weight, parse("uint3-g8"))
    alone = hqq.quantize(weight[512:513], parse("uint3-g8"))
    np.testing.assert_array_equal(whole.codes[512], alone.codes[0])
    np.testing.assert_array_equal(whole.zeros[512], alone.zeros[0])


@pytest.mark.parametrize("value", [0.0, 0.3, -5.0])
def test_groups_of_one_value_come_back(value):
    weight = np.full((2, 9), value, np.float32)
    got = formats.decode(hqq.quantize(weight, parse("uint4-g8")))
    np.testing.assert_array_equal(got, weight)


@pytest.mark.parametrize("scale", ["fp16", "bf16"])
def test_codes_are_nearest_under_the_scale_as_stored(scale):
    form = dataclasses.replace(parse("uint4-g16"), scale=scale)
    weight = noise(4, 32)
    got = hqq.quantize(weight, form)
    assert got.scales.dtype == formats.format.SCALES[scale]
    error = np.abs(formats.decode(got) - weight)
    inside = (got.codes > 0) & (got.codes < 15)
    half = np.repeat(got.scales.astype(np.float32), 16, axis=1) / 2
    assert (error <= half * 1.00001)[inside].all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8-e4m3fn", "int8-b16", "int8-t", "mxint8", "fp16"])
def test_formats_without_free_scales_are_refused(name):
    with pytest.raises(PassError, match="PORT-0282"):
        hqq.quantize(noise(2, 32), parse(name))


@pytest.mark.parametrize("beta", [10.0, 12.0])
def test_shrinkage_lets_large_errors_through_and_is_odd(beta):
    error = np.array([-1e3, -0.5, -1e-3, 0, 1e-3, 0.5, 1e3], np.float32)
    got = hqq.shrink(error, beta)
    np.testing.assert_array_equal(got, -got[::-1])
    assert got[3:5].tolist() == [0, 0]
    assert got[5] == pytest.approx(0.5 - 0.5**-0.3 / beta, rel=1e-6)
    assert got[6] == pytest.approx(1e3, rel=1e-4)

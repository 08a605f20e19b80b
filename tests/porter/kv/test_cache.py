import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.errors import PassError
from porter.formats import blocks
from porter.kv import PRESETS, Cache, Scheme, Side, attend, attend_cache, calibrated, parse
from porter.kv.constants import normalizer

EXTRA = [
    "innerq recent=3 sink=2",
    "innerq-hybrid recent=0 sink=1 value=int4-g5-tokens-hybrid",
    "kivi2 recent=7 key=uint3-g4-tokens",
    "int8 key=int8-g4-tokens value=int2 rotate",
    "turboquant3 recent=2 key=lloyd2-mixed-rotate-residual",
    "fp8 static=channel rotate",
    "triaxial recent=5 sink=1",
    "triaxial recent=0 share=0.6",
    "certified copy=fp16",
]
TEXTS = [*PRESETS, *EXTRA]


def made(text, size=12, heads=2, tokens=40, batch=1, seed=0, capacity=None):
    """A scheme with its constants, and random keys, values and tags."""
    scheme, rng = parse(text), np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, batch, heads, tokens, size)).astype(np.float32)
    constants = calibrated(scheme, keys[0], values[0])
    constants = dataclasses.replace(constants, more=np.array([False, True]))
    cache = Cache(scheme, size, heads, capacity or tokens, batch, constants)
    return cache, keys, values, rng.integers(0, 2, (batch, tokens))


def same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint8), b[name].view(np.uint8), err_msg=name)


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_cache_does_not_know_how_its_tokens_came(text, data):
    size = data.draw(st.sampled_from([1, 4, 7, 12, 16]))
    short = text in EXTRA
    tokens = data.draw(st.integers(1, 40 if short else 220))
    capacity = tokens + data.draw(st.integers(0, 9))
    whole, keys, values, tags = made(text, size, tokens=tokens, capacity=capacity)
    parts = made(text, size, tokens=tokens, capacity=capacity)[0]
    whole.append(keys, values, tags=tags)
    most = data.draw(st.sampled_from([1, 3, 40]))
    start = 0
    while start < tokens:
        count = data.draw(st.integers(1, most)) if short else most
        cut = slice(start, start + count)
        parts.append(keys[:, :, cut], values[:, :, cut], tags=tags[:, cut])
        start += count
    same_bytes(whole.state, parts.state)


@pytest.mark.parametrize("text", TEXTS)
def test_rows_of_other_lengths_are_rows_of_their_own(text):
    cache, keys, values, tags = made(text, batch=3)
    cache.append(keys[:, :, :20], values[:, :, :20], np.array([20, 0, 7]), tags)
    late = [x[:, :, 20:] for x in (keys, values)]
    cache.append(*late, np.array([3, 18, 20]), tags)
    np.testing.assert_array_equal(cache.lengths, [23, 18, 27])
    for row, (early, after) in enumerate([(20, 3), (0, 18), (7, 20)]):
        alone = Cache(cache.scheme, 12, 2, 40, 1, cache.constants)
        for x, count in (((keys, values), early), (late, after)):
            one = [each[row : row + 1, :, :count] for each in x]
            alone.append(*one, tags=tags[row : row + 1])
        same_bytes({n: a[row] for n, a in cache.state.items()}, {n: a[0] for n, a in alone.state.items()})
        np.testing.assert_array_equal(cache.keys(row), alone.keys(0))


@pytest.mark.parametrize("text", ["innerq", "kivi4", "innerq-hybrid rotate", "triaxial"])
def test_windows_are_the_model_s_own_numbers_in_high_precision(text):
    cache, keys, values, tags = made(text, 8, tokens=300)
    cache.append(keys, values, tags=tags)
    scheme = cache.scheme
    for name, exact in (("key", keys), ("value", values)):
        rounded = scheme.rounded(scheme.side(name), 300)
        kept = [*range(scheme.sink), *range(scheme.sink + rounded, 300)]
        assert len(kept) >= scheme.sink + scheme.recent
        held = cache.stored(name, 0)[:, kept]
        want = cache._turned(name, exact)[0][:, kept]
        np.testing.assert_array_equal(held, want.astype(np.float16).astype(np.float32))


def bound(side, x, axis):
    """Half a step of each group, and what rounding the step, the minimum and the sum may add."""
    groups = x if axis == -1 else x.swapaxes(-1, -2)
    span = blocks.largest(groups, side.group) - blocks.smallest(groups, side.group)
    peak = blocks.absmax(groups, side.group)
    levels = (1 << side.bits) - 1
    step = span / levels if side.element.startswith("uint") else peak / (levels // 2)
    # fp16 moves a minimum by 2^-11 of it, the last level by as many steps' 2^-11, and float32 far less.
    each = step / 2 * (1 + 2**-10) + (peak + span) * 2**-10
    spread = blocks.spread(each, groups.shape[-1], side.group)
    return spread if axis == -1 else spread.swapaxes(-1, -2)


@pytest.mark.parametrize("element", ["int8", "int4", "int3", "int2", "uint4", "uint3", "uint2"])
@pytest.mark.parametrize(("along", "group"), [("channels", 0), ("channels", 5), ("tokens", 4)])
@pytest.mark.parametrize("scale", ["fp16", "fp32"])
def test_a_rounded_value_is_half_a_step_away(element, along, group, scale):
    side = Side(element, along, group, scale)
    cache = Cache(Scheme(side, side), 13, 2, 24)
    x = np.random.default_rng(1).standard_normal((1, 2, 24, 13)).astype(np.float32) * 5
    x[0, 0, :4] = 0
    cache.append(x, x)
    # Along tokens the values wait for their group in fp16.
    exact = x.astype(np.float16).astype(np.float32) if along == "tokens" else x
    error = np.abs(cache.keys(0) - exact[0])
    assert (error <= bound(side, exact[0], -1 if along == "channels" else -2)).all()
    assert error.max() > 0
    np.testing.assert_array_equal(error[0, :4], 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_hybrid_group_is_never_worse_than_symmetric_or_asymmetric(bits):
    x = np.random.default_rng(2).standard_normal((1, 2, 32, 16)).astype(np.float32)
    x[:, 0] += 2  # far from symmetric
    errors = {}
    for text in (f"int{bits}-g8", f"uint{bits}-g8", f"int{bits}-g8-hybrid"):
        cache = Cache(parse(f"key={text} value={text}"), 16, 2, 32)
        cache.append(x, x)
        errors[text] = np.abs(cache.keys(0) - x[0]).reshape(2, 32, 2, 8).sum(axis=-1)
        scales = cache.state["key_scale"]
    symmetric, asymmetric, hybrid = errors.values()
    # L1 sums of float32 against float64: two modes may only be mixed up where they are this close.
    np.testing.assert_allclose(hybrid, np.minimum(symmetric, asymmetric), rtol=1e-6)
    assert (scales < 0).mean() > 0.1
    assert (scales > 0).any()


def test_fp8_is_what_ml_dtypes_has():
    x = np.random.default_rng(3).standard_normal((1, 2, 9, 8)).astype(np.float32)
    cache = Cache(parse("fp8-dynamic"), 8, 2, 9)
    cache.append(x, x)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(448)
    want = (x / scale).astype(ml_dtypes.float8_e4m3fn)
    same_bytes({"codes": cache.state["key_codes"]}, {"codes": want})
    np.testing.assert_array_equal(cache.keys(0), (want.astype(np.float32) * scale)[0])


@pytest.mark.parametrize(
    ("static", "shape"), [("tensor", (1, 1, 1)), ("head", (2, 1, 1)), ("channel", (2, 1, 8))]
)
def test_static_steps_saturate(static, shape):
    x = np.random.default_rng(4).standard_normal((1, 2, 9, 8)).astype(np.float32)
    scheme = parse(f"int8 static={static}")
    constants = calibrated(scheme, x[0], x[0])
    assert constants.key_step.shape == shape
    cache = Cache(scheme, 8, 2, 18, 1, constants)
    cache.append(x, x)
    cache.append(3 * x, 3 * x)
    step = constants.key_step
    assert (np.abs(cache.keys(0)[:, :9] - x[0]) <= step * (0.5 + 127 * 2**-22)).all()  # float32 of 127 steps
    np.testing.assert_array_equal(
        cache.keys(0)[:, 9:], np.clip(np.rint(3 * x[0] / step), -128, 127).astype(np.float32) * step
    )


def test_what_needs_calibration_says_so():
    for text in ("fp8", "innerq", "triaxial"):
        with pytest.raises(PassError) as caught:
            Cache(parse(text), 8, 1, 8)
        assert caught.value.code == "PORT-0272"


HALVES, NEIGHBOURS = (np.arange(12) + 6) % 12, np.arange(12) ^ 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pairs", [None, HALVES, NEIGHBOURS], ids=["free", "halves", "neighbours"])
def test_normalization_and_rotation_leave_scores_as_they_are(pairs, shared):
    """With kept elements of float32 only rounding is left: 2^-24 of each of a few sums of D products."""
    scheme = Scheme(Side("fp32", rotate=True), Side("fp32", rotate=True), normalize=True)
    rng = np.random.default_rng(5)
    keys, values, queries = (rng.standard_normal((1, h, 6, 12)).astype(np.float32) for h in (2, 2, 4))
    constants = calibrated(scheme, keys[0], values[0], pairs, shared)
    norm = constants.normalizer
    alike = norm if pairs is None else norm[:, pairs]
    np.testing.assert_array_equal(norm, alike)
    assert not shared or (norm[0] == norm[1]).all()
    assert (norm**2 >= np.abs(keys[0]).max(axis=1) * (1 - 1e-6)).all()
    cache = Cache(scheme, 12, 2, 6, 1, constants)
    cache.append(keys, values)
    want = attend(keys[0], values[0], queries[0]).output
    np.testing.assert_allclose(attend_cache(cache, queries)[0], want, atol=1e-6)
    turned = (queries[0].reshape(2, 2, 6, 12) * norm[:, None, None]) @ cache._matrices["key"][0].T
    scores = turned @ cache.stored("key", 0)[:, None].swapaxes(-1, -2)
    exact = queries[0].reshape(2, 2, 6, 12) @ keys[0][:, None].swapaxes(-1, -2)
    np.testing.assert_allclose(scores, exact, atol=1e-5)


def test_a_channel_of_zeros_is_not_divided_by_zero():
    np.testing.assert_array_equal(normalizer(np.zeros((1, 3, 4), np.float32)), 1)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attention_is_the_definition(window, softcap):
    rng = np.random.default_rng(6)
    keys, values, queries = (rng.standard_normal(s) for s in ((2, 9, 5), (2, 9, 5), (6, 4, 5)))
    found = attend(keys, values, queries, 0.7, softcap, window)
    for head in range(6):
        for i in range(4):
            at = 5 + i
            seen = range(max(0, at - window + 1) if window else 0, at + 1)
            scores = np.array([0.7 * queries[head, i] @ keys[head // 3, t] for t in seen])
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores) / np.exp(scores).sum()
            want = sum(w * values[head // 3, t] for w, t in zip(weights, seen, strict=True))
            np.testing.assert_allclose(found.output[head, i], want, rtol=1e-12, atol=1e-14)


def test_tagged_tokens_get_their_bits_until_the_room_is_spent():
    cache, keys, values, _ = made("triaxial recent=0 share=0.25", 8, tokens=20)
    tags = np.array([[1, 0, 1, 1, 1, 1, 1] + [0] * 13])
    cache.append(keys, values, tags=tags)
    np.testing.assert_array_equal(np.flatnonzero(cache.state["slots"][0, 0, :, 0] < 0), [0, 2, 3, 4, 5])
    error = np.abs(cache.keys(0) - keys[0]).mean(axis=(0, 2))
    assert error[[0, 2, 3, 4, 5]].max() < error[[1, *range(6, 20)]].min()
    full = made("triaxial recent=0 share=0.25", 8, tokens=20)[0]
    full.append(keys, values, tags=np.zeros((1, 20), int))
    np.testing.assert_array_equal(np.flatnonzero(full.state["slots"][0, 0, :, 0] < 0), range(15, 20))


def test_a_full_row_is_refused():
    cache, keys, values, _ = made("int8", tokens=4)
    cache.append(keys, values)
    with pytest.raises(ValueError, match="more than 4"):
        cache.append(keys[:, :, :1], values[:, :, :1])


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_of_any_size_stay_finite(text):
    """fp16 steps reach 65504 and 6e-5 at their ends; codes saturate there, and never become NaN."""
    cache, keys, values, tags = made(text, tokens=12)
    sizes = np.array([0, 1e-30, 1e-8, 1e-5, 1, 1e3, 1e5, 1e9, 1e30, 3e38, 0, 1], np.float32)
    with np.errstate(over="ignore"):
        cache.append(np.clip(keys * sizes[:, None], -3e38, 3e38), values * 0, tags=tags)
    assert np.isfinite(cache.keys(0)).all()
    assert np.abs(cache.values(0)).max() < 1e-3

"""The attention kernel against float64: caches, who sees whom, masks, head sizes, extreme scores."""

from dataclasses import replace

import numpy as np
import pytest
from kernels import UNIT, built

from porter.formats.packing import pack
from porter.lower.kernels.attention import LOWEST, Attention, Cache, attention

BATCH, STEPS, LENGTH = 3, 5, 21  # a length that is no multiple of the kernel's tile


def spec(
    width: int = 8, codec: str = "fp32", heads: tuple[int, int] = (4, 2), **options: object
) -> Attention:
    values: dict[str, object] = {
        "length": LENGTH if options.get("offset") == "lengths" else "t",
        "scale": width**-0.5,
        "causal": True,
        "offset": "end",
        **options,
    }
    return Attention(*heads, Cache(codec, width), Cache(codec, width), **values)


BOOL, ADDED = {"mask": ("b", 1, "s", "t")}, {"mask": ("b", 1, "s", "t"), "mask_dtype": "float32"}
SPECS = {
    **{
        f"{c} {o}": spec(codec=c, offset=o)
        for c in ("fp32", "int8", "int4")
        for o in ("start", "end", "lengths")
    },
    **{f"{c} sees all": spec(codec=c, offset="start", causal=False) for c in ("fp32", "int8", "int4")},
    "lengths alone": spec(offset="lengths", causal=False),
    **{f"head size {d}": spec(d) for d in (1, 2, 12, 64, 80, 128, 256)},
    **{f"int8 head size {d}": spec(d, "int8") for d in (1, 12, 256)},
    **{f"int4 head size {d}": spec(d, "int4") for d in (2, 12, 80, 256)},
    "one head for all": spec(heads=(6, 1)),
    "every head its own": spec(heads=(3, 3)),
    "values of another size": replace(spec(12), value=Cache("fp32", 5)),
    "keys and values of two kinds": replace(spec(12, "int8"), value=Cache("int4", 6)),
    "softcap": spec(softcap=5.0),
    "bool mask": spec(causal=False, offset="start", **BOOL),
    "bool mask, causal": spec(**BOOL),
    "float mask": spec(causal=False, offset="start", **ADDED),
    "float mask and softcap": spec(causal=False, offset="start", softcap=3.0, **ADDED),
    "mask of every head": spec(causal=False, offset="start", mask=(1, 4, "s", "t"), mask_dtype="float32"),
    "mask of keys alone": spec(causal=False, offset="start", mask=("b", 1, 1, "t")),
    "mask of a static cache": spec(offset="lengths", mask=("b", 1, "s", LENGTH), mask_dtype="float32"),
}


@pytest.fixture(scope="module")
def kernels() -> dict:
    return dict(zip(SPECS, built(attention(s) for s in SPECS.values()), strict=True))


def stored(
    cache: Cache, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """The buffers of a cache, and what they stand for in float64."""
    shape = (*shape, cache.width)
    if cache.codec == "fp32":
        values = rng.standard_normal(shape).astype(np.float32)
        return [values], values.astype(np.float64)
    top = 127 if cache.codec == "int8" else 7
    codes = rng.integers(-top - 1, top + 1, shape).astype(np.int8)
    scales = (rng.random((*shape[:-1], 1)) / top).astype(np.float32)
    packed = pack(codes, 4) if cache.codec == "int4" else codes
    return [packed, scales], codes.astype(np.float64) * scales


def mask_of(s: Attention, rng: np.random.Generator) -> list[np.ndarray]:
    sizes = {"b": BATCH, "s": STEPS, "t": LENGTH}
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in s.mask)
    if not shape:
        return []
    return [
        rng.random(shape) < 0.7 if s.mask_dtype == "bool" else rng.standard_normal(shape).astype(np.float32)
    ]


def last_seen(s: Attention, lengths: np.ndarray, steps: int, length: int) -> np.ndarray:
    """How many keys each query sees, [batch, steps]."""
    total = {"lengths": lengths}.get(s.offset, np.full(len(lengths), length))
    first = np.zeros(len(lengths), np.int64) if s.offset == "start" else total - steps
    seen = first[:, None] + np.arange(steps) + 1 if s.causal else total[:, None] + np.zeros(steps, np.int64)
    return np.clip(np.minimum(seen, total[:, None]), 0, length)


def expected(
    s: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, mask: list[np.ndarray]
) -> tuple[np.ndarray, float]:
    """The result in float64, and how far float32 may stray from it."""
    k, v = (np.repeat(x, s.query_heads // s.heads, 1) for x in (k, v))
    score = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) * s.scale
    size = np.abs(q).astype(np.float64) @ np.abs(k).transpose(0, 1, 3, 2) * s.scale
    if s.softcap:
        score = np.tanh(score / s.softcap) * s.softcap
    if mask:
        score = np.where(mask[0], score, -np.inf) if s.mask_dtype == "bool" else score + mask[0]
    score = np.where(np.arange(k.shape[2]) < seen[:, None, :, None], score, -np.inf)
    top = score.max(-1, keepdims=True, initial=-np.inf)
    weight = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = weight.sum(-1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    # A score is a sum of `width` products (and a scale, a mask, a maximum taken off): (width + 4) roundings
    # of its terms' size; tanh adds 4 units of the cap. A weight's relative error is that, once above and once
    # below the fraction, and 2 units for exp. The sums over keys and their rescalings add 2 roundings for
    # each key, of a result no larger than the largest value.
    off = (
        (s.key.width + 4)
        * UNIT
        * (size.max(initial=0) + np.abs(mask[0]).max(initial=0) if mask else size.max(initial=0))
    )
    off += 4 * UNIT * s.softcap
    return share @ v, (2 * off + (2 * k.shape[2] + 8) * UNIT) * np.abs(v).max(initial=0)


@pytest.mark.parametrize("name", SPECS)
def test_attention(kernels: dict, name: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(0)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (BATCH, s.heads, LENGTH), rng) for c in (s.key, s.value))
    lengths, mask = np.array([STEPS, 13, LENGTH]), mask_of(s, rng)
    given = [lengths] if s.offset == "lengths" else []
    got = kernels[name](q, *keys, *values, *given, *mask, shape=(*q.shape[:3], s.value.width))
    wanted, bound = expected(s, q, k, v, last_seen(s, lengths, STEPS, LENGTH), mask)
    assert np.abs(got - wanted).max() <= bound


@pytest.mark.parametrize("name", ["fp32 end", "int8 end", "int4 end"])
@pytest.mark.parametrize(("steps", "length"), [(1, 1), (1, 40), (8, 8), (9, 17), (0, 4)])
def test_any_number_of_queries_and_keys(kernels: dict, name: str, steps: int, length: int) -> None:
    s, rng = SPECS[name], np.random.default_rng(1)
    q = rng.standard_normal((1, s.query_heads, steps, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (1, s.heads, length), rng) for c in (s.key, s.value))
    got = kernels[name](q, *keys, *values, shape=(*q.shape[:3], s.value.width))
    wanted, bound = expected(s, q, k, v, last_seen(s, np.zeros(1), steps, length), [])
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= bound


def test_no_keys_at_all_give_zeros(kernels: dict) -> None:
    q, none = np.ones((1, 4, 2, 8), np.float32), np.zeros((1, 2, 0, 8), np.float32)
    assert not kernels["fp32 sees all"](q, none, none, shape=(1, 4, 2, 8)).any()


def test_a_query_that_sees_no_key_gives_zeros(kernels: dict) -> None:
    """Lengths below the number of queries leave the first of them nothing to see."""
    rng = np.random.default_rng(2)
    q = rng.standard_normal((BATCH, 4, STEPS, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, 2, LENGTH, 8)).astype(np.float32)
    lengths = np.array([2, 0, STEPS])
    got = kernels["fp32 lengths"](q, k, v, lengths, shape=q.shape)
    seen = last_seen(SPECS["fp32 lengths"], lengths, STEPS, LENGTH)
    wanted, bound = expected(SPECS["fp32 lengths"], q, k, v, seen, [])
    assert np.abs(got - wanted).max() <= bound
    assert not got[0, :, :3].any()
    assert not got[1].any()


@pytest.mark.parametrize("lowest", [-np.inf, LOWEST])
def test_a_fully_masked_row(kernels: dict, lowest: float) -> None:
    """-inf leaves nothing: zeros. The lowest float32, which exporters write, leaves equals: the mean."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((BATCH, 4, STEPS, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, 2, LENGTH, 8)).astype(np.float32)
    mask = np.zeros((BATCH, 1, STEPS, LENGTH), np.float32)
    mask[1] = lowest
    got = kernels["float mask"](q, k, v, mask, shape=q.shape)[1]
    mean = np.repeat(v[1].astype(np.float64).mean(1, keepdims=True), 2, 0)
    wanted = np.zeros_like(got) if np.isinf(lowest) else np.broadcast_to(mean, got.shape)
    # A score of at most 8 vanishes in 3.4e38. The mean is a sum of LENGTH terms, a division each way.
    assert np.abs(got - wanted).max() <= (LENGTH + 2) * UNIT * np.abs(v).max()


def test_a_fully_masked_row_of_a_bool_mask_gives_zeros(kernels: dict) -> None:
    q = np.ones((BATCH, 4, STEPS, 8), np.float32)
    k = np.ones((BATCH, 2, LENGTH, 8), np.float32)
    mask = np.ones((BATCH, 1, STEPS, LENGTH), bool)
    mask[0, 0, 2] = False
    got = kernels["bool mask"](q, k, k, mask, shape=q.shape)
    assert not got[0, :, 2].any()
    assert np.all(got[0, :, 3] == 1)


@pytest.mark.parametrize("scale", [1e3, 1e9, 1e18])
def test_scores_far_beyond_what_exp_can_take(kernels: dict, scale: float) -> None:
    """The largest score is taken off first, so the softmax is a choice of one value and nothing overflows."""
    rng = np.random.default_rng(4)
    q = (rng.standard_normal((1, 4, 1, 8)) * scale).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 2, 30, 8)).astype(np.float32)
    got = kernels["fp32 end"](q, k, v, shape=q.shape)
    score = q.astype(np.float64) @ np.repeat(k, 2, 1).transpose(0, 1, 3, 2)
    first, second = np.sort(score, -1)[..., ::-1][..., :2].T * 8**-0.5
    assert np.all(first - second > 30)  # what the runner-up weighs, exp(-30), is below half a unit
    chosen = np.take_along_axis(np.repeat(v, 2, 1), score.argmax(-1)[..., None], 2)
    np.testing.assert_allclose(got, chosen, rtol=UNIT, atol=0)


@pytest.mark.parametrize("name", ["fp32 lengths", "lengths alone", "int8 lengths"])
def test_lengths_beyond_the_cache_read_the_cache_alone(kernels: dict, name: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(5)
    q = rng.standard_normal((BATCH, 4, 1, 8)).astype(np.float32)
    keys, values = (stored(c, (BATCH, 2, LENGTH), rng)[0] for c in (s.key, s.value))
    at_most, beyond = (
        kernels[name](q, *keys, *values, lengths, shape=q.shape)
        for lengths in (np.full(BATCH, LENGTH), np.array([LENGTH + 1, LENGTH + 1000, 2**62]))
    )
    np.testing.assert_array_equal(at_most, beyond)

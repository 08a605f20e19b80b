"""Attention on codes as they are: exact where its 8-bit factors are, and else far nearer to what the codes
say than they are to what was cached."""

import dataclasses

import numpy as np
import pytest
from kernels import UNIT, built

from porter.kv import Cache, attend, calibrated, parse
from porter.lower.kernels.attention import Attention, attention
from porter.lower.kernels.packed import codes_of
from porter.lower.kernels.stored import Stored

SIDES = ("key", "value")
HEADS, CAPACITY = 2, 171
LENGTHS = np.array([CAPACITY, 114, 12, 0])  # full; ragged; less than a tile; nothing
BATCH = len(LENGTHS)
# Where codes begin and end: at once, behind sinks that are no whole tile, and in front of a window.
EDGES = ("", "sink=5 recent=3", "sink=32 recent=40", "recent=64 sink=41")
KEYS = (
    "int3-g32-fp16",
    "int4",
    "uint2-g64-fp16",
    "uint4-g32-tokens-fp16",
    "int2-g32-tokens",
    "uint3-g64-tokens",
)
VALUES = ("int3-g32-tokens-fp16", "int4-g64-tokens", "int2-g32-tokens-hybrid-fp16", "uint3-g32-fp16",
          "uint4-g32", "int3", "uint2-g64-tokens-fp16")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    text: str
    size: int
    shared: int

    def spec(self, **options: object) -> Attention:
        scheme = parse(self.text)
        sides = [Stored(scheme, n, self.size, CAPACITY) for n in SIDES]
        given = {"length": CAPACITY, "scale": 1.0, "causal": True, "offset": "lengths", **options}
        return Attention(HEADS * self.shared, HEADS, *sides, **given)

    def oracle(self, keys: np.ndarray, values: np.ndarray) -> Cache:
        scheme = parse(self.text)
        made = Cache(scheme, self.size, HEADS, CAPACITY, BATCH, calibrated(scheme, keys[0], values[0]))
        made.append(keys, values, counts=LENGTHS)
        return made


def cases(side: str, other: str, texts: tuple[str, ...]) -> list[Case]:
    """One side's codes, while the other is float32."""
    return [
        Case(f"{side}={t} {other}=fp32 {EDGES[i % 4]}", (64, 128)[i % 2], (4, 1, 3)[i % 3])
        for i, t in enumerate(texts)
    ]


OF_KEYS, OF_VALUES = cases("key", "value", KEYS), cases("value", "key", VALUES)
BOTH = [
    Case("innerq recent=3 sink=7", 128, 4),
    Case("kivi2 recent=32", 64, 2),
    Case("kivi4 recent=0 sink=1", 128, 1),
    Case("innerq-hybrid recent=0 sink=32", 64, 4),
]


def whole_numbers(case: Case, side: str, rng: np.random.Generator) -> np.ndarray:
    """Integers [BATCH, HEADS, CAPACITY, size] that the side's codes hold as they are: every group has the
    smallest and the largest of them, so its step is 1."""
    scheme = parse(case.text)
    stored = scheme.side(side)
    top = (1 << stored.bits) - 1 if stored.minimums and not stored.hybrid else 2 * (1 << stored.bits - 1) - 2
    low = -(top // 2)
    values = rng.integers(low, low + top + 1, (BATCH, HEADS, CAPACITY, case.size))
    if stored.along == "tokens":
        first = scheme.sink % 32
        values[:, :, first::32], values[:, :, first + 1 :: 32] = low, low + top
    else:
        values[..., ::32], values[..., 1::32] = low, low + top
    return values.astype(np.float32)


def run(kernel: object, case: Case, cache: Cache, q: np.ndarray, *more: np.ndarray) -> np.ndarray:
    scheme, buffers = parse(case.text), []
    for name in SIDES:
        planned = Stored(scheme, name, case.size, CAPACITY).planned(HEADS)
        buffers += [cache.state[name + suffix] for suffix, _, _ in planned]
    return kernel(q, *buffers, LENGTHS, *more, shape=q.shape)


def check_exact(case: Case, cache: Cache, q: np.ndarray, got: np.ndarray) -> None:
    for row in range(BATCH):
        keys, values = (cache.stored(n, row) for n in SIDES)
        if not keys.shape[1]:
            assert not got[row].any()
            continue
        wanted = attend(keys, values, q[row], scale=1.0).output
        size = np.abs(q[row]).sum(-1).max() * np.abs(keys).max()
        # As in test_stored: D + 6 roundings of a score's terms, which count twice; 2 for each token and 8
        # for exp and the division.
        bound = 2 * (case.size + 6) * UNIT * size + (2 * keys.shape[1] + 8) * UNIT
        assert np.abs(got[row] - wanted).max() <= bound * np.abs(values).max()


def kernels_of(specs: list[Attention]) -> list:
    for spec in specs:
        for side in (spec.key, spec.value):
            assert (codes_of(side) is not None) == side.side.coded
    return built(attention(s) for s in specs)


@pytest.mark.parametrize("case", OF_KEYS, ids=lambda c: f"{c.text} d{c.size} x{c.shared}")
def test_scores_are_exact_where_the_query_is_of_8_bits(case: Case) -> None:
    """Steps of 1, and a query of integers up to 127, times a power of two: nothing is rounded."""
    rng = np.random.default_rng(0)
    keys, values = whole_numbers(case, "key", rng), rng.standard_normal((BATCH, HEADS, CAPACITY, case.size))
    cache = case.oracle(keys, values.astype(np.float32))
    q = rng.integers(-127, 128, (BATCH, HEADS * case.shared, 3, case.size)).astype(np.float32)
    q[..., ::32] = 127
    (kernel,) = kernels_of([case.spec()])
    check_exact(case, cache, q * 2.0**-13, run(kernel, case, cache, q * np.float32(2.0**-13)))


@pytest.mark.parametrize("case", OF_VALUES, ids=lambda c: f"{c.text} d{c.size} x{c.shared}")
def test_sums_are_exact_where_weights_are_of_8_bits(case: Case) -> None:
    """Steps of 1, and weights of n / 255 of the largest, which is in every tile: rounding finds the n."""
    rng = np.random.default_rng(1)
    values = whole_numbers(case, "value", rng)
    counts = rng.integers(1, 256, (BATCH, HEADS, CAPACITY))
    counts[..., parse(case.text).sink % 32 :: 32] = counts[..., 0] = 255
    keys = np.zeros_like(values)
    keys[..., 0] = np.log(counts / 255)
    cache = case.oracle(keys, values)
    q = np.zeros((BATCH, HEADS * case.shared, 3, case.size), np.float32)
    q[..., 0] = 1
    (kernel,) = kernels_of([case.spec()])
    check_exact(case, cache, q, run(kernel, case, cache, q))


@pytest.mark.parametrize("case", BOTH, ids=lambda c: f"{c.text} d{c.size} x{c.shared}")
def test_what_rounding_adds_is_far_below_what_the_codes_are_off_by(case: Case) -> None:
    """Root mean squares. For normal numbers 32 of a factor have a largest of some 2.2 of theirs, so rounding
    it to 127 (keys), or 255 (weights, of which each is at most the largest), is off by 0.005 of it, of a code
    of b bits that is 2 (b = 3) to 5 (b = 4) steps by root mean square, while the code is off by 0.29: 3 % to
    9 %. Unlike channels and both sides together make no more than twice that."""
    rng = np.random.default_rng(2)
    shape = (2, BATCH, HEADS, CAPACITY, case.size)
    new = rng.standard_normal(shape) * np.exp(rng.standard_normal(case.size) / 2) + 0.3
    keys, values = new.astype(np.float32)
    cache = case.oracle(keys, values)
    q = rng.standard_normal((BATCH, HEADS * case.shared, 5, case.size)).astype(np.float32)
    added = rng.standard_normal((BATCH, 1, 5, CAPACITY)).astype(np.float32)
    mask = {"mask": ("b", 1, "s", CAPACITY), "mask_dtype": "float32"}
    scale = case.size**-0.5
    plain, masked = kernels_of([case.spec(scale=scale), case.spec(scale=scale, softcap=4.0, **mask)])
    for kernel, more in ((plain, ()), (masked, (added,))):
        got, rounding, own = run(kernel, case, cache, q, *more), [], []
        for row in np.flatnonzero(LENGTHS):
            count = LENGTHS[row]
            options = {"softcap": 4.0, "mask": added[row][..., :count]} if more else {}
            codes = attention_of(*(cache.stored(n, row) for n in SIDES), q[row], scale, **options)
            exact = attention_of(keys[row][:, :count], values[row][:, :count], q[row], scale, **options)
            rounding.append(got[row] - codes)
            own.append(codes - exact)
        off, by_codes = (np.sqrt(np.mean(np.concatenate(x) ** 2)) for x in (rounding, own))
        assert 0 < off <= 0.18 * by_codes


def attention_of(
    keys: np.ndarray,
    values: np.ndarray,
    q: np.ndarray,
    scale: float,
    softcap: float = 0.0,
    mask: object = 0.0,
) -> np.ndarray:
    """One row in float64."""
    shared = len(q) // len(keys)
    keys, values = (np.repeat(x.astype(np.float64), shared, 0) for x in (keys, values))
    score = q.astype(np.float64) @ keys.swapaxes(-1, -2) * scale
    score = np.tanh(score / softcap) * softcap if softcap else score
    count, steps = keys.shape[1], q.shape[1]
    seen = np.arange(count) <= (count - steps + np.arange(steps))[:, None]
    score = np.where(seen, score + mask, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ values


def test_what_is_not_multiplied_as_it_is() -> None:
    """Other sizes and groups, 8 bits, codebooks, static steps, and codes beside an exact copy."""
    texts = [
        "int8",
        "turboquant4",
        "key=int4-g48 value=int3-g40-tokens",
        "int4 static=head",
        "certified key=int4",
    ]
    texts += ["innerq capacity too small", "key=int3-g32-hybrid value=int4-g32-tokens-hybrid"]
    for text in texts:
        capacity = 150 if "small" in text else 600
        scheme = parse(text.split(" capacity")[0])
        assert not any(codes_of(Stored(scheme, name, 128, capacity)) for name in SIDES), text
    assert not any(codes_of(Stored(parse("int4"), name, size, 600)) for name in SIDES for size in (5, 32, 80))

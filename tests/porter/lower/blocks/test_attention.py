"""Attention of rounded operands against float64, and against itself in float32."""

import numpy as np
import operands
import pytest
from attentions import BATCH, LENGTH, SPECS, STEPS, expected, last_seen, mask_of, stored
from kernels import UNIT, built

from porter.lower.blocks.attention import attention
from porter.lower.blocks.operand import Operand
from porter.lower.blocks.unit import Unit
from porter.lower.kernels.attention import LOWEST, Attention

FLOATS = {name: spec for name, spec in SPECS.items() if spec.key.codec == spec.value.codec == "fp32"}
FORMS = {"fp32": 32, "tf32": 8, "bf16": 16, "fp16": 128}


def unit(form: str) -> Unit:
    return Unit(Operand(form), Operand(form), FORMS[form], name=form)


@pytest.fixture(scope="module")
def kernels() -> dict:
    cases = [(n, f) for n in FLOATS for f in (("fp32", "bf16") if n != "fp32 lengths" else FORMS)]
    return dict(zip(cases, built(attention(SPECS[n], unit(f), unit(f)) for n, f in cases), strict=True))


@pytest.mark.parametrize("name", FLOATS)
def test_in_float32_it_is_attention(kernels: dict, name: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(0)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (BATCH, s.heads, LENGTH), rng) for c in (s.key, s.value))
    lengths, mask = np.array([STEPS, 13, LENGTH]), mask_of(s, rng)
    given = [lengths] if s.offset == "lengths" else []
    got = kernels[name, "fp32"](q, *keys, *values, *given, *mask, shape=(*q.shape[:3], s.value.width))
    wanted, bound = expected(s, q, k, v, last_seen(s, lengths, STEPS, LENGTH), mask)
    assert np.abs(got - wanted).max() <= bound


def by_hand(
    s: Attention, form: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The result with operands rounded, in float64, and how far the kernel may stray from it.

    The kernel rounds weights that are off by some units in float32, so that one near a tie may go the other
    way: the bound has the whole step of such weights, and of no others.
    """
    k, v = (np.repeat(x, s.query_heads // s.heads, 1) for x in (k, v))
    left, right, values = (operands.rounded(form, x) for x in (q, k, v))
    score = left @ right.transpose(0, 1, 3, 2) * s.scale
    size = np.abs(left) @ np.abs(right).transpose(0, 1, 3, 2) * abs(s.scale)
    visible = np.arange(k.shape[2]) < seen[:, None, :, None]
    score = np.where(visible, score, -np.inf)
    top = score.max(-1, keepdims=True, initial=LOWEST)
    weight = np.where(visible, np.exp(score - top), 0)
    # A score is a sum of `width` exact products and a scale; the maximum is one too, and is taken off: what
    # they are off by, exp makes relative, and adds 2 units of its own.
    off = 2 * ((s.key.width + 2) * UNIT * size.max(-1, keepdims=True, initial=0)) + 4 * UNIT
    low, high = (operands.rounded(form, (weight * (1 + e)).astype(np.float32)) for e in (-off, off))
    rounded = operands.rounded(form, weight.astype(np.float32))
    total = weight.sum(-1, keepdims=True)
    share = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
    wanted = rounded @ values * share
    straddling = (high - low) @ np.abs(values) * share
    # Both sums have a term for each key; the fraction is rounded once.
    sums = (2 * k.shape[2] + 4) * UNIT + off
    return wanted, straddling + sums * (rounded @ np.abs(values)) * share


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, "bf16") for n in ("fp32 start", "fp32 end", "one head for all", "head size 80")]
    + [("fp32 lengths", form) for form in FORMS],
)
def test_both_products_round_their_operands(kernels: dict, name: str, form: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(0)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, s.heads, LENGTH, s.key.width)).astype(np.float32)
    lengths = np.array([STEPS, 13, LENGTH])
    given = [lengths] if s.offset == "lengths" else []
    got = kernels[name, form](q, k, v, *given, shape=(*q.shape[:3], s.value.width))
    seen = last_seen(s, lengths, STEPS, LENGTH)
    wanted, bound = by_hand(s, form, q, k, v, seen)
    assert np.all(np.abs(got - wanted) <= bound)
    if form != "fp32":
        plain, _ = by_hand(s, "fp32", q, k, v, seen)
        assert np.any(np.abs(got - plain) > bound)  # the bound tells rounded operands from others


def test_what_lies_behind_a_row_s_length_is_never_seen(kernels: dict) -> None:
    s, rng = SPECS["fp32 lengths"], np.random.default_rng(5)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, s.heads, LENGTH, s.key.width)).astype(np.float32)
    lengths = np.array([STEPS, 13, LENGTH])
    first = kernels["fp32 lengths", "bf16"](q, k, v, lengths, shape=q.shape)
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = np.nan
    np.testing.assert_array_equal(kernels["fp32 lengths", "bf16"](q, k, v, lengths, shape=q.shape), first)


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (1, 40), (9, 17), (0, 4), (2, 0)])
def test_any_number_of_queries_and_keys(kernels: dict, steps: int, length: int) -> None:
    s, rng = SPECS["fp32 end"], np.random.default_rng(1)
    q = rng.standard_normal((1, s.query_heads, steps, s.key.width)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, s.heads, length, s.key.width)).astype(np.float32)
    got = kernels["fp32 end", "bf16"](q, k, v, shape=q.shape)
    wanted, bound = by_hand(s, "bf16", q, k, v, last_seen(s, np.zeros(1), steps, length))
    assert np.all(np.abs(got - wanted) <= bound)


@pytest.mark.parametrize("lowest", [-np.inf, LOWEST])
def test_a_fully_masked_row(kernels: dict, lowest: float) -> None:
    """-inf leaves nothing: zeros. The lowest float32, which exporters write, leaves equals: the mean."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((BATCH, 4, STEPS, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, 2, LENGTH, 8)).astype(np.float32)
    mask = np.zeros((BATCH, 1, STEPS, LENGTH), np.float32)
    mask[1] = lowest
    got = kernels["float mask", "bf16"](q, k, v, mask, shape=q.shape)[1]
    mean = np.repeat(operands.rounded("bf16", v[1]).mean(1, keepdims=True), 2, 0)
    wanted = np.zeros_like(got) if np.isinf(lowest) else np.broadcast_to(mean, got.shape)
    assert np.abs(got - wanted).max() <= (LENGTH + 2) * UNIT * np.abs(v).max()  # a sum, a division

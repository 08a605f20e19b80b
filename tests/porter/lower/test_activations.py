"""Activations that become codes on the chip: the codes themselves, and what a rounding before them comes to.

A chip that rounds its other operands makes codes of slightly different numbers, and where one lies next to
the boundary of two codes, another code: a step of an eighth, for E4M3. The next layer's activations differ by
that, and so on. Measured as what the lowering does, that is large; measured against the float32 source it is
nothing, since the other codes are as good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from llama import Llama, Numerics
from lowering import model, with_weights
from ported import ported

from porter import formats, graph, target
from porter.lower.lower import lower
from porter.run.decode import Decode
from porter.run.host import HostRunner

ROUNDED = """g (float[b,50] x, int64[1] last) => (float[b,50] y) {
  size = Abs(x) peak = ReduceMax<keepdims=1>(size, last) top = Constant<value = float {%s}>()
  floor = Constant<value = float {1e-30}>() step = Div(peak, top) s = Max(step, floor)
  c = QuantizeLinear<axis=-1, block_size=50, output_dtype=%d>(x, s)
  y = DequantizeLinear<axis=-1, block_size=50>(c, s) }"""
FORMS = {"int8": ("127", 3), "fp8-e4m3fn": ("448", 17)}


@pytest.mark.parametrize(
    ("chip", "name"), [("h100", "int8"), ("h100", "fp8-e4m3fn"), ("maia-200", "fp8-e4m3fn")]
)
def test_the_same_activations_give_the_same_codes(tmp_path: Path, chip: str, name: str) -> None:
    source = with_weights(model(ROUNDED % FORMS[name]), last=np.array([-1]))
    lower(source, target.load(chip), tmp_path, {"b": 64})
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 50)) * 10.0 ** rng.integers(-6, 6, (64, 1))).astype(np.float32)
    x[0] = np.linspace(-448, 448, 50)  # a scale of 1 for E4M3: some lie between two codes
    x[1] = 0
    (got,) = HostRunner(tmp_path).run({"x": x}).values()
    np.testing.assert_array_equal(got, formats.decode(formats.encode(formats.parse(name), x)))


@dataclass(frozen=True)
class Noted(Numerics):
    """Numerics that keep the codes they make."""

    made: list[np.ndarray] = field(default_factory=list)

    def encoded(self, x: np.ndarray) -> formats.Encoded:
        self.made.append(super().encoded(x).codes)
        return super().encoded(x)


@pytest.fixture(scope="module")
def llama() -> Llama:
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra porter[export]")
    folder = Path(__file__).parents[3] / "samples" / "stories260k"
    return Llama(safetensors.load_file(folder / "model.safetensors"), heads=8, kv_heads=4, layers=5)


@pytest.fixture(scope="module")
def tokens(llama: Llama) -> np.ndarray:
    """Texts that the model writes: [4, 48]."""
    rng, found = np.random.default_rng(0), np.full((4, 1), 1)
    for _ in range(47):
        p = np.exp(logarithms(llama.logits(found, Numerics())[:, -1]))
        found = np.append(found, [[rng.choice(p.shape[1], p=row / row.sum())] for row in p], 1)
    return found


def logarithms(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """The mean KL divergence of distributions of logits."""
    p, q = logarithms(wanted.astype(np.float64)), logarithms(got.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_a_rounding_before_codes_moves_codes_and_loses_nothing(llama: Llama, tokens: np.ndarray) -> None:
    form = "fp8-e4m3fn"
    wanted, weights = llama.logits(tokens, Numerics()), Numerics("fp32", form, "fp32")
    exact, chip = (Noted(floats, form, activations=form) for floats in ("fp32", "tf32"))
    plain, moved = (llama.logits(tokens, how) for how in (exact, chip))
    other = [float((a != b).mean()) for a, b in zip(exact.made, chip.made, strict=True)]
    assert other[:3] == [0, 0, 0]  # the first q, k, v: nothing was rounded before them
    assert other[3] > 0  # o reads what attention rounded: 1 in 30 is another code
    assert other[-1] > 0.5  # five layers on, most are
    # Without codes the same rounding moves the logits by a thousandth of that.
    assert divergence(wanted, llama.logits(tokens, Numerics("tf32"))) < divergence(plain, moved) / 1000
    # What the codes lose against the source: two roundings that have nothing to do with each other lose the
    # same, and each differs from the other by as much as both lose together.
    losses = [divergence(wanted, logits) for logits in (plain, moved)]
    own = np.mean(losses) - divergence(wanted, llama.logits(tokens, weights))
    assert abs(losses[0] - losses[1]) < 0.15 * losses[0]
    assert divergence(plain, moved) < 2.5 * own


@pytest.mark.long
def test_a_chip_loses_what_the_oracle_does(
    stories_onnx: Path, tmp_path: Path, llama: Llama, tokens: np.ndarray
) -> None:
    """The H100's numerics, run here, against the same in numpy: what differs in the last bits alone ends as
    other codes too, so that what both lose is compared, and not their logits."""
    form = "fp8-e4m3fn"
    _, known = ported(graph.load(stories_onnx), target.load("h100"), tmp_path, form, form)
    got = Decode(HostRunner(tmp_path), known, len(tokens)).step(tokens)
    wanted, oracle = (
        llama.logits(tokens, how) for how in (Numerics(), Numerics("tf32", form, activations=form))
    )
    assert abs(divergence(wanted, got) / divergence(wanted, oracle) - 1) < 0.15

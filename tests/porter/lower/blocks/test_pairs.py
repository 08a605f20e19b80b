"""Products of two tensors against float64 on operands that numpy rounds."""

import numpy as np
import operands
import pytest
from kernels import UNIT, built

from porter.lower.blocks.operand import Operand
from porter.lower.blocks.pairs import pairs
from porter.lower.blocks.unit import Unit

CASES = [("m", "k", "n"), (5, 33, 7), ("m", 33, "n"), (1, "k", 1)]


@pytest.fixture(scope="module")
def kernels() -> list:
    return built(pairs(*case, Unit(Operand("bf16"), Operand("bf16"), 16, name="bf16")) for case in CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("k", [33, 0, 1, 16])
def test_pairs(kernels: list, number: int, k: int) -> None:
    m, inner, n = (d if isinstance(d, int) else {"m": 5, "k": k, "n": 7}[d] for d in CASES[number])
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((3, *d)).astype(np.float32) for d in ((m, inner), (inner, n)))
    got = kernels[number](x, y, shape=(3, m, n))
    left, right = (operands.rounded("bf16", v) for v in (x, y))
    # Products are exact; a term is rounded at most k times as part of the sum.
    assert np.all(np.abs(got - left @ right) <= (inner + 1) * UNIT * (np.abs(left) @ np.abs(right)))

"""The comparison itself: what it lets pass and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from porter.export.check import compare, relative_bound

ROOT = Path(__file__).parent.parent.parent.parent
WANTED = np.array([[10.0, -3.0, 0.5]], np.float32)


def share(got: object, wanted: np.ndarray = WANTED, allowed: float = 1e-5) -> float:
    return compare("", ["logits"], [wanted], [np.asarray(got, np.float32)], allowed).share


def test_share_is_of_the_largest_element() -> None:
    # 5e-5 of a scale of 10 is half of 1e-5; the float32 neighbours of 10 are 1e-6 apart.
    assert share(WANTED + np.float32(5e-5)) == pytest.approx(0.5, abs=0.02)
    assert share(WANTED) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_on_one_side_are_infinitely_wrong(bad: float) -> None:
    broken = WANTED.copy()
    broken[0, 2] = bad
    assert share(broken) == np.inf
    assert share(WANTED, broken) == np.inf
    assert share(broken, broken) == 0
    assert share(-broken, broken) == (np.inf if not np.isnan(bad) else pytest.approx(20 / 1e-4))


def test_shapes_and_zero_scale() -> None:
    assert share(WANTED[0]) == np.inf
    zero = np.zeros((1, 3), np.float32)
    assert share(zero, zero) == 0
    assert share(zero + np.float32(1e-30), zero) == np.inf
    assert share(np.zeros((1, 0)), np.zeros((1, 0), np.float32)) == 0


def test_the_worst_output_is_named() -> None:
    probe = compare("case", ["logits", "present.0.key"], [WANTED, WANTED], [WANTED, WANTED + 1], 1e-5)
    assert (probe.output, probe.max_abs, probe.scale) == ("present.0.key", 0.0, 10.0)


def test_the_bound_lies_between_rounding_and_faults(stories_onnx: Path) -> None:
    torch = pytest.importorskip("torch")
    model = ir.load(stories_onnx)
    module = torch.nn.ParameterDict(
        {
            n.replace(".", "-"): torch.from_numpy(v.const_value.numpy().copy())
            for n, v in model.graph.initializers.items()
        }
    )
    allowed = relative_bound(model, module)
    # 5 layers of 7 linears and an attention, and the head; the longest row is down_proj's 172.
    assert allowed == pytest.approx(4 * 2.0**-23 * np.sqrt(172 * 41))
    assert 2.5e-5 / 20 < allowed < 8e-3 / 10  # a good export of a trained model, and one without its epsilon

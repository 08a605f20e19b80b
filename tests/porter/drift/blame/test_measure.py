"""Noise, the shelf, and pieces of a model: what blame is made of, against plain numpy and a whole run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from porter.drift.blame import pieces as cutting
from porter.drift.blame.measure import Noise, decibels, distance, worst_slot
from porter.drift.blame.pieces import Pieces
from porter.drift.blame.shelf import Shelf


def test_noise_is_the_ratio_of_powers_of_all_steps() -> None:
    rng = np.random.default_rng(0)
    noise, parts = Noise(), []
    for n in (3, 1):
        a, e = rng.standard_normal((2, n, 5)), rng.standard_normal((2, n, 5)) * 0.1
        noise.add(a, a + e, rows=2)
        parts.append((a, e))
    signal, error = (sum((p[i] ** 2).sum() for p in parts) for i in (0, 1))
    assert noise.db == pytest.approx(10 * math.log10(signal / error))
    assert noise.worst == pytest.approx(min(decibels((a**2).sum(), (e**2).sum()) for a, e in parts))
    rows = [decibels(*(sum((p[i][r] ** 2).sum() for p in parts) for i in (0, 1))) for r in (0, 1)]
    assert noise.rows() == pytest.approx(rows)


def test_what_is_equal_has_no_noise_and_what_is_no_number_only_noise() -> None:
    same, lost = Noise(), Noise()
    a = np.array([[1.0, -np.inf]])
    same.add(a, a, 1)
    lost.add(np.ones((1, 2)), np.array([[1.0, np.nan]]), 1)
    assert (same.db, lost.db) == (math.inf, -math.inf)


def test_one_token_of_a_cache_is_found_among_many() -> None:
    cache = np.random.default_rng(0).standard_normal((1, 2, 50, 8))
    stale = cache.copy()
    stale[:, :, 17] = 0
    assert worst_slot(cache, cache * 1.001) == pytest.approx(60, abs=1e-6)
    assert worst_slot(cache, stale) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_logits_is_kl() -> None:
    a, b = np.log([[[0.5, 0.5]]]), np.log([[[0.9, 0.1]]])
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert distance(a, b, hidden=False) == pytest.approx(wanted)
    assert distance(a, np.full_like(b, np.nan), hidden=False) == math.inf


def test_a_shelf_gives_back_what_it_was_given_from_memory_and_from_the_disk(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, memory=100)
    arrays = {f"v{i}": np.arange(20, dtype=np.float32) + i for i in range(5)}
    for name, array in arrays.items():
        shelf.put(name, array.copy())
    assert all(np.array_equal(shelf[name], array) for name, array in arrays.items())
    assert isinstance(shelf["v4"].base, np.memmap)
    shelf.clear()
    assert "v0" not in shelf


@pytest.fixture
def chain() -> ir.Model:
    """y = ((x W0) W1) W2 + x, each product a value."""
    rng = np.random.default_rng(3)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    nodes, weights, value = [], [], x
    for i in range(3):
        tensor = ir.tensor(rng.standard_normal((4, 4)).astype(np.float32), name=f"w{i}")
        weights.append(ir.Value(name=f"w{i}", const_value=tensor, type=ir.TensorType(tensor.dtype),
                                shape=tensor.shape))  # fmt: skip
        nodes.append(ir.node("MatMul", [value, weights[-1]], name=f"node{i}"))
        value = nodes[-1].outputs[0]
        value.name = f"v{i}"
    nodes.append(ir.node("Add", [value, x], name="last"))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="chain")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("values", [1, 100])  # in one piece, and in as many as there are values
def test_pieces_compute_what_the_whole_does_and_take_values_in_the_place_of_others(
    chain: ir.Model, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "VALUES", values)
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    w = [chain.graph.initializers[f"w{i}"].const_value.numpy() for i in range(3)]
    given = {f"v{i}": np.full((5, 4), i + 1, np.float32) for i in range(3)}
    names = ["v0", "v1", "v2", "y"]
    free: dict[str, np.ndarray] = {}
    forced: dict[str, np.ndarray] = {}
    whole = Pieces(chain, names).run({"x": x}, given.__getitem__, free.__setitem__)
    Pieces(chain, names, given).run({"x": x}, given.__getitem__, forced.__setitem__)
    np.testing.assert_allclose(whole["y"], x @ w[0] @ w[1] @ w[2] + x, rtol=1e-5)
    assert list(free) == names
    # Each made from what was given, not from what the node before it made.
    wanted = [x @ w[0], given["v0"] @ w[1], given["v1"] @ w[2], given["v2"] + x]
    for name, array in zip(names, wanted, strict=True):
        np.testing.assert_allclose(forced[name], array, rtol=1e-5)

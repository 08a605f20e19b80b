"""Whole decoders, lowered into a folder and run step by step beside ONNX Runtime, with every cache."""

from __future__ import annotations

import json
from pathlib import Path

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from porter import target
from porter.context import Context
from porter.lower.lower import lower
from porter.pipeline import Pipeline
from porter.run.host import HostRunner

BOUNDS = {"batch": 4, "sequence": 8, "past": 64}
CAPACITY = 200  # larger than anything else in the model, so that what has its size is a cache
# Every way to store a weight: packed bytes, zero points, two levels of scales, micro-exponents, blocks.
FORMATS = (
    "int3-g10",
    "uint4-g32",
    "mxfp4",
    "mxfp6-e2m3",
    "nvfp4",
    "mx9",
    "mx6",
    "mxint8",
    "fp8-e3m4-b16",
    "bf16",
)
PASSES = {
    "concatenated": "",
    "static": f"kv.static_cache{{capacity={CAPACITY}}}",
    "int8 cache": f"kv.static_cache{{capacity={CAPACITY}}},kv.quantize",
    "int4 cache": f"kv.static_cache{{capacity={CAPACITY}}},kv.quantize{{scheme=int4}}",
    "int8 weights": f"quantize.rtn{{format=int8}},kv.static_cache{{capacity={CAPACITY}}}",
    "int4 weights": f"quantize.rtn{{format=int4-g32}},kv.static_cache{{capacity={CAPACITY}}},kv.quantize",
    "fp8 weights": "quantize.rtn{format=fp8-e4m3fn}",
    **{f"{f} weights": f"quantize.rtn{{format={f} skip=}}" for f in FORMATS},
}


class Lowered:
    """A decoder after some passes, lowered."""

    def __init__(self, passes: str, folder: Path, **sizes: object) -> None:
        self.model = decoders.tiny_decoder(context=256, **sizes)
        if passes:
            Pipeline.parse(passes).run(self.model, Context())
        self.plan = lower(self.model, target.load("host"), folder, BOUNDS)
        self.runner = HostRunner(folder)
        self.folder = folder


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lowered]:
    return {name: Lowered(text, tmp_path_factory.mktemp("bundle")) for name, text in PASSES.items()}


def steps(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Three steps of three rows: a prompt and two tokens.

    Rows of a static cache have lengths of their own.
    """
    rng = np.random.default_rng(0)
    static = any(v.name == "past_lengths" for v in model.graph.inputs)
    feeds, lengths = [], np.array([0, 3, 11]) if static else np.zeros(3, np.int64)
    for count in (5, 1, 1):
        feeds.append({"input_ids": rng.integers(0, 61, (3, count))})
        if static:
            feeds[-1]["past_lengths"] = lengths.copy()
        lengths += count
    return feeds


@pytest.mark.parametrize("name", PASSES)
def test_steps_beside_onnx_runtime(lowered: dict[str, Lowered], name: str) -> None:
    port = lowered[name]
    session = decoders.session(port.model)
    ours, theirs = (decoders.empty_cache(port.model, 3) for _ in range(2))
    for feeds in steps(port.model):
        got, wanted = port.runner.run({**feeds, **ours}), decoders.run(session, {**feeds, **theirs})
        assert list(got) == list(wanted)
        for key in wanted:
            assert got[key].dtype == wanted[key].dtype
            assert got[key].shape == wanted[key].shape
        # Two layers of sums over at most 44 terms: some hundred roundings of numbers of the size of the
        # logits. A code may round to its neighbour where the two differ, which none of these does.
        close(got["logits"], wanted["logits"], 2.0**-24 * 500)
        for key in wanted:
            if key.startswith("present"):
                close(got[key], wanted[key], 2.0**-24 * 500)
        ours, theirs = ({n: r[n.replace("past_key_values", "present")] for n in ours} for r in (got, wanted))


def close(got: np.ndarray, wanted: np.ndarray, relative: float) -> None:
    if wanted.dtype != np.float32:
        np.testing.assert_array_equal(got, wanted)
    else:
        assert np.abs(got - wanted).max(initial=0) <= relative * np.abs(wanted).max(initial=0)


@pytest.mark.parametrize("name", [n for n, text in PASSES.items() if "static" in text])
def test_caches_are_written_in_place(lowered: dict[str, Lowered], name: str) -> None:
    port = lowered[name]
    caches = [v.name for v in port.model.graph.inputs if v.name.startswith("past_key_values.")]
    assert port.runner.in_place == {c.replace("past_key_values", "present"): c for c in caches}
    feeds = {**steps(port.model)[1], **decoders.empty_cache(port.model, 3)}
    before = {c: feeds[c].copy() for c in caches}
    outputs = port.runner.run(feeds)
    for cache in caches:
        assert outputs[cache.replace("past_key_values", "present")] is feeds[cache]
        changed = np.argwhere(np.any(feeds[cache] != before[cache], axis=(1, 3)))
        # One token was fed: the one after each row's length is written, and no other.
        assert {(int(r), int(t)) for r, t in changed} <= {(0, 5), (1, 8), (2, 16)}


@pytest.mark.parametrize("name", PASSES)
def test_nothing_is_expanded(lowered: dict[str, Lowered], name: str) -> None:
    """No tensor of the workspace has a cache's capacity, or the fixed shape of a weight."""
    port = lowered[name]
    for buffer in (b for b in port.plan.buffers if b.kind == "workspace"):
        assert str(CAPACITY) not in buffer.shape, buffer
        assert any(not d.isdecimal() for d in buffer.shape) or buffer.bytes <= 512, buffer


@pytest.mark.parametrize(("name", "bits"), [("int8 weights", 8), ("int4 weights", 4), ("fp8 weights", 8)])
def test_weights_take_what_their_codes_take(lowered: dict[str, Lowered], name: str, bits: int) -> None:
    """Each quantized matrix is there once, as codes, rows padded to 16; of floats the tied table alone."""
    port = lowered[name]
    quantized = {n.inputs[0].name: tuple(n.inputs[0].shape) for n in port.model.graph if _is_weight(n)}
    assert len(quantized) == 8  # four matrices in each of two layers
    rows = {q: (-(-n // 16) * 16, k) for q, (n, k) in quantized.items()}
    stored = [w["bytes"] for w in port.plan.weights if w["dtype"] in ("int8", "uint8")]
    assert sorted(stored) == sorted(n * (-(-k * bits // 8)) for n, k in rows.values())
    smallest = min(n * k for n, k in quantized.values())
    large = [w for w in port.plan.weights if w["dtype"] == "float32" and w["bytes"] >= 4 * smallest]
    assert [w["bytes"] for w in large] == [64 * 32 * 4]  # 61 rows, padded


def _is_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None


def test_plan(lowered: dict[str, Lowered]) -> None:
    for port in lowered.values():
        plan = port.plan
        names = [b.name for b in plan.buffers]
        assert len(set(names)) == len(names)
        assert all(w["offset"] % 64 == 0 for w in plan.weights)
        assert all(
            a["offset"] + a["bytes"] <= b["offset"]
            for a, b in zip(plan.weights, plan.weights[1:], strict=False)
        )
        assert all(s["offset"] % 64 == 0 for s in plan.storages)
        assert plan.workspace_bytes == sum(-(-s["bytes"] // 64) * 64 for s in plan.storages)
        assert 0 < plan.lower_bound_bytes <= plan.workspace_bytes
        assert plan.to_json() == json.loads((port.folder / "plan.json").read_text())
        _check_lifetimes(plan)
        nodes = {n.name for n in port.model.graph} | {n.outputs[0].name for n in port.model.graph}
        for launch in plan.launches:
            assert launch.nodes, launch.kernel
            assert set(launch.nodes) <= nodes


def _check_lifetimes(plan: object) -> None:
    """A buffer is read and written within its life only, and two in one storage never live at once."""
    at = {b.name: b for b in plan.buffers}
    for i, launch in enumerate(plan.launches):
        for name in launch.buffers:
            assert at[name].first <= i <= at[name].last
    used = [b for b in plan.buffers if b.storage is not None]
    for a in used:
        assert a.bytes <= plan.storages[a.storage]["bytes"]
        for b in used:
            if a is not b and a.storage == b.storage:
                assert a.last < b.first or b.last < a.first, (a, b)


def test_layers_share_their_kernels(lowered: dict[str, Lowered], tmp_path: Path) -> None:
    """Four layers have the kernels of two."""
    deeper = Lowered(PASSES["static"], tmp_path, layers=4)
    two, four = ({launch.kernel for launch in port.plan.launches} for port in (lowered["static"], deeper))
    assert four == two


def test_every_way_to_count_positions(tmp_path: Path) -> None:
    for positions in decoders.POSITIONS:
        folder = tmp_path / positions
        folder.mkdir()
        port = Lowered("", folder, positions=positions, layers=1)
        feeds = {"input_ids": np.array([[3, 1, 4]]), **decoders.empty_cache(port.model, 1, past=4, seed=0)}
        if positions == "input":
            feeds["position_ids"] = np.array([[4, 5, 6]])
        got, wanted = port.runner.run(feeds), decoders.run(port.model, feeds)
        close(got["logits"], wanted["logits"], 2.0**-24 * 500)


def test_weights_beside_the_model_are_read_and_released(tmp_path: Path) -> None:
    """One in memory at a time: after lowering, no tensor keeps what it read."""
    model = decoders.tiny_decoder()
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    lower(model, target.load("host"), tmp_path, BOUNDS)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert any(isinstance(t, ir.ExternalTensor) for t in tensors)
    assert all(t.raw is None for t in tensors if isinstance(t, ir.ExternalTensor))

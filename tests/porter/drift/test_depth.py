"""Depth: the right values of a graph, and their error as numpy has it."""

import numpy as np
import onnx_ir as ir
import pytest

from porter import graph
from porter.drift.depth import depth, sums
from porter.run.reference import ReferenceRunner

BLOCKS = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 4] x, float[4] bias, float[4] gain) => (float[b, s, 4] y)
{
  n0 = RMSNormalization(x, gain)
  p0 = Add(n0, bias)
  r0 = Add(x, p0)
  n1 = RMSNormalization(r0, gain)
  p1 = Add(n1, bias)
  q1 = Add(p1, bias)
  r1 = Add(r0, q1)
  n2 = RMSNormalization(r1, gain)
  y = Add(r1, n2)
}"""


def test_the_longest_row_of_additions_is_found():
    names = [v.name for v in sums(ir.from_onnx_text(BLOCKS).graph)]
    assert names == ["r0", "r1", "y"]  # and no bias among them


def test_norms_may_stand_between():
    after = BLOCKS.replace("n1 = RMSNormalization(r0", "s0 = RMSNormalization(r0").replace(
        "(n1, bias)", "(s0, bias)"
    )
    after = after.replace("Add(r0, q1)", "Add(s0, q1)")
    assert [v.name for v in sums(ir.from_onnx_text(after).graph)] == ["r0", "r1", "y"]


@pytest.fixture
def pair(decoder, tmp_path):
    paths = []
    for name, change in (("a", 0.0), ("b", 0.02)):
        model = decoder("llama_sdpa_23")
        noise = np.random.default_rng(4)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            if array.ndim == 2 and change:
                array = array + noise.normal(size=array.shape).astype(np.float32) * change
                value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        paths.append(tmp_path / f"{name}.onnx")
        graph.save(model, paths[-1])
    return paths


def test_levels_are_those_of_the_values_themselves(pair):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 64, n) for n in (9, 5)]
    found = depth(*pair, texts)
    assert len(found) == 4  # two layers, two additions each
    assert [level.layer for level in found] == [0, 0, 1, 1]
    values = []
    for path in pair:
        model = graph.load(path)
        made = {v.name: v for node in model.graph for v in node.outputs}
        model.graph.outputs.extend(made[level.name] for level in found)
        runner = ReferenceRunner(model)
        past = {n: np.zeros((1, s.shape[1], 0, s.shape[3]), s.dtype)
                for n, s in runner.inputs.items() if n.startswith("past")}  # fmt: skip
        values.append([runner.run({"input_ids": t[None]} | past) for t in texts])  # one text at a time
    for level in found:
        a, b = (np.concatenate([v[level.name][0] for v in side]) for side in values)
        assert level.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)


def test_the_same_model_has_no_error(pair):
    levels = depth(pair[0], pair[0], [np.arange(6)])
    assert levels
    assert all(level.sqnr_db == np.inf for level in levels)

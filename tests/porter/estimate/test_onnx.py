"""The same decoder from its config and from its graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from porter import graph, kv, target
from porter.errors import ModelError
from porter.estimate import Options, estimate
from porter.estimate.config import read as of_config
from porter.estimate.onnx import read

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "samples" / "stories260k" / "config.json"


def test_an_exported_decoder_is_that_of_its_config(stories_onnx: Path) -> None:
    mine, told = read(stories_onnx), of_config(CONFIG)
    assert (mine.hidden, mine.vocab, mine.layers, mine.heads) == (64, 512, 5, 8)
    assert mine.attention == told.attention
    assert mine.tied
    assert sum(w.k * w.n * w.count for w in mine.linears) == sum(w.k * w.n * w.count for w in told.linears)
    assert {(w.n, w.side) for w in mine.linears} == {
        (64, "column"),
        (32, "column"),
        (172, "column"),
        (64, "row"),
    }
    assert mine.kv == "fp32"

    options = Options("fp32", kv="fp32", prompt=64, context=128)
    one, two = (estimate(m, target.load("a100"), options) for m in (mine, told))
    assert one.bytes.kv == two.bytes.kv
    assert abs(one.bytes.weights / two.bytes.weights - 1) < 0.02, "norms are fp32 in the graph, 16 bits else"
    products = [sum(p.work.operations * p.work.count for p in e.decode) for e in (one, two)]
    assert products[0] == products[1]


def test_a_port_is_estimated_as_it_is_stored(stories_onnx: Path, tmp_path: Path) -> None:
    from porter.convert import Options as Asked
    from porter.convert import convert

    out = tmp_path / "bundle"
    convert(stories_onnx, out, Asked(weights="int8", kv="int8", context=64))
    mine = read(out)
    assert {w.weights for w in mine.linears} == {"int8"}
    assert mine.head.weights == "fp32"
    assert (mine.attention[0].kv_heads, mine.attention[0].size, mine.layers) == (4, 8, 5)
    assert kv.parse(mine.kv) == kv.parse("int8")
    found = estimate(mine, target.load("h100"), Options(context=64, prompt=16))
    total = graph.weight_bytes(graph.load(out / "model.onnx"))
    assert total - 1 <= found.bytes.weights <= total, "an odd byte aside"
    assert found.to_dict()["weights"] == "int8"


def test_what_has_no_cache_is_refused(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 4])
    table = helper.make_tensor("table", TensorProto.FLOAT, [9, 4], [0.0] * 36)
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", [ids], [logits], [table])), tmp_path / "model.onnx"
    )
    with pytest.raises(ModelError) as error:
        read(tmp_path / "model.onnx")
    assert error.value.code == "PORT-0335"

"""A trained model with a tagged cache, from the ONNX file to the bundle that runs."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from porter import graph, kv
from porter.bundle import Bundle
from porter.convert import convert
from porter.kv import tags
from porter.kv.layout import model_bytes, pools
from porter.options import Options
from porter.run.decode import Decode, generate

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "report.schema.json").read_text())
CONTEXT, LAYERS = 128, [(4, 8, 8)] * 5


@pytest.fixture(scope="module")
def bundle(stories_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tagged"
    convert(stories_onnx, out, Options(kv="triaxial recent=16 bits=7.5", context=CONTEXT))
    return out


def test_the_budget_is_kept_and_reported_to_the_byte(bundle: Path) -> None:
    about = graph.load(bundle / "model.onnx").metadata_props
    scheme = kv.parse(about["porter.kv"])
    held = Bundle.open(bundle).runner()
    taken = sum(int(np.prod(held.inputs[c.past].shape[1:])) * held.inputs[c.past].dtype.itemsize
                for c in Bundle.open(bundle).decoder.caches)  # fmt: skip
    assert taken == model_bytes(scheme, LAYERS, CONTEXT) == int(about["porter.kv.bytes"])
    values = 2 * CONTEXT * sum(heads * size for heads, size, _ in LAYERS)
    assert 7.5 - 2 / CONTEXT < 8 * taken / values <= 7.5  # a token more has two bits more
    report = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["calibration"]["kind"] == "self-generated"
    figures = report["memory"]
    assert figures[f"KV cache, {CONTEXT} tokens x batch 1"]["value"] == taken
    (line,) = (name for name in figures if "tags that ask" in name)
    assert figures[line]["value"] == pools(scheme, CONTEXT)[1] > 0
    assert "keys uint4, values uint4" in line
    assert not line.endswith("none")


def test_the_lowered_program_is_the_graph(bundle: Path) -> None:
    """Rounding of products may move a code to its neighbour, no more."""
    report = json.loads((bundle / "report.json").read_text())
    assert report["drift"]["lowering"]["kl_mean"] < 0.01 * report["drift"]["total"]["kl_mean"]
    assert {h["tokens"] for h in report["attention"]} == {64, 128}
    assert len(report["attention"]) == 2 * 5 * 8


def test_it_writes_text_and_fills_its_places(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    known, scheme = opened.decoder, kv.parse(graph.load(bundle / "model.onnx").metadata_props["porter.kv"])
    assert known.tags == "tags"
    session = Decode(opened.runner(), known)
    assert len(list(generate(session, [1, 5, 9], 60, eos=()))) == 60
    slots = session.caches["past_slots"][0, 0, : session.length, 0]
    more = pools(scheme, CONTEXT)[1]
    ups = slots < 0
    np.testing.assert_array_equal(np.sort(slots[~ups]), np.arange((~ups).sum()))
    np.testing.assert_array_equal(np.sort(~slots[ups]), np.arange(ups.sum()))
    assert ups.sum() <= more
    chosen = set(map(int, graph.load(bundle / "model.onnx").metadata_props["porter.kv.tags"].split()))
    asks = np.isin(tags.default(np.arange(session.length)), list(chosen))
    np.testing.assert_array_equal(ups, asks & (np.cumsum(asks) <= more))


def test_a_caller_may_say_what_tokens_are(bundle: Path) -> None:
    """Tags of nothing that asks: every token has the fewer bits, while there is room."""
    opened = Bundle.open(bundle)
    runner, known = opened.runner(), opened.decoder
    session = Decode(runner, known)
    feeds = {known.tokens: np.array([[1, 5, 9, 12]]), known.lengths: np.zeros(1, np.int64), **session.caches}
    found = {}
    for name, given in (("none", np.full((1, 4), 999)), ("usual", tags.default(np.arange(4)[None]))):
        fresh = {n: a.copy() for n, a in feeds.items()}
        found[name] = runner.run(fresh | {known.tags: given})["present_slots"][0, 0, :4, 0].copy()
    np.testing.assert_array_equal(found["none"], np.arange(4))
    asks = "0" in graph.load(bundle / "model.onnx").metadata_props["porter.kv.tags"].split()
    np.testing.assert_array_equal(found["usual"] < 0, np.full(4, asks))

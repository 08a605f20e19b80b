"""Calibration feeds: where they come from, that they are not what is measured, and how a pass gets them."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

from porter import graph
from porter.calibrate import Sweep
from porter.calibrate import feeds as calibrating
from porter.calibrate.feeds import Calibration, calibration
from porter.context import Context
from porter.convert import Options, convert
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import Runnable, feeds_for
from porter.errors import OptionError
from porter.pipeline import Pass, Pipeline
from porter.run.reference import ReferenceRunner

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text())


class Looks(Pass):
    """A pass that reads calibration feeds."""

    calibrates = True

    def run(self, model: ir.Model, context: Context) -> int:
        """Nothing."""
        return 0


LOOKS = Pipeline((Looks(),))


@pytest.fixture(scope="module")
def stories(stories_onnx: Path) -> Runnable:
    return Runnable.of(stories_onnx)


def ids(*rows: list[int]) -> TokenFeeds:
    return TokenFeeds(tuple(np.array(row, np.int64) for row in rows), "tokens", "some.json")


def rows(found: Calibration) -> list[tuple[int, ...]]:
    return [tuple(feed["input_ids"][0].tolist()) for feed in found.feeds]


def test_the_models_own_text_is_not_what_is_measured(stories: Runnable) -> None:
    measured = {seed: feeds_for(stories, "", seed) for seed in (0, 1)}
    found = {seed: calibration(LOOKS, stories, "", seed, measured[seed]) for seed in (0, 1)}
    for seed, texts in measured.items():
        known = {tuple(t.tolist()) for m in measured.values() for t in m.sequences}
        for row in rows(found[seed]):  # not even the beginnings of any of them
            assert not any(row[: len(other)] == other[: len(row)] for other in known)
        facts = found[seed].facts
        assert (facts["kind"], facts["sequences"]) == ("self-generated", len(rows(found[seed])))
        assert facts["tokens"] == sum(map(len, rows(found[seed])))
        assert facts["seed"] != texts.seed
    assert rows(found[0]) != rows(found[1])
    assert rows(calibration(LOOKS, stories, "", 0, measured[0])) == rows(found[0])
    assert found[0].facts["tokens"] > 4000


def test_the_feeds_are_the_models_inputs_without_a_past(stories: Runnable, stories_onnx: Path) -> None:
    found = calibration(LOOKS, stories, "random", 3, ids([1, 2]))
    assert found.facts == {
        "kind": "random",
        "source": "uniform over 512 tokens",
        "sequences": 32,
        "tokens": 32 * 256,
        "seed": calibrating.SEEDS + 3,
    }
    model = graph.load(stories_onnx)
    wanted = ReferenceRunner(stories_onnx).run(dict(found.feeds[5]))
    [logits] = [v for v in model.graph.outputs if v.name == "logits"]
    np.testing.assert_array_equal(list(Sweep(model, found.feeds).advance(logits))[5], wanted["logits"])


def test_a_file_is_cut_into_windows(stories: Runnable, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([[5] * 1300, [6, 7]]))
    found = calibration(LOOKS, stories, str(file), 0, ids([1, 2]))
    assert [len(row) for row in rows(found)] == [512, 512, 276, 2]
    assert found.facts == {
        "kind": "tokens", "source": "ids.json", "sequences": 4, "tokens": 1302, "seed": None,
    }  # fmt: skip


def test_a_long_file_is_read_to_a_bound(
    stories: Runnable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "TOKENS", 600)
    file = tmp_path / "ids.npy"
    np.save(file, np.full((3, 500), 5))
    found = calibration(LOOKS, stories, str(file), 0, ids([1, 2]))
    assert [len(row) for row in rows(found)] == [500, 100]


def test_text_needs_no_more_than_the_models_tokenizer(stories: Runnable, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Once upon a time")
    found = calibration(LOOKS, stories, str(file), 0, ids([1, 2]))
    assert rows(found) == [tuple(stories.words.encode("Once upon a time").tolist())]
    assert found.facts["kind"] == "text"


def test_measuring_on_the_calibration_text_is_refused(stories: Runnable, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[[5, 6, 7], [8, 9], [10, 11]]")
    with pytest.raises(OptionError, match="1 of 3 calibration texts") as caught:
        calibration(LOOKS, stories, str(file), 0, ids([1, 2], [8, 9]))
    assert caught.value.code == "PORT-0294"


def test_a_model_that_repeats_itself_is_refused(stories: Runnable, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ids([1, 2, 3], [1, 4])
    monkeypatch.setattr(calibrating.feeding, "self_generated", lambda *a, **k: measured)
    with pytest.raises(OptionError, match="all text that the model writes") as caught:
        calibration(LOOKS, stories, "", 0, measured)
    assert caught.value.code == "PORT-0294"
    found = calibration(LOOKS, stories, "", 0, ids([1, 4]))
    assert set(rows(found)) == {(1, 2, 3)}


def test_tokens_outside_the_vocabulary_are_refused(stories: Runnable, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[[5, 512]]")
    with pytest.raises(OptionError, match="PORT-0807"):
        calibration(LOOKS, stories, str(file), 0, ids([1, 2]))


def test_an_encoder_is_told_what_to_read(tiny: Callable[..., ir.Model], tmp_path: Path) -> None:
    model = tiny(past=None, positions="position_ids", mask="attention_mask", output="last_hidden_state")
    graph.save(model, tmp_path / "encoder.onnx")
    encoder = Runnable.of(tmp_path / "encoder.onnx")
    with pytest.raises(OptionError, match="encoder") as caught:
        calibration(LOOKS, encoder, "", 0, ids([1, 2]))
    assert caught.value.code == "PORT-0295"
    (tmp_path / "ids.json").write_text("[[5, 6, 7]]")
    [feed] = calibration(LOOKS, encoder, str(tmp_path / "ids.json"), 0, ids([1, 2])).feeds
    assert {n: a.tolist() for n, a in feed.items()} == {
        "input_ids": [[5, 6, 7]],
        "position_ids": [[0, 1, 2]],
        "attention_mask": [[1, 1, 1]],
    }
    assert calibration(LOOKS, encoder, "random", 0, ids([1, 2])).facts["kind"] == "random"


def test_data_that_no_pass_wants_is_refused(stories: Runnable) -> None:
    pipeline = Pipeline.parse("clean.identity,clean.dead")
    with pytest.raises(OptionError, match="no pass looks") as caught:
        calibration(pipeline, stories, "random", 0, ids([1, 2]))
    assert caught.value.code == "PORT-0296"
    assert calibration(pipeline, stories, "", 0, ids([1, 2])) == Calibration()


PASS = '''"""Write down what calibration there is -> nothing changes."""
from dataclasses import dataclass
from typing import ClassVar
import onnx_ir as ir
from porter.context import Context
from porter.pipeline import Pass

@dataclass(frozen=True)
class Record(Pass):
    """Record."""
    calibrates: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> int:
        """Into the model's metadata."""
        rows = [feed["input_ids"].shape for feed in context.calibration]
        names = sorted(context.calibration[0])
        model.metadata_props["seen"] = f"{len(rows)} {sum(b * n for b, n in rows)} {names}"
        return 0
'''  # fmt: skip


def test_a_conversion_calibrates_and_says_on_what(stories_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "record.py").write_text(PASS)
    (tmp_path / "ids.json").write_text(json.dumps([[1, 5, 6, 7], [1, 8, 9]]))
    passes = f"clean.opset,clean.constants,clean.shapes,clean.dead,{tmp_path}/record.py,check.support"
    options = Options(pipeline=passes, calibration=str(tmp_path / "ids.json"))
    report = convert(stories_onnx, tmp_path / "out", options)
    said = {"kind": "tokens", "source": "ids.json", "sequences": 2, "tokens": 7, "seed": None}
    written = json.loads(report.to_json())
    jsonschema.validate(written, SCHEMA)
    assert written["calibration"] == said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"] == said
    assert "given token ids (ids.json): 2 sequences, 7 tokens" in (tmp_path / "out/report.html").read_text()
    seen = graph.load(tmp_path / "out" / "model.onnx").metadata_props["seen"]
    assert seen.startswith("2 7 ['input_ids', 'past_key_values.0.key'")

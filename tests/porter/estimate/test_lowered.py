"""A bundle's own program in the place of the roofline: sizes, pieces, what is asked of whom."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema
import pytest
from decoders import tiny_decoder
from timed import made, program

from porter import convert, decoder, target
from porter.errors import OptionError, TargetError
from porter.estimate import Options, compare, estimate
from porter.estimate.lowered import KERNELS, TARGET, Lowered, parts
from porter.estimate.model import Model
from porter.estimate.onnx import _Reader
from porter.simulate import Step

ROOT = Path(__file__).parents[3]
SIZES = {"layers": 1, "hidden": 48, "heads": 6, "kv_heads": 2, "head_size": 8, "ffn": 44, "context": 40}


@cache
def lowered() -> Lowered:
    """For a chip with a price, in whose cache 40 tokens are."""
    return made(tiny_decoder(**SIZES), target.load("tpu-v6e")).lowered


@cache
def model() -> Model:
    return _Reader(tiny_decoder(**SIZES), "", "tiny").model()


def test_times_are_those_of_the_program() -> None:
    asked = Options(batch=3, prompt=7, context=30)
    found = estimate(model(), lowered().spec, asked, lowered())
    assert found.kind == "simulated"
    assert found.decode_s == pytest.approx(float(lowered().decode(3, 30).seconds), rel=1e-12)
    assert found.prefill_s == pytest.approx(float(lowered().prefill(3, 7).seconds), rel=1e-12)
    plain = estimate(model(), lowered().spec, asked)
    assert (plain.kind, plain.program) == ("estimated", None)
    assert plain.decode_s != found.decode_s
    assert plain.bytes == found.bytes


def test_what_binds_is_one_of_the_estimates_own_words() -> None:
    step = lowered().decode(1, 40)
    longest = max(step.calls, key=lambda call: call[0].seconds)[0]
    assert {part.time.kind for part in parts(step)} == {"simulated"}
    for why, key in (("vector unit", "compute"), ("bandwidth of hbm", "memory"), ("latency", "fixed")):
        (part,) = parts(replace(step, calls=((replace(longest, bound_by=why), 2),)))
        assert getattr(part.time, key) == part.time.seconds == float(longest.seconds)
        assert part.seconds == 2 * float(longest.seconds)


def test_long_prompts_are_fed_in_pieces() -> None:
    pieces = replace(lowered(), plan={**lowered().plan, "bounds": {"batch": 8, "sequence": 16}})
    whole, one = lowered(), lowered()._step
    assert whole.prefill(2, 37).seconds == one(2, 37, 0).seconds
    assert pieces.prefill(2, 37).seconds == 2 * one(2, 16, 0).seconds + one(2, 5, 32).seconds


def test_without_a_question_as_many_tokens_as_the_model_takes() -> None:
    assert lowered().most == model().tokens == 40
    found = estimate(model(), lowered().spec, Options(), lowered())
    assert (found.options.prompt, found.options.context) == (40, 40)
    report = lowered().report()
    assert (report["prefill"]["tokens"], report["decode"]["context"], report["rows"]) == (40, 40, 8)


@pytest.mark.parametrize("asked", [{"prompt": 41}, {"context": 41}])
def test_more_tokens_than_the_cache_holds_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(OptionError) as error:
        estimate(model(), lowered().spec, Options(**asked), lowered())
    assert error.value.code == "PORT-0339"


def test_a_program_of_one_size_is_of_that_size() -> None:
    inputs = [
        {**entry, "shape": [2 if size == "batch" else size for size in entry["shape"]]}
        for entry in lowered().plan["inputs"]
    ]
    fixed = replace(lowered(), plan={**lowered().plan, "inputs": inputs})
    assert fixed.rows == 2
    with pytest.raises(OptionError) as error:
        fixed.decode(3, 9)
    assert error.value.code == "PORT-0339"
    assert fixed.report()["why"] == error.value.what.replace("3", "1")


def test_a_cache_that_grows_takes_longer() -> None:
    source = tiny_decoder(**SIZES)
    found = decoder.recognise(source)

    grown = program(source, found, target.load("tpu-v6e"), convert._bounds(source, found)).lowered
    assert found.cache == "concat"
    times = [grown.decode(1, context).seconds for context in (2, 40)]
    assert times[0] < times[1]


def test_the_report_keeps_to_its_schema() -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text("utf-8"))
    part = {"$ref": "#/$defs/simulated", "$defs": schema["$defs"]}
    jsonschema.validate(lowered().report(), part)
    jsonschema.validate(estimate(model(), lowered().spec, Options(), lowered()).to_dict()["program"], part)


# ---- which targets are simulated


def compared(names: str, **asked: object) -> compare.Compared:
    return compare.compare(model(), names, Options(**asked), lowered())


def test_a_bundles_own_target_is_simulated_and_the_rest_is_not() -> None:
    assert [e.kind for e in compared("").estimates] == ["simulated"]
    found = compared("all")
    assert {e.target for e in found.estimates if e.kind == "simulated"} == {"tpu-v6e"}
    assert len(found.estimates) > 5
    steps = {row["name"]: row["step"] for row in compare.rows(found)}
    assert {name for name, text in steps.items() if not text.startswith("~")} == {"tpu-v6e"}
    assert any(line.startswith("~: times are estimated") for line in compare.lines(found))
    assert not any(row["step"].startswith("~") for row in compare.rows(compared("")))


def test_what_has_no_time_is_named() -> None:
    text = "\n".join(compare.lines(compared("", batch=9)))
    assert "not simulated, no time of a step: counting (1), sizes_1_1 (1): the control processor's" in text
    assert "the bundle's memory is planned for 8 rows at most" in text
    assert compare.SIMULATED in text


@pytest.mark.parametrize("asked", [{"tp": 2}, {"weights": "int8"}, {"kv": "int8"}])
def test_another_program_than_the_bundles_is_estimated(asked: dict[str, object]) -> None:
    found = compared("", **asked)
    assert [e.kind for e in found.estimates] == ["estimated"]
    assert any("tpu-v6e: not simulated: the program" in line for line in compare.lines(found))


def test_a_target_whose_file_is_another_is_estimated() -> None:
    other = replace(lowered(), spec=lowered().spec.model_copy(update={"summary": "older"}))
    found = compare.compare(model(), "tpu-v6e", Options(), other)
    assert [e.kind for e in found.estimates] == ["estimated"]
    assert any("its file is another one" in line for line in compare.lines(found))


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a bundle keeps of its program."""
    (tmp_path / "lib").mkdir()
    lowered().step.write(tmp_path / KERNELS)
    (tmp_path / TARGET).write_bytes(target.text("tpu-v6e"))
    (tmp_path / "plan.json").write_text(json.dumps(lowered().plan), "utf-8")
    return tmp_path


def test_a_bundle_says_all_that_is_needed(folder: Path) -> None:
    found = Lowered.read(folder, lowered().decoder)
    assert found == lowered()
    (folder / "plan.json").write_text("{}", "utf-8")
    with pytest.raises(TargetError) as error:
        Lowered.read(folder, lowered().decoder)
    assert error.value.code == "PORT-0440"


def test_what_is_no_bundle_of_a_chip_has_no_program(tmp_path: Path) -> None:
    assert compare.load_lowered(None) is None
    assert compare.load_lowered(tmp_path) is None


def test_a_model_that_has_no_cache_has_no_decode_steps() -> None:
    bare = replace(
        lowered(), decoder=replace(lowered().decoder, caches=(), cache="none", capacity=0, context=0)
    )
    bare = replace(bare, step=Step({}, {}, ()))
    report = bare.report()
    assert report["decode"] is None
    assert report["prefill"]["seconds"] == 0

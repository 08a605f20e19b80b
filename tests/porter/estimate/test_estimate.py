"""porter estimate: one model on targets, as table and JSON; what fits, what it costs."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from configs import PUBLISHED, llama

from porter import cli, target
from porter.errors import OptionError
from porter.estimate import Model, Options, compare, estimate
from porter.estimate.config import read
from porter.estimate.estimate import split

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "estimate.schema.json").read_text("utf-8"))
FIGURES = {"host", "webgpu"}  # targets that say nothing of how fast they are


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["Llama-3-70B"][0]), "utf-8")
    return path


@pytest.fixture
def llama70(big: Path) -> Model:
    return read(big)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def porter(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["porter", "estimate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return porter


# ---- the command


def test_all_targets_side_by_side_most_tokens_for_a_dollar_first(big: Path, run) -> None:
    start = time.perf_counter()
    code, out, err = run("--config", big, "--target", "all", "--tp", "8", "--json")
    assert time.perf_counter() - start < 5
    assert (code, err) == (0, "")
    found = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    assert {e["target"] for e in found} == set(target.names()) - FIGURES
    fitting = [e["usd_per_mtok"] for e in found if e["fits"] and e["usd_per_mtok"] is not None]
    assert len(fitting) > 5
    assert fitting == sorted(fitting)
    ranks = [(not e["fits"], e["usd_per_mtok"] is None) for e in found]
    assert ranks == sorted(ranks)
    assert {e["kind"] for e in found} == {"estimated"}


def test_the_table_fits_a_terminal_and_says_that_it_is_estimated(big: Path, run) -> None:
    code, out, err = run("--config", big)
    assert (code, err) == (0, "")
    assert "All figures are estimated." in out
    assert max(len(line.rstrip()) for line in out.splitlines()[:14]) <= 80
    assert "h100" in out
    assert "needs 2" in out
    assert "webgpu: left out: no estimate for webgpu" in out


def test_one_target_says_where_time_goes(big: Path, run) -> None:
    code, out, err = run("--config", big, "--target", "h100", "--tp", "2")
    assert (code, err) == (0, "")
    assert "decode step: memory" in out
    assert "links" in out
    code, out, err = run("--config", big, "--target", "h100")
    assert "it does not fit; it would on 2 chips: --tp 2" in out


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        ((), "PORT-0336", 1),
        (("--config", "missing.json"), "PORT-0330", 1),
        (("CONFIG", "--target", "webgpu"), "PORT-0332", 1),
        (("CONFIG", "--tp", "3"), "PORT-0337", 1),
        (("CONFIG", "--tp", "3", "--target", "h100"), "PORT-0333", 1),
        (("CONFIG", "--tp", "16", "--target", "h100"), "PORT-0334", 4),
        (("CONFIG", "--target", "none"), "PORT-0301", 1),
        (("CONFIG", "--target", "h100", "--weights", "int5"), "PORT-0250", 1),
        (("CONFIG", "--target", ","), "PORT-0337", 1),
    ],
)
def test_what_cannot_be_estimated(
    arguments: tuple[str, ...], code: str, exit_code: int, big: Path, run
) -> None:
    found = [a for word in arguments for a in (("--config", big) if word == "CONFIG" else (word,))]
    exited, out, err = run(*found)
    assert (exited, out) == (exit_code, "")
    assert err.startswith(f"porter: {code}: ")
    assert err.count("\n") == 1


# ---- figures


def test_memory_is_weights_cache_and_workspace(llama70: Model) -> None:
    found = estimate(llama70, target.load("h100"), Options(batch=3, prompt=100, context=1000))
    assert found.bytes.weights == 2 * 70_553_706_496
    assert found.bytes.kv == 3 * 1000 * 80 * 8 * 128 * 2 * 2
    # The residual beside the widest product's inputs and outputs (gate and up), then logits in float32.
    assert found.bytes.workspace == 3 * 100 * (8192 + 8192 + 2 * 28672) * 2 + 3 * 128256 * 4


def test_quantized_weights_leave_embedding_and_head_as_they_are(llama70: Model) -> None:
    found = estimate(llama70, target.load("h100"), Options("int4-g32", context=512))
    tables, small = 2 * 128256 * 8192, llama70.small
    linears = 70_553_706_496 - tables - small
    assert found.bytes.weights == linears * (4 + 32 / 32) / 8 + (tables + small) * 2


def test_a_model_that_does_not_fit_says_how_many_chips_it_takes(llama70: Model) -> None:
    spec = target.load("tpu-v6e")
    found = estimate(llama70, spec, Options())
    assert not found.fits
    each = {tp: estimate(llama70, spec, Options(tp=tp)) for tp in (1, 2, 4, 8, 16)}
    assert found.chips == next(tp for tp, e in each.items() if e.fits) == 8
    assert all(e.chips == tp for tp, e in each.items() if e.fits)
    assert all(e.bytes.total > 32e9 for e in each.values() if not e.fits)


def test_a_cache_too_large_for_any_number_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama(64, 2, 2, 2, 128, 100)), "utf-8")
    found = estimate(read(path), target.load("h100"), Options(batch=10_000_000))
    assert not found.fits
    assert found.chips > 2


def test_costs_are_those_of_the_listed_price_and_power(llama70: Model) -> None:
    found = estimate(llama70, target.load("h100"), Options(batch=8, tp=4))
    document = found.to_dict()
    assert document["tokens_per_s"] == 8 / document["decode_s"]
    assert document["tokens_per_s_per_chip"] == document["tokens_per_s"] / 4
    assert math.isclose(document["usd_per_mtok"], 4 * 6.88 / 3600 * document["decode_s"] / 8 * 1e6)
    assert math.isclose(document["joules_per_token"], 4 * 700 * document["decode_s"] / 8)
    unpriced = estimate(llama70, target.load("tpu-7x"), Options()).to_dict()
    assert (unpriced["usd_per_mtok"], unpriced["joules_per_token"]) == (None, None)


def test_a_step_takes_at_least_what_its_bytes_and_operations_do(llama70: Model) -> None:
    for name in sorted(set(target.names()) - FIGURES):
        spec = target.load(name)
        found = estimate(llama70, spec, Options(prompt=2048))
        read_once = (70_553_706_496 - 128256 * 8192) * 2 + found.bytes.kv
        assert found.decode_s > read_once / next(iter(spec.memory.values())).bandwidth.value
        operations = 2 * 2048 * (70_553_706_496 - 2 * 128256 * 8192)
        assert found.prefill_s > operations / spec.matrix.formats["bf16"].rate.value
        assert math.isclose(sum(split(found.decode).values()), found.decode_s, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"context": 8192}, {"context": 4096}),
        ({"batch": 16}, {"batch": 8}),
        ({"weights": "bf16"}, {"weights": "fp8"}),
        ({"kv": "fp16"}, {"kv": "int4"}),
        ({"tp": 1}, {"tp": 2}),
    ],
)
def test_more_work_takes_longer(more: dict[str, Any], less: dict[str, Any], llama70: Model) -> None:
    spec, asked = target.load("b200"), Options(batch=8, context=4096)
    assert (
        estimate(llama70, spec, replace(asked, **more)).decode_s
        > estimate(llama70, spec, replace(asked, **less)).decode_s
    )


def test_what_binds_changes_with_the_batch(llama70: Model) -> None:
    h200 = target.load("h200")
    assert estimate(llama70, h200, Options(batch=1)).bound_by == "memory"
    assert estimate(llama70, h200, Options(batch=2048, context=16, prompt=16)).bound_by == "compute"
    small = replace(llama70, linears=tuple(replace(w, k=64, n=64) for w in llama70.linears))
    assert estimate(small, h200, Options(context=16)).bound_by == "overhead"
    assert estimate(small, h200, Options(context=16, batch=512, tp=8)).bound_by == "links"


def test_formats_are_the_targets_own(llama70: Model) -> None:
    for name, weights in (("h100", "fp8-e4m3fn"), ("trainium2", "fp8-e4m3"), ("tpu-v6e", "fp8-e4m3b11fnuz")):
        assert estimate(llama70, target.load(name), Options("fp8")).to_dict()["weights"] == weights


def test_the_context_holds_at_least_the_prompt(llama70: Model) -> None:
    found = estimate(llama70, target.load("h200"), Options(prompt=8192, context=100))
    assert found.to_dict()["context"] == 8192


def test_one_of_model_and_config(big: Path) -> None:
    with pytest.raises(OptionError) as error:
        compare.load_model(big, big)
    assert error.value.code == "PORT-0336"

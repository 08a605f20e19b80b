"""The straight path on a trained model: what it writes, repeats, refuses, and leaves when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

from porter import graph
from porter.bundle import Bundle
from porter.convert import Options, convert
from porter.diff import diff
from porter.drift.measure import Runnable
from porter.errors import DriftError, OptionError, PassError, PorterError, SpecError
from porter.generate import stream
from porter.run.decode import Decode, generate
from porter.run.reference import ReferenceRunner

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text())

# Both sides sum float32 products in other orders. The longest sum has 172 terms and 5 layers follow each
# other; logits
# reach 20, so one rounding of the largest is 1e-6 and 100 of them are 1e-4. Measured: 2.7e-5.
LOGITS = 1e-4
RENAMED = {"batch": "batch_size", "sequence": "sequence_length", "past": "past_sequence_length"}


@pytest.fixture(scope="session")
def bundle(stories_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "stories"
    convert(stories_onnx, out, Options())
    return out


@pytest.fixture(scope="session")
def small(stories_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 weights and an int8 cache."""
    out = tmp_path_factory.mktemp("bundle") / "small"
    convert(stories_onnx, out, Options(weights="int4", kv="int8", context=128))
    return out


def listing(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_the_bundle_is_whole(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.verify() == len(opened.manifest["files"])
    assert set(listing(bundle)) == {
        *opened.manifest["files"], "manifest.json", "report.json", "report.html", "report.junit.xml",
    }  # fmt: skip
    library = json.loads((bundle / "plan.json").read_text())["library"]
    assert {"model.onnx", "plan.json", library, "lib/weights.bin"} <= set(opened.manifest["files"])
    assert opened.decoder.cache == "static"
    assert [f.name for f in bundle.parent.iterdir()] == [bundle.name]


def test_the_report_says_what_was_measured(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["ok"]
    assert set(report["drift"]) == {"total", "passes", "lowering"}
    # KL is quadratic in the logit error: (1e-4)² / 2, and every phase is there.
    assert all(d["kl_mean"] < 1e-8 and d["top1"] == 1.0 for d in report["drift"].values())
    assert all(d["kind"] == "measured" for d in report["drift"].values())
    assert report["phases"]["decode"]["tokens"] >= 64
    assert min(report["feeds"]["decode_steps"]) >= 64
    assert report["feeds"]["kind"] == "self-generated"
    assert report["attention"] == []
    assert [s["name"].split("{")[0] for s in report["stages"]][-1] == "check.support"
    page = (bundle / "report.html").read_text()
    assert "://" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_quantized_drift_is_reported_and_lowering_adds_nothing(small: Path) -> None:
    report = json.loads((small / "report.json").read_text())
    total, passes, lowering = (report["drift"][n]["kl_mean"] for n in ("total", "passes", "lowering"))
    # The int4 weights cost; the lowered program computes the same rounded model, but a key that lies on
    # the edge
    # between two int8 codes can fall either way, which is worth far less than the rounding itself.
    assert 0.01 < passes < 1.0
    assert lowering < 0.01 * passes
    assert total == pytest.approx(passes, rel=0.05)


def test_the_drift_is_split_by_its_causes(small: Path) -> None:
    report = json.loads((small / "report.json").read_text())
    found = report["attribution"]
    names = ["export", "fusion", "weights", "KV cache", "lowering"]
    assert [p["name"] for p in found["parts"]] == names
    _, fusion, weights, cache, lowering = chain = found["parts"]
    # Own parts and interactions make the total that the budget is about.
    assert sum(p["own"] + p["interaction"] for p in chain[1:]) == pytest.approx(found["total"], rel=1e-9)
    assert found["total"] == report["drift"]["total"]["kl_mean"] == lowering["after"]
    assert cache["after"] == report["drift"]["passes"]["kl_mean"]
    assert lowering["own"] == report["drift"]["lowering"]["kl_mean"]
    assert fusion["own"] < 1e-8 < weights["own"]  # fusing only reorders float32 sums
    assert cache["passes"][0].startswith("kv.quantize")
    assert weights["own"] > cache["own"] > 0  # of int4 weights beside an int8 cache
    # int4 costs far more than bfloat16, which has sixteen times its levels.
    assert report["plain"]["ratio"]["rms_error"] > 5
    assert 1e-5 < report["plain"]["drift"]["kl_mean"] < 1e-2
    assert [level["layer"] for level in report["depth"]] == [i // 2 for i in range(10)]
    assert report["depth"][0]["sqnr_db"] > report["depth"][-1]["sqnr_db"]
    page = (small / "report.html").read_text()
    assert all(words in page for words in ("Memory over time", "Layer by layer", "Against ordinary rounding"))
    assert not (small / ".trail").exists()


def test_a_float_port_has_no_loss_to_split(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert [p["name"] for p in report["attribution"]["parts"]] == ["export", "fusion", "lowering"]
    assert report["plain"]["ratio"]["rms_error"] < 1e-3  # float32 against eight bits


def test_a_chip_s_numerics_stand_apart_from_the_lowering(stories_onnx: Path, tmp_path: Path) -> None:
    """A chip that multiplies in bfloat16: what it loses is near what a plain run in bfloat16 does."""
    report = convert(stories_onnx, tmp_path / "out", Options(target="tpu-v6e"))
    parts = {p.name: p for p in report.attribution.parts}
    assert list(parts) == ["export", "fusion", "lowering", "target numerics"]
    assert parts["target numerics"].kind == "simulated"
    assert parts["lowering"].kind == "measured"
    assert parts["lowering"].own.kl_mean < 1e-8 < parts["target numerics"].own.kl_mean
    # Operands are rounded there, results are not: less than bfloat16 throughout, and no order of magnitude.
    assert 0.1 < report.ratio["rms_error"] < 1


def test_a_quantized_cache_is_measured_by_context_length_and_head(small: Path) -> None:
    report = json.loads((small / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    # Eight texts of 512 tokens are four windows each, with 16 single tokens before each length.
    assert [(r["tokens"], r["positions"], r["phase"]) for r in report["context"]] == [
        (64, 512, "decode"), (128, 512, "decode"),
    ]  # fmt: skip
    places = {(h["layer"], h["head"], h["tokens"]) for h in report["attention"]}
    assert places == {(layer, head, n) for layer in range(5) for head in range(8) for n in (64, 128)}
    assert {h["queries"] for h in report["attention"]} == {8 * 4}
    # int8 with 127 levels changes a logit of up to 100 by about 1, and some attention by a few per cent.
    assert all(0 < h["tv"] < 0.15 and h["cosine"] > 0.95 for h in report["attention"])
    assert "heat" in (small / "report.html").read_text()


def test_decode_is_for_quantized_caches(stories_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="PORT-0606"):
        convert(stories_onnx, tmp_path / "out", Options(decode=64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("past", [0, 1, 7, 511])
def test_logits_equal_the_source(bundle: Path, stories_onnx: Path, batch: int, past: int) -> None:
    reference, port = Runnable.of(stories_onnx), Runnable.of(bundle)
    a, b = reference.session(batch), port.session(batch)
    tokens = np.random.default_rng(past).integers(3, 512, (batch, 512), dtype=np.int64)
    for piece in (tokens[:, :past], tokens[:, past : past + 5]):
        if piece.size:
            np.testing.assert_allclose(b.step(piece), a.step(piece), rtol=0, atol=LOGITS)


def test_200_greedy_tokens_are_identical(bundle: Path, stories_onnx: Path) -> None:
    runs = [list(generate(Runnable.of(m).session(1), [1], 200, eos=())) for m in (bundle, stories_onnx)]
    assert len(runs[0]) == 200
    assert runs[0] == runs[1]


def test_text_streams(bundle: Path) -> None:
    pieces: list[str] = []
    made = stream(Runnable.of(bundle), "Once upon a time", None, 20, {"temperature": 0}, pieces.append)
    # llama2.c's own test has this text for greedy decoding.
    assert "".join(pieces).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )
    assert len(made.tokens) == 20
    full = stream(Runnable.of(bundle), "", [1] * 510, 64, {"temperature": 0}, None)
    assert len(full.tokens) == 3  # 512 places: two more are fed, and the third new token needs none


def test_conversion_repeats_to_the_byte(bundle: Path, stories_onnx: Path, tmp_path: Path) -> None:
    """In another process with another hash seed and another place."""
    out = tmp_path / "again"
    paths = f"Path({str(stories_onnx)!r}), Path({str(out)!r})"
    code = f"from pathlib import Path; from porter.convert import *; convert({paths}, Options())"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=tmp_path
    )
    for name in ("manifest.json", *Bundle.open(bundle).manifest["files"]):
        assert (out / name).read_bytes() == (bundle / name).read_bytes(), name


def test_a_bundle_that_is_converted_again_runs_its_new_program(
    decoder: Callable[[str], ir.Model], tmp_path: Path
) -> None:
    """In one process: the system's loader would give back the library that it had loaded by the same path."""
    graph.save(decoder("llama_sdpa_23"), tmp_path / "model.onnx")
    for context in (24, 32):  # the program of one does not take the caches of the other
        report = convert(tmp_path / "model.onnx", tmp_path / "b", Options(data="random", context=context))
        assert report.total.max_abs < LOGITS
        assert Bundle.open(tmp_path / "b").decoder.capacity == context


@pytest.mark.parametrize("name", ["llama_sdpa_23", "llama_eager_18_mask"])
def test_dimensions_may_have_any_names(decoder: Callable[[str], ir.Model], tmp_path: Path, name: str) -> None:
    """As optimum exports them: batch_size, sequence_length, past_sequence_length."""
    model = decoder(name)
    for value in model.graph.inputs:
        dims = [d if isinstance(d, int) else RENAMED.get(d.value, d.value) for d in value.shape]
        value.shape = ir.Shape(dims)
    graph.save(model, tmp_path / "model.onnx")
    report = convert(tmp_path / "model.onnx", tmp_path / "b", Options(data="random", context=64))
    assert report.total.max_abs < LOGITS


def test_diff_of_bundle_and_source(bundle: Path, stories_onnx: Path) -> None:
    report = diff(stories_onnx, bundle, budget="kl=1e-8,top1=1")
    assert report.ok
    same = diff(bundle, bundle)
    assert same.total.kl_mean == 0.0
    assert same.total.max_abs == 0.0


@pytest.mark.parametrize("keep", [False, True])
def test_over_budget(stories_onnx: Path, tmp_path: Path, keep: bool) -> None:
    out = tmp_path / "b"
    options = Options(weights="int4", budget="kl=1e-6", keep=keep)
    if keep:
        assert not convert(stories_onnx, out, options).ok
        assert json.loads((out / "report.json").read_text())["ok"] is False
        return
    with pytest.raises(DriftError) as caught:
        convert(stories_onnx, out, options)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (Options(target="nochip"), SpecError),
        (Options(weights="int5"), OptionError),
        (Options(kv="kivi9"), OptionError),
        (Options(kv="bf16"), OptionError),
        (Options(kv="kivi2 recent=many"), PassError),
        (Options(kv="key=int9"), PassError),
        (Options(budget="speed=1"), OptionError),
        (Options(data="no-such-file.txt"), OptionError),
    ],
)
def test_wrong_options(stories_onnx: Path, tmp_path: Path, options: Options, kind: type[PorterError]) -> None:
    with pytest.raises(kind):
        convert(stories_onnx, tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["passes", "lower", "measure"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_any_stage(stories_onnx: Path, tmp_path: Path, stage: str, how: int) -> None:
    """No bundle afterwards, and no temporary file after the next run (here: one that is refused early)."""
    scratch, place = tmp_path / "tmp", tmp_path / "place"
    scratch.mkdir()
    place.mkdir()
    command = [sys.executable, "-m", "porter", "convert", str(stories_onnx), "-o", str(place / "b")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env={**os.environ, "TMPDIR": str(scratch)})  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if stage in line:
            break
    process.send_signal(how)
    rest = process.stderr.read()
    process.wait()
    assert not (place / "b").exists()
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert "interrupted" in rest
        assert list(place.iterdir()) == []
    with pytest.raises(OptionError):
        convert(stories_onnx, place / "b", Options(data="no-such-file.txt"))
    assert list(place.iterdir()) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("scheme", "runs"), [("key=int8-channel value=int8-channel", True), ("fp8", False)], ids=["int8", "fp8"]
)
def test_a_cache_in_the_operator_s_form_is_lowered_and_measured(stories_onnx, tmp_path, scheme, runs):
    """ONNX Runtime's CPU runs the file where it has a kernel, and decodes as the lowered program does."""
    out = tmp_path / "contrib"
    options = Options(kv=scheme, context=64, form="contrib", decode=4)
    drift = json.loads(convert(stories_onnx, out, options).to_json())["drift"]
    # What the passes cost, measured in standard form, is what the lowered program costs, but for codes that a
    # sum in another order turns.
    assert 0 < drift["passes"]["kl_mean"] == pytest.approx(drift["total"]["kl_mean"], rel=0.05)
    assert not [name for name in listing(out) if name.endswith(".onnx") and name != "model.onnx"]
    opened, model = Bundle.open(out), graph.load(out / "model.onnx")
    assert sum(n.op_type == "GroupQueryAttention" for n in model.graph) == 5
    if not runs:
        return
    ids = np.random.default_rng(0).integers(3, 500, (1, 9))
    lowered = Decode(opened.runner(), opened.decoder)
    operator = Decode(ReferenceRunner(out / "model.onnx"), opened.decoder)
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        want, got = operator.step(part), lowered.step(part)
        # Sums in another order; where one turns an int8 code, that is a step of its channel in one token.
        np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-5 * np.abs(want).max())

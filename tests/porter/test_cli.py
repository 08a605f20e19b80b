"""The command line: exit codes, one JSON document, errors in one line, nothing left behind."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import porter.convert
from porter import __version__, cli
from porter.errors import DriftError, TargetError

COMMANDS = (
    "blame",
    "convert",
    "diff",
    "estimate",
    "explain",
    "export",
    "inspect",
    "passes",
    "run",
    "sweep",
    "targets",
    "verify",
)
PASSES = "clean.opset,clean.constants,clean.identity,clean.dead"

Porter = Callable[..., tuple[int, str, str]]


@pytest.fixture
def porter_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Porter:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["porter", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., ir.Model]) -> Path:
    """A decoder of one layer."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    decoder = tiny()
    decoder.metadata_props["porter.context_length"] = "16"
    ir.save(decoder, path)
    return path


@pytest.fixture(scope="session")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder ported."""
    out = tmp_path_factory.mktemp("ported") / "bundle"
    porter.convert.convert(model, out, porter.convert.Options(pipeline=PASSES, data="random"))
    return out


def _copy(bundle: Path, to: Path) -> Path:
    for file in (f for f in bundle.rglob("*") if f.is_file()):
        target = to / file.relative_to(bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return to


# ---- help, version, usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(porter_: Porter, command: str) -> None:
    code, out, err = porter_(command, "--help")
    assert (code, err) == (0, "")
    assert f"porter {command}" in " ".join(out.split())
    assert "--json" in out


def test_the_commands_are_these(porter_: Porter) -> None:
    code, out, _ = porter_("--help")
    assert code == 0
    assert {c for c in COMMANDS if f"\n  {c} " in out} == set(COMMANDS)
    assert len(cli.app.registered_commands) == len(COMMANDS), "a command without a test of its help"


def test_version(porter_: Porter) -> None:
    assert porter_("--version") == (0, f"porter {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["convert"], ["nonsense"], ["run", "--max-new", "0", "b"], ["passes", "--nonsense"]]
)
def test_wrong_usage_exits_with_two(porter_: Porter, arguments: list[str]) -> None:
    code, out, err = porter_(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: porter" in err
    assert "Traceback" not in err


# ---- one JSON document


def test_lists_as_json(porter_: Porter) -> None:
    code, out, err = porter_("passes", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert {"clean.dead", "fuse.attention"} <= {r["name"] for r in rows}
    assert all(set(r) == {"name", "promise", "what"} and r["what"] for r in rows)
    code, out, err = porter_("targets", "--json")
    assert (code, err) == (0, "")
    assert "host" in [t["name"] for t in json.loads(out)]
    code, out, err = porter_("targets", "host", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["family"] == "host"


def test_convert_then_everything_that_reads_a_bundle(porter_: Porter, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, text, err = porter_("convert", model, "-o", out, "--pipeline", PASSES, "--data", "random", "--json")
    report = json.loads(text)
    assert (code, err) == (0, "")
    assert report["ok"] is True
    assert report == json.loads((out / "report.json").read_text())
    code, text, err = porter_("verify", out, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text) == {
        "ok": True,
        "files": len(json.loads((out / "manifest.json").read_text())["files"]),
    }
    code, text, err = porter_("inspect", out, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["target"] == "host"
    code, text, err = porter_("run", out, "--tokens", "1,2,3", "--max-new", "4", "--json")
    made = json.loads(text)
    assert (code, err) == (0, "")
    assert made["prompt"] == [1, 2, 3]
    assert len(made["tokens"]) == 4
    assert made["kind"] == "measured"
    code, text, err = porter_("diff", model, out, "--data", "random", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["drift"]["total"]["top1"] == 1.0  # the same weights in float, so the same choices


def test_diff_against_a_baseline(porter_: Porter, bundle: Path, model: Path, tmp_path: Path) -> None:
    code, out, err = porter_("diff", bundle, "--against", bundle / "report.json", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["against"]["ok"] is True
    better = json.loads((bundle / "report.json").read_text())
    for drift in (better["drift"]["total"], *better["phases"].values()):
        drift |= {"top1": 1.0, "top1_ci95": 0.0, "sqnr_db": 60.0}
    worse = json.loads(json.dumps(better))
    worse["drift"]["total"] |= {"top1": 0.5, "sqnr_db": 20.0}
    (tmp_path / "better.json").write_text(json.dumps(better))
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    code, out, err = porter_("diff", tmp_path / "worse.json", "--against", tmp_path / "better.json")
    assert code == 3
    assert "same top token" in out
    assert "PORT-0621: worse than the baseline: total top1 1 -> 0.5" in err
    code, out, err = porter_("diff", tmp_path / "better.json", "--against", tmp_path / "worse.json", "--json")
    assert (code, err) == (0, "")
    code, _, err = porter_("diff", bundle)
    assert (code, "PORT-0623" in err) == (1, True)
    code, _, err = porter_("diff", model, bundle, "--against", model)
    assert (code, "PORT-0620" in err) == (1, True)


def test_explain_as_json(porter_: Porter, model: Path) -> None:
    code, out, err = porter_("explain", "fuse.rms_norm", model, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"rule": "fuse.rms_norm", "edits": 0, "near_misses": []}


def test_export_as_json_and_as_text(porter_: Porter, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra porter[export]")
    source = Path(__file__).parents[2] / "samples" / "stories260k"
    code, out, err = porter_("export", source, "-o", tmp_path / "m.onnx", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["parameters"] == 260_032
    code, out, err = porter_("export", source, "-o", tmp_path / "m.onnx")
    assert code == 0
    assert "260,032 parameters" in out
    assert "porter: trace" in err


# ---- text


def test_what_is_shown_without_json(porter_: Porter, model: Path, bundle: Path) -> None:
    for arguments, expected in (
        (["passes"], "fuse.attention"),
        (["targets"], "host"),
        (["targets", "host"], "family: host"),
        (["inspect", model], "producer"),
        (["inspect", bundle], "sha256"),
        (["verify", bundle], "files are what was written"),
        (["explain", "fuse.swiglu", model], "fuse.swiglu: 0 edits"),
    ):
        code, out, err = porter_(*arguments)
        assert (code, err) == (0, ""), arguments
        assert expected in out, arguments


def test_generated_ids_go_to_stdout_and_times_to_stderr(porter_: Porter, bundle: Path) -> None:
    code, out, err = porter_("run", bundle, "--tokens", "1", "--max-new", "3")
    assert code == 0
    assert len([int(t) for t in out.split()]) == 3
    assert "3 tokens" in err
    assert "measured" in err


# ---- exit codes


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["convert", "missing.onnx", "-o", "b"], "PORT-0101"),
        (["inspect", "missing.onnx"], "PORT-0101"),
        (["convert", "MODEL", "-o", "b", "--target", "nowhere"], "PORT-0301"),
        (["convert", "MODEL", "-o", "b", "--pipeline", "no.such"], "PORT-0201"),
        (["convert", "MODEL", "-o", "b", "--weights", "float7"], "PORT-0830"),
        (["convert", "MODEL", "-o", "b", "--budget", "kl=much"], "PORT-0809"),
        (["run", "BUNDLE", "--tokens", "one"], "PORT-0832"),
        (["run", "BUNDLE", "--prompt", "hello"], "PORT-0834"),
        (["verify", "."], "PORT-0510"),
        (["explain", "clean.dead", "MODEL"], "PORT-0211"),
        (["explain", "fuse.swiglu,fuse.matmul", "MODEL"], "PORT-0211"),
        (["targets", "nowhere"], "PORT-0301"),
        (["export", "nowhere", "-o", "m.onnx"], "PORT-0701"),
    ],
)
@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_wrong_input_is_one_line_and_exit_code_one(
    porter_: Porter, model: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: str, json_: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    known = {"MODEL": str(model), "BUNDLE": str(bundle)}
    status, out, err = porter_(*(known.get(a, a) for a in arguments), *json_)
    lines = [line for line in err.splitlines() if not line.endswith("…")]
    assert status == 1
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith(f"porter: {code}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("json_", [True, False])
def test_over_budget_shows_the_report_exits_with_three_and_leaves_nothing(
    porter_: Porter, model: Path, tmp_path: Path, json_: bool
) -> None:
    # 400 dB cannot be reached in float32, whose own rounding lies near 150 dB; only equal bits would.
    arguments = [
        "convert",
        model,
        "-o",
        tmp_path / "b",
        "--pipeline",
        PASSES,
        "--data",
        "random",
        "--budget",
        "sqnr-db=400",
    ]
    code, out, err = porter_(*arguments, *(["--json"] if json_ else []))
    assert code == 3
    assert "porter: PORT-0605: " in err
    assert (json.loads(out)["ok"] is False) if json_ else ("Over budget" in out)
    assert list(tmp_path.iterdir()) == []


def test_keep_writes_the_bundle_and_still_exits_with_three(
    porter_: Porter, model: Path, tmp_path: Path
) -> None:
    arguments = ("--pipeline", PASSES, "--data", "random", "--budget", "sqnr-db=400", "--keep")
    code, _, _ = porter_("convert", model, "-o", tmp_path / "b", *arguments)
    assert code == 3
    assert porter_("verify", tmp_path / "b")[0] == 0


def test_diff_over_budget_exits_with_three(porter_: Porter, model: Path, bundle: Path) -> None:
    code, out, err = porter_("diff", model, bundle, "--data", "random", "--budget", "sqnr-db=400", "--json")
    assert code == 3
    assert json.loads(out)["violations"][0]["measure"] == "sqnr_db"
    assert err.startswith("porter: PORT-0605: ")


def test_what_does_not_fit_the_target_exits_with_four(porter_: Porter, tmp_path: Path) -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
        g (int64[batch,sequence] input_ids) => (float[batch,sequence,4] last_hidden_state) {
            x = Gather(table, input_ids)
            last_hidden_state = Bernoulli(x)
        }"""
    table = ir.tensor(np.full((8, 4), 0.5, np.float32), name="table")
    ir.save(ir.from_onnx_text(text, initializers=[table]), tmp_path / "odd.onnx")
    code, out, err = porter_(
        "convert",
        tmp_path / "odd.onnx",
        "-o",
        tmp_path / "b",
        "--pipeline",
        "clean.opset",
        "--data",
        "random",
    )
    assert code == 4, err
    assert out == ""
    assert "PORT-04" in err
    assert "Bernoulli" in err
    assert [f.name for f in tmp_path.iterdir()] == ["odd.onnx"]


def _fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("porter.bundle.Bundle.open", fail)


def test_a_bug_exits_with_seventy_and_says_so_in_one_line(
    porter_: Porter, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, ZeroDivisionError("one\ntwo"))
    code, out, err = porter_("verify", "x")
    assert (code, out) == (70, "")
    assert err.startswith("porter: PORT-0999: a bug in porter: ZeroDivisionError: one; ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("one"), DriftError("PORT-0605", "far")])
def test_debug_shows_where_it_happened(
    porter_: Porter, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _fail(monkeypatch, error)
    with pytest.raises(type(error)):
        porter_("verify", "x", "--debug")
    with pytest.raises(type(error)):
        porter_("--debug", "verify", "x")


def test_an_error_says_what_where_and_what_to_try(porter_: Porter, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, TargetError("PORT-0410", "no kernel", where="node_3", hint="drop it"))
    assert porter_("verify", "x") == (4, "", "porter: PORT-0410: no kernel [node_3]; drop it\n")


# ---- interruptions


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(
    porter_: Porter,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    def interrupt(*args: object) -> None:
        assert list(tmp_path.iterdir()), "nothing had been written yet: the test is too early"
        signal.raise_signal(number)

    monkeypatch.setattr(porter.convert, "_lower", interrupt)
    code, out, err = porter_("convert", model, "-o", tmp_path / "b", "--pipeline", PASSES, "--data", "random")
    assert (code, out) == (status, "")
    assert err.splitlines()[-1] == "porter: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["passes", "--help"])
def test_a_closed_pipe_is_no_complaint(command: str) -> None:
    program = [sys.executable, "-c", "from porter.cli import main; main()", command]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    killer = threading.Timer(60, process.kill)
    killer.start()
    err = process.stderr.read()
    process.wait()
    killer.cancel()
    assert err == b""
    assert process.returncode == 1

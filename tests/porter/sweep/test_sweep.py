"""Sweeps of a real model: killed and taken up again, held against a conversion by hand, and through Ray."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import sweeping

from porter import cli
from porter.estimate import Options as Asked
from porter.estimate import compare
from porter.sweep.matrix import Matrix, Options
from porter.sweep.sweep import sweep

ROOT = Path(__file__).parent.parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "sweep.schema.json").read_text("utf-8"))
ESTIMATES = json.loads((ROOT / "docs" / "schemas" / "estimate.schema.json").read_text("utf-8"))
WEIGHTS = "fp32,int8,fp7"


@pytest.fixture(scope="module")
def real(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the decoder, a chip, and in `out` a sweep that was killed after its first cell and begun
    again; what that printed is in `said.json` and `said.txt`."""
    place = tmp_path_factory.mktemp("real")
    (place / "tiny.onnx").write_bytes(source.read_bytes())
    chip = sweeping.chip(place)
    axes = ["--targets", str(chip), "--weights", WEIGHTS, "--kv", "fp32", "--budget", "kl=0.00001"]
    command = [sys.executable, "-m", "porter", "sweep", place / "tiny.onnx", *axes, "-o", place / "out"]
    command = [*map(str, command), "--workers", "1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "1 of 2 cells" in line:
            break
    first.kill()
    first.wait()
    assert len(list((place / "out" / "cells").iterdir())) == 1
    assert not (place / "out" / "sweep.json").exists()
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    (place / "said.json").write_text(again.stdout)
    return place


@pytest.fixture
def said(real: Path) -> dict:
    return json.loads((real / "said.json").read_text())


def porter(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run a command line in this process."""
    monkeypatch.setattr(sys, "argv", ["porter", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def test_a_kill_in_the_middle_loses_nothing(real: Path, said: dict) -> None:
    jsonschema.validate(said, SCHEMA)
    assert said["counts"] == {"done": 2, "refused": 1, "failed": 0, "reused": 1}
    assert said["ok"]
    assert [c["tries"] for c in said["cells"]] == [1, 1, 0]
    assert json.loads((real / "out" / "sweep.json").read_text()) == said
    assert {f.name for f in (real / "out").iterdir()} == {
        ".lock", "cells", "sweep.csv", "sweep.json", next((real / "out").glob("texts-*.json")).name,
    }  # fmt: skip


def test_the_order_is_the_budget_s(said: dict) -> None:
    rows = [(c["target"], c["weights"], c["ok"], c["status"]) for c in said["cells"]]
    # Weights in float32 stay the same but for the order of sums; in int8 they cost more than the budget has.
    assert rows == [
        ("priced", "fp32", True, "done"),
        ("priced", "int8", False, "done"),
        ("priced", "fp7", False, "refused"),
    ]
    assert said["cells"][0]["pareto"]  # none drifts less
    assert "kl_mean" in said["cells"][1]["violations"][0]
    assert said["cells"][2]["error"]["code"] == "PORT-0830"


def test_a_cell_is_the_conversion_that_its_command_does(
    real: Path, said: dict, monkeypatch, tmp_path
) -> None:
    cell = said["cells"][1]
    words = shlex.split(cell["repeat"].replace("BUNDLE", str(tmp_path / "bundle")))
    assert porter(monkeypatch, *words[1:]) == 0
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert cell["drift"] == report["drift"]
    assert cell["bytes"]["weights"] == report["memory"]["weights of the port"]["value"]
    # One layer, one head of 8, keys and values of 24 tokens in float32.
    assert (cell["bytes"]["kv"], cell["bytes"]["tokens"]) == (2 * 24 * 8 * 4, 24)
    found = compare.compare(
        compare.load_model(tmp_path / "bundle", None),
        str(real / "priced.toml"),
        Asked(prompt=24, context=24),
    )
    assert cell["estimate"] == found.estimates[0].to_dict()
    jsonschema.validate([cell["estimate"]], ESTIMATES)
    assert cell["tokens_per_usd"] == pytest.approx(1e6 / cell["estimate"]["usd_per_mtok"])


def test_what_is_there_is_only_read(real: Path, said: dict, monkeypatch, capsys) -> None:
    files = {f: f.stat().st_mtime_ns for f in (real / "out" / "cells").iterdir()}
    axes = ["--targets", real / "priced.toml", "--weights", WEIGHTS, "-o", real / "out"]
    assert porter(monkeypatch, "sweep", real / "tiny.onnx", *axes) == 0
    shown = capsys.readouterr()
    assert {f: f.stat().st_mtime_ns for f in (real / "out" / "cells").iterdir()} == files
    table = [line.split() for line in shown.out.splitlines()]
    assert table[0][:3] == ["name", "weights", "KV"]
    # Without the budget, dollars alone decide.
    cheapest = max(said["cells"][:2], key=lambda c: c["tokens_per_usd"])
    assert table[1][:3] == ["priced", cheapest["weights"], "fp32"]
    assert table[3] == ["priced", "fp7", "fp32", *"––––––", "PORT-0830"]
    assert "3 cells, 2 of them from before" in shown.out
    assert "PORT-0830: priced has no weights format 'fp7' [priced fp7 fp32]" in shown.out
    rows = {r["weights"]: r for r in csv.DictReader((real / "out" / "sweep.csv").open())}
    assert {w: r["status"] for w, r in rows.items()} == {"fp32": "done", "int8": "done", "fp7": "refused"}
    assert float(rows["int8"]["kl_mean"]) == said["cells"][1]["drift"]["total"]["kl_mean"]
    assert (rows["int8"]["drift_kind"], rows["int8"]["estimate_kind"]) == ("measured", "estimated")


def test_bundles_are_kept_and_a_budget_that_none_keeps_is_exit_code_3(
    real: Path, monkeypatch, capsys
) -> None:
    axes = ["--targets", "host", "--weights", "int8", "--budget", "kl=1e-9", "-o", real / "out", "--keep"]
    assert porter(monkeypatch, "sweep", real / "tiny.onnx", *axes, "--json") == 3
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    jsonschema.validate(said, SCHEMA)
    (cell,) = said["cells"]
    assert (said["ok"], cell["ok"], cell["no_estimate"]["code"]) == (False, False, "PORT-0332")
    assert "PORT-0647" in shown.err
    assert "host int8 fp32" in shown.err
    assert [f.name for f in (real / "out" / "bundles").iterdir()] == [cell["record"]]
    assert porter(monkeypatch, "verify", real / "out" / "bundles" / cell["record"]) == 0


def test_a_model_that_changes_meanwhile_is_noticed(told, monkeypatch) -> None:
    monkeypatch.setattr("porter.sweep.shared.made_by", lambda: {"porter": "another"})
    swept = told(sweeping.real_but_dies_once, targets="a", weights="fp32", workers=1)
    assert [(r.status, r.found["error"]["code"]) for r in swept.rows] == [("failed", "PORT-0644")]


def test_through_ray_it_is_the_same(real: Path, said: dict, tmp_path: Path, monkeypatch, capfd) -> None:
    """On a cluster of this machine, with a worker that is killed on the way."""
    pytest.importorskip("ray", reason="needs the extra porter[ray]")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(sweeping.__file__).parent), str(ROOT)]))
    monkeypatch.setattr("porter.sweep.sweep.measure", sweeping.real_but_dies_once)
    matrix = Matrix.of(targets=str(real / "priced.toml"), weights=WEIGHTS)
    options = Options(ray="local", workers=2, budget="kl=0.00001")
    rows = sweep(real / "tiny.onnx", tmp_path / "out", matrix, options).to_dict()["cells"]
    differing = ("seconds", "tries", "reused", "repeat")  # repeat: the texts lie in another folder
    for one, other in zip(rows, said["cells"], strict=True):
        assert {k: v for k, v in one.items() if k not in differing} == {
            k: v for k, v in other.items() if k not in differing
        }
    assert [r["tries"] for r in rows] == [1, 2, 0]
    assert capfd.readouterr().out == ""

"""Workers: one that dies is replaced, what it was at is tried again, and none outlives the sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweeping

from porter.sweep.processes import Processes
from porter.sweep.work import TRIES, outcomes

SUPPORT = Path(sweeping.__file__).parent
ROOT = SUPPORT.parent.parent


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 20) -> bool:
    """Whether all of them end in that time; busy machines take long to schedule a dying process."""
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def records(folder: Path) -> dict[str, dict]:
    return {f.stem: json.loads(f.read_text()) for f in (folder / "cells").glob("*.json")}


def test_a_killed_worker_loses_nothing(told, place: Path) -> None:
    axes = {"targets": "a", "weights": "int4,fp32,int8", "kv": "fp32"}
    swept = told(sweeping.dies_once, **axes)
    found = {r.cell.weights: (r.status, r.found["tries"]) for r in swept.rows}
    # A cell that kills whoever takes it is given up, and said so; what is done is kept.
    assert found == {"fp32": ("done", 1), "int8": ("done", 2), "int4": ("failed", TRIES)}
    assert swept.rows[-1].found["error"]["code"] == "PORT-0645"
    assert {name.split("-")[0] for name in records(place / "out")} == {"a_fp32_fp32", "a_int8_fp32"}
    failure = swept.failure()
    assert (failure.code, failure.exit_code) == ("PORT-0640", 1)
    assert "1 of 3 cells failed" in str(failure)
    # Next time only that one is tried.
    again = told(sweeping.quick, **axes)
    assert [r.cell.weights for r in again.rows if not r.reused] == ["int4"]
    assert again.failure() is None


def test_what_the_machine_lacked_is_tried_again(told) -> None:
    swept = told(sweeping.lacking_once, targets="a", weights="fp32,int8")
    assert [(r.status, r.found["tries"]) for r in swept.rows] == [("done", 2)] * 2


def test_workers_share_the_cores_and_stdout_is_not_theirs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("PORTER_THREADS", "TVM_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what the user says holds
    monkeypatch.setattr("porter.sweep.processes.cores", lambda: 8)
    pool = Processes(2, sweeping.speaks, str(tmp_path))
    tasks = [{"name": f"{i:04x}"} for i in range(5)]
    try:
        found = [result for _, result in outcomes(pool, tasks)]
    finally:
        pool.close()
    assert len({result["pid"] for result in found}) <= 2
    for result in found:
        assert {name: result["threads"][name] for name in ("PORTER_THREADS", "TVM_NUM_THREADS")} == {
            "PORTER_THREADS": "4", "TVM_NUM_THREADS": "4",
        }  # fmt: skip
        assert result["threads"]["OMP_NUM_THREADS"] == "3"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("nobody asked") == captured.err.count("another") == 5


PROGRAM = """
import sys
if __name__ == "__main__":
    import porter.sweep.sweep, sweeping
    from porter import cli
    porter.sweep.sweep.measure = sweeping.slow
    sys.argv = ["porter", *sys.argv[1:]]
    cli.main()
"""


@pytest.mark.parametrize(
    ("how", "more"),
    [
        (signal.SIGINT, []),
        (signal.SIGTERM, []),
        (signal.SIGKILL, []),
        pytest.param(signal.SIGINT, ["--ray", "local"], marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, ["--ray", "local"], marks=pytest.mark.long),
    ],
)
def test_an_end_in_the_middle_keeps_finished_cells_and_leaves_no_process(
    told, place: Path, how: int, more: list[str]
) -> None:
    program = place / "program.py"
    program.write_text(PROGRAM)
    axes = ["--targets", str(place / "a.toml"), "--weights", "fp32,bf16,int8", "--kv", "fp32,fp16"]
    command = [
        sys.executable,
        program,
        "sweep",
        place / "tiny.onnx",
        *axes,
        "-o",
        place / "out",
        "--workers",
        "2",
        *more,
    ]
    path = f"{SUPPORT}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "4 of 6 cells" in line:  # the two in int8 never end
            break
    others = os.killpg if how == signal.SIGINT else os.kill  # Ctrl-C reaches all of a terminal's processes
    others(process.pid, how)
    said = process.stderr.read()
    assert process.wait() == (-how if how == signal.SIGKILL else 128 + how), said
    pids = [int(f.name) for f in (place / "pids").iterdir()]
    assert len(pids) == 2
    assert gone(pids)
    assert len(records(place / "out")) == 4
    assert not list((place / "out").rglob("*.tmp"))
    if how != signal.SIGKILL:
        assert "Traceback" not in said
        assert f"interrupted; finished cells are kept in {place / 'out'}" in said
        assert not list((place / "out").glob(".work-*"))
    swept = told(sweeping.quick, targets="a", weights="fp32,bf16,int8", kv="fp32,fp16")
    assert sorted(r.cell.weights for r in swept.rows if not r.reused) == ["int8", "int8"]
    assert not list((place / "out").glob(".work-*"))

"""The folder of a sweep: one at a time, whole records, nothing half-made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from porter.errors import EnvironmentFailure
from porter.sweep.store import Store

TASK = {"name": "host_fp32-0123", "inputs": {"source": "1", "versions": {"a": "2"}}, "keep": False}


def test_a_record_comes_back(tmp_path: Path) -> None:
    with Store.opened(tmp_path / "new" / "folder") as store:
        assert store.read(TASK) is None
        store.finish(TASK, {"status": "refused", "seconds": 1.5})
        assert store.read(TASK)["seconds"] == 1.5
        work = store.work
        (work / "bundle").mkdir()
    assert not work.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "porter.sweep.cell/0"}', b"\xff\xfe"])
def test_what_is_no_record_is_none(tmp_path: Path, text: str | bytes) -> None:
    with Store.opened(tmp_path) as store:
        store.finish(TASK, {"status": "done"})
        store.cell(TASK["name"]).write_bytes(text if isinstance(text, bytes) else text.encode())
        assert store.read(TASK) is None


def test_a_record_of_other_inputs_is_none(tmp_path: Path) -> None:
    with Store.opened(tmp_path) as store:
        store.finish(TASK, {"status": "done"})
        assert store.read({**TASK, "inputs": {**TASK["inputs"], "source": "2"}}) is None
        assert store.read({**TASK, "keep": True}) is None  # its bundle is not there
        store.bundle(TASK["name"]).mkdir(parents=True)
        assert store.read({**TASK, "keep": True}) is not None


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from porter.sweep.store import Store
with Store.opened(Path({str(tmp_path)!r})) as store:
    print(store.work, flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    work = Path(other.stdout.readline().strip())
    assert work.is_dir()
    with pytest.raises(EnvironmentFailure, match="PORT-0642"), Store.opened(tmp_path):
        pass
    assert work.is_dir()  # the refused one touched nothing
    (tmp_path / "cells" / ".a.json.tmp").touch()
    other.kill()
    other.wait()
    with Store.opened(tmp_path) as store:  # the killed one holds nothing
        assert not work.exists()
        assert [f.name for f in tmp_path.rglob("*.tmp")] == []
        store.finish(TASK, {"status": "done"})
    assert json.loads((tmp_path / "cells" / "host_fp32-0123.json").read_text())["status"] == "done"


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="PORT-0903"), Store.opened(tmp_path / "file"):
        pass

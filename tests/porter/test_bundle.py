"""Bundles: written whole or not at all, opened only when whole, verified byte by byte."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from porter.bundle import Bundle, write_manifest, writing
from porter.decoder import CacheTensor, Decoder
from porter.errors import BundleError, EnvironmentFailure

DECODER = Decoder(
    "input_ids", "logits", "static", (CacheTensor("past.0.key", "present.0.key", 0, "key"),), lengths="n",
    capacity=8, eos=(2,)
)  # fmt: skip


def make(out: Path, text: str = "one") -> Path:
    with writing(out) as folder:
        (folder / "lib").mkdir()
        (folder / "lib" / "model.so").write_text(text)
        (folder / "report.json").write_text("{}")
        write_manifest(folder, DECODER, {"seed": 0})
    return out


def code(action: object, *arguments: object) -> str:
    with pytest.raises((BundleError, EnvironmentFailure)) as caught:
        action(*arguments)  # type: ignore[operator]
    return caught.value.code


def beside(out: Path) -> list[str]:
    return sorted(f.name for f in out.parent.iterdir() if f != out)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    bundle = Bundle.open(make(tmp_path / "b"))
    assert bundle.decoder == DECODER
    assert bundle.verify() == 1
    assert list(bundle.manifest["files"]) == ["lib/model.so"]
    assert beside(tmp_path / "b") == []


def test_the_report_is_not_listed_so_the_manifest_repeats(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    (second / "report.json").write_text('{"seconds": 1}')
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert Bundle.open(second).verify() == 1


def test_a_bundle_is_replaced_whole(tmp_path: Path) -> None:
    out = make(tmp_path / "b")
    (out / "report.html").write_text("old")
    make(out, "two")
    assert (out / "lib" / "model.so").read_text() == "two"
    assert not (out / "report.html").exists()
    assert beside(out) == []


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), BundleError("PORT-0510", "x")])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    out = make(tmp_path / "b")

    def fail() -> None:
        with writing(out) as folder:
            (folder / "half").write_text("x")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert (out / "lib" / "model.so").read_text() == "one"
    assert beside(out) == []


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "b"):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert code(write) == "PORT-0901"
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "folder", "link"):
        assert code(make, tmp_path / name) == "PORT-0514"
    assert (tmp_path / "folder" / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert Bundle.open(make(tmp_path / "empty")).verify() == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert code(make, tmp_path / "file" / "b") == "PORT-0903"


def test_leftovers_of_the_killed_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".b.porter-{dead.pid}").mkdir()
    (tmp_path / f".b.porter-{dead.pid}" / "half").write_text("x")
    (tmp_path / f".b.porter-{os.getppid()}").mkdir()
    make(tmp_path / "b")
    assert beside(tmp_path / "b") == [f".b.porter-{os.getppid()}"]


def test_killed_between_the_renames_of_a_swap(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = make(tmp_path / "b")
    aside = tmp_path / f".b.porter-old-{dead.pid}"
    aside.mkdir()
    out.rename(aside / "replaced")
    with pytest.raises(ValueError, match="stop"), writing(out):
        raise ValueError("stop")
    assert Bundle.open(out).verify() == 1
    assert beside(out) == []


def test_damage_is_found(tmp_path: Path) -> None:
    out = make(tmp_path / "b")
    library = out / "lib" / "model.so"
    library.write_text("oen")
    assert code(Bundle.open(out).verify) == "PORT-0513"
    library.write_text("on")
    assert code(Bundle.open, out) == "PORT-0512"
    library.unlink()
    assert code(Bundle.open, out) == "PORT-0512"


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"format": 1}'])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert code(Bundle.open, tmp_path) == "PORT-0510"
    assert code(Bundle.open, tmp_path / "none") == "PORT-0510"


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    out = make(tmp_path / "b")
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert code(Bundle.open, out) == "PORT-0510"


def test_a_bundle_of_another_format(tmp_path: Path) -> None:
    out = make(tmp_path / "b")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert code(Bundle.open, out) == "PORT-0511"

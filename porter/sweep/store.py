"""Store: the folder of a sweep, with a small JSON of every finished cell; the rest of it can be lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.errors import EnvironmentFailure

SCHEMA = "porter.sweep.cell/1"


def digest(value: Any) -> str:
    """sha256, in hex, of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """`folder`, with a folder `work` in it that vanishes with the sweep: bundles in the making lie there."""

    folder: Path
    work: Path

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[Store]:
        """The folder, made if need be; one sweep at a time has it, until it ends or is killed.

        What a killed sweep left half-made is removed. Raises EnvironmentFailure PORT-0642 while another sweep
        has it, PORT-0903 when it cannot be written, PORT-0901 when the disk is full.
        """
        folder = folder.absolute()
        with _writable(folder):
            (folder / "cells").mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it for a killed one
            except BlockingIOError as error:
                what, hint = "another sweep is at work in this folder", "wait for it, or choose another -o"
                raise EnvironmentFailure("PORT-0642", what, where=str(folder), hint=hint) from error
            with _writable(folder):
                for left in (*folder.glob(".work-*"), *folder.rglob("*.tmp")):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                work = Path(tempfile.mkdtemp(prefix=".work-", dir=folder))
            try:
                yield cls(folder, work)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def texts(self, inputs: Mapping[str, Any]) -> Path:
        """Where the texts lie that the model writes under these circumstances."""
        return self.folder / f"texts-{digest(inputs)[:16]}.json"

    def cell(self, name: str) -> Path:
        """Where a cell's record is."""
        return self.folder / "cells" / f"{name}.json"

    def bundle(self, name: str) -> Path:
        """Where its bundle is, if bundles are kept."""
        return self.folder / "bundles" / name

    def read(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a finished cell that was made of the same inputs; None where there is none, or none
        that can be read, or its bundle is to be kept and is not there."""
        try:
            found = json.loads(self.cell(task["name"]).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or (found.get("schema"), found.get("inputs")) != (
            SCHEMA,
            task["inputs"],
        ):
            return None
        kept = not task["keep"] or found["status"] != "done" or self.bundle(task["name"]).is_dir()
        return found if kept else None

    def finish(self, task: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Keep what a cell gave. Raises what `write` does."""
        self.write(self.cell(task["name"]), {"schema": SCHEMA, "inputs": task["inputs"], **found})

    def write(self, file: Path, value: object) -> None:
        """A JSON value (or a text) in `file`: all of it or, when killed, what was there before.

        Raises EnvironmentFailure PORT-0901 when the disk is full, PORT-0903 when nothing can be written.
        """
        text = value if isinstance(value, str) else json.dumps(value, indent=1, allow_nan=False) + "\n"
        beside = file.with_name(f".{file.name}.tmp")
        with _writable(file), beside.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            beside.replace(file)


@contextlib.contextmanager
def _writable(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=str(where)) from error
        what = f"cannot write there: {error.strerror}"
        raise EnvironmentFailure("PORT-0903", what, where=str(where)) from error

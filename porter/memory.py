"""Memory: a limit in bytes, what a process takes, and a watch that keeps mapped files from filling it.

What counts is memory that the kernel cannot take back, a process's anonymous pages. Pages of mapped files can
be dropped at any time and read again; under a limit the watch drops those of the mappings in `mapped` before
they and the rest reach it, so that resident memory keeps the limit as well, nearly.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from porter.errors import EnvironmentFailure, OptionError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip
INTERVAL = 0.01  # seconds between two looks; a page fault takes 1 µs or so, so 40 MB may come in between
ROOM = 0.8  # share of the limit from which mapped pages are dropped

mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""Mappings of files that nobody writes to: their pages may be dropped while they are read."""


def parse(text: str) -> int:
    """Bytes of `4GiB`, `500MB`, `1.5 GiB`; nothing is 0, no limit. Raises OptionError PORT-0904."""
    if not text:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise OptionError(
            "PORT-0904", f"{text!r} is no amount of memory", where="--max-memory", hint="as 4GiB or 500MB"
        )
    return int(float(match[1]) * unit)


def shown(size: float) -> str:
    """`1.4 GiB`, `512 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


@dataclass(frozen=True)
class Usage:
    """Bytes of this process: `anonymous` ones that the kernel cannot drop, and all that are `resident`."""

    anonymous: int
    resident: int


def usage() -> Usage:
    """What this process takes now; nothing is known where there is no /proc."""
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return Usage(0, 0)
    resident, files = int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE
    return Usage(resident - files, resident)


def available() -> int:
    """Bytes of this machine that are free or can be made so."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Watch:
    """Looks at this process's memory while it is entered; `peaks` is the most that was seen in each stage.

    With a `limit` in bytes, mapped pages are dropped from `ROOM` of it on, and `enter` holds it.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.peaks: dict[str, Usage] = {}
        self._stage = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="porter-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak(self) -> Usage:
        """The most that was seen of each."""
        seen = [usage(), *self.peaks.values()]
        return Usage(max(u.anonymous for u in seen), max(u.resident for u in seen))

    def enter(self, stage: str) -> None:
        """`stage` begins, or goes on. Raises EnvironmentFailure PORT-0906 when the limit was not kept."""
        self._look()
        taken, before = self.peak.anonymous, self._stage
        self._stage = stage
        if self.limit and taken > self.limit:
            allowed = f"--max-memory allows {shown(self.limit)}"
            what = f"{before or stage} took {shown(taken)} of memory, and {allowed}"
            raise EnvironmentFailure("PORT-0906", what, hint="allow more, and report it: less was predicted")

    def _run(self) -> None:
        while not self._end.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        now, stage = usage(), self._stage
        then = self.peaks.get(stage, now)
        self.peaks[stage] = Usage(max(now.anonymous, then.anonymous), max(now.resident, then.resident))
        if self.limit and now.resident > ROOM * self.limit:
            drop()


def drop() -> None:
    """Let the pages of all known mappings go; who reads them gets them from the file again."""
    for mapping in list(mapped):
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            mapping.madvise(mmap.MADV_DONTNEED)

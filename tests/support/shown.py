"""Compare what a program printed with what a page shows, where figures of a machine may differ."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[-−]?\d[\d,.]*(?:e[-+]?\d+)?(?: (?:ms|µs|s)\b)?")
_STAGE = re.compile(r"porter: \w+ …")  # progress, which a terminal wipes away


def lines(text: str) -> list[str]:
    """Lines that say something, with every number and time as #, and spaces and rules of one character."""
    kept = (line.strip() for line in text.splitlines())
    spoken = (re.sub(r"─+", "─", re.sub(r"\s+", " ", _NUMBER.sub("#", line))) for line in kept)
    return [line for line in spoken if line and not _STAGE.fullmatch(line)]


def check(page: str, printed: str) -> None:
    """Fail when `printed` is not what `page` shows, where a line that is only "…" stands for any lines."""
    wanted, got = lines(page), lines(printed)
    at, gap = 0, False
    for line in wanted:
        if line == "…":
            gap = True
            continue
        ahead = got[at:] if gap else got[at : at + 1]
        assert line in ahead, f"the page shows {line!r}, printed was:\n{printed}"
        at, gap = at + ahead.index(line) + 1, False
    assert gap or at == len(got), f"the page does not show {got[at:]}"

"""What the command line shows: stages with percent and time left on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from porter.blame import Blamed
    from porter.report.baseline import Against
    from porter.report.report import DriftReport


class Stages:
    """A progress line per stage, on stderr; on a pipe, one line as a stage begins; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._live = not quiet and console.is_terminal
        self._quiet = quiet
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), *times)
        self._progress = Progress(*columns, console=console, disable=not self._live)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._finish()
        self.stop()

    def stop(self) -> None:
        """Leave the terminal to others."""
        self._progress.stop()

    def update(self, stage: str, fraction: float, note: str = "") -> None:
        """`stage` is `fraction` done; a new name ends the stage before. `note` stands beside it, on a pipe on
        a line of its own."""
        if stage not in self._tasks:
            self._finish()
            self._tasks[stage] = self._progress.add_task(stage, total=1.0)
            if not self._live and not self._quiet:
                print(f"porter: {stage} …", file=sys.stderr)
        if note and not self._live and not self._quiet:
            print(f"porter: {stage}: {note}", file=sys.stderr)
        self._progress.update(self._tasks[stage], completed=fraction, description=f"{stage} {note}".rstrip())

    def named(self, stage: str, *rest: Any) -> None:
        """`stage` has begun."""
        self.update(stage, 0.0)

    def _finish(self) -> None:
        for task in self._tasks.values():
            self._progress.update(task, completed=1.0)


def print_report(report: DriftReport) -> None:
    """The drift table and the verdict."""
    from porter.report.terminal import show

    show(report, Console())


def print_against(found: Against) -> None:
    """A report beside its baseline."""
    from porter.report.terminal import against

    Console().print(against(found))


def print_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str], least: int = 0) -> None:
    """A table; on a pipe it is at least `least` characters wide before anything is folded."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*[str(row[c]) for c in columns])
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, least)
    console.print(table, markup=False)


def print_blame(found: Blamed, most: int = 12) -> None:
    """The verdict, then the worst nodes."""
    from porter.drift.blame import verdict

    print(found.verdict)
    shown = [s for s in found.suspects if s.kind != "exact"][:most] or found.suspects[:3]
    for line in verdict.table(shown):
        print(line)
    for stage in found.stages:
        print(f"{stage.name}: {stage.candidate} against {stage.reference}, {stage.pairs} values compared, "
              f"drift {stage.drift:.3g} {found.unit} (measured)")  # fmt: skip
    if found.repro:
        print(f"repro: {found.repro}")


def print_facts(facts: Mapping[str, Any], indent: int = 0) -> None:
    """Nested facts, a line each."""
    pad = "  " * indent
    for key, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{pad}{key}:")
            print_facts(value, indent + 1)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{pad}{key}:")
            for item in value:
                print(f"{pad}  " + "  ".join(f"{k}={v}" for k, v in item.items()))
        else:
            print(f"{pad}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


def print_explanation(found: Mapping[str, Any]) -> None:
    """Near-misses of a rule, the nearest first."""
    misses = found["near_misses"]
    print(f"{found['rule']}: {found['edits']} edits, {len(misses)} near-misses")
    for miss in misses:
        print(f"  {miss['node']} ({miss['op']}): {miss['reason']}")
        print(f"      rule {miss['rule']}, {miss['matched']} nodes matched, failed at {miss['failed']}")

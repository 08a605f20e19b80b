"""The straight path of a sweep: what is missing is made, and all of it set side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from porter.drift import budget as budgets
from porter.sweep import matrix as crossing
from porter.sweep.cell import measure
from porter.sweep.matrix import Cell, Matrix, Options, Task
from porter.sweep.processes import Processes
from porter.sweep.rows import Row, ordered, refused, row
from porter.sweep.shared import share
from porter.sweep.store import Store
from porter.sweep.swept import Swept
from porter.sweep.work import Pool, cores, outcomes


def sweep(source: Path, folder: Path, matrix: Matrix, options: Options) -> Swept:
    """Do every conversion of `matrix` that `folder` has no record of, and report on all of them.

    Each finished cell is kept at once. Raises what reading the model, its texts, the targets and the budget
    does; EnvironmentFailure PORT-0642 while another sweep is at work in the folder, PORT-0643 and PORT-0646
    for a cluster that does no work. What becomes of single cells is for the result to say (`failure`).
    """
    started, allowed = time.perf_counter(), budgets.parse(options.budget)
    with Store.opened(folder) as store:
        options.progress(0.0, "reading the model")
        shared = share(source, options.data, options.calibration, options.seed, store)
        cells = crossing.cells(matrix, options, shared)
        tasks = {cell.task["name"]: cell.task for cell in cells if cell.task}
        kept = {name: record for name, task in tasks.items() if (record := store.read(task))}
        missing = [_given(task, store) for name, task in tasks.items() if name not in kept]
        made = {}
        for task, found in _done(missing, options, store):
            made[task["name"]] = found
            if found["status"] != "failed":
                store.finish(task, found)
        rows = ordered([_row(cell, kept, made, allowed) for cell in cells])
        swept = Swept(source.name, shared, matrix, options, allowed, rows, time.perf_counter() - started)
        swept.write(store)
    return swept


def _given(task: Task, store: Store) -> Task:
    """The task with the places that a worker is to use."""
    return {**task, "work": str(store.work), "keep": str(store.bundle(task["name"])) if task["keep"] else ""}


Records = Mapping[str, Mapping[str, Any]]


def _row(cell: Cell, kept: Records, made: Records, allowed: Mapping[str, float]) -> Row:
    if cell.task is None:
        return refused(cell)
    name = cell.task["name"]
    return row(cell, kept.get(name) or made[name], reused=name in kept, budget=allowed)


def _done(tasks: list[Task], options: Options, store: Store) -> Iterator[tuple[Task, dict[str, Any]]]:
    """What workers make of the tasks, telling how far they are."""
    if not tasks:
        return
    started = time.perf_counter()
    with _pool(len(tasks), options, store) as pool:
        options.progress(0.0, f"{len(tasks)} cells to do, {pool.size} at a time")
        for done, (task, found) in enumerate(outcomes(pool, tasks), 1):
            yield task, found
            left = (time.perf_counter() - started) / done * (len(tasks) - done)
            said = f"{done} of {len(tasks)} cells, {_clock(left)} left: {task['name']}"
            options.progress(
                done / len(tasks), said if found["status"] == "done" else f"{said}: {found['status']}"
            )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextlib.contextmanager
def _pool(count: int, options: Options, store: Store) -> Iterator[Pool]:
    """Workers for `count` tasks."""
    pool: Pool
    if options.ray:
        from porter.sweep.cluster import Cluster

        pool = Cluster(options.ray, options.workers, measure)
    else:
        pool = Processes(min(options.workers or cores(), count), measure, str(store.work))
    try:
        yield pool
    finally:
        pool.close()

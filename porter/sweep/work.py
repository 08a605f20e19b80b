"""Work: tasks go out to a pool of workers, and what they gave comes back; one that died is asked again."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from porter.errors import EnvironmentFailure, PorterError

TRIES = 3
THREADS = ("PORTER_THREADS", "TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Task = dict[str, Any]
Function = Callable[[Task], dict[str, Any]]
"""What a worker does. It stands in a module, takes plain data and returns plain data."""


class Pool(Protocol):
    """Workers, each of which does one task at a time."""

    size: int

    def start(self, task: Task) -> None:
        """Give a task to a worker that has none; there are fewer tasks under way than `size`."""
        ...

    def wait(self) -> list[tuple[Task, dict[str, Any] | None]]:
        """What workers gave since, at least one; None from one that died."""
        ...

    def close(self) -> None:
        """End the workers, whatever they are at."""
        ...


def outcomes(pool: Pool, tasks: Iterable[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
    """What each task gave, in the order they are done, with the number of `tries`.

    One whose worker died, or that says `again`, is put at the end and tried TRIES times in all.
    """
    waiting, tried, running = deque(tasks), Counter[str](), 0
    while waiting or running:
        while waiting and running < pool.size:
            pool.start(waiting.popleft())
            running += 1
        for task, found in pool.wait():
            running -= 1
            tried[task["name"]] += 1
            if (found is None or found.get("again")) and tried[task["name"]] < TRIES:
                waiting.append(task)
            else:
                yield task, {**(found or _dead()), "tries": tried[task["name"]]}


def _dead() -> dict[str, Any]:
    """Of a task whose workers all died."""
    what, hint = f"its worker died, {TRIES} times", "it may be the memory: take fewer --workers"
    return {
        "status": "failed",
        "error": said(EnvironmentFailure("PORT-0645", what, hint=hint)),
        "seconds": 0.0,
    }


def said(error: PorterError) -> dict[str, str]:
    """An error as plain data."""
    return {"code": error.code, "what": error.what, "where": error.where, "hint": error.hint}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(count: int) -> dict[str, str]:
    """Variables that give a process `count` threads; what the user set holds."""
    return {name: os.environ.get(name, str(count)) for name in THREADS}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables that processes started in the block get as well."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

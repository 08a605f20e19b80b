"""Processes: workers on this machine, each a fresh interpreter that shares its cores with the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from porter.sweep.work import Function, Task, cores, environment, threads


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None


class Processes:
    """`size` workers that do `function`, started when there is work for them; see `porter.sweep.work.Pool`.

    They end with this process, however it ends. `scratch` is where their temporary files go.
    """

    def __init__(self, size: int, function: Function, scratch: str) -> None:
        self.size, self._function = size, function
        self._variables = {**threads(max(1, cores() // size)), "TMPDIR": scratch}
        self._workers: list[_Worker] = []

    def start(self, task: Task) -> None:
        """See `Pool`."""
        for worker in [w for w in self._workers if w.task is None]:
            try:
                worker.connection.send(task)
            except OSError:  # it died with nothing to do
                self._remove(worker)
            else:
                worker.task = task
                return
        worker = self._new()
        self._workers.append(worker)
        worker.task = task
        with contextlib.suppress(OSError):  # it died at once, which `wait` finds out
            worker.connection.send(task)

    def _new(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        with environment(**self._variables):
            process.start()
        theirs.close()  # so that the pipe ends when the worker does
        return _Worker(process, ours)

    def wait(self) -> list[tuple[Task, dict[str, Any] | None]]:
        """See `Pool`."""
        found = []
        for ready in wait([w.connection for w in self._workers if w.task is not None]):
            worker = next(w for w in self._workers if w.connection is ready)
            assert worker.task is not None
            try:
                found.append((worker.task, worker.connection.recv()))
                worker.task = None
            except (EOFError, OSError):
                found.append((worker.task, None))
                self._remove(worker)
        return found

    def close(self) -> None:
        """See `Pool`."""
        for worker in [*self._workers]:
            self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()  # in the midst of compiling it would hear nothing else
        worker.process.join()
        worker.connection.close()


def _serve(connection: Connection, function: Function) -> None:
    """Do what comes over the pipe until nothing comes any more."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all of a terminal; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # stdout is for the one document
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(function(task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

"""Cluster: workers of Ray, on this machine or on others. The only place that imports Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from types import ModuleType
from typing import Any

from porter.errors import EnvironmentFailure
from porter.sweep.work import Function, Task, cores, environment, threads

LOCAL = "local"
# Ray takes a third of the memory for objects; ours are a few kilobytes. It wants at least 75 MiB.
OBJECTS = 80 << 20
POLL = 0.2  # seconds between two looks for a signal


class Cluster:
    """Tasks of one core each on a cluster; see `porter.sweep.work.Pool`. `address` is "local" for one that is
    made on this machine for as long as this object lives, else where a cluster is, as Ray writes it. `size`
    0: as many as it has cores.

    Machines need porter in the same versions, and see the same files under the same paths. Ray's dashboard
    and its reports of usage are off. Raises EnvironmentFailure PORT-0643 without Ray, PORT-0646 when there is
    no cluster or it cannot run porter.
    """

    def __init__(self, address: str, size: int, function: Function) -> None:
        self._ray, self._running = _ray(), {}
        self._held = contextlib.ExitStack()  # what lasts as long as the cluster
        # A thread of Ray's prints there what becomes of workers, and nothing turns it off.
        self._held.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._noted: list[int] = []
        self._handlers = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._connect(address, size)
            self._note_signals()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise _unreachable(address, error) from error
        self.size = size or int(self._ray.cluster_resources().get("CPU", 0))
        if not self.size:
            self.close()
            raise _unreachable(address, "it has no cores")
        self._remote = self._ray.remote(num_cpus=1, max_retries=0)(function)

    def _connect(self, address: str, size: int) -> None:
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if address != LOCAL:
            self._ray.init(address=address, runtime_env={"env_vars": threads(1)}, **quiet)
            return
        count = size or cores()
        self._held.enter_context(environment(**threads(max(1, cores() // count))))
        made = tempfile.TemporaryDirectory(prefix="porter-ray-", ignore_cleanup_errors=True)
        self._ray.init(
            address=LOCAL,
            num_cpus=count,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=OBJECTS,
            _temp_dir=self._held.enter_context(made),
            **quiet,
        )

    def _note_signals(self) -> None:
        """What a handler raises inside Ray's own code is lost there, so they are called between its calls;
        and Ray has put one of its own in SIGTERM's place."""
        if threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                signal.signal(number, lambda number, frame: self._noted.append(number))

    def start(self, task: Task) -> None:
        """See `Pool`."""
        self._running[self._remote.remote(task)] = task

    def wait(self) -> list[tuple[Task, dict[str, Any] | None]]:
        """See `Pool`. Raises EnvironmentFailure PORT-0646 when the cluster cannot run porter, or is gone."""
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait([*self._running], timeout=POLL)
            for number in self._noted:
                _raise(self._handlers[number], number)
        return [(self._running.pop(reference), self._result(reference)) for reference in ready]

    def _result(self, reference: Any) -> dict[str, Any] | None:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError):
            return None
        except errors.RayError as error:
            raise _unreachable("", error) from error

    def close(self) -> None:
        """See `Pool`."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            for reference in self._running:
                self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()
        self._held.close()
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)


def _raise(handler: Any, number: int) -> None:
    """Do what the handler of a signal would have done when it came."""
    if callable(handler):
        handler(number, None)
    elif handler == signal.SIG_DFL:
        raise KeyboardInterrupt


def _ray() -> ModuleType:
    os.environ["RAY_USAGE_STATS_ENABLED"] = (
        "0"  # before it is imported; no report of usage leaves the machine
    )
    try:
        import ray
    except ImportError as error:
        raise EnvironmentFailure("PORT-0643", "--ray needs Ray", hint="pip install 'porter[ray]'") from error
    return ray


def _unreachable(address: str, why: object) -> EnvironmentFailure:
    first = (str(why).strip() or type(why).__name__).splitlines()[0]
    what = f"no work can be done on the cluster: {first}"
    hint = "porter and Ray must be there in the versions that are here"
    return EnvironmentFailure("PORT-0646", what, where=address or "--ray", hint=hint)

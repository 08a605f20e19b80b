"""Trace: what each unit of the slowest core does when, as JSON for chrome://tracing or Perfetto."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from porter.simulate.engine import Action
from porter.simulate.kernel import slowest
from porter.simulate.program import Program
from porter.simulate.result import KIND
from porter.simulate.work import Actor
from porter.target import TargetSpec

LIMIT = 20_000


class _Full(Exception):
    """As many operations as were asked for."""


def trace(program: Program, spec: TargetSpec, limit: int = LIMIT) -> dict[str, Any]:
    """The first `limit` operations of the slowest core, or cluster, in the longest stage of `program`.

    The result is a JSON object in Chrome's trace event format: an event of phase "X" for each operation,
    `ts` and `dur` in microseconds from the beginning of the stage, a thread for each queue. Events of a DMA
    last from the beginning of the transfer until its data is there, so that they may overlap.
    `otherData.complete` says whether all operations are in it. Raises what `simulate` raises.
    """
    events: list[tuple[Action, int]] = []

    def watch(action: Action, begin: int) -> None:
        if len(events) == limit:
            raise _Full
        events.append((action, begin))

    work = slowest(program, spec)
    complete = True
    try:
        if work is not None:
            work.watched(watch)
    except _Full:
        complete = False
    actors = work.actors if work else []
    queues = {place: _label(actor, name) for actor in actors for name, place in actor.queues.items()}
    microsecond = Fraction(work.ticks if work else 1, 10**6)
    named = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": place, "args": {"name": f"{name} ({KIND})"}}
        for place, name in queues.items()
    ]
    shown = [
        {
            "ph": "X",
            "name": action.name,
            "cat": queues[action.queue],
            "pid": 0,
            "tid": action.queue,
            "ts": float(begin / microsecond),
            "dur": float(action.length / microsecond),
        }
        for action, begin in events
    ]
    other = {"kind": KIND, "kernel": program.name, "target": spec.name, "complete": complete}
    return {"traceEvents": named + shown, "displayTimeUnit": "ns", "otherData": other}


def _label(actor: Actor, queue: str) -> str:
    return f"core {actor.index}: {queue}" if actor.index >= 0 else queue

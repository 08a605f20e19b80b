"""Engine: when the operations of one core are done, exactly, with loops in closed form.

The state of a core is a list of times: of each queue, when it is free; of each buffer, when its filling is
written, when the last to use it is done, and when those of the fillings before were done, one for each
slot; and when all is done. An operation begins at the maximum of some of them plus a constant and moves
others to constants after that: an iteration is a linear map of the max-plus algebra. Such a map, repeated,
soon moves every time by a fixed amount every p iterations (p is 1, or what the slots make of it), and the
rest of the loop is a multiplication.

**When that is certain.** Let times move by the same steps d in two successive periods, and let no time
depend on one with a larger step. Then they always will: of the terms whose maximum a time is, those with
smaller steps did not attain it in the second period (they fell behind in it), so one with the same step
did, and it will keep up; the others do not catch up. Iterations are run one by one until a period is found,
so that the result is exact in any case.

Places that a loop does not read, but raises, do not count: since no time moves backwards, the last period
decides what becomes of them, and it is run.

Times are whole numbers of ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

PERIODS = 12
"""The longest period looked for. Slots of 1 to 4 make periods that divide it."""


@dataclass(frozen=True)
class Action:
    """An operation: places in the state, and ticks.

    It begins at the latest of `state[queue]` and, for each place in `waits`, that time and `lead`. Then
    `state[queue]` is `busy` after, and every place of `marks` at least `length` after its beginning.
    `also`, if not negative, is another queue that is busy for as long, from when it is free.
    """

    name: str
    queue: int
    waits: tuple[int, ...]
    marks: tuple[int, ...]
    lead: int
    busy: int
    length: int
    also: int = -1


@dataclass(frozen=True)
class Renewal:
    """A new filling of a buffer: `oldest` is the first of its `slots` times, then come written and done."""

    oldest: int
    slots: int


@dataclass(eq=False)
class Round:
    """`body`, `count` times, each after `renewals`."""

    count: int
    body: tuple[Round | Action, ...]
    renewals: tuple[Renewal, ...]

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The places that it reads. The others it only raises, in the end to times of the last period."""
        found: set[int] = set()
        for renewal in self.renewals:
            found.update(range(renewal.oldest, renewal.oldest + renewal.slots + 2))
        for step in self.body:
            if isinstance(step, Round):
                found.update(step.live)
            else:
                found.update((step.queue, *step.waits, *([step.also] if step.also >= 0 else [])))
        return tuple(sorted(found))

    @cached_property
    def sources(self) -> dict[int, tuple[int, ...]]:
        """Of each live place those that it may depend on after any number of iterations."""
        masks = {place: 1 << place for place in self.live}
        while True:
            before = list(masks.values())
            _spread(masks, self)
            if before == list(masks.values()):
                break
        return {place: tuple(o for o in self.live if masks[place] >> o & 1) for place in self.live}


Watch = Callable[[Action, int], None]  # told of each operation and its beginning


def run(state: list[int], program: Sequence[Round | Action], watch: Watch | None = None) -> None:
    """Move `state` to where `program` is done; with `watch`, every operation by itself."""
    for step in program:
        if isinstance(step, Action):
            _act(state, step, watch)
        elif watch is not None or step.count < 3:
            for _ in range(step.count):
                _once(state, step, watch)
        else:
            _repeat(state, step)


def _act(state: list[int], action: Action, watch: Watch | None) -> None:
    begin = state[action.queue]
    for place in action.waits:
        begin = max(begin, state[place] + action.lead)
    if watch is not None:
        watch(action, begin)
    state[action.queue] = begin + action.busy
    if action.also >= 0:
        state[action.also] += action.busy
    done = begin + action.length
    for place in action.marks:
        state[place] = max(state[place], done)


def _once(state: list[int], step: Round, watch: Watch | None) -> None:
    for renewal in step.renewals:
        first, written = renewal.oldest, renewal.oldest + renewal.slots
        state[first:written] = [*state[first + 1 : written], state[written + 1]]
        state[written] = state[written + 1] = 0
    run(state, step.body, watch)


def _repeat(state: list[int], step: Round) -> None:
    past = [[state[place] for place in step.live]]
    left = step.count
    while left:
        _once(state, step, None)
        left -= 1
        past.append([state[place] for place in step.live])
        period = _period(past, step)
        if period and left >= 2 * period:
            times = left // period - 1  # the last period raises all times to where they end
            for place, now, before in zip(step.live, past[-1], past[-1 - period], strict=True):
                state[place] = now + times * (now - before)
            for _ in range(left - times * period):
                _once(state, step, None)
            return
        if len(past) > 2 * PERIODS + 1:
            del past[0]


def _period(past: list[list[int]], step: Round) -> int:
    """The number of iterations after which all repeats, 0 where that is not certain."""
    now = past[-1]
    for period in range(1, min(PERIODS, (len(past) - 1) // 2) + 1):
        middle, first = past[-1 - period], past[-1 - 2 * period]
        if all(a - b == b - c for a, b, c in zip(now, middle, first, strict=True)):
            moved = {place: a - b for place, a, b in zip(step.live, now, middle, strict=True)}
            if min(moved.values(), default=0) >= 0 and _keeps(moved, step):
                return period
    return 0


def _keeps(moved: dict[int, int], step: Round) -> bool:
    """Whether no time depends on one that moves further."""
    return all(moved[other] <= rate for place, rate in moved.items() for other in step.sources[place])


def _spread(masks: dict[int, int], step: Round | Action) -> None:
    """Add to the masks what one iteration makes of them; places that are not in `masks` are not read."""
    if isinstance(step, Action):
        mask = masks[step.queue]
        for place in step.waits:
            mask |= masks[place]
        masks[step.queue] = mask
        for place in step.marks:
            if place in masks:
                masks[place] |= mask
        return
    for renewal in step.renewals:
        written = renewal.oldest + renewal.slots
        for place in range(renewal.oldest, written):
            masks[place] |= masks[place + 1 if place + 1 < written else written + 1]
    for inner in step.body:
        _spread(masks, inner)

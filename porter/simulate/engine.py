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

Times are whole numbers of ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Round:
    """`body`, `count` times, each after `renewals`."""

    count: int
    body: tuple[Round | Action, ...]
    renewals: tuple[Renewal, ...]


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
    past = [tuple(state)]
    left = step.count
    while left:
        _once(state, step, None)
        left -= 1
        past.append(tuple(state))
        period = _period(past, step)
        if period and left >= period:
            times, left = divmod(left, period)
            before = past[-1 - period]
            state[:] = [now + times * (now - then) for now, then in zip(state, before, strict=True)]
            for _ in range(left):
                _once(state, step, None)
            return
        if len(past) > 2 * PERIODS + 1:
            del past[0]


def _period(past: list[tuple[int, ...]], step: Round) -> int:
    """The number of iterations after which all repeats, 0 where that is not certain."""
    now = past[-1]
    for period in range(1, min(PERIODS, (len(past) - 1) // 2) + 1):
        middle, first = past[-1 - period], past[-1 - 2 * period]
        if all(a - b == b - c for a, b, c in zip(now, middle, first, strict=True)):
            moved = [a - b for a, b in zip(now, middle, strict=True)]
            if _keeps(moved, step):
                return period
    return 0


def _keeps(moved: list[int], step: Round) -> bool:
    """Whether no time depends on one that moves further."""
    for rate, sources in zip(moved, influences(step, len(moved)), strict=True):
        if any(other > rate and sources >> place & 1 for place, other in enumerate(moved)):
            return False
    return True


def influences(step: Round, places: int) -> list[int]:
    """Of each place of the state, a mask of those that it may depend on after any number of iterations."""
    masks = [1 << place for place in range(places)]
    while True:
        after = list(masks)
        _spread(after, step)
        merged = [old | new for old, new in zip(masks, after, strict=True)]
        if merged == masks:
            return masks
        masks = merged


def _spread(masks: list[int], step: Round | Action) -> None:
    if isinstance(step, Action):
        mask = masks[step.queue]
        for place in step.waits:
            mask |= masks[place]
        masks[step.queue] = mask
        for place in step.marks:
            masks[place] |= mask
        return
    for renewal in step.renewals:
        for place in range(renewal.oldest, renewal.oldest + renewal.slots):
            masks[place] |= masks[place + 1] if place + 1 < renewal.oldest + renewal.slots else 0
        masks[renewal.oldest + renewal.slots - 1] |= masks[renewal.oldest + renewal.slots + 1]
    for inner in step.body:
        _spread(masks, inner)

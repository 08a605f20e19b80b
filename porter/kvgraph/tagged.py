"""Tokens with more bits by their tags: slots, and the two pools of codes that they point into.

- `AssignSlots_…{scheme}(slots int32 [B,1,P,1], tags int64 [B,S], past_lengths int64 [B], more bool [tags])
  -> slots`, once for a model: P is the capacity less the sinks, and `more` says which tags want more bits.

The definition (`porter.kv.cache.Cache._assign`) goes token by token: with h of the first t tokens having more
bits, the next one has when h < more, and its tag wants it or the others' places are all taken, t - h = usual.
That comes to a running sum. With w of the new tokens before this one wanting more,

    h = min(more, max(h0 + w, t - usual))

As long as neither pool is full it is h0 + w, since t - h <= usual. When that of more bits is full, h = more
and stays. When the other one is full, each token gets more bits, so h = t - usual from there on, and h0 + w,
which does not grow faster, stays below. A token has more bits where h grows.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import onnx_ir as ir

from porter.kv import layout
from porter.kv.names import text_of
from porter.kv.scheme import Scheme, Side
from porter.kvgraph import body
from porter.kvgraph.body import Body
from porter.kvgraph.rounding import Parts, Rounding

ASSIGN = "AssignSlots_"


def assign_name(scheme: Scheme, capacity: int) -> str:
    """The function's name, which tells one body from another."""
    about = f"{text_of(scheme)} {capacity}"
    return f"{ASSIGN}{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def assign_function(scheme: Scheme, capacity: int, opset: int) -> ir.Function:
    """The function that gives S new tokens of each row their slots."""
    b = Body()
    usual, most = layout.pools(scheme, capacity)
    before = b.op("Sub", "past_lengths", b.integer(scheme.sink))
    first = b.op("Unsqueeze", before, b.ints(1))  # [B,1]: where the first new token stands, < 0 for a sink
    steps = b.op("Unsqueeze", b.counted(b.size("tags", 1)), b.ints(0))
    place = b.op("Add", first, steps)
    wants = b.cast(b.op("And", b.op("GreaterOrEqual", place, b.integer(0)), _wants(b)), body.INT64)
    with_it = b.op("CumSum", wants, b.integer(1))
    held = b.cast(b.op("Squeeze", "past_slots", b.ints(1, 3)), body.INT64)
    places = b.ints(*range(max(0, capacity - scheme.sink)))
    real = b.op("And", b.op("Less", held, b.integer(0)), b.op("Less", places, first))
    so_far = b.op("ReduceSum", b.cast(real, body.INT64), b.ints(1), keepdims=1)

    def high(count: str, tokens: str) -> str:
        sure = b.op("Add", so_far, count)
        forced = b.op("Sub", tokens, b.integer(usual))
        return b.op("Min", b.op("Max", sure, forced), b.integer(most))

    old = high(b.op("Sub", with_it, wants), place)
    new = high(with_it, b.op("Add", place, b.integer(1)))
    up = b.op("Greater", new, old)
    slot = b.op("Where", up, b.op("Sub", b.integer(-1), old), b.op("Sub", place, old))
    index = b.op("Sub", places, first)  # [B,P]: which new token is at a place
    last = b.op("Sub", b.size("tags", 1), b.integer(1))
    inside = b.op("Min", b.op("Max", index, b.integer(0)), last)
    fresh = b.op("And", b.op("GreaterOrEqual", index, b.integer(0)), b.op("LessOrEqual", index, last))
    found = b.op("Where", fresh, b.op("GatherElements", slot, inside, axis=1), held)
    slots = b.op("Unsqueeze", b.cast(found, body.INT32), b.ints(1, 3))
    inputs = ["past_slots", "tags", "past_lengths", "more"]
    return b.function(assign_name(scheme, capacity), inputs, {"present_slots": slots}, ["scheme"], opset)


def _wants(b: Body) -> str:
    """Whether each token's tag wants more bits, bool [B,S]; what is no tag does not."""
    last = b.op("Sub", b.size("more", 0), b.integer(1))
    inside = b.op("Min", b.op("Max", "tags", b.integer(0)), last)
    return b.op("And", b.op("Equal", inside, "tags"), b.op("Gather", "more", inside))


def pools(scheme: Scheme, name: str, capacity: int) -> list[tuple[str, Side, int]]:
    """(what names of buffers begin with, how tokens are stored, places) of the pools that have any."""
    side, (usual, more) = scheme.side(name), layout.pools(scheme, capacity)
    both = [("", replace(side, more=""), usual), ("more_", replace(side, element=side.more, more=""), more)]
    return [pool for pool in both if pool[2]]


def write(
    b: Body, held: list[tuple[str, Side, int]], size: int, past: Parts, tokens: str, slots: str, real: str
) -> Parts:
    """The pools with tokens float32 [B,H,N,D] in their slots int64 [B,N], where `real` bool [B,N]."""
    present = {}
    for prefix, side, count in held:
        parts = Rounding(b, side, size).encode(tokens)
        high = b.op("Less", slots, b.integer(0))
        place = b.op("Sub", b.integer(-1), slots) if prefix else slots
        mine = b.op("And", real, high if prefix else b.op("Not", high))
        inside = b.op("Unsqueeze", b.op("Where", mine, place, b.integer(count)), b.ints(1, 3))
        for name, part in parts.items():
            # A place more, for what is of the other pool; then off again.
            buffer = past[prefix + name]
            longer = b.op("Concat", buffer, b.part(buffer, 0, 1, 2), axis=2)
            index = b.op("Expand", inside, b.op("Shape", part))
            written = b.op("ScatterElements", longer, index, part, axis=2)
            present[prefix + name] = b.part(written, 0, count, 2)
    return present


def slots_at(b: Body, places: str, count: int) -> str:
    """The slots of tokens at `places` int64 [B,N] after the sinks, of `count` there are; int64 [B,N]."""
    inside = b.op("Min", b.op("Max", places, b.integer(0)), b.integer(count - 1))
    return b.op("GatherElements", _flat(b), inside, axis=1)


def read(b: Body, held: list[tuple[str, Side, int]], size: int, parts: Parts) -> tuple[str, str, str]:
    """All codes as floats [B,H,Q,D], one pool after the other; where there each token is, int64 [B,Q]; and
    the last place."""
    slots = b.part(_flat(b), 0, sum(count for *_, count in held), 1)
    floats, place, total = [], slots, 0
    for prefix, side, count in held:
        mine = {n.removeprefix(prefix): v for n, v in parts.items() if n.startswith("more_") == bool(prefix)}
        floats.append(Rounding(b, side, size).decode(mine))
        if prefix:
            behind = b.op("Sub", b.integer(total - 1), slots)
            place = b.op("Where", b.op("Less", slots, b.integer(0)), behind, slots)
        total += count
    whole = floats[0] if len(floats) == 1 else b.op("Concat", *floats, axis=2)
    return whole, place, b.integer(total - 1)


def _flat(b: Body) -> str:
    """The input `slots` as int64 [B,P]."""
    return b.cast(b.op("Squeeze", "slots", b.ints(1, 3)), body.INT64)

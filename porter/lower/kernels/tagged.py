"""A side of a tagged scheme (`porter.kvgraph.tagged`): tokens in two pools, found by their slots.

A pool is a `Stored` of one element whose token `place` is that at the place. Slots are given, so a kernel
that writes or decodes takes no slot beyond its pool, whatever the buffer says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from porter.kv import layout, tags
from porter.kv.scheme import Scheme
from porter.lower.kernels.define import Dim, Expr, Spec, T, define, i64, local, loop, store, tirx
from porter.lower.kernels.stored import Buffers, Stored, Tile


@dataclass(frozen=True)
class Pool:
    """Tokens of one element: what the names of its buffers have after the side's, how many it holds, which
    kernels write and decode it, and whether its slots are below 0."""

    suffix: str
    count: int
    spec: Stored
    more: bool

    def place(self, slot: Expr) -> Expr:
        """Where a slot of this pool is, in it."""
        place = i64(-1) - slot if self.more else slot
        return tirx.max(tirx.min(place, i64(self.count - 1)), i64(0))

    def holds(self, slot: Expr) -> Expr:
        """Whether a slot is of this pool."""
        return slot < i64(0) if self.more else slot >= i64(0)


@dataclass(frozen=True)
class Tagged(Stored):
    """One side of a tagged scheme's planned buffers. Where a `Stored` has static steps, these have slots,
    int32 [b, 1, capacity - sinks, 1]."""

    @property
    def label(self) -> str:
        """Both elements."""
        return f"{self.side.element}_{self.side.more}"

    def step(self, name: str, heads: int) -> list[Spec]:
        """The buffer of slots."""
        return [(f"{name}_slots", ("b", 1, self.capacity - self.scheme.sink, 1), "int32")]

    def pools(self) -> list[Pool]:
        """Those that have any places."""
        usual, more = layout.pools(self.scheme, self.capacity)
        both = [("", usual, self.side.element), ("_more", more, self.side.more)]
        return [
            Pool(suffix, count, self._pool(element), bool(suffix)) for suffix, count, element in both if count
        ]

    def _pool(self, element: str) -> Stored:
        side = replace(self.side, element=element, more="")
        scheme = replace(self.scheme, key=side, value=side, share=0.0)
        return Stored(scheme, self.name, self.width, self.capacity)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        some = next((at[n] for n in (f"{name}_codes", f"{name}_more_codes") if n in at), None)
        super().fill(at if some is None else at | {f"{name}_codes": some}, name, tile, row, span, total)

    def _decode(
        self, at: Buffers, name: str, tile: Tile, to: Expr, row: tuple[Expr, Expr], token: Expr
    ) -> None:
        slot = slot_of(at[f"{name}_slots"], row[0], token)
        for pool in self.pools():
            with T.If(pool.holds(slot)), T.Then():
                pool.spec._decode(at, name + pool.suffix, tile, to, row, pool.place(slot))


def slot_of(slots: tirx.Buffer, row: Expr, token: Expr) -> Expr:
    """The slot of a token after the sinks, int64."""
    kept = local(1, "int64")
    store(kept, tirx.Cast("int64", slots[row, i64(0), token, i64(0)]), 0)
    return kept[0]


def assign_slots(scheme: Scheme, capacity: int) -> tirx.PrimFunc:
    """slots int32 [b, 1, capacity - sinks, 1], tags [b, s] int64, starts [b] int64, more [tags] bool.

    Each new token after the sinks gets its slot (`porter.kv.cache.Cache._assign`). Tokens past the capacity
    are dropped; with a start below 0 nothing is written.
    """
    usual, most = layout.pools(scheme, capacity)
    places: Dim = capacity - scheme.sink

    def body(slots, given, starts, more, b, s):
        with loop(b, "parallel") as row:
            start = starts[row]
            first = tirx.max(start - i64(scheme.sink), i64(0))
            end = tirx.min(start + s - i64(scheme.sink), i64(places))
            with T.If(tirx.all(start >= i64(0), first < end)), T.Then():
                high = local(1, "int64")
                store(high, i64(0), 0)
                with loop(first) as place:
                    below = slots[row, i64(0), place, i64(0)] < tirx.IntImm("int32", 0)
                    store(high, high[0] + tirx.Cast("int64", below), 0)
                with loop(end - first) as i:
                    place, up = first + i, local(1, "int64")
                    tag = given[row, place + i64(scheme.sink) - start]
                    inside = tirx.max(tirx.min(tag, i64(tags.COUNT - 1)), i64(0))
                    wants = tirx.all(inside == tag, more[inside])
                    full = place - high[0] >= i64(usual)
                    grows = tirx.all(high[0] < i64(most), tirx.any(wants, full))
                    store(up, tirx.Cast("int64", grows), 0)
                    slot = tirx.Select(up[0] > i64(0), i64(-1) - high[0], place - high[0])
                    store(slots, tirx.Cast("int32", slot), row, i64(0), place, i64(0))
                    store(high, high[0] + up[0], 0)

    buffers: list[Spec] = [
        ("slots", ("b", 1, places, 1), "int32"),
        ("tags", ("b", "s"), "int64"),
        ("starts", ("b",), "int64"),
        ("more", (tags.COUNT,), "bool"),
    ]
    return define(f"assign_slots_c{capacity}", buffers, body)

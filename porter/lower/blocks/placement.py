"""Placement: what became of everything that a program multiplies, for its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from porter.lower.blocks.operand import MANTISSA
from porter.lower.blocks.profile import Profile
from porter.lower.importer.templates import Multiplied
from porter.target.placed import Placed
from porter.target.placing import holds


def placements(profile: Profile, multiplied: Iterable[Multiplied]) -> list[Placed]:
    """One for each class of tensors, in the order in which the program comes to them; last, all the rest."""
    counts, sides = Counter(multiplied), Counter()
    found = []
    for entry, count in counts.items():
        found.append(_right(profile, entry, count))
        if entry.kind == "weights":
            unit = profile.unit(entry.format, entry.activations)
            sides[entry.activations or "fp32", unit.x.form, "matrix" if unit.name else "vector"] += count
    found += [_activations(*side, count) for side, count in sides.items()]
    order = ("weights", "activations", "cache", "tensors")
    found.sort(key=lambda placed: order.index(placed.tensors))
    return [*found, Placed("rest", "fp32", 0, "native", "fp32", "vector")]


def _right(profile: Profile, entry: Multiplied, count: int) -> Placed:
    """Where the right side of products goes."""
    coded = entry.kind == "cache" and entry.format not in MANTISSA  # its numbers come as float32
    place = profile.placed("fp32" if coded else entry.format, entry.activations)
    how = "widened" if coded else place.how
    return Placed(entry.kind, entry.format, count, how, place.format, place.unit, entry.activations)


def _activations(given: str, form: str, unit: str, count: int) -> Placed:
    """What the left sides become: they go where the weights are multiplied."""
    how = "native" if form == given else "widened" if holds(form, given) else "emulated"
    return Placed("activations", given, count, how, form, unit)

"""An assignment as passes of a pipeline: one for each format that weights are cast to, one for the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

from porter.kv.names import side_text
from porter.search.caches import EXACT
from porter.search.choices import Assignment
from porter.weights.base import WeightPass
from porter.weights.select import ROLES

_UNWRITABLE = "{}+,"  # they mean something in a pipeline's text


def pattern(name: str) -> str:
    """What names an initializer in `only`; a character that a pipeline's text cannot hold becomes `?`."""
    written = "".join(_escaped(c) for c in name)
    return f"{written[:-1]}[{written[-1]}]" if written in (*ROLES, "linear") else written


def _escaped(c: str) -> str:
    if c in "*?[":
        return f"[{c}]"
    return "?" if c in _UNWRITABLE or c.isspace() or not c.isprintable() else c


def named(name: str, others: Sequence[str]) -> bool:
    """Whether the pattern of a name means no other."""
    return [other for other in others if fnmatchcase(other, pattern(name))] == [name]


def weights_text(assignment: Assignment) -> str:
    """The passes that cast its weights, fewest bits of a format first; "" where all stay."""
    groups: dict[WeightPass, list[str]] = {}
    pairs = zip(assignment.items, assignment.options, strict=True)
    for item, option in sorted(pairs, key=lambda p: (p[1].bytes / p[0].numbers, p[1].name)):
        if option.cast is not None:
            groups.setdefault(option.cast, []).append(item.name)
    passes = [
        dataclasses.replace(cast, skip=(), only=tuple(map(pattern, sorted(names))))
        for cast, names in groups.items()
    ]
    return ",".join(map(str, passes))


def kv_text(assignment: Assignment) -> str:
    """The pass that quantizes its cache, each layer as `KEY/VALUE`; "" where there is none to quantize."""
    sides: dict[int, dict[str, str]] = {}
    for item, option in zip(assignment.items, assignment.options, strict=True):
        if option.side is not None:
            sides.setdefault(item.layer, {})[item.kind] = side_text(option.side)
    exact = side_text(EXACT)
    if all(text == exact for layer in sides.values() for text in layer.values()):
        return ""
    layers = ":".join(f"{layer['key']}/{layer['value']}" for _, layer in sorted(sides.items()))
    return f"kv.quantize{{scheme=fp16 layers={layers}}}"

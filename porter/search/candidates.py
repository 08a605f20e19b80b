"""Candidates: the formats and methods of a target that are worth measuring, few enough to measure each.

A candidate is a pass that casts weights. One that another beats in bits and in error is left out, first on a
sample of the model's weights, then for each matrix by the error of what it gives, trace(E G E^T), with E the
error of the matrix and G the mean of x x^T over its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from porter import formats, registry
from porter.context import Context
from porter.errors import PassError
from porter.formats import Format
from porter.methods import awq, gptq
from porter.target import TargetSpec
from porter.target.placing import class_of
from porter.weights.base import WeightPass
from porter.weights.select import Matrix

WITHOUT_DATA = ("rtn", "kquant", "hqq")  # methods that look at weights alone
GROUPS = ("-g32", "-g128")  # of integers of fewer than 8 bits, whose scales are then 16 bits wide
MOST = 8  # candidates that are measured on a matrix
CLOSE = 1.02  # a candidate of the sample is beaten by one whose error is smaller by so much
ROWS, TENSORS = 32, 12  # of the sample


def every(spec: TargetSpec, method: str) -> list[WeightPass]:
    """All that the target reads, by `method` where it can be and one is asked for, else by those that need
    no data."""
    methods = {m: _method(m) for m in ((method, "rtn") if method else WITHOUT_DATA)}
    found: list[WeightPass] = []
    for name in spec.weights:
        grouped = class_of(name) == "int" and formats.parse(f"{name}-r").bits < 8
        for text in [name + g for g in GROUPS] if grouped else [name]:
            made = [_pass(spec, cls, text, "fp16" if grouped else "") for cls in methods.values()]
            casts = [cast for cast in made if cast is not None]
            found += casts[:1] if method else casts
    return found


def _method(name: str) -> type[WeightPass]:
    found = registry.find(f"quantize.{name}")
    assert isinstance(found, type)
    assert issubclass(found, WeightPass)
    return found


def _pass(spec: TargetSpec, cls: type[WeightPass], name: str, scales: str) -> WeightPass | None:
    """The pass, or None where the method does not do the format, or does nothing."""
    made = cls(format=name, skip=(), scales=scales)
    try:
        form = made.form(Context(spec))
    except PassError:
        return None
    if form.element == "fp32" or (form.element in ("fp16", "bf16") and cls.name != "quantize.rtn"):
        return None
    return made


def worth(found: Sequence[WeightPass], matrices: Sequence[Matrix], spec: TargetSpec) -> list[WeightPass]:
    """Those that no other beats in bits and error on a sample of the weights, fewest bits first."""
    picked = [matrices[i] for i in np.unique(np.linspace(0, len(matrices) - 1, TENSORS).astype(int))]
    sample = [_rows(m) for m in picked]
    points = []
    for cast in found:
        form = cast.form(Context(spec))
        encode = formats.encode if cast.name == "quantize.rtn" else partial(cast.encode, name="")
        errors = [error(x, formats.decode(encode(form, x))) for x in sample]  # too small to compile for
        bits = np.mean([form.bits_per_weight(x.shape[-2], x.shape[-1]) for x in sample])
        points.append((float(bits), float(np.mean(errors))))
    kept = [i for i, (b, e) in enumerate(points) if not any(b2 <= b and e2 * CLOSE < e for b2, e2 in points)]
    return [found[i] for i in sorted(kept, key=lambda i: points[i])]


def _rows(matrix: Matrix) -> np.ndarray:
    """Some rows of a matrix, float32 [rows, K]."""
    values = matrix.read().reshape(-1, matrix.shape[-1])
    return values[np.unique(np.linspace(0, len(values) - 1, ROWS).astype(int))]


def rounded(cast: WeightPass, form: Format, values: np.ndarray, gram: np.ndarray | None) -> np.ndarray:
    """What a pass makes of a weight, float32 [..., N, K]; `gram`: the mean of x x^T of its inputs.

    AWQ's scales are left out: they belong to several matrices at once.
    """
    if gram is not None and cast.name == "quantize.gptq" and values.ndim == 2:
        options = {name: getattr(cast, name) for name in ("damp", "act_order", "static_groups")}
        return formats.decode(gptq.quantize(values, gram, form, **options))
    if gram is not None and cast.name == "quantize.awq" and values.ndim == 2:
        values = awq.clip(values, gram, form)
    return formats.decode(cast.encode(form, values, ""))


def error(values: np.ndarray, instead: np.ndarray, gram: np.ndarray | None = None) -> float:
    """The squared error of a weight, or of its outputs, in parts of the square of these."""
    change = (instead.astype(np.float64) - values).reshape(-1, values.shape[-1])
    weight = values.astype(np.float64).reshape(change.shape)
    if gram is None:
        return float(np.square(change).sum() / max(np.square(weight).sum(), 1e-300))
    return float(((change @ gram) * change).sum() / max(((weight @ gram) * weight).sum(), 1e-300))


@dataclasses.dataclass(frozen=True, eq=False)
class Tried:
    """A candidate of a matrix: what it makes of it, its bytes and seconds, `cost` the one of these that
    counts, and how far off the outputs are."""

    cast: WeightPass
    values: np.ndarray
    bytes: float
    seconds: float
    cost: float
    error: float


def few(tried: Sequence[Tried], most: int = MOST) -> list[Tried]:
    """Those that no other beats in cost and error, cheapest first, thinned where they are close."""
    kept: list[Tried] = []
    for t in sorted(tried, key=lambda t: (t.cost, t.error, t.bytes)):
        if not kept or t.error < kept[-1].error:
            kept.append(t)
    while len(kept) > most:
        gaps = [kept[i + 1].cost / max(kept[i - 1].cost, 1e-300) for i in range(1, len(kept) - 1)]
        del kept[1 + int(np.argmin(gaps))]
    return kept

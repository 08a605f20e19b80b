"""Placement: in which format, and on which unit, a target multiplies weights of a format."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from porter import formats
from porter.formats.elements import Float
from porter.formats.integers import Integer

if TYPE_CHECKING:
    from porter.target.spec import TargetSpec

How = Literal["native", "widened", "emulated"]
TF32 = "tf32"  # multiplied by several chips, stored by none
WIDE = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Placement:
    """Weights are multiplied as `format` on the `unit`: as they are stored (`native`), after their codes
    became numbers of a wider format (`widened`), or in another format's precision or rate (`emulated`)."""

    format: str
    how: How
    unit: Literal["matrix", "vector"]


def placement(spec: TargetSpec, weights: str, activations: str = "") -> Placement | None:
    """Where weights of a format (`int4-g32`) meet activations of a format ("": floats, rounded as needed).

    A narrow native format needs activations of the same, or of one that the unit mixes with it. None where
    the target says nothing of the format.
    """
    name, other = base(weights), base(activations)
    native = _among(name, spec.matrix.formats) if spec.matrix else ""
    if native and (name in WIDE or same(name, other) or _mixes(spec, other, name)):
        return Placement(native, "native", "matrix")
    if found := _ruled(spec, name, other):
        return found
    if spec.vector and name in spec.vector.formats.value:
        return Placement(name, "native", "vector")
    return _ruled(spec, class_of(name), other)


def _ruled(spec: TargetSpec, key: str, activations: str) -> Placement | None:
    """What the numeric profile says of a format or a class, where such activations can be multiplied so."""
    rules = spec.numerics
    for how, table in (("widened", rules.widened), ("emulated", rules.emulated)) if rules else ():
        if key in table:
            to = str(table[key].value)
            if to not in (*WIDE, TF32) and not (activations and holds(to, activations)):
                continue
            on_matrix = spec.matrix is not None and to in spec.matrix.formats
            return Placement(to, how, "matrix" if on_matrix else "vector")
    return None


def _mixes(spec: TargetSpec, activations: str, weights: str) -> bool:
    mixed = spec.matrix.mixed if spec.matrix else ()
    return any(same(m.activations, activations or "bf16") and same(m.weights, weights) for m in mixed)


def _among(name: str, native: Mapping[str, object]) -> str:
    """The name that a native format has there: `mxfp8-e4m3` is `mxfp8`."""
    return next((n for n in native if same(n, name)), "")


def base(name: str) -> str:
    """A format's name without what shares a scale: `int4-g32` -> `int4`."""
    found = re.fullmatch(r"(.+?)(-(r|t|[gb][1-9]\d*))?", name)
    return found[1] if found else name


def class_of(name: str) -> str:
    """`float`, `int`, `fp8` or `mx`: all that share scales of a block, NVFP4 too, are `mx`."""
    if name in (*WIDE, TF32):
        return "float"
    if name.startswith("fp8"):
        return "fp8"
    return "int" if re.match(r"u?int\d", name) else "mx"


CLASSES = ("float", "int", "fp8", "mx")


@functools.cache
def known() -> tuple[str, ...]:
    """Every name that a target may use for a format, without suffixes."""
    return (*formats.names(), TF32)


@functools.cache
def same(a: str, b: str) -> bool:
    """Whether two names are of one format: `mxfp8` and `mxfp8-e4m3` are."""
    if a == b or TF32 in (a, b) or not {a, b} <= set(known()):
        return a == b
    return _form(a) == _form(b)


@functools.cache
def _form(name: str) -> formats.Format:
    return replace(formats.parse(f"{name}-r" if class_of(name) in ("int", "fp8") else name), name="")


@functools.cache
def holds(wide: str, narrow: str) -> bool:
    """Whether every number that `narrow` stores, before scales, is one of `wide` under the same scales."""
    if narrow in WIDE or narrow == TF32:
        return (
            wide == narrow
            or wide == "fp32"
            or (wide, narrow) == (TF32, "bf16")
            or (wide, narrow) == (TF32, "fp16")
        )
    if wide not in (*WIDE, TF32):
        a, b = _form(wide), _form(narrow)
        if (a.group, a.scale) != (b.group, b.scale):
            return False
    numbers = _numbers(narrow)
    if wide == TF32:
        return bool(np.all(numbers.view(np.uint32) & 0x1FFF == 0))
    element = _form(wide).elements
    back = element.decode(element.encode(numbers))
    return bool(np.array_equal(back / (1 << _form(wide).fraction), numbers))


def _numbers(narrow: str) -> np.ndarray:
    """Every finite number of a format of 8 bits or fewer, float32."""
    form = _form(narrow)
    element = form.elements
    if isinstance(element, Float):
        values = element.values[np.isfinite(element.values)]
    else:
        assert isinstance(element, Integer)
        values = np.arange(element.smallest, element.largest + 1)
    values = np.asarray(values, np.float32) / (1 << form.fraction)
    return np.concatenate([values, values / 2]) if form.micro else values

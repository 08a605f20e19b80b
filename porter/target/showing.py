"""Showing targets: a row of the table of all, and one in full, every figure with its marker and source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from porter.target.figure import Figure
from porter.target.spec import TargetSpec

COLUMNS = ("name", "family", "memory", "TB/s", "bf16", "fp8", "int8", "fp4", "USD/h", "summary")
NOTE = (
    "bf16, fp8, int8, fp4: peak TFLOP/s or TOP/s, dense, of what is multiplied as it is stored.\n"
    "USD/h: a chip's, on demand (*: spot or reserved). –: none, or not known.\n"
    "A port to a chip that is not at hand runs on this machine, in the numerics of the chip."
)
_RATES: dict[str, Callable[[str], bool]] = {
    "bf16": lambda name: name == "bf16",
    "fp8": lambda name: name.startswith(("fp8", "mxfp8")),
    "int8": lambda name: name == "int8",
    "fp4": lambda name: name in ("mxfp4", "nvfp4"),
}
_WIDTH = 44  # columns until the marker


def summary(spec: TargetSpec) -> dict[str, Any]:
    """A target in a few numbers, in SI units; None where there is none."""
    outer = next(iter(spec.memory.values()), None)
    formats = spec.matrix.formats if spec.matrix else {}
    rates = {
        column: max((o.rate.value for name, o in formats.items() if fits(name)), default=None)
        for column, fits in _RATES.items()
    }
    return {
        "name": spec.name,
        "family": spec.family,
        "summary": spec.summary,
        "memory_bytes": outer.size.value if outer else None,
        "bandwidth_bytes_per_s": outer.bandwidth.value if outer and outer.bandwidth else None,
        "flop_per_s": rates,
        "usd_per_hour": spec.price.per_hour.value if spec.price else None,
        "price_terms": spec.price.terms if spec.price else None,
        "price_date": spec.price.date.isoformat() if spec.price else None,
    }


def row(spec: TargetSpec) -> dict[str, str]:
    """The same for people: one text for each of `COLUMNS`."""
    facts = summary(spec)
    outer = next(iter(spec.memory.values()), None)
    rates = {name: f"{rate / 1e12:,.0f}" if rate else "–" for name, rate in facts["flop_per_s"].items()}
    price = f"{spec.price.per_hour.value:.2f}" if spec.price else "–"
    if spec.price and spec.price.terms != "on-demand":
        price += "*"
    return rates | {
        "name": spec.name,
        "family": spec.family,
        "memory": outer.size.text if outer else "–",
        "TB/s": f"{outer.bandwidth.value / 1e12:.3g}" if outer and outer.bandwidth else "–",
        "USD/h": price,
        "summary": spec.summary,
    }


def lines(spec: TargetSpec) -> Iterator[str]:
    """A target in full: a line for each key that says something, sources last."""
    for name in type(spec).model_fields:
        if name != "sources":
            yield from _lines(name, getattr(spec, name), 0)
    yield from _lines("sources", spec.sources, 0)


def _lines(key: str, value: Any, depth: int) -> Iterator[str]:
    start = f"{'  ' * depth}{key}:"
    if isinstance(value, Figure):
        known = f"{value.kind}: {value.source}" if value.kind != "published" else f"published {value.source}"
        yield f"{start} {value.text}".ljust(_WIDTH) + f" {known}"
    elif isinstance(value, BaseModel):
        entries = {f.alias or name: getattr(value, name) for name, f in type(value).model_fields.items()}
        yield from _part(start, entries, depth)
    elif isinstance(value, dict):
        yield from _part(start, value, depth)
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        yield from _part(start, {str(i): entry for i, entry in enumerate(value, 1)}, depth)
    elif value not in (None, (), ""):
        yield f"{start} {', '.join(value) if isinstance(value, tuple) else value}"


def _part(start: str, entries: dict[str, Any], depth: int) -> Iterator[str]:
    inner = [line for key, value in entries.items() for line in _lines(key, value, depth + 1)]
    if inner:
        yield start
        yield from inner

"""Units: "3.35 TB/s" as a number of SI base units, refused where the unit is missing or of another kind.

Decimal and binary prefixes are distinct (`80 GB` is 80e9 bytes, `80 GiB` 80 * 2^30), as are bytes and bits
(`400 Gbit/s` is `50 GB/s`).
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _with(prefixes: dict[str, int], unit: str, divisor: int = 1) -> dict[str, Fraction]:
    return {prefix + unit: Fraction(factor, divisor) for prefix, factor in prefixes.items()}


_BYTES = _DECIMAL | _BINARY
UNITS: dict[str, dict[str, Fraction]] = {
    "B": _with(_BYTES, "B"),
    "B/s": _with(_BYTES, "B/s") | _with(_DECIMAL, "bit/s", 8),
    "FLOP/s": _with(_DECIMAL, "FLOP/s") | _with(_DECIMAL, "OP/s"),
    "s": {"s": Fraction(1), "ms": Fraction(1, 10**3), "us": Fraction(1, 10**6), "ns": Fraction(1, 10**9)},
    "Hz": _with(_DECIMAL, "Hz"),
    "cycles": {"cycles": Fraction(1), "cycle": Fraction(1)},
    "W": {"W": Fraction(1), "kW": Fraction(1000)},
    "USD/h": {"USD/h": Fraction(1)},
}
"""By the unit that a quantity is kept in: every unit that it may be written in, as a number of the first.
Operations on integers (`TOP/s`) and on floats (`TFLOP/s`) are one kind."""

_LARGEST = 30  # decimal digits before the point; more is a slip, and would not fit a float with care


class WrongUnit(ValueError):
    """The unit is missing, unknown, or one of another kind of quantity."""


class Impossible(ValueError):
    """A number that no chip has: zero, negative, infinite, or none at all."""


def quantity(text: object, unit: str) -> int | float:
    """`text`, a number and a unit with a space between, in `unit`, a key of `UNITS`.

    Bytes are whole numbers, all else floats. Raises WrongUnit, Impossible.
    """
    known = ", ".join(list(UNITS[unit])[:6])
    if not isinstance(text, str):
        raise WrongUnit(f"{text!r} has no unit; write it as text with one of {known}")
    number, _, written = text.strip().partition(" ")
    written = written.strip()
    value = positive(number)
    if written not in UNITS[unit]:
        kind = next((other for other, spelled in UNITS.items() if written in spelled), None)
        what = f"is a number of {kind}" if kind else "has no unit" if not written else "has an unknown unit"
        raise WrongUnit(f"{text!r} {what}; write it with one of {known}")
    exact = value * UNITS[unit][written]
    if unit == "B":
        if exact.denominator != 1:
            raise Impossible(f"{text!r} is not a whole number of bytes")
        return int(exact)
    return float(exact)


def positive(text: object) -> Fraction:
    """A number above zero, exactly. Raises Impossible."""
    try:
        number = Decimal(str(text).replace(",", ""))
    except InvalidOperation:
        raise Impossible(f"{text!r} is not a number") from None
    if not number.is_finite() or number <= 0 or abs(number.adjusted()) > _LARGEST:
        raise Impossible(f"{text!r} is not a number above zero")
    return Fraction(number)


def shown(value: float, unit: str) -> str:
    """A quantity for people, with the largest decimal prefix that fits: 3.35e12 B/s -> 3.35 TB/s."""
    for prefix, factor in reversed(_DECIMAL.items()):
        if value >= factor and prefix + unit in UNITS[unit]:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"

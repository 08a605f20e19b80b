"""Figure: a value of a target's file, with how it is known and who says so.

    bandwidth = { value = "3.35 TB/s", published = "G2" }
    bandwidth = { value = "450 GB/s", derived = "half of 900 GB/s, the sum of both directions [G2]" }
    fixed = { value = "1.3 us", assumed = "nothing is published; as on Trainium" }

`published` names one or more keys of the file's [sources], `derived` says how, with the keys in brackets,
`assumed` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from porter.target import units

Kind = Literal["published", "derived", "assumed"]
KINDS: tuple[str, ...] = get_args(Kind)
Value = bool | int | float | str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, float], ...]


class Part(BaseModel):
    """A table of a target's file: unknown keys are refused, nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Part):
    """`value` in `unit` ("" for counts, shares and words), `text` as the file has it.

    `source` is what stands behind the marker `kind`: keys of [sources], a derivation, or a reason.
    """

    value: Value
    unit: str
    text: str
    kind: Kind
    source: str


def refused(code: str, what: str) -> PydanticCustomError:
    """An error that carries a PORT code through pydantic, which adds the key's path."""
    return PydanticCustomError(code, "{what}", {"what": what})


def _figure(read: Callable[[Any], Value], unit: str = "") -> Any:
    """The type of figures whose value `read` understands."""

    def build(raw: Any) -> Figure:
        if isinstance(raw, Figure):
            return raw
        if not isinstance(raw, dict):
            what = f'{raw!r} has no source; write {{ value = {_written(raw)}, published = "KEY" }}'
            raise refused("PORT-0305", what)
        if unknown := sorted(raw.keys() - {"value", *KINDS}):
            raise refused("PORT-0302", f"there is no key {unknown[0]!r} in a figure")
        if "value" not in raw:
            raise refused("PORT-0302", "the key 'value' is missing")
        kind, source = _marker(raw)
        try:
            value = read(raw["value"])
        except units.WrongUnit as error:
            raise refused("PORT-0303", str(error)) from error
        except units.Impossible as error:
            raise refused("PORT-0304", str(error)) from error
        return Figure(value=value, unit=unit, text=_text(raw["value"]), kind=kind, source=source)

    return Annotated[Figure, BeforeValidator(build)]


def _marker(raw: dict[str, Any]) -> tuple[Any, str]:
    """The one marker of a figure and what it says."""
    found = [kind for kind in KINDS if kind in raw]
    if len(found) != 1:
        what = f"it is {' and '.join(found)}" if found else "nothing says how it is known"
        raise refused("PORT-0305", f"{what}; a figure has one of {', '.join(KINDS)}")
    said = raw[found[0]]
    if not isinstance(said, str) or not said.strip():
        raise refused("PORT-0305", f"{found[0]} says nothing; give a source, a derivation or a reason")
    return found[0], said.strip()


def _written(raw: Any) -> str:
    return f'"{raw}"' if isinstance(raw, str) else str(raw).lower()


def _text(raw: Any) -> str:
    if isinstance(raw, bool):
        return "yes" if raw else "no"
    if isinstance(raw, list) and any(isinstance(pair, list) for pair in raw):
        return ", ".join(" in ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in raw)
    return " x ".join(map(str, raw)) if isinstance(raw, list) else str(raw)


def _quantity(unit: str) -> Any:
    return _figure(lambda raw: units.quantity(raw, unit), unit)


def _whole(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 < raw < 1 << 40:
        raise units.Impossible(f"{raw!r} is not a whole number above zero")
    return raw


def _power_of_two(raw: Any) -> int:
    size = units.quantity(raw, "B")
    if int(size) & (int(size) - 1):
        raise units.Impossible(f"{raw!r} is not a power of two")
    return int(size)


def _share(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 < raw <= 1:
        raise units.Impossible(f"{raw!r} is not a share: above 0, at most 1")
    return float(raw)


def _exponent(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 1 <= raw <= 64:
        raise units.Impossible(f"{raw!r} is not an exponent from 1 to 64")
    return float(raw)


def _points(raw: Any) -> tuple[tuple[int, float], ...]:
    pairs = raw if isinstance(raw, list) else []
    if len(pairs) < 2 or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise units.Impossible(f"{raw!r} is not a list of two or more [size, time]")
    found = tuple((int(units.quantity(a, "B")), float(units.quantity(b, "s"))) for a, b in pairs)
    if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(found)):
        raise units.Impossible("sizes do not grow from point to point, or a larger one takes less time")
    return found


def _flag(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise units.Impossible(f"{raw!r} is neither true nor false")
    return raw


def shape(rank: int) -> Any:
    """Figures whose value is `rank` whole numbers."""

    def read(raw: Any) -> tuple[int, ...]:
        if not isinstance(raw, list) or len(raw) != rank:
            raise units.Impossible(f"{raw!r} is not a list of {rank} whole numbers")
        return tuple(_whole(n) for n in raw)

    return _figure(read)


def choice(*words: str) -> Any:
    """Figures whose value is one of `words`."""

    def read(raw: Any) -> str:
        if raw not in words:
            raise units.Impossible(f"{raw!r} is none of {', '.join(words)}")
        return str(raw)

    return _figure(read)


def _words(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not raw or not all(isinstance(w, str) and w for w in raw):
        raise units.Impossible(f"{raw!r} is not a list of names")
    return tuple(raw)


def _word(raw: Any) -> str:
    if not isinstance(raw, str) or not raw:
        raise units.Impossible(f"{raw!r} is not a name")
    return raw


Size = _quantity("B")
Bandwidth = _quantity("B/s")
Rate = _quantity("FLOP/s")
Duration = _quantity("s")
Frequency = _quantity("Hz")
Cycles = _quantity("cycles")
Watts = _quantity("W")
Dollars = _quantity("USD/h")
Count = _figure(_whole)
Alignment = _figure(_power_of_two, "B")
Share = _figure(_share)
Exponent = _figure(_exponent)
Points = _figure(_points)
Flag = _figure(_flag)
Name = _figure(_word)
Names = _figure(_words)

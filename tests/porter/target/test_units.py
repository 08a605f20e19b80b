"""Units: text to SI, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.target import units


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.35 TB/s", "B/s", 3_350_000_000_000.0),
        ("400 Gbit/s", "B/s", 50_000_000_000.0),
        ("2,024 GiB/s", "B/s", 2024.0 * 1024**3),
        ("80 GB", "B", 80_000_000_000),
        ("80 GiB", "B", 85_899_345_920),
        ("1.5 KiB", "B", 1536),
        ("16384 B", "B", 16384),
        ("989.4 TFLOP/s", "FLOP/s", 989.4e12),
        ("3 POP/s", "FLOP/s", 3e15),
        ("1.3 us", "s", 1.3e-6),
        ("2 ms", "s", 2e-3),
        ("1.935 GHz", "Hz", 1.935e9),
        ("1 cycle", "cycles", 1.0),
        ("0.7 kW", "W", 700.0),
        ("6.88 USD/h", "USD/h", 6.88),
        ("1e3 W", "W", 1000.0),
    ],
)
def test_quantities_are_read_into_si(text: str, unit: str, value: float) -> None:
    found = units.quantity(text, unit)
    assert found == value
    assert isinstance(found, int if unit == "B" else float)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("3.35", "B/s"),
        (3.35, "B/s"),
        (80_000_000_000, "B"),
        (True, "B"),
        (None, "B"),
        ("", "W"),
        ("3.35 TB", "B/s"),
        ("80 Gb", "B"),
        ("80 gb", "B"),
        ("80 GB/s", "B"),
        ("3.35TB/s", "B/s"),
        ("989 TFLOPS", "FLOP/s"),
        ("6.88", "USD/h"),
        ("6.88 EUR/h", "USD/h"),
        ("6.88 USD", "USD/h"),
        ("700 kWh", "W"),
        ("1.5 KiHz", "Hz"),
        ("5 m", "s"),
    ],
)
def test_units_that_are_refused(text: object, unit: str) -> None:
    with pytest.raises((units.WrongUnit, units.Impossible)) as error:
        units.quantity(text, unit)
    if str(text)[:1].isdigit() and text != "3.35TB/s":
        assert error.type is units.WrongUnit


def test_a_unit_of_another_kind_is_named() -> None:
    with pytest.raises(units.WrongUnit, match=r"'80 GB/s' is a number of B/s; write it with one of B, kB"):
        units.quantity("80 GB/s", "B")


@pytest.mark.parametrize(
    "number", ["0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "x", "1.2.3", "0.0", "1/2"]
)
@pytest.mark.parametrize("unit", sorted(units.UNITS))
def test_numbers_that_are_refused(number: str, unit: str) -> None:
    with pytest.raises(units.Impossible):
        units.quantity(f"{number} {next(iter(units.UNITS[unit]))}", unit)


def test_bytes_are_whole() -> None:
    with pytest.raises(units.Impossible, match="whole number of bytes"):
        units.quantity("1.5 B", "B")
    assert units.quantity("0.5 KiB", "B") == 512


@given(st.decimals(min_value="0.001", max_value=10**6, places=3), st.data())
def test_the_nearest_float_of_the_exact_product(number: object, data: st.DataObject) -> None:
    unit = data.draw(st.sampled_from(sorted(set(units.UNITS) - {"B"})))
    spelled, factor = data.draw(st.sampled_from(sorted(units.UNITS[unit].items())))
    assert units.quantity(f"{number} {spelled}", unit) == float(Fraction(str(number)) * factor)


def test_no_spelling_is_of_two_kinds() -> None:
    spelled = [s for table in units.UNITS.values() for s in table]
    assert len(spelled) == len(set(spelled))
    assert all(units.UNITS[unit][unit] == 1 for unit in units.UNITS)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.35e12, "B/s", "3.35 TB/s"),
        (989e12, "FLOP/s", "989 TFLOP/s"),
        (7.0, "W", "7 W"),
        (0.5, "s", "0.5 s"),
    ],
)
def test_shown(value: float, unit: str, text: str) -> None:
    assert units.shown(value, unit) == text

import re
from pathlib import Path

import numpy as np
import pytest

from porter import formats
from porter.errors import PassError
from porter.formats.elements import FLOATS, INTEGERS, Float
from porter.formats.format import SCALES
from porter.formats.integers import Integer
from porter.formats.scales import RULES

DOCS = Path(__file__).parents[3] / "docs" / "formats.md"
SUFFIXED = ["int4-g32", "int4-r", "int2-t", "uint4-g7", "int8-b3", "fp8-e4m3fn-b128", "fp8-e3m4-t"]
ALL = [n for n in formats.names() if n != "int4"] + SUFFIXED


@pytest.mark.parametrize(
    ("name", "element", "bits", "group", "rows", "scale", "zero"),
    [
        ("fp32", "fp32", 32, 0, 1, "", ""),
        ("bf16", "bf16", 16, 0, 1, "", ""),
        ("int8", "int8", 8, 0, 1, "fp32", ""),
        ("int4-r", "int4", 4, 0, 1, "fp32", ""),
        ("int4-g32", "int4", 4, 32, 1, "fp32", ""),
        ("int3-t", "int3", 3, 0, 0, "fp32", ""),
        ("uint2-g16", "uint2", 2, 16, 1, "fp32", "code"),
        ("fp8-e4m3", "e4m3", 8, 0, 1, "fp32", ""),
        ("fp8-e4m3fn-b128", "e4m3fn", 8, 128, 128, "fp32", ""),
        ("mxfp8", "e4m3fn", 8, 32, 1, "e8m0", ""),
        ("mxint8", "int8", 8, 32, 1, "e8m0", ""),
        ("nvfp4", "e2m1", 4, 16, 1, "e4m3fn", ""),
        ("mx6", "mx6", 5, 16, 1, "e8m0", ""),
    ],
)
def test_parse(name, element, bits, group, rows, scale, zero):
    form = formats.parse(name)
    assert (form.name, form.element, form.bits, form.group, form.rows) == (name, element, bits, group, rows)
    assert (form.scale, form.zero, form.mx) == (scale, zero, "floor")
    assert form.elements.bits == bits


def test_mxfp8_is_one_format_under_two_names():
    short, long = formats.parse("mxfp8"), formats.parse("mxfp8-e4m3")
    assert formats.format.replace(short, name=long.name) == long


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("int5", "PORT-0250"),
        ("int4-g0", "PORT-0250"),
        ("int4-g", "PORT-0250"),
        ("int4-g32-t", "PORT-0250"),
        ("int8-t4", "PORT-0250"),
        ("fp8-e9m9", "PORT-0250"),
        ("fp8-e8m0", "PORT-0250"),
        ("fp8-mx9", "PORT-0250"),
        ("mxfp4-g16", "PORT-0250"),
        ("fp16-g32", "PORT-0250"),
        ("INT8", "PORT-0250"),
        ("auto", "PORT-0250"),
        ("", "PORT-0250"),
        ("fp8", "PORT-0252"),
        ("int4", "PORT-0252"),
    ],
)
def test_names_that_do_not_parse(name, code):
    with pytest.raises(PassError) as error:
        formats.parse(name)
    assert error.value.code == code
    assert error.value.hint


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (5, 45), (130, 256)])
def test_bits_per_weight_counts_all_that_is_stored(name, shape):
    form = formats.parse(name)
    e = formats.encode(form, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    stored = e.codes.size * form.bits
    if e.scales is not None:
        assert e.scales.dtype == SCALES[form.scale]
        assert e.scales.shape == form.groups(*shape)
        stored += 8 * e.scales.nbytes
    stored += e.zeros.size * form.bits if e.zeros is not None else 0
    stored += e.shifts.size if e.shifts is not None else 0
    stored += 32 if name == "nvfp4" else 0
    assert form.bits_per_weight(*shape) == pytest.approx(stored / e.codes.size, rel=1e-12)  # one division


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("mxfp8", 8.25),
        ("mxfp6-e3m2", 6.25),
        ("mxfp4", 4.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5 + 32 / 2**20),
        ("mx9", 9),
        ("mx6", 6),
        ("fp8-e4m3fn-b128", 8 + 32 / 128**2),
        ("int4-g32", 5),
        ("uint4-g32", 5.125),
    ],
)
def test_bits_per_weight_are_the_published_ones(name, stored):
    assert formats.parse(name).bits_per_weight(1024, 1024) == stored


def test_half_scales_and_real_zeros_count_too():
    form = formats.format.replace(formats.parse("uint4-g32"), scale="fp16", zero="real")
    assert form.bits_per_weight(2, 64) == 4 + 16 / 32 + 32 / 32


def section(heading: str) -> str:
    return DOCS.read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the page's table under `heading`, by their first cell."""
    text = DOCS.read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def element_row(element: Float | Integer) -> list[str]:
    if isinstance(element, Integer):
        return [str(element.bits), "–", "–", str(element.largest), "1", "no", "0"]
    layout = f"{element.signed:d}-{element.exponent}-{element.mantissa}"
    smallest = f"2^{int(np.log2(element.values[element.values > 0].min()))}"
    infinity = "yes" if np.isinf(element.values).any() else "no"
    row = [str(element.bits), layout, str(element.bias), f"{element.largest:.9g}", smallest, infinity]
    return [*row, str(np.isnan(element.values).sum())]


def format_row(form: formats.Format) -> list[str]:
    reach = (str(form.group) if form.group else "row") if form.scale else "–"
    packing = {8: "byte", 4: "ONNX", 2: "ONNX"}.get(form.bits, "stream") if form.scale else "value"
    bits = f"{form.bits_per_weight(4096, 4096):.4g}"
    words = [form.scale, form.zero, bits, form.rule, packing]
    return [form.element, str(form.bits), reach, *(word or "–" for word in words)]


def test_the_page_lists_every_element_as_the_code_has_it():
    wanted = {name: element_row(element) for name, element in {**FLOATS, **INTEGERS}.items()}
    assert {name: row[:7] for name, row in table("Elements").items()} == wanted


def test_the_page_lists_every_format_as_the_code_has_it():
    known = {name: formats.parse("int4-r" if name == "int4" else name) for name in formats.names()}
    assert table("Formats") == {name: format_row(form) for name, form in known.items()}


def test_the_page_explains_every_rule():
    assert re.findall(r"^- \*\*(\w+)\*\*", section("Rules for scales"), re.MULTILINE) == list(RULES)

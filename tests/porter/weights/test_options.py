"""What --weights, --method, --activations and --form make of a target's pipeline."""

from __future__ import annotations

import pytest

from porter import target
from porter.errors import OptionError, PassError
from porter.options import Options, pipeline_text

HOST = target.load("host")


def filled(**options: object) -> str:
    """What stands between the last fuse pass and the cache, and after the last pass."""
    text = pipeline_text(HOST, Options(**options)).replace("\n", "")
    middle = text.partition("fuse.matmul,clean.dead,")[2].partition(",kv.static_cache")[0]
    return f"{middle}|{text.partition('check.support')[2]}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "|"),
        ({"weights": "fp32"}, "|"),
        ({"weights": "int4"}, "quantize.rtn{format=int4-g32}|"),
        ({"weights": "int4-g64"}, "quantize.rtn{format=int4-g64}|"),
        ({"weights": "uint3-g128"}, "quantize.rtn{format=uint3-g128}|"),
        ({"weights": "fp8"}, "quantize.rtn{format=fp8-e4m3fn}|"),
        ({"weights": "fp8-e5m2-b128"}, "quantize.rtn{format=fp8-e5m2-b128}|"),
        ({"weights": "mxfp6-e2m3"}, "quantize.rtn{format=mxfp6-e2m3}|"),
        ({"weights": "bf16", "method": "rtn"}, "quantize.rtn{format=bf16}|"),
        ({"activations": "int8"}, "quantize.activations{format=int8}|"),
        (
            {"weights": "int8", "activations": "fp8"},
            "quantize.rtn{format=int8},quantize.activations{format=fp8-e4m3fn}|",
        ),
        ({"weights": "int8", "form": "contrib"}, "quantize.rtn{format=int8}|,quantize.contrib,kv.contrib"),
    ],
)
def test_options_fill_the_slot(options: dict[str, str], text: str) -> None:
    assert filled(**options) == text


def test_a_form_follows_a_pipeline_of_ones_own() -> None:
    text = pipeline_text(HOST, Options(pipeline="clean.dead", form="contrib"))
    assert text == "clean.dead,quantize.contrib,kv.contrib"


@pytest.mark.parametrize("scheme", ["int8", "kivi2", "fp8 recent=8", "key=int8-head value=fp8"])
def test_a_form_that_cannot_hold_a_cache_is_refused_at_once(scheme: str) -> None:
    with pytest.raises(PassError, match="PORT-0283"):
        pipeline_text(HOST, Options(kv=scheme, form="contrib"))
    assert "kv.quantize" in pipeline_text(HOST, Options(kv=scheme))
    assert "kv.quantize" in pipeline_text(HOST, Options(kv="fp8", form="contrib"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"weights": "int5"}, "PORT-0830"),
        ({"weights": "int4x-g32"}, "PORT-0830"),
        ({"weights": "int4-g0"}, "PORT-0830"),
        ({"activations": "mxfp4"}, "PORT-0830"),
        ({"weights": "int8", "method": "contrib"}, "PORT-0258"),
        ({"weights": "int8", "method": "gtpq"}, "PORT-0258"),
        ({"method": "rtn"}, "PORT-0258"),
        ({"weights": "fp32", "method": "rtn"}, "PORT-0258"),
        ({"form": "qdq"}, "PORT-0259"),
        ({"pipeline": "clean.dead", "method": "rtn"}, "PORT-0835"),
        ({"pipeline": "clean.dead", "activations": "int8"}, "PORT-0835"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, str], code: str) -> None:
    with pytest.raises(OptionError, match=code):
        pipeline_text(HOST, Options(**options))

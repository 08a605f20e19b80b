import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from porter.errors import PassError
from porter.kv import PRESETS, Scheme, Side, parse, text_of
from porter.kv.scheme import ELEMENTS, STATIC

SIDES = st.fixed_dictionaries(
    {},
    optional={
        "element": st.sampled_from(ELEMENTS),
        "along": st.sampled_from(["channels", "tokens"]),
        "group": st.sampled_from([0, 5, 32]),
        "scale": st.sampled_from(["fp16", "fp32"]),
        "hybrid": st.booleans(),
        "static": st.sampled_from(["", *STATIC]),
        "mixed": st.booleans(),
        "residual": st.booleans(),
        "rotate": st.booleans(),
        "more": st.sampled_from(["", "uint4"]),
    },
)


def side_or_none(fields):
    try:
        return Side(**fields)
    except PassError:  # the refusals have a test of their own
        return None


@given(key=SIDES, value=SIDES, counts=st.tuples(*[st.integers(0, 200)] * 4), normalize=st.booleans())
def test_the_text_of_every_scheme_reads_back(key, value, counts, normalize):
    key, value = side_or_none(key), side_or_none(value)
    assume(key is not None and value is not None and bool(key.more) == bool(value.more))
    shared = {"high": "bf16"} | ({"share": 0.3} if key.more else {})
    shared |= {"copy": "bf16"} if key.bounded and value.bounded and not any(counts[:2]) else {}
    scheme = Scheme(key, value, *counts[:2], "fp16", normalize, *counts[2:])
    scheme = dataclasses.replace(scheme, **shared)
    assert parse(text_of(scheme)) == scheme


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_name_and_a_text(name):
    assert parse(name) == parse(f"scheme={name}") == parse(PRESETS[name]) == parse(text_of(parse(name)))


def test_options_override_a_preset_in_any_order():
    scheme = parse("scheme=innerq rotate recent=64 sink=4 key=int8 value=int4 keep-first=1 keep-last=2")
    assert scheme == Scheme(
        Side("int8", rotate=True),
        Side("int4", rotate=True),
        recent=64,
        sink=4,
        normalize=True,
        keep_first=1,
        keep_last=2,
    )
    assert parse("int8 key=turboquant4").key == parse("turboquant4").key
    assert parse("int8 key=turboquant4").value == Side("int8")
    assert parse("kivi2 rotate=key").value.rotate is False
    assert parse("int8 scales=fp16 static=head").key == Side("int8", scale="fp16", static="head")
    assert parse("fp8 static=none") == parse("fp8-dynamic")
    assert parse("int8 key=triaxial value=triaxial").share == parse("triaxial").share


@pytest.mark.parametrize(
    "text",
    ["int5", "int8 innerq", "recent", "recent=x", "recent=-1", "recent=", "int8 rotate=both", "normalize=1",
     "key=int4-q32", "key=", "key", "key=int4-g0", "share=a", "scales", "scheme=none", "int8 high"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(PassError) as caught:
        parse(text)
    assert caught.value.code == "PORT-0270"


@pytest.mark.parametrize(
    "text",
    ["key=int4-tokens", "key=fp16-g32", "key=lloyd4", "key=lloyd4-mixed-rotate", "key=int4-g32-head",
     "key=int8-hybrid", "key=uint4-tensor", "key=int4-residual", "int8 high=int8", "int8 share=0.5",
     "key=uint2+uint4-g32 value=int8", "triaxial share=2", "key=int9",
     "certified recent=4", "certified sink=1",
     "int8 copy=fp32 scales=fp16", "fp8 copy=fp32", "certified value=uint4", "certified key=int8-g4-tokens",
     "key=uint2+e4m3fn-g32 value=uint2+uint4"],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(text):
    with pytest.raises(PassError) as caught:
        parse(text)
    assert caught.value.code == "PORT-0271"


def test_first_and_last_layers_are_kept():
    scheme = parse("innerq keep-first=1 keep-last=2")
    kinds = [scheme.layer(i, 5).key.element for i in range(5)]
    assert kinds == ["fp16", "int3", "int3", "fp16", "fp16"]
    assert scheme.layer(1, 5) == parse("innerq")


@pytest.mark.parametrize(
    ("size", "extra"),
    [(128, 32), (256, 64), (64, 16), (96, 24), (80, 16), (48, 16), (32, 8), (16, 4), (8, 2)],
)
def test_a_quarter_of_the_channels_has_one_bit_more(size, extra):
    side = parse("turboquant2.5").key
    assert side.sets(size) == [(extra, 3), (size - extra, 2)]
    assert parse("turboquant3").key.sets(size) == [(size, 3)]


@given(recent=st.integers(0, 9), sink=st.integers(0, 5), group=st.integers(1, 7), tokens=st.integers(0, 60))
def test_tokens_become_codes_once_their_group_is_complete_and_older_than_the_window(
    recent, sink, group, tokens
):
    side = Side("int4", "tokens", group)
    scheme = Scheme(side, side, recent, sink)
    groups = [range(sink + i * group, sink + (i + 1) * group) for i in range(60)]
    assert scheme.rounded(side, tokens) == sum(len(g) for g in groups if g[-1] < tokens - recent)
    assert tokens - scheme.rounded(side, tokens) <= sink + scheme.ring(side)


def test_a_tolerance_is_read_and_printed():
    assert parse("certified tolerance=0.25").tolerance == 0.25
    assert parse(text_of(parse("certified tolerance=0.25"))) == parse("certified tolerance=0.25")
    assert parse("certified tolerance=0").tolerance == 0
    for text in (
        "int8 tolerance=0.5",
        "certified tolerance=-1",
        "certified tolerance=inf",
        "certified tolerance=nan",
    ):
        with pytest.raises(PassError, match="PORT-0271"):
            parse(text)
    with pytest.raises(PassError, match="PORT-0270"):
        parse("certified tolerance=much")

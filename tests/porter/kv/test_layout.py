from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.kv import PRESETS, Cache, Constants, bits_per_value, buffers, bytes_of, parse

DOCS = Path(__file__).parents[3] / "docs" / "kv.md"
CONSTANTS = Constants(
    np.ones((1, 1, 1), np.float32),
    np.ones((1, 1, 1), np.float32),
    np.ones((1, 1), np.float32),
    more=np.array([False]),
)


# At D=128 with an endless context windows weigh nothing: bits of codes + (step and minimum) / group.
RATES = {
    "fp16": 16,
    "int8": 8 + 32 / 128,
    "int4": 4 + 32 / 128,
    "fp8": 8,
    "kivi2": 2 + 32 / 32,
    "kivi4": 4 + 32 / 32,
    "innerq": 3 + 16 / 32,
    "innerq-small": (3 + 2) / 2 + 16 / 32,
    "innerq-hybrid": ((3 + 16 / 32) + (2 + 32 / 32)) / 2,
    "turboquant4": 4 + 16 / 128,
    "turboquant3": 3 + 16 / 128,
    "turboquant3.5": 3.5,
    "turboquant2.5": 2.5,
    "certified": ((8 + 32 / 128) + (4 + 32 / 32)) / 2 + 32,
    "int8 scales=fp16": 8 + 16 / 128,
    "turboquant3 key=lloyd2-rotate-residual-fp16": ((2 + 1 + 32 / 128) + (3 + 16 / 128)) / 2,
}


@pytest.mark.parametrize("text", RATES)
def test_bits_of_a_long_context_are_those_of_codes_and_steps(text):
    scheme = parse(text)
    capacity = 1 << 22
    ends = bytes_of(scheme, 128, 1, scheme.sink + scheme.recent + 32) if scheme.recent else 0
    slack = 8 * ends / (2 * capacity * 128)  # what the windows and a group waiting for its end may add
    assert RATES[text] - slack <= bits_per_value(scheme, 128, 1, capacity) <= RATES[text] + slack
    assert bits_per_value(parse("certified"), 128, 1, 64, copy=False) == RATES["certified"] - 32


def test_windows_and_kept_layers_count():
    # 32 + 96 tokens of 16 bits, a group of 32 more of values, and 1024 - 128 of 3.5 bits.
    keys = 128 * 16 + 896 * 3.5
    values = 160 * 16 + 896 * 3.5
    assert bits_per_value(parse("innerq"), 128, 8, 1024) == (keys + values) / 2 / 1024
    some = parse("int8 keep-first=1")
    assert bits_per_value(some, 128, 8, 1024, layers=4) == (3 * 8.25 + 16) / 4


@given(
    name=st.sampled_from(sorted(PRESETS)),
    size=st.integers(1, 40),
    heads=st.integers(1, 3),
    capacity=st.integers(1, 300),
    batch=st.integers(1, 2),
)
def test_the_bytes_are_those_of_the_arrays(name, size, heads, capacity, batch):
    scheme = parse(name)
    state = Cache(scheme, size, heads, capacity, batch, CONSTANTS).state
    planned = buffers(scheme, size, heads, capacity, batch)
    assert {b.name: b.nbytes for b in planned} == {name: array.nbytes for name, array in state.items()}
    assert bytes_of(scheme, size, heads, capacity, batch) == sum(a.nbytes for a in state.values())
    bits = bits_per_value(scheme, size, heads, capacity)
    assert bits * 2 * heads * capacity * size == pytest.approx(8 * bytes_of(scheme, size, heads, capacity))


def test_the_buffers_of_innerq_are_those_of_the_documentation():
    found = {b.name: (b.shape, str(b.dtype)) for b in buffers(parse("innerq-hybrid"), 80, 2, 1000, 3)}
    assert found == {
        "key_codes": ((3, 2, 872, 30), "uint8"),
        "key_scale": ((3, 2, 872, 3), "float16"),
        "key_window": ((3, 2, 128, 80), "float16"),
        "value_codes": ((3, 2, 864, 20), "uint8"),
        "value_scale": ((3, 2, 27, 80), "float16"),
        "value_min": ((3, 2, 27, 80), "float16"),
        "value_window": ((3, 2, 160, 80), "float16"),
    }


def test_a_cache_shorter_than_its_windows_is_all_window():
    found = {b.name: b.shape for b in buffers(parse("innerq"), 80, 2, 20)}
    assert found == {"key_window": (1, 2, 20, 80), "value_window": (1, 2, 20, 80)}
    assert bits_per_value(parse("innerq"), 80, 2, 20) == 16


def test_tokens_with_more_bits_have_room_of_their_own():
    found = {b.name: b.shape for b in buffers(parse("triaxial recent=0 share=0.25"), 64, 1, 100)}
    assert found["key_codes"] == (1, 1, 75, 16)
    assert found["key_more_codes"] == (1, 1, 25, 32)
    assert found["slots"] == (1, 1, 100, 1)


def test_the_documentation_lists_every_scheme_with_its_bits(request):
    def row(name):
        sizes = [(128, 2048), (128, 32768), (64, 32768)]
        bits = [f"{bits_per_value(parse(name), size, 8, capacity):.3f}" for size, capacity in sizes]
        return f"| `{name}` | `{PRESETS[name]}` | {' | '.join(b.rstrip('0').rstrip('.') for b in bits)} |"

    lines = DOCS.read_text("utf-8").splitlines()
    start = lines.index("|---|---|---|---|---|") + 1
    end = start + next(i for i, line in enumerate(lines[start:]) if not line)
    if request.config.getoption("--update-golden"):
        lines[start:end] = map(row, PRESETS)
        DOCS.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    assert lines[start:end] == [row(name) for name in PRESETS]

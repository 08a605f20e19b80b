"""Casting by kernels and threads gives what porter.formats gives, bit by bit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from porter import formats
from porter.formats import Format, rounding
from porter.lower import casting

# Every element that a kernel rounds to, every kind of scale, groups of one, odd, one vector, more than numpy
# adds up in one block (129), and what no kernel does (micro-exponents, wide floats, 256 for int4).
NAMES = [
    *(
        "int8",
        "int8-g1",
        "int8-g5",
        "int8-g33",
        "int8-t",
        "int8-b7",
        "int4-g7",
        "int4-g9",
        "int4-g32",
        "int4-g33",
    ),
    *(
        "int4-g129",
        "int4-g256",
        "int4-r",
        "int4-b16",
        "int3-g32",
        "int2-g16",
        "uint8",
        "uint4-g32",
        "uint4-b5",
    ),
    *("uint2-g9", "fp8-e4m3fn", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3fnuz", "fp8-e5m2fnuz", "fp8-e4m3b11fnuz"),
    *("fp8-e3m4", "fp8-e4m3fn-g32", "fp8-e4m3fn-b128", "fp8-e5m2-t", "mxfp8", "mxfp8-e5m2", "mxfp6-e2m3"),
    *("mxfp6-e3m2", "mxfp4", "mxint8", "nvfp4", "mx9", "mx6", "fp16", "bf16"),
]
EDGES = (0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 448.0, -8.0)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the fast path, in several blocks."""
    monkeypatch.setattr(casting, "SMALL", 0)
    monkeypatch.setattr(casting, "BLOCK", 600)


def same(form: Format, values: np.ndarray, threads: int = 2) -> None:
    wanted, got = formats.encode(form, values), casting.encode(form, values, threads=threads)
    for field in dataclasses.fields(wanted):
        a, b = getattr(wanted, field.name), getattr(got, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 96), (17, 133), (2, 300), (3, 5, 64), (2, 1, 45)])
def test_weights_like_a_models(name: str, shape: tuple[int, ...]) -> None:
    same(formats.parse(name), np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["fp16", "bf16"])
def test_scales_of_half_precision(name: str, scale: str) -> None:
    form = formats.parse(name)
    if form.scale == "fp32":
        form = dataclasses.replace(form, scale=scale)
        same(form, np.random.default_rng(1).normal(0, 1, (9, 70)).astype(np.float32))


@pytest.mark.parametrize("rounding_", ["floor", "ceil", "larger"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "mxint8"])
def test_scales_that_are_powers_of_two(name: str, rounding_: str) -> None:
    form = dataclasses.replace(formats.parse(name), mx=rounding_)
    same(form, np.random.default_rng(2).normal(0, 3, (9, 70)).astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NAMES),
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 70)),
        elements=st.one_of(
            st.floats(-(2.0**100), 2.0**100, width=32),  # zeros of both signs and subnormals among them
            st.integers(-40, 40).map(lambda n: n / 8),  # ties
            st.sampled_from([float(np.float32(x)) for x in EDGES]),
        ),
    ),
)
def test_any_finite_values(name: str, values: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        same(formats.parse(name), values)


@pytest.mark.parametrize("name", ["int4-g32", "uint4-g32", "fp8-e5m2", "mxfp4", "nvfp4"])
def test_values_of_any_layout_and_float_type(name: str) -> None:
    form, values = formats.parse(name), np.random.default_rng(3).normal(0, 1, (70, 41)).astype(np.float32)
    same(form, values.T)
    same(form, values[::2, 3:])
    same(form, values.astype(np.float16))
    same(form, values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("length", [9, 16, 31, 32, 33, 64, 127, 128, 129])
def test_squares_are_added_in_numpys_order(length: int) -> None:
    """Of nearly equal errors the order of the sum decides, so int4's choice shows it: none may differ."""
    form = formats.parse(f"int4-g{length}")
    values = np.random.default_rng(length).integers(-100, 101, (400, 2 * length)).astype(np.float32)
    same(form, values)


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(0, 1, (60, 50)).astype(np.float32)
    for threads in (1, 3, 8):
        same(formats.parse("int4-g32"), values, threads)
    monkeypatch.setenv("PORTER_THREADS", "3")
    assert casting.available() == 3


def test_a_failure_in_a_thread_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def broken(*_: object) -> None:
        seen.append(threading.current_thread().name)
        raise MemoryError("no room")

    monkeypatch.setattr(rounding, "nearest", broken)
    monkeypatch.setattr(casting._Caster, "_code", broken)
    with pytest.raises(MemoryError, match="no room"):
        casting.encode(formats.parse("nvfp4"), np.ones((90, 64), np.float32))
    assert seen
    assert all(name.startswith("porter-cast") for name in seen)


def test_kernels_compile_fast_and_give_the_same_bits_in_another_process() -> None:
    """Under 2 s for the first matrix, TVM's own start not counted."""
    script = """
import hashlib, time
import numpy as np
from porter import formats
from porter.lower import casting
values = np.random.default_rng(5).normal(0, 1, (256, 4096)).astype(np.float32)
start = time.process_time()
made = [casting.encode(formats.parse(n), values, threads=1) for n in ("int4-g32", "fp8-e4m3fn")]
took = time.process_time() - start
print(hashlib.sha256(b"".join(m.codes.tobytes() + m.scales.tobytes() for m in made)).hexdigest(), took)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (one, first), (two, second) = (r.stdout.split() for r in runs)
    assert one == two
    assert min(float(first), float(second)) < 2

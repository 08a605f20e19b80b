"""Kernels on WebGPU, in software where there is no GPU, beside the same functions compiled for this CPU.

Both compute the same float32 operations; sums may be taken in another order, and WGSL lets a compiler fuse a
product with a sum, so that a sum of n terms may differ by n units in the last place of its largest term.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from decoders import tiny_decoder
from lowering import imported
from simt import on_device, on_host
from tvm import tirx

from porter import target
from porter.errors import TargetError
from porter.lower import build
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.importer.program import Importer
from porter.lower.kernels.attention import Attention, Cache
from porter.lower.kernels.define import define, i64, loop, store
from porter.lower.kernels.layout import Layout
from porter.lower.simt import kernels
from porter.lower.simt.language import device, language
from porter.run.webgpu import WebGPU
from porter.target import TargetSpec

ULP = 2.0**-23
SIZES = {"b": 2, "s": 3, "m": 6, "n": 5, "t": 4, "batch": 2, "sequence": 3, "past": 7}
Compare = Callable[..., None]


@pytest.fixture
def compare(machine: WebGPU, webgpu: TargetSpec) -> Compare:
    def run(function: tirx.PrimFunc, terms: int, sizes: dict[str, int] = SIZES, **given: np.ndarray) -> None:
        arguments = [given.get(p.name, _made(p, sizes, i)) for i, p in enumerate(function.params)]
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        want, got = on_host(function, copies), on_device(function, arguments, webgpu, machine)
        assert any(
            isinstance(w, np.ndarray) and not np.array_equal(w, a)
            for w, a in zip(want, arguments, strict=True)
        ), "the function wrote nothing"
        for a, b in zip(want, got, strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                scale = max(1.0, float(np.abs(a).max(initial=0)))
                np.testing.assert_allclose(b, a, rtol=0, atol=terms * ULP * scale)
            elif isinstance(a, np.ndarray):
                np.testing.assert_array_equal(b, a)

    return run


def _made(parameter: tirx.Var, sizes: dict[str, int], seed: int) -> np.ndarray | int:
    if not tirx.is_buffer_var(parameter):
        return sizes[parameter.name]
    shape = [int(d) if isinstance(d, tirx.IntImm) else sizes[d.name] for d in parameter.shape]
    rng, dtype = np.random.default_rng(seed), str(parameter.dtype)
    if "float" in dtype:
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 4, shape).astype(dtype)


@pytest.mark.parametrize("m", [1, 6, 33])
@pytest.mark.parametrize(("n", "k"), [(24, 40), (7, 33), (64, 172)])
def test_products(compare: Compare, webgpu: TargetSpec, m: int, n: int, k: int) -> None:
    compare(Chip(Profile(webgpu)).matmul(Layout("fp32", n, k, lanes=1)), 2 * k, SIZES | {"m": m})


CODES = {
    "int8": Layout("int8", 24, 70, group=70, lanes=1),
    "int4": Layout("int4", 24, 70, group=32, lanes=1),
    "uint4 with zeros": Layout("uint4", 24, 64, group=32, zero="uint4", lanes=1),
    "int3": Layout("int3", 8, 64, group=32, lanes=1),
    "fp8": Layout("e4m3fn", 24, 64, group=64, lanes=1),
    "fp8-e5m2": Layout("e5m2", 24, 64, group=64, lanes=1),
    "mxfp4": Layout("e2m1", 24, 64, group=32, scale="e8m0", lanes=1),
    "fp16": Layout("fp16", 24, 33, lanes=1),
    "bf16": Layout("bf16", 24, 33, lanes=1),
}


@pytest.mark.parametrize("name", CODES)
def test_products_of_codes_that_lie_packed(machine: WebGPU, webgpu: TargetSpec, name: str) -> None:
    layout = CODES[name]
    function = Chip(Profile(webgpu)).matmul(layout)
    rng = np.random.default_rng(1)
    arguments: list[np.ndarray] = [rng.standard_normal((3, layout.k)).astype(np.float32)]
    for part, shape, dtype in layout.buffers():
        if dtype in ("float16", "bfloat16", "float32"):
            arguments.append(_floats(rng, shape, dtype))
        elif part == "scale":
            arguments.append(rng.integers(120, 130, shape).astype(dtype))  # e8m0: near 1
        else:
            arguments.append(_codes(rng, shape, dtype, 0x78 if "fp8" in name else 256))  # finite numbers
    arguments.append(np.zeros((3, layout.n), np.float32))
    weights = range(1, len(arguments) - 1)
    want = on_host(function, [a.copy() for a in arguments])[-1]
    got = on_device(function, arguments, webgpu, machine, constant=weights)[-1]
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * layout.k * ULP * np.abs(want).max())


def _codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, top: int) -> np.ndarray:
    if dtype == "uint16":  # bfloat16
        return _floats(rng, shape, "bfloat16").view(np.uint16)
    return rng.integers(0, top, shape).astype(np.uint8).view(dtype)


def _floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("offset", ["lengths", "end", "start"])
@pytest.mark.parametrize("steps", [1, 3])
def test_attention(compare: Compare, webgpu: TargetSpec, offset: str, steps: int) -> None:
    length = 40 if offset == "lengths" else "t"
    spec = Attention(4, 2, Cache("fp32", 8), Cache("fp32", 8), length, 8**-0.5, True, offset, 0.0)
    function = Chip(Profile(webgpu)).attention(spec)
    lengths = {"lengths": np.array([7, 39], np.int64)} if offset == "lengths" else {}
    compare(function, 100, SIZES | {"s": steps, "t": 9}, **lengths)


def test_norms_and_rotations(compare: Compare, webgpu: TargetSpec) -> None:
    chip = Chip(Profile(webgpu))
    compare(chip.rms_norm(37, 1e-5), 60)
    compare(chip.rotary(4, 8, 8, interleaved=False, table=None), 4)
    compare(chip.rotary(4, 8, 6, interleaved=True, table=16), 4)


def test_appending_in_place(compare: Compare, webgpu: TargetSpec) -> None:
    chip = Chip(Profile(webgpu))
    starts = np.array([2, 14], np.int64)  # one row runs past the end
    compare(chip.append(2, 16, 4, "float32"), 0, starts=starts)
    compare(chip.append(2, 16, 4, "float32", circular=True), 0, starts=starts)


def test_every_function_of_a_decoder(compare: Compare, webgpu: TargetSpec) -> None:
    """Those that Relax makes among them: elementwise, transposes, splits."""
    source = tiny_decoder(positions="range", mask="bool", tied=False)
    found = Importer(source, {"batch": 4, "sequence": 8, "past": 32}, Chip(Profile(webgpu))).run()
    module = build.planned(found.module, build.tvm_target(webgpu), found.sources).module
    tried = 0
    for name, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        simple = all(
            isinstance(d, tirx.IntImm | tirx.Var)
            for p in function.params
            if tirx.is_buffer_var(p)
            for d in p.shape
        )
        known = {
            d.name
            for p in function.params
            if tirx.is_buffer_var(p)
            for d in p.shape
            if isinstance(d, tirx.Var)
        }
        if simple and known <= SIZES.keys() and all(tirx.is_buffer_var(p) for p in function.params):
            compare(function.with_attr("global_symbol", name.name_hint), 100)
            tried += 1
    assert tried >= 12


def test_a_loop_without_blocks_is_dealt_out(compare: Compare) -> None:
    def body(x, y, n):
        with loop(n, "parallel") as i:
            store(y, x[i] + x[n - i64(1) - i], i)

    spec = [("x", ("n",), "float32"), ("y", ("n",), "float32")]
    compare(define("pairs", spec, body), 0, {"n": 131})
    made = kernels.compiled(
        define("pairs", spec, body), device(target.load("webgpu")), language(target.load("webgpu"))
    )
    assert made.dispatches[0].kernel.block == [64, 1, 1]


def test_groups_beyond_an_axis_are_spread(machine: WebGPU, webgpu: TargetSpec) -> None:
    """65,539 groups of 64 are two rows of 32,770, and none writes past the end."""
    count = 65538 * 64 + 1

    def body(x, y, n, m):
        with loop(n, "parallel") as i:
            store(y, x[i] + x[i], i)

    function = define("double", [("x", ("n",), "float32"), ("y", ("m",), "float32")], body)
    y = on_device(function, [np.ones(count, np.float32), np.zeros(count + 64, np.float32)], webgpu, machine)[
        1
    ]
    assert y.sum(dtype=np.float64) == 2 * count
    np.testing.assert_array_equal(y[-65:], [2] + [0] * 64)


def test_a_language_that_is_not_written_is_refused(webgpu: TargetSpec) -> None:
    other = webgpu.model_copy(update={"tvm": {"kind": "metal"}})
    with pytest.raises(TargetError, match="metal") as caught:
        language(other)
    assert caught.value.code == "PORT-0450"


def test_what_no_schedule_takes_is_refused(webgpu: TargetSpec) -> None:
    source = imported(
        tiny_decoder(), {"batch": 2, "sequence": 4, "past": 8}
    )  # the host's kernels: vectors of eight
    module = build.planned(source.module, build.tvm_target(target.load("host")), source.sources).module
    function = next(f for g, f in module.functions.items() if g.name_hint.startswith("attention"))
    with pytest.raises(TargetError) as caught:
        kernels.compiled(function.with_attr("global_symbol", "attention"), device(webgpu), language(webgpu))
    assert caught.value.code == "PORT-0451"

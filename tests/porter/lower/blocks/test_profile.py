"""Which unit multiplies what: every target's weights have kernels, and what has none is refused."""

from __future__ import annotations

import tomllib
from importlib import resources

import numpy as np
import onnx_ir as ir
import pytest
from lowering import model, with_weights

from porter import formats, target
from porter.context import Context
from porter.errors import TargetError
from porter.lower.blocks.operand import MANTISSA
from porter.lower.blocks.placement import placements
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.importer.program import Importer
from porter.lower.importer.templates import Multiplied
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.naming import format_name
from porter.pipeline import Pipeline
from porter.target import reading

CHIPS = [name for name in target.names() if name != "host"]


@pytest.mark.parametrize("name", CHIPS)
def test_every_format_that_a_target_reads_is_multiplied(name: str) -> None:
    profile = Profile(target.load(name))
    for weights in profile.spec.weights:
        unit = profile.unit(weights)
        assert unit.x.form in MANTISSA  # float activations
        assert unit.step >= 1
        native = profile.spec.matrix.formats if profile.spec.matrix else {}
        assert unit.name == "" or unit.step == native[unit.name].step.value[2]
    for given in profile.spec.activations:
        if given != "fp32":
            unit = profile.unit(given, given)
            assert (unit.x.form, unit.w.form) == (given, given), "rounded for a unit that does not take it"


@pytest.mark.parametrize(
    ("name", "weights", "activations", "operands", "sums"),
    [
        ("tpu-v6e", "int8", "int8", ("int8", "int8"), "int32"),
        ("tpu-v6e", "int8", "", ("bf16", "bf16"), "float32"),
        ("tpu-v6e", "int4-g32", "int8", ("bf16", "bf16"), "float32"),
        ("tpu-7x", "fp8-e4m3fn", "", ("bf16", "fp8-e4m3fn"), "float32"),
        ("h100", "fp8-e4m3fn", "fp8-e4m3fn", ("fp8-e4m3fn", "fp8-e4m3fn"), "float32"),
        ("h100", "fp32", "", ("tf32", "tf32"), "float32"),
        ("trainium2", "fp32", "", ("fp32", "fp32"), "float32"),
        ("trainium1", "fp8-e4m3", "", ("bf16", "bf16"), "float32"),
        ("webgpu", "mxfp4", "", ("fp32", "fp32"), "float32"),
    ],
)
def test_operands(name: str, weights: str, activations: str, operands: tuple, sums: str) -> None:
    unit = Profile(target.load(name)).unit(weights, activations)
    assert (unit.x.form, unit.w.form) == operands
    assert unit.sums == sums
    assert unit.x.flush == (name.startswith("tpu"))


def product(weight: np.ndarray) -> ir.Model:
    """x [m, k] times a constant."""
    k, n = weight.shape
    text = f"agraph (float[m,{k}] x, float[{k},{n}] w) => (float[m,{n}] y) {{ y = MatMul(x, w) }}"
    return with_weights(model(text), w=weight)


@pytest.mark.parametrize(
    ("target_name", "flavour", "largest"),
    [
        ("trainium1", "fp8-e4m3", 240),
        ("trainium2", "fp8-e4m3", 240),
        ("tpu-v5e", "fp8-e4m3b11fnuz", 30),
        ("tpu-v6e", "fp8-e4m3b11fnuz", 30),
        ("h100", "fp8-e4m3fn", 448),
    ],
)
def test_fp8_weights_have_the_target_s_flavour_and_its_scales(
    target_name: str, flavour: str, largest: float
) -> None:
    spec = target.load(target_name)
    assert spec.flavour("fp8") == flavour
    weight = np.random.default_rng(0).standard_normal((32, 48)).astype(np.float32)
    source = product(weight)
    Pipeline.parse("quantize.rtn{format=fp8 skip=}").run(source, Context(spec, {}, 0))
    importer = Importer(source, {"m": 4}, Chip(Profile(spec)))
    importer.run()
    assert [m.format for m in importer.multiplied.values()] == [flavour]
    made = {p.name: p.make() for p in importer.weights.parameters}
    codes, scales = (
        next(a for a in made.values() if (a.dtype == np.uint8) == coded) for coded in (True, False)
    )
    values = formats.parse(flavour).elements.decode(codes[:, :, 0])
    assert np.abs(values).max(1).tolist() == [largest] * 48  # each row reaches the flavour's largest number
    wanted = np.abs(weight).max(0) / np.float32(largest)
    np.testing.assert_allclose(scales.reshape(-1), wanted, rtol=2.0**-23)  # one rounding of the quotient


@pytest.mark.parametrize(("target_name", "rule"), [("trainium2", "larger"), ("maia-200", "floor")])
def test_mx_scales_follow_the_target_s_rule(target_name: str, rule: str) -> None:
    spec = target.load(target_name)
    assert spec.mx == rule
    weight = np.full((32, 32), 7.9, np.float32)  # 7.9 = 1.975 * 2^2: the exponent of the block is in doubt
    source = product(weight)
    Pipeline.parse("quantize.rtn{format=mxfp4 skip=}").run(source, Context(spec, {}, 0))
    importer = Importer(source, {"m": 4}, Chip(Profile(spec)))
    importer.run()
    scale = next(p.make() for p in importer.weights.parameters if p.shape == (32, 1, 1))
    # E2M1 reaches 6 = 1.5 * 2^2. Floor takes 2^0, under which 7.9 saturates to 6; larger takes 2^1: 4 * 2.
    assert set(scale.reshape(-1)) == {127 + (rule == "larger")}


def test_a_format_without_a_place_is_refused() -> None:
    with pytest.raises(TargetError, match="no place for products with int16") as caught:
        Profile(target.load("h100")).unit("int16")
    assert caught.value.code == "PORT-0430"


def test_a_narrow_place_needs_activations_of_its_kind() -> None:
    keys = tomllib.loads((resources.files("porter.targets") / "tpu-v6e.toml").read_text())
    keys["numerics"]["widened"]["int4"] = {"value": "int8", "assumed": "for this test"}
    profile = Profile(reading.checked(keys, "test"))
    assert profile.unit("int4-g32").w.form == "bf16"
    unit = profile.unit("int4-g32", "int8")
    assert (unit.x.form, unit.w.form, unit.sums) == ("int8", "int8", "int32")


def test_placement_names_every_class_once() -> None:
    profile = Profile(target.load("h100"))
    program = [Multiplied("weights", "int4-g32")] * 3 + [Multiplied("weights", "fp8-e4m3fn", "fp8-e4m3fn")]
    program += [Multiplied("cache", "fp32")] * 2 + [
        Multiplied("cache", "int8"),
        Multiplied("tensors", "fp32"),
    ]
    assert [str(p) for p in placements(profile, program)] == [
        "int4-g32 weights (3 matrices): widened to bf16 on the matrix unit",
        "fp8-e4m3fn weights beside fp8-e4m3fn (1 matrix): native on the matrix unit",
        "fp32 activations (3 products): emulated in bf16 on the matrix unit",
        "fp8-e4m3fn activations (1 product): native on the matrix unit",
        "fp32 cache (2 sides): emulated in tf32 on the matrix unit",
        "int8 cache (1 side): widened to tf32 on the matrix unit",
        "fp32 tensors (1 product): emulated in tf32 on the matrix unit",
        "norms, softmax, rotations and all else: fp32 on the vector unit",
    ]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout("bf16", 4, 64), "bf16"),
        (Layout("int4", 4, 64, 32), "int4-g32"),
        (Layout("int8", 4, 64, 64), "int8"),
        (Layout("int8", 4, 64, 64, rows=0), "int8-t"),
        (Layout("e4m3fn", 256, 256, 128, rows=128), "fp8-e4m3fn-b128"),
        (Layout("e4m3fn", 4, 64, 32, scale="e8m0"), "mxfp8"),
        (Layout("e2m1", 4, 64, 32, scale="e8m0"), "mxfp4"),
        (Layout("e2m1", 4, 64, 16, scale="e4m3fn", factor=True), "nvfp4"),
        (Layout("mx9", 4, 64, 16, scale="e8m0", micro=2), "mx9"),
        (Layout("uint4", 4, 64, 32, zero="uint8"), "uint4-g32"),
    ],
)
def test_names_of_what_is_stored(layout: Layout, name: str) -> None:
    assert format_name(layout) == name
    assert target.placing.base(name) in target.placing.known()


def test_a_certified_cache_is_refused() -> None:
    node = ir.node("CertifiedAttention_x", [], domain="porter", num_outputs=1)
    importer = Importer(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}), ir_version=10),
        {},
        Chip(Profile(target.load("h100"))),
    )
    from porter.lower.importer import certified

    with pytest.raises(TargetError, match="host alone") as caught:
        certified.PREFIXES["CertifiedAttention_"](importer, node, None)
    assert caught.value.code == "PORT-0432"

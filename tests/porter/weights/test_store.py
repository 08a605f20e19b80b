"""Every format in the graph, run by ONNX Runtime, has the values of formats.decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from weights import FORMATS, model_of, noise

from porter import formats, graph
from porter.context import Context
from porter.errors import PassError
from porter.match import tidy
from porter.pipeline import Pipeline
from porter.weights import lazy, select, store

# K = 1, K = 33 (odd, no multiple of any group), N = 1, a whole group, more rows than a block of 128.
SHAPES = [(5, 33), (4, 1), (1, 40), (3, 64), (130, 20), (2, 4, 33), (3, 1, 7), (1, 5, 1)]
PRODUCTS = {2: "t = Transpose<perm=[1,0]>(w)", 3: "t = Transpose<perm=[0,2,1]>(w)"}


def stored(name: str, values: np.ndarray, text: str = "", **others: np.ndarray) -> ir.Model:
    """A model in which `w` was replaced by its codes."""
    *lead, n, k = values.shape
    y = ",".join(map(str, [*lead, "s", n]))
    text = text or f"g (float[s,{k}] x) => (float[{y}] y) {{ {PRODUCTS[values.ndim]} y = MatMul(x, t) }}"
    model = model_of(text, w=values, **others)
    form = formats.parse(name)
    (matrix,) = [m for m in select.matrices(model.graph) if m.name == "w"]
    store.replace(model, matrix, form, lambda: formats.encode(form, matrix.read()), lazy.Shelf())
    store.put_parts_together(model.graph)
    graph.verify(model)
    return model


def decoded_by_runtime(model: ir.Model) -> np.ndarray:
    """What ONNX Runtime makes of the value that stands for the weight."""
    value = next(v for n in model.graph for v in n.outputs if v.name == "w.dequantized")
    model.graph.outputs.append(value)
    feeds = {v.name: np.zeros([1, *list(v.shape)[1:]], np.float32) for v in model.graph.inputs}
    return decoders.run(model, feeds)["w.dequantized"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_the_same_bits(name: str, shape: tuple[int, ...]) -> None:
    values = noise(*shape)
    wanted = formats.decode(formats.encode(formats.parse(name), values))
    got = decoded_by_runtime(stored(name, values))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)


def test_the_list_of_formats_has_every_name() -> None:
    tested = {formats.parse(name).element for name in FORMATS} | set(FORMATS)
    aliases = {"fp32", "mxfp8-e4m3", "int4"}  # kept as it is; mxfp8; tested with a suffix
    assert set(formats.names()) - aliases <= tested


USES = {
    "turned": ("g (float[s,33] x) => (float y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }", True),
    "straight": ("g (float[s,33] x) => (float y) { y = MatMul(x, w) }", False),
    "gemm rows": ("g (float[s,33] x) => (float y) { y = Gemm<transB=1>(x, w, b) }", True),
    "gemm columns": ("g (float[s,33] x) => (float y) { y = Gemm(x, w, b) }", False),
    "two readers": (
        "g (float[s,33] x) => (float y) { a = MatMul(x, w) c = Relu(x) d = MatMul(c, w) y = Add(a, d) }",
        False,
    ),
    "stack": ("g (float[5,s,33] x) => (float y) { y = MatMul(x, w) }", False),
    "stack turned": (
        "g (float[5,s,33] x) => (float y) { t = Transpose<perm=[0,2,1]>(w) y = MatMul(x, t) }",
        True,
    ),
    "picked": ("g (float[s,1,33] x) => (float y) { p = Gather(w, ids) y = MatMul(x, p) }", False),
    "picked then turned": (
        """g (float[s,1,33] x) => (float y)
        { p = Gather(w, ids) t = Transpose<perm=[0,2,1]>(p) y = MatMul(x, t) }""",
        True,
    ),
    "picked many": (
        """g (float[s,1,1,33] x) => (float y)
        { p = Gather(w, two) t = Transpose<perm=[0,1,3,2]>(p) y = MatMul(x, t) }""",
        True,
    ),
}


@pytest.mark.parametrize("name", ["int8", "uint4-g5", "int3-g32", "mxfp4", "nvfp4", "mx6", "int8-b4", "bf16"])
@pytest.mark.parametrize("kind", USES)
def test_every_use_multiplies_by_the_same_values(kind: str, name: str) -> None:
    """Beside the same graph with the decoded floats: the same values, so the same sums in ONNX Runtime."""
    text, rows = USES[kind]
    stack = "stack" in kind or "picked" in kind
    values = noise(5, 6, 33) if stack else noise(6, 33)
    turn = (lambda a: a) if rows else (lambda a: np.ascontiguousarray(np.swapaxes(a, -1, -2)))
    others = {"b": noise(6, seed=3)} if "gemm" in kind else {}
    others |= {"ids": np.array([3, 0, 3])} if kind in ("picked", "picked then turned") else {}
    others |= {"two": np.array([[3, 0], [3, 4], [1, 1]])} if kind == "picked many" else {}
    model = stored(name, turn(values), text, **others)
    rounded = formats.decode(formats.encode(formats.parse(name), values))
    plain = model_of(text, w=turn(rounded), **others)
    x = noise(*((5, 3, 33) if "stack" in kind else (3, 1, 33) if "picked" in kind else (3, 33)), seed=1)
    x = x[:, None] if kind == "picked many" else x
    got, wanted = (decoders.run(m, {"x": x})["y"] for m in (model, plain))
    assert got.shape == wanted.shape
    # The same float32 products; ONNX Runtime may order the sums by the weight's layout: 33 roundings of each
    # sum, none of whose terms is larger than the product of the largest, twice where there are two.
    bound = 2 * 33 * 33 * 2.0**-24 * np.abs(x).max() * np.abs(rounded).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)
    assert np.abs(wanted).max() > 1


@pytest.mark.parametrize("name", ["int4-g16", "uint3-g7", "mxfp8", "nvfp4", "int2-g16"])
def test_a_tied_table_is_stored_once(name: str) -> None:
    text = """g (int64[s] ids) => (float[s,9] y)
        { e = Gather(w, ids) t = Transpose<perm=[1,0]>(w) z = MatMul(e, t) y = Identity(z) }"""
    values, ids = noise(9, 33), np.array([4, 0, 8])
    model = stored(name, values, text)
    rounded = formats.decode(formats.encode(formats.parse(name), values))
    (table,) = [n for n in model.graph if n.op_type == "Gather" and n.inputs[1].name == "ids"]
    assert table.inputs[0].name == "w.dequantized"
    got = decoders.run(model, {"ids": ids})["y"]
    np.testing.assert_allclose(got, rounded[ids] @ rounded.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_of_the_type_and_shape_that_they_say(name: str) -> None:
    for shape in ((5, 33), (2, 5, 33), (1, 1)):
        model = stored(name, noise(*shape))
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            assert array.shape == tuple(value.shape.numpy()), value.name
            assert array.dtype == value.dtype.numpy(), value.name
            assert len(value.const_value.tobytes()) == value.const_value.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_stored_bytes_are_what_the_format_says(name: str) -> None:
    """Whole blocks and bytes, so nothing is padded: the bits per weight that the format claims are those in
    the model. Zero points that are codes of a blocks of rows stand once for each row."""
    model = stored(name, noise(128, 640))
    bits = 8 * sum(v.const_value.nbytes for v in model.graph.initializers.values())
    claimed = formats.parse(name).bits_per_weight(128, 640) * 128 * 640
    form = formats.parse(name)
    groups = form.groups(128, 640)
    if form.zero and form.element not in store.TYPED:  # a byte each
        claimed += (8 - form.bits) * groups[0] * groups[1]
    if form.zero and form.rows > 1 and form.element in store.TYPED:
        claimed += form.bits * (128 - groups[0]) * groups[1]
    if form.fraction:  # the factor of MXINT8 is part of what the format is, and stands in the model
        claimed += 32
    assert claimed <= bits <= claimed + 8


def test_values_say_their_types_and_shapes() -> None:
    for name in FORMATS:
        model = stored(name, noise(4, 7, 33))
        known = {v.name: v.shape for n in model.graph for v in n.outputs if v.name.startswith("w.")}
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True))
        for node in inferred.graph:
            for value in node.outputs:
                if value.name in known and value.shape is not None and value.shape.is_static():
                    assert value.shape == known[value.name], value.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "mxfp4", "bf16"])
def test_half_models_get_their_own_type(name: str, dtype: str) -> None:
    kind = ir.DataType[dtype.upper()]
    values = noise(5, 33).astype(kind.numpy())
    text = f"g ({dtype}[s,33] x) => ({dtype}[s,5] y) {{ t = Transpose(w) z = MatMul(x, t) y = Relu(z) }}"
    model = stored(name, values, text)
    value = next(v for n in model.graph for v in n.outputs if v.name == "w.dequantized")
    assert value.dtype == kind
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    cast.outputs[0].name, cast.outputs[0].type = "float", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(cast)
    model.graph.outputs[:] = [cast.outputs[0]]
    tidy(model)  # ONNX Runtime multiplies no bfloat16 here
    model.graph.inputs.clear()
    form = formats.parse(name)
    wanted = formats.decode(formats.encode(form, values.astype(np.float32))).astype(kind.numpy())
    np.testing.assert_array_equal(decoders.run(model, {})["float"], wanted.astype(np.float32))


@pytest.mark.parametrize("swish", ["Swish(z)", "Swish<alpha=1.5>(z)"])
@pytest.mark.parametrize("name", ["int2-g16", "uint2"])
def test_two_bits_raise_the_opset_and_spell_out_swish(name: str, swish: str) -> None:
    text = f"g (float[s,33] x) => (float[s,5] y) {{ t = Transpose(w) z = MatMul(x, t) y = {swish} }}"
    values, x = noise(5, 33), noise(3, 33, seed=1)
    model = stored(name, values, text)
    assert model.opset_imports[""] == 25
    assert model.ir_version == 13
    assert "Swish" not in {n.op_type for n in model.graph}
    z = x @ formats.decode(formats.encode(formats.parse(name), values)).T
    alpha = 1.5 if "alpha" in swish else 1.0
    got = decoders.run(model, {"x": x})["y"]
    # 33 roundings in each sum, and a handful in the sigmoid.
    np.testing.assert_allclose(
        got, z / (1 + np.exp(-alpha * z)), rtol=1e-5, atol=40 * 2.0**-24 * np.abs(z).max()
    )


def test_functions_follow_when_the_opset_is_raised() -> None:
    """One model may have functions of an earlier weight, and a cache of 4 bits after the raise."""
    model = decoders.tiny_decoder(fused=False)
    text = "quantize.rtn{format=mxfp4 only=attention},quantize.rtn{format=int2-g16 only=mlp}"
    text += ",kv.static_cache{capacity=16},kv.quantize{scheme=int4}"
    Pipeline.parse(text).run(model, Context())
    assert {f.opset_imports[""] for f in model.functions.values() if f.name.startswith("Decode")} == {25}
    feeds = {
        v.name: np.zeros([d if isinstance(d, int) else 2 for d in v.shape], v.dtype.numpy())
        for v in model.graph.inputs
    }
    assert np.isfinite(decoders.run(model, feeds)["logits"]).all()


@pytest.mark.parametrize(
    ("name", "opset", "found"), [("int8", 20, 20), ("mxfp4", 23, 23), ("int2-g16", 23, 23)]
)
def test_an_opset_that_is_too_old_is_refused(name: str, opset: int, found: int) -> None:
    model = model_of("g (float[s,33] x) => (float y) { y = MatMul(x, w) }", opset, w=noise(33, 5))
    (matrix,) = select.matrices(model.graph)
    before = len(model.graph)
    with pytest.raises(PassError, match=f"PORT-0254.*the model has {found}"):
        store.replace(model, matrix, formats.parse(name), lambda: None, lazy.Shelf())
    assert len(model.graph) == before


def test_a_weight_is_computed_once_while_a_model_is_written(tmp_path: Path) -> None:
    model = model_of(
        "g (float[s,33] x) => (float y) { a = MatMul(x, w) b = MatMul(a, v) y = Relu(b) }",
        w=noise(33, 44),
        v=noise(44, 20),
    )
    shelf, counts = lazy.Shelf(), {"w": 0, "v": 0}
    form = formats.parse("uint4-g8")
    for matrix in select.matrices(model.graph):

        def compute(matrix: select.Matrix = matrix) -> formats.Encoded:
            counts[matrix.name] += 1
            return formats.encode(form, matrix.read())

        store.replace(model, matrix, form, compute, shelf)
    assert counts == {"w": 0, "v": 0}
    store.put_parts_together(model.graph)
    assert list(model.graph.initializers) == ["w", "w.scale", "w.zero", "v", "v.scale", "v.zero"]
    graph.save(model, tmp_path / "m.onnx", threshold=1)
    assert counts == {"w": 1, "v": 1}
    wanted = decoders.run(model, {"x": noise(2, 33)})["y"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": noise(2, 33)})[0], wanted)


def test_an_encoded_that_was_computed_before_may_lie_on_disk() -> None:
    values, spool = noise(5, 33), lazy.Spool()
    model = model_of(
        "g (float[s,33] x) => (float y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }", w=values
    )
    (matrix,) = select.matrices(model.graph)
    encoded = formats.encode(formats.parse("nvfp4"), values)
    store.replace(model, matrix, encoded.form, spool.keep(encoded), lazy.Shelf())
    del spool
    np.testing.assert_array_equal(decoded_by_runtime(model), formats.decode(encoded))


def test_real_zero_points() -> None:
    for name in ("uint4-g7", "uint3-g32", "uint2-g16", "uint8"):
        plain = formats.encode(formats.parse(name), noise(5, 33))
        zeros = plain.zeros.astype(np.float32) + np.float32(0.3)
        encoded = replace(plain, form=replace(plain.form, zero="real"), zeros=zeros)
        model = model_of(
            "g (float[s,33] x) => (float y) { t = Transpose(w) y = MatMul(x, t) }", w=noise(5, 33)
        )
        (matrix,) = select.matrices(model.graph)
        store.replace(model, matrix, encoded.form, lambda encoded=encoded: encoded, lazy.Shelf())
        np.testing.assert_array_equal(decoded_by_runtime(model), formats.decode(encoded))


@pytest.mark.parametrize("scales", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["int4-g5", "uint8", "fp8-e3m4-b16", "int8-t"])
def test_scales_of_half_precision(name: str, scales: str) -> None:
    form = replace(formats.parse(name), scale=scales)
    encoded = formats.encode(form, noise(20, 33))
    model = model_of("g (float[s,33] x) => (float y) { t = Transpose(w) y = MatMul(x, t) }", w=noise(20, 33))
    (matrix,) = select.matrices(model.graph)
    store.replace(model, matrix, form, lambda: encoded, lazy.Shelf())
    assert model.graph.initializers["w.scale"].dtype == store.HALVES[scales]
    np.testing.assert_array_equal(decoded_by_runtime(model), formats.decode(encoded))

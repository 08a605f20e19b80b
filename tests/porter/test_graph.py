"""Loading what anyone may have sent, saving without loss, and the checks in between."""

import contextlib
import gc
import hashlib
import io
import mmap
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from porter import graph
from porter.errors import ModelError, PassError, PorterError
from porter.graph import saving, untrusted
from porter.graph.mapped import MappedTensor
from porter.match import add_initializer

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def proto(*initializers: TensorProto, nodes: list | None = None, opset: int = 24) -> onnx.ModelProto:
    """y = x @ w, with the initializers or nodes given instead."""
    nodes = nodes if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"])]
    initializers = initializers or (onnx.numpy_helper.from_array(WEIGHT, "w"),)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    made = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def external(
    location: str = "w.bin", dims: tuple = (3, 4), dtype: int = TensorProto.FLOAT, **entries: object
) -> TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def write(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refused(path: Path, code: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        graph.load(path)
    assert caught.value.code == code, caught.value
    assert str(caught.value).isprintable()
    return caught.value


def to_ir(model: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(model)


# ------------------------------------------------------------------ files that are no model


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    refused(tmp_path / "none.onnx", "PORT-0101")
    refused(tmp_path, "PORT-0101")
    os.mkfifo(tmp_path / "pipe.onnx")  # opening it would block for ever
    refused(tmp_path / "pipe.onnx", "PORT-0101")
    refused(Path("a\0b"), "PORT-0101")
    refused(Path("/dev/zero"), "PORT-0101")


def test_an_empty_file_is_refused(tmp_path):
    refused(write(tmp_path, b""), "PORT-0102")


def test_a_file_beyond_protobuf_is_refused_without_reading_it(tmp_path):
    path = write(tmp_path, b"x")
    os.truncate(path, 2**31)  # sparse
    assert "external data" in refused(path, "PORT-0103").hint


@pytest.mark.parametrize(
    "data", [b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04", b"GGUF", b"hello"]
)
def test_other_formats_are_named(tmp_path, data):
    refused(write(tmp_path, data + bytes(50)), "PORT-0104")


def test_every_truncation_is_refused(tmp_path):
    data = proto().SerializeToString()
    for size in range(1, len(data)):
        with pytest.raises(ModelError):
            graph.load(write(tmp_path, data[:size]))


def test_protobuf_that_is_not_onnx_is_refused(tmp_path):
    refused(write(tmp_path, helper.make_tensor_value_info("x", 1, [1])), "PORT-0105")
    empty = proto()
    del empty.opset_import[:]
    refused(write(tmp_path, empty), "PORT-0105")


@pytest.mark.parametrize("version", [0, -1, 2**40])
def test_impossible_versions_are_refused(tmp_path, version):
    odd = proto()
    odd.opset_import.append(helper.make_opsetid("ai.onnx.ml", version))
    refused(write(tmp_path, odd), "PORT-0106")


def test_newer_versions_are_refused(tmp_path):
    newer = proto()
    newer.ir_version = onnx.IR_VERSION + 1
    refused(write(tmp_path, newer), "PORT-0106")
    refused(write(tmp_path, proto(opset=onnx.defs.onnx_opset_version() + 1)), "PORT-0106")


def nested(depth: int) -> bytes:
    """`If` in `If`, wrapped by hand, since onnx's own helpers cannot build what they cannot parse."""
    flag, t = (
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("t", 1, None),
    )
    leaf = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "g", [], [t]).SerializeToString()
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node(
        "If", ["c"], ["t"], else_branch=onnx.GraphProto.FromString(leaf)
    ).SerializeToString()
    branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
    inner = leaf
    for _ in range(depth):
        attribute = branch + field(6, inner)  # AttributeProto.g
        inner = (
            field(1, node + field(5, attribute)) + onnx.GraphProto(name="g", output=[t]).SerializeToString()
        )
    x = helper.make_tensor_value_info("x", 1, [1])
    rest = onnx.GraphProto(initializer=[condition], input=[x], value_info=[flag]).SerializeToString()
    header = onnx.ModelProto(ir_version=11, opset_import=[helper.make_opsetid("", 24)])
    return header.SerializeToString() + field(7, inner + rest)


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return bytes([number * 8 + 2]) + length + bytes([size]) + data


def test_deep_nesting_is_refused_and_the_deepest_that_parses_loads(tmp_path):
    graph.load(write(tmp_path, nested(30)))
    refused(write(tmp_path, nested(60)), "PORT-0107")


# ------------------------------------------------------------------ external data


@pytest.fixture
def secret(tmp_path):
    """A file outside the model's folder, of exactly the right size."""
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "sub/../../secret",
        "..\\secret",
        "C:\\secret",
        "C:secret",
        "w\0.bin",
        "a/b\\c",
        ".",
        "//x",
        "./..",
        "\\\\host\\x",
    ],
)
def test_a_path_out_of_the_folder_is_refused(secret, location):
    refused(write(secret, proto(external(location))), "PORT-0108")


def test_a_symbolic_link_is_refused_wherever_it_stands(secret):
    (secret / "w.bin").symlink_to("../secret")
    refused(write(secret, proto(external())), "PORT-0109")
    (secret / "w.bin").unlink()
    (secret / "inside").write_bytes(WEIGHT.tobytes())
    (secret / "w.bin").symlink_to("inside")
    refused(write(secret, proto(external())), "PORT-0109")
    (secret / "sub").symlink_to("..")
    refused(write(secret, proto(external("sub/secret"))), "PORT-0109")


def test_a_hard_link_is_refused(secret):
    os.link(secret.parent / "secret", secret / "w.bin")
    assert "copy" in refused(write(secret, proto(external())), "PORT-0110").hint


def test_what_is_not_a_regular_file_is_refused(secret):
    os.mkfifo(secret / "w.bin")
    refused(write(secret, proto(external())), "PORT-0111")
    os.unlink(secret / "w.bin")
    (secret / "w.bin").mkdir()
    refused(write(secret, proto(external())), "PORT-0111")
    (secret / "plain").write_bytes(b"")
    refused(write(secret, proto(external("plain/w.bin"))), "PORT-0111")


def test_a_missing_file_is_refused(secret):
    assert "w.bin" in refused(write(secret, proto(external())), "PORT-0112").where


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": -1},
        {"length": -48},
        {"offset": 1},
        {"offset": 10**17},
        {"offset": 10**30},
        {"offset": "0x0"},
        {"offset": "٣"},
        {"length": "1e3"},
        {"offset": ""},
    ],
)
def test_a_bad_offset_or_length_is_refused(secret, entries):
    (secret / "w.bin").write_bytes(WEIGHT.tobytes())
    refused(write(secret, proto(external(**entries))), "PORT-0113")


def test_data_shorter_than_the_shape_is_refused(secret):
    (secret / "w.bin").write_bytes(WEIGHT.tobytes()[:-1])
    refused(write(secret, proto(external())), "PORT-0113")
    (secret / "w.bin").write_bytes(b"")
    refused(write(secret, proto(external())), "PORT-0113")


@pytest.mark.parametrize(
    ("dims", "dtype", "length"),
    [
        ((3, 4), TensorProto.FLOAT, 44),
        ((3, 3), TensorProto.INT4, 4),
        ((5,), TensorProto.FLOAT4E2M1, 5),
        ((5,), TensorProto.FLOAT6E2M3, 5),
        ((5,), TensorProto.UINT2, 1),
    ],
)
def test_a_length_that_contradicts_the_shape_is_refused(secret, dims, dtype, length):
    (secret / "w.bin").write_bytes(bytes(64))
    refused(write(secret, proto(external(dims=dims, dtype=dtype, length=length))), "PORT-0114")


def test_odd_entries_are_refused(secret):
    (secret / "w.bin").write_bytes(WEIGHT.tobytes())
    twice = external()
    twice.external_data.add(key="location", value="other")
    refused(write(secret, proto(twice)), "PORT-0118")
    refused(write(secret, proto(external(location=None))), "PORT-0118")
    both = external()
    both.raw_data = WEIGHT.tobytes()
    refused(write(secret, proto(both)), "PORT-0118")
    refused(write(secret, proto(external(dtype=TensorProto.STRING))), "PORT-0117")


def test_good_external_data_is_read_lazily(secret):
    (secret / "sub").mkdir()
    (secret / "sub" / "w.bin").write_bytes(b"12345" + WEIGHT.tobytes())
    model = graph.load(
        write(secret, proto(external("./sub/w.bin", offset=5, length=48, checksum="x", other="y")))
    )
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    assert isinstance(tensor.raw, mmap.mmap)
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)  # from an odd offset
    assert tensor.tobytes() == WEIGHT.tobytes()
    tensor.release()
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_external_data_in_an_attribute_is_checked_and_read(secret):
    model = proto(
        nodes=[
            helper.make_node("Constant", [], ["c"], value=external()),
            helper.make_node("MatMul", ["x", "c"], ["y"]),
        ]
    )
    refused(write(secret, model), "PORT-0112")
    (secret / "w.bin").write_bytes(WEIGHT.tobytes())
    loaded = graph.load(write(secret, model))
    graph.save(loaded, secret / "again.onnx")
    (secret / "w.bin").unlink()
    constant = next(iter(graph.load(secret / "again.onnx").graph)).attributes["value"].as_tensor()
    np.testing.assert_array_equal(constant.numpy(), WEIGHT)


def test_every_element_type_survives_external_and_inline(tmp_path):
    random = np.random.default_rng(0)
    for dtype in ir.DataType:
        if dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            continue
        kind, count = dtype.numpy(), 7  # 7 elements do not fill the last byte of any sub-byte type
        bits = random.integers(
            0,
            2 if dtype == ir.DataType.BOOL else 2 ** min(dtype.bitwidth, 8),
            (count, np.dtype(kind).itemsize),
        )
        array = np.ascontiguousarray(bits.astype(np.uint8)).view(kind).reshape(count)
        w = ir.Value(
            name="w", const_value=ir.Tensor(array, dtype), shape=ir.Shape([7]), type=ir.TensorType(dtype)
        )
        node = ir.Node("", "Identity", [w])
        node.outputs[0].name = "y"
        node.outputs[0].type, node.outputs[0].shape = w.type, w.shape
        model = ir.Model(
            ir.Graph([], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 28}), ir_version=14
        )
        for threshold in (0, 1024):
            graph.save(model, tmp_path / "m.onnx", threshold=threshold)
            found = graph.load(tmp_path / "m.onnx").graph.initializers["w"].const_value
            assert isinstance(found, MappedTensor) == (threshold == 0)
            assert found.nbytes == untrusted.byte_count(dtype, [count])
            assert found.numpy().tobytes() == array.tobytes(), dtype


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize("dims", [(-1,), (2**40 + 1,), (2**62, 2**62), (0, 2**62), (1,) * 65])
@pytest.mark.parametrize("where", ["inline", "external"])
def test_absurd_shapes_are_refused(secret, dims, where):
    tensor = (
        external(dims=dims)
        if where == "external"
        else TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT)
    )
    refused(write(secret, proto(tensor)), "PORT-0115")


@pytest.mark.parametrize(
    "fields",
    [
        {"raw_data": b"1234", "dims": (2,)},
        {"raw_data": b"", "dims": (2**39,)},  # would be a terabyte of zeros
        {"dims": (2**39,)},
        {"float_data": [1.0], "dims": (2,)},
        {"int32_data": [1, 2], "dims": (2,)},  # the wrong field for float
        {"float_data": [1.0, 2.0], "int64_data": [1], "dims": (2,)},
        {"raw_data": bytes(8), "float_data": [1.0, 2.0], "dims": (2,)},
        {"raw_data": b"12", "dims": (3,), "data_type": TensorProto.INT4, "extra": 1},
        {"int32_data": [1, 2, 3], "dims": (3,), "data_type": TensorProto.INT4},
        {"string_data": [b"a"], "dims": (2,), "data_type": TensorProto.STRING},
    ],
)
def test_inline_data_that_contradicts_its_shape_is_refused(tmp_path, fields):
    fields = {"data_type": TensorProto.FLOAT, "name": "w", **fields}
    if fields.pop("extra", 0):
        fields["raw_data"] = b"123"
    refused(write(tmp_path, proto(TensorProto(**fields))), "PORT-0116")


@pytest.mark.parametrize("data_type", [0, 99, -1])
def test_an_unknown_element_type_is_refused(tmp_path, data_type):
    refused(
        write(tmp_path, proto(TensorProto(name="w", dims=(1,), data_type=data_type, raw_data=b"1234"))),
        "PORT-0117",
    )


def test_a_declared_tensor_that_is_missing_is_refused(tmp_path):
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    refused(write(tmp_path, proto(nodes=[node, helper.make_node("MatMul", ["x", "c"], ["y"])])), "PORT-0117")


def test_strings_pass_through(tmp_path):
    words = np.array(["a", "é"], object)
    node = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(words, "c"))
    weight = onnx.numpy_helper.from_array(words, "words")
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = graph.load(
        write(tmp_path, proto(onnx.numpy_helper.from_array(WEIGHT, "w"), weight, nodes=[node, matmul]))
    )
    graph.check_finite(model)
    assert graph.weight_bytes(model) == 48
    graph.save(model, tmp_path / "again.onnx", threshold=0)
    again = graph.load(tmp_path / "again.onnx")
    for tensor in (
        again.graph.initializers["words"].const_value,
        next(iter(again.graph)).attributes["value"].value,
    ):
        assert [bytes(s).decode() for s in tensor.numpy()] == ["a", "é"]


def test_sparse_tensors_are_refused(tmp_path):
    model = proto()
    model.graph.sparse_initializer.add().dims.append(3)
    refused(write(tmp_path, model), "PORT-0119")
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims.append(
        3
    )
    refused(write(tmp_path, proto(nodes=[node, helper.make_node("MatMul", ["x", "c"], ["y"])])), "PORT-0119")


@pytest.mark.parametrize(
    ("values", "dtype", "finite"),
    [
        ([1, np.nan, 2], np.float32, False),
        ([1, np.inf, 2], np.float32, False),
        ([1, -np.inf, 2], np.float32, False),
        ([np.nan], np.float16, False),
        ([0, np.nan], ml_dtypes.bfloat16, False),
        ([0, np.nan], ml_dtypes.float8_e4m3fn, False),
        ([0, np.nan], ml_dtypes.float8_e5m2fnuz, False),
        ([1, np.inf], ml_dtypes.float8_e5m2, False),
        ([0, -np.inf, 0], np.float32, True),  # an additive mask
        ([np.inf], np.float32, True),  # a bound of Clip
        ([1, 2, 448], ml_dtypes.float8_e4m3fn, True),
    ],
)
def test_weights_that_are_not_finite_are_found(values, dtype, finite):
    model = to_ir(proto())
    add_initializer(model.graph, "culprit", np.array(values, dtype))
    if finite:
        graph.check_finite(model)
        return
    with pytest.raises(ModelError) as caught:
        graph.check_finite(model)
    assert (caught.value.code, caught.value.where) == ("PORT-0126", "culprit")


def test_the_first_bad_weight_is_counted_across_chunks(tmp_path):
    array = np.ones(5_000_000, np.float32)  # more than one chunk of 16 MiB
    array[4_500_000] = np.nan
    model = to_ir(proto())
    add_initializer(model.graph, "w2", array)
    graph.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="first at 4500000"):
        graph.check_finite(graph.load(tmp_path / "m.onnx"))


# ------------------------------------------------------------------ structure


def refused_text(text: str, code: str) -> None:
    model = onnx.parser.parse_model(text)

    def check() -> None:
        untrusted.check(model)
        graph.verify(to_ir(model))

    with pytest.raises(ModelError) as caught:
        check()
    assert caught.value.code == code, caught.value


HEAD = '<ir_version: 11, opset_import: ["" : 24]> g (float[N] x) => (float[N] y)'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{ a = Add(x, y) y = Relu(a) }", "PORT-0120"),
        ("{ y = Add(x, nothing) }", "PORT-0121"),
        ("{ z = Relu(x) }", "PORT-0121"),
        ("{ y = Relu(x) y = Abs(x) }", "PORT-0122"),
        ("{ x = Relu(x) y = Relu(x) }", "PORT-0122"),
        ("{ y = Frobnicate(x) }", "PORT-0123"),
        ("{ y = Upsample(x) }", "PORT-0123"),
        ("{ y = BitCast<to = 6>(x) }", "PORT-0123"),
        ("{ y = elsewhere.Relu(x) }", "PORT-0123"),
        ("{ y = Add(x) }", "PORT-0124"),
        ("{ y = Relu(x, x) }", "PORT-0124"),
        ("{ y = Clip(, x) }", "PORT-0124"),
        ("{ y, z = Relu(x) }", "PORT-0124"),
        ("{ y = Cast(x) }", "PORT-0125"),
        ("{ y = Relu<alpha = 1.0>(x) }", "PORT-0125"),
        ("{ y = Elu<alpha = 1>(x) }", "PORT-0125"),
    ],
)
def test_malformed_graphs_are_refused(body, code):
    refused_text(f"{HEAD} {body}", code)


def test_a_cycle_is_refused_and_a_shuffle_is_sorted(tmp_path):
    relu = helper.make_node("Relu", ["x"], ["a"])
    rest = [helper.make_node("MatMul", ["b", "w"], ["y"]), helper.make_node("Abs", ["a"], ["b"])]
    loaded = graph.load(write(tmp_path, proto(nodes=[*rest, relu])))
    assert [n.op_type for n in loaded.graph] == ["Relu", "Abs", "MatMul"]
    cycle = [helper.make_node("Add", ["x", "b"], ["a"]), *rest]
    refused(write(tmp_path, proto(nodes=cycle)), "PORT-0120")


def test_a_cycle_through_a_subgraph_is_refused(tmp_path):
    out = helper.make_tensor_value_info("t", 1, None)
    inner = helper.make_graph([helper.make_node("Identity", ["y"], ["t"])], "i", [], [out])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "i", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    refused(write(tmp_path, proto(condition, nodes=[node])), "PORT-0120")


def test_a_duplicate_initializer_is_refused(tmp_path):
    one = onnx.numpy_helper.from_array(WEIGHT, "w")
    refused(write(tmp_path, proto(one, one)), "PORT-0122")


FUNCTION = """
<domain: "porter", opset_import: ["" : 24, "porter" : 1]> {name} (a) => (b) {{ b = {body}(a) }}
"""


def with_functions(call: str, *functions: tuple[str, str]) -> str:
    head = '<ir_version: 11, opset_import: ["" : 24, "porter" : 1]> g (float[N] x) => (float[N] y)'
    return f"{head} {{ y = {call} }}" + "".join(FUNCTION.format(name=n, body=b) for n, b in functions)


def test_functions_are_checked():
    graph.verify(
        to_ir(onnx.parser.parse_model(with_functions("porter.F(x)", ("F", "porter.G"), ("G", "Relu"))))
    )
    refused_text(with_functions("porter.F(x)", ("F", "porter.G"), ("G", "porter.F")), "PORT-0129")
    refused_text(with_functions("porter.F(x, x)", ("F", "Relu")), "PORT-0124")
    refused_text(with_functions("porter.F<k = 1>(x)", ("F", "Relu")), "PORT-0125")
    refused_text(with_functions("porter.Missing(x)", ("F", "Relu")), "PORT-0123")
    refused_text(with_functions("porter.F(x)", ("F", "Frobnicate")), "PORT-0123")


def test_more_data_files_than_may_be_open_are_explained(tmp_path):
    tensors = []
    for i in range(80):
        (tmp_path / f"w{i}.bin").write_bytes(WEIGHT.tobytes())
        tensors.append(external(f"w{i}.bin"))
        tensors[-1].name = f"w{i}" if i else "w"
    path = write(tmp_path, proto(*tensors))
    graph.load(path)
    gc.collect()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, before[1]))
    try:
        refused(path, "PORT-0112")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_a_careless_pass_leaves_is_found():
    model = to_ir(onnx.parser.parse_model(f"{HEAD} {{ a = Relu(x) y = Abs(a) }}"))
    relu, last = list(model.graph)
    model.graph.remove(relu)
    with pytest.raises(ModelError, match="PORT-0121"):
        graph.verify(model)
    model.graph.append(relu)
    with pytest.raises(ModelError, match="PORT-0120"):
        graph.verify(model)
    graph.sort(model)
    graph.verify(model)
    last.outputs[0].name = "x"
    with pytest.raises(ModelError, match="PORT-0122"):
        graph.verify(model)


# ------------------------------------------------------------------ any bytes at all


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Valid files with subgraphs, functions, attributes and external data: bytes to be mutated."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    text = with_functions("porter.F(x)", ("F", "porter.G"), ("G", "Relu"))
    out = helper.make_tensor_value_info("t", 1, None)
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "i", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    models = [
        proto(),
        proto(external(length=48)),
        onnx.parser.parse_model(text),
        proto(condition, nodes=[node]),
    ]
    for model in models:
        graph.load(write(folder, model))
    return folder, [m.SerializeToString() for m in models]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_bytes_load_or_are_refused(seeds, data):
    folder, models = seeds
    content = bytearray(data.draw(st.sampled_from(models)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["flip", "set", "delete", "insert", "copy"]))
        if action == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif action == "delete":
            del content[at]
        elif action == "insert":
            content.insert(at, data.draw(st.integers(0, 255)))
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 40))]
    survives(folder, bytes(content))


def survives(folder: Path, content: bytes) -> None:
    """What loads can be read, checked and written again; anything but a PorterError fails the test."""
    path = write(folder, content)
    with contextlib.suppress(PorterError):
        model = graph.load(path)
        graph.check_finite(model)
        graph.save(model, folder / "again.onnx")
        graph.load(folder / "again.onnx")
    with contextlib.suppress(PorterError):
        graph.digest(path)


def messages(message: Message) -> list[Message]:
    """The message and all within it."""
    found = [message]
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for inner in value if kind.is_repeated else [value]:
                found += messages(inner)
    return found


NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 7, 16, 22, 99, 2**31 - 1]) | st.integers(-(2**31), 2**31 - 1)
TEXTS = st.sampled_from(
    ["", "x", "y", "w", "c", "t", "If", "Loop", "Relu", "porter", "F", "G", "..", "m.onnx", "\0", "48"]
)
SCALARS = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=60) | st.just(WEIGHT.tobytes()),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: NUMBERS | st.integers(-(2**63), 2**63 - 1),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_fields_load_or_are_refused(seeds, data):
    """Mutations that stay valid protobuf, so that they reach what lies behind the parser."""
    folder, models = seeds
    model = onnx.ModelProto.FromString(data.draw(st.sampled_from(models)))
    for _ in range(data.draw(st.integers(1, 4))):
        everything = messages(model)
        message = data.draw(st.sampled_from(everything))
        kind = data.draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
        value = None
        if kind.type == kind.TYPE_MESSAGE:
            alike = [m for m in everything if kind.message_type == m.DESCRIPTOR]
            value = data.draw(st.sampled_from(alike)) if alike else None
        elif kind.type == kind.TYPE_ENUM:
            value = data.draw(st.sampled_from([v.number for v in kind.enum_type.values]))
        else:
            value = data.draw(SCALARS.get(kind.type, NUMBERS))
        mutate(message, kind, value, data.draw(st.booleans()))
    survives(folder, model.SerializeToString())


def mutate(message: Message, kind: FieldDescriptor, value: object, clear: bool) -> None:
    """Clear the field, or set it, or append to it."""
    copy = type(value).FromString(value.SerializeToString()) if isinstance(value, Message) else value
    if clear:
        message.ClearField(kind.name)
    if copy is None:
        return
    if kind.is_repeated:
        getattr(message, kind.name).append(copy)
    elif isinstance(copy, Message):
        getattr(message, kind.name).CopyFrom(copy)
    else:
        setattr(message, kind.name, copy)


# ------------------------------------------------------------------ saving


def big(count: int = 3, size: int = 500) -> ir.Model:
    """A chain of `count` matrices, a small bias, and a name that sorts before its predecessors."""
    random = np.random.default_rng(0)
    model = to_ir(
        onnx.parser.parse_model(
            f'<ir_version: 11, opset_import: ["" : 24]> g (float[N,{size}] x) => (float[N,{size}] y)'
            "{ y = Identity(x) }"
        )
    )
    value = model.graph.inputs[0]
    last = next(iter(model.graph))
    for i in range(count):
        array = random.standard_normal((size, size)).astype(np.float32)
        node = ir.Node("", "MatMul", [value, add_initializer(model.graph, f"w{count - i}", array)])
        model.graph.insert_before(last, node)
        value = node.outputs[0]
    bias = ir.Node("", "Add", [value, add_initializer(model.graph, "bias", np.ones(5, np.float32)[:1])])
    model.graph.insert_before(last, bias)
    last.replace_input_with(0, bias.outputs[0])
    graph.verify(model)
    return model


def values(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: np.array(v.const_value.numpy()) for n, v in model.graph.initializers.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_round_trip_keeps_everything(tmp_path):
    model = big()
    model.metadata_props["porter.context_length"] = "512"
    before = values(model)
    graph.save(model, tmp_path / "m.onnx")
    same(values(model), before)
    loaded = graph.load(tmp_path / "m.onnx")
    same(values(loaded), before)
    assert ir.to_onnx_text(loaded, exclude_initializers=True) == ir.to_onnx_text(
        model, exclude_initializers=True
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    assert graph.weight_bytes(loaded) == graph.weight_bytes(model) == 3 * 500 * 500 * 4 + 4


def test_layout_is_in_graph_order_aligned_and_without_waste(tmp_path):
    model = big(count=3, size=33)  # 4356 bytes each: not a multiple of 64
    graph.save(model, tmp_path / "m.onnx")
    loaded = graph.load(tmp_path / "m.onnx")
    places = [
        (v.name, v.const_value.offset)
        for v in loaded.graph.initializers.values()
        if isinstance(v.const_value, MappedTensor)
    ]
    assert places == [("w3", 0), ("w2", 4416), ("w1", 8832)]
    assert (tmp_path / "m.onnx.data").stat().st_size == 8832 + 4356
    assert all(
        v.const_value.numpy().ctypes.data % 64 == 0
        for v in loaded.graph.initializers.values()
        if v.name != "bias"
    )


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        graph.save(big(), tmp_path / folder / "m.onnx")
    assert graph.digest(tmp_path / "a" / "m.onnx") == graph.digest(tmp_path / "b" / "m.onnx")
    graph.save(graph.load(tmp_path / "a" / "m.onnx"), tmp_path / "b" / "m.onnx")
    assert graph.digest(tmp_path / "a" / "m.onnx") == graph.digest(tmp_path / "b" / "m.onnx")


def test_a_shared_tensor_is_stored_once(tmp_path):
    model = big(count=1, size=40)
    add_initializer(model.graph, "again", model.graph.initializers["w1"].const_value)
    graph.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == 6400 == graph.weight_bytes(model) - 4
    same(values(graph.load(tmp_path / "m.onnx")), values(model))


@pytest.mark.parametrize("loader", [graph.load, ir.load])
def test_saving_over_the_files_it_is_mapped_from(tmp_path, loader):
    path = tmp_path / "m.onnx"
    graph.save(big(), path)
    model = loader(path)
    before = values(graph.load(path))
    # Another order in the file, so that reading from the new one through the old offsets would show.
    moved = model.graph.initializers.pop("w3")
    model.graph.initializers.add(moved)
    graph.save(model, path)
    after = values(model)
    assert set(after) == set(before)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
        assert model.graph.initializers[name].const_value.tobytes() == before[name].tobytes()
        copied = io.BytesIO()
        model.graph.initializers[name].const_value.tofile(copied)
        assert copied.getvalue() == before[name].tobytes()
    same(values(graph.load(path)), after)
    graph.save(model, tmp_path / "elsewhere.onnx")  # still whole
    same(values(graph.load(tmp_path / "elsewhere.onnx")), after)


def test_a_symlink_at_the_destination_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "m.onnx.data").symlink_to(tmp_path / "precious")
    graph.save(big(), tmp_path / "m.onnx")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    graph.load(tmp_path / "m.onnx")


class Bomb(ir.Tensor):
    """A tensor whose bytes cannot be had."""

    def numpy(self):
        raise self.error

    tobytes = numpy


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, error):
    path = tmp_path / "m.onnx"
    graph.save(big(), path)
    before = graph.digest(path)
    model = big(count=4)
    bomb = Bomb(np.zeros((500, 500), np.float32))
    bomb.error = error
    kept = model.graph.initializers["w2"].const_value = bomb
    with pytest.raises(type(error)):
        graph.save(model, path)
    assert graph.digest(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert model.graph.initializers["w2"].const_value is kept


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(ModelError, match="PORT-0128"):
        graph.save(big(count=1), tmp_path / "none" / "m.onnx")


def test_too_much_inside_the_protobuf_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "PROTOBUF_LIMIT", 900_000)
    with pytest.raises(ModelError, match="PORT-0128"):
        graph.save(big(count=1), tmp_path / "m.onnx", threshold=2_000_000)
    assert not list(tmp_path.iterdir())


FULL = """
import sys
from porter import graph
from porter.errors import EnvironmentFailure
model = graph.load(sys.argv[1])
try:
    graph.save(model, sys.argv[2] + "/m.onnx")
except EnvironmentFailure as error:
    import os
    print(error.code, os.listdir(sys.argv[2]))
"""


def test_a_full_disk_is_said_and_cleaned_up(tmp_path):
    """On a real file system of 512 KiB, mounted where only the child sees it."""
    graph.save(big(), tmp_path / "m.onnx")  # 3 MB
    (tmp_path / "small").mkdir()
    script = f'mount -t tmpfs -o size=512k none {tmp_path}/small && "$@"'
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-c",
        FULL,
        tmp_path / "m.onnx",
        tmp_path / "small",
    ]
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine does not allow mounting")
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if "mount" in done.stderr:
        pytest.skip("this machine does not allow mounting")
    assert done.stdout.strip() == "PORT-0901 []", done.stderr


MEASURE = """
import resource, sys
from porter import graph
model = graph.load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph.save(model, sys.argv[2])
graph.check_finite(model)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_saving_streams(tmp_path):
    """200 MB, in one tensor of 120 MB and eight of 10 MB, pass through with less than 64 MiB of memory.

    The bound: a mapped tensor is written and checked in chunks of 16 MiB whose pages are then dropped, so one
    chunk and its masks (a byte per value, three of them: 12 MiB) are in memory, whatever a tensor's size;
    twice that, rounded up, allows for the allocator. Copying even the one large tensor would take 120 MB.
    """
    model = big(count=1, size=30)
    for i, size in enumerate([30_000_000, *[2_500_000] * 8]):
        add_initializer(model.graph, f"large{i}", np.zeros(size, np.float32))
    graph.save(model, tmp_path / "a.onnx")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a.onnx", tmp_path / "b.onnx"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
    assert graph.digest(tmp_path / "b.onnx") != graph.digest(tmp_path / "a.onnx")  # the name of the data file
    assert (tmp_path / "b.onnx.data").read_bytes() == (tmp_path / "a.onnx.data").read_bytes()


def lazies(makers):
    """A model with a lazy float32[300000] initializer for each function."""
    model = big(count=1, size=30)
    for i, make in enumerate(makers):
        name = f"lazy{i}"
        lazy = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([300_000]), name=name)
        model.graph.register_initializer(
            ir.Value(name=name, const_value=lazy, type=ir.TensorType(lazy.dtype), shape=lazy.shape)
        )
    return model


def test_tensors_are_made_ahead_of_the_writer_but_not_far(tmp_path, monkeypatch):
    """While one is written the next AHEAD are made, and those only; each once, in order, in one thread."""
    made, seen, write = [], [], saving._made

    def maker(i):
        def make():
            made.append((i, threading.current_thread().name))
            return ir.Tensor(np.full(300_000, i, np.float32))

        return make

    def watched(layout):
        for n, each in enumerate(write(layout)):
            time.sleep(0.02)  # the writer is slow: the maker waits for it
            seen.append((n, len(made)))
            yield each

    monkeypatch.setattr(saving, "_made", watched)
    graph.save(lazies([maker(i) for i in range(8)]), tmp_path / "m.onnx")
    assert [i for i, _ in made] == list(range(8))
    assert len({name for _, name in made}) == 1
    assert made[0][1].startswith("porter-save")
    assert all(count <= n + 1 + saving.AHEAD for n, count in seen)
    assert any(count > n for n, count in seen[1:-3])
    read = graph.load(tmp_path / "m.onnx").graph.initializers
    assert all((read[f"lazy{i}"].const_value.numpy() == i).all() for i in range(8))


@pytest.mark.parametrize("error", [PassError("PORT-0255", "not finite"), KeyboardInterrupt(), MemoryError()])
def test_what_fails_in_the_thread_comes_out_and_nothing_is_left(tmp_path, error):
    def broken():
        raise error

    later = []
    fine = [lambda: ir.Tensor(np.ones(300_000, np.float32))] * 2
    model = lazies([*fine, broken, *[lambda: later.append(1)] * 20])
    with pytest.raises(type(error)) as caught:
        graph.save(model, tmp_path / "m.onnx")
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    assert len(later) <= saving.AHEAD + 1  # the rest is not made any more
    assert not [t for t in threading.enumerate() if t.name.startswith("porter-save")]


def test_an_interrupted_writer_stops_the_thread(tmp_path, monkeypatch):
    """Ctrl-C arrives in the main thread, between two tensors."""

    class Interrupted(BaseException):
        pass

    write = saving._made

    def interrupted(layout):
        for n, each in enumerate(write(layout)):
            if n == 3:
                raise Interrupted
            yield each

    monkeypatch.setattr(saving, "_made", interrupted)
    made = []

    def make():
        made.append(1)
        return ir.Tensor(np.ones(300_000, np.float32))

    with pytest.raises(Interrupted):
        graph.save(lazies([make] * 30), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert len(made) <= 4 + saving.AHEAD


# ------------------------------------------------------------------ digest and edits


def test_the_digest_can_be_computed_by_hand(tmp_path):
    path = write(tmp_path, proto())
    assert graph.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    graph.save(big(count=1), path)
    own, data = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, tmp_path / "m.onnx.data"))
    assert graph.digest(path) == hashlib.sha256(f"{own}\n{data}  m.onnx.data\n".encode()).hexdigest()
    with open(tmp_path / "m.onnx.data", "r+b") as file:
        file.write(b"\1")
    assert graph.digest(path) != hashlib.sha256(f"{own}\n{data}  m.onnx.data\n".encode()).hexdigest()

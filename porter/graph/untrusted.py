"""Read an ONNX file that nobody vouches for: parse it, and check what its tensors claim."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from porter.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1  # bytes in one message
MAX_ELEMENTS = 2**40
MAX_RANK = 64  # what numpy allows

# What people hand over in place of an ONNX file: first bytes, and what they are.
_MISTAKEN = (
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself with: git lfs pull"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", "export it first: porter export"),
    (b"GGUF", "a GGUF file", "export the original PyTorch model: porter export"),
    (b"\x80\x02", "a pickle", "export the original PyTorch model: porter export"),
    (b"{", "JSON text", "give the .onnx file"),
    (b"<", "HTML or XML text, perhaps a failed download", "download it again"),
)

Scope = onnx.GraphProto | onnx.FunctionProto


def shown(name: object, limit: int = 120) -> str:
    """A name from a model as it is safe to print: short, and without control characters."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read(path: Path) -> onnx.ModelProto:
    """Parse the model file, without its external data. Raises ModelError PORT-0101 to PORT-0107."""
    data = _read_bytes(path)
    for magic, what, hint in _MISTAKEN:
        if data.startswith(magic):
            raise ModelError(
                "PORT-0104", f"the file is {what}, not an ONNX model", where=str(path), hint=hint
            )
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        if "MaxDepth" in str(error):
            hint = "protobuf allows 100 levels, which is about 30 nested subgraphs"
            raise ModelError(
                "PORT-0107", "the model is nested too deeply", where=str(path), hint=hint
            ) from error
        what, hint = (
            "the file is not ONNX, or it is truncated or damaged",
            "compare its size with the original",
        )
        raise ModelError("PORT-0104", what, where=str(path), hint=hint) from error
    _check_header(proto, path)
    return proto


def check(proto: onnx.ModelProto) -> None:
    """Check names and tensors of all graphs and functions; drop external-data keys that ONNX does not define.

    Raises ModelError PORT-0115 to PORT-0119 and PORT-0122. Where external data lies is checked when it is
    mapped.
    """
    _unique([(f.domain, f.name, f.overload) for f in proto.functions], "function")
    for scope in _scopes(proto):
        _check_names(scope)
        for tensor in _tensors(scope):
            _check_tensor(tensor)


def locations(proto: onnx.ModelProto) -> Iterator[str]:
    """Where the model's external data lies, as the model says it. Raises as `check` does."""
    check(proto)
    for scope in _scopes(proto):
        for tensor in _tensors(scope):
            yield from (e.value for e in tensor.external_data if e.key == "location")


def byte_count(dtype: ir.DataType, shape: Iterable[int]) -> int:
    """Bytes that ONNX stores for a tensor; sub-byte elements are packed."""
    return (math.prod(shape) * dtype.bitwidth + 7) // 8


def _read_bytes(path: Path) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ModelError("PORT-0101", "the model is not a file", where=str(path))
        if found.st_size == 0:
            raise ModelError("PORT-0102", "the model file is empty", where=str(path))
        if found.st_size > PROTOBUF_LIMIT:
            hint = "save the weights as external data: onnx.save_model(..., save_as_external_data=True)"
            what = f"the model file has {found.st_size} bytes, and protobuf ends at 2 GiB"
            raise ModelError("PORT-0103", what, where=str(path), hint=hint)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError("PORT-0101", f"cannot read the model: {reason}", where=shown(path)) from error


def _check_header(proto: onnx.ModelProto, path: Path) -> None:
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        what = "the file parses as protobuf, but it has no ONNX version, graph or opset"
        raise ModelError("PORT-0105", what, where=str(path), hint="give the .onnx file")
    if proto.ir_version > onnx.IR_VERSION:
        what = f"the model has IR version {proto.ir_version}, and porter knows those up to {onnx.IR_VERSION}"
        raise ModelError("PORT-0106", what, where=str(path), hint="export it again with an older onnx")


def _scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """The main graph, functions, and every graph nested in them."""
    stack: list[Scope] = [*proto.functions, proto.graph]
    while stack:
        scope = stack.pop()
        yield scope
        for attribute in _attributes(scope):
            stack.extend([attribute.g] if attribute.HasField("g") else [])
            stack.extend(attribute.graphs)


def _attributes(scope: Scope) -> Iterator[onnx.AttributeProto]:
    yield from getattr(scope, "attribute_proto", ())
    for node in scope.node:
        yield from node.attribute


def _tensors(scope: Scope) -> Iterator[onnx.TensorProto]:
    sparse = len(getattr(scope, "sparse_initializer", ()))
    yield from getattr(scope, "initializer", ())
    for attribute in _attributes(scope):
        sparse += attribute.HasField("sparse_tensor") + len(attribute.sparse_tensors)
        declared = attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name
        if declared or attribute.HasField(
            "t"
        ):  # a tensor that is declared and missing reads as an untyped one
            yield attribute.t
        yield from attribute.tensors
    if sparse:
        raise ModelError("PORT-0119", "sparse tensors are not supported", hint="store them densely")


def _check_names(scope: Scope) -> None:
    """Single assignment; an initializer may share its name with an input, which makes it a default."""
    if isinstance(scope, onnx.FunctionProto):
        inputs, initializers = list(scope.input), []
        _unique(list(scope.attribute) + [a.name for a in scope.attribute_proto], "attribute")
    else:
        inputs, initializers = [i.name for i in scope.input], [t.name for t in scope.initializer]
    texts = [t for n in scope.node for t in (n.op_type, n.domain, n.name, *n.input, *n.output)]
    if not all(
        isinstance(t, str) for t in [*texts, *inputs, *initializers]
    ):  # protobuf gives bytes for bad UTF-8
        raise ModelError("PORT-0127", "a name is not UTF-8 text")
    made = [name for node in scope.node for name in node.output if name]
    _unique(inputs + made, "value")
    _unique(initializers + made, "value")
    if "" in inputs + initializers:
        raise ModelError("PORT-0127", "an input or an initializer has no name", where=shown(scope.name))
    for node in scope.node:
        _unique([a.name for a in node.attribute], "attribute")


def _unique(names: list, kind: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ModelError("PORT-0122", f"two things claim the {kind} name {shown(name)!r}")
        seen.add(name)


def _check_tensor(tensor: onnx.TensorProto) -> None:
    where = shown(tensor.name) or "a tensor without a name"
    dtype = _dtype(tensor, where)
    _check_dims(tensor, where)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, dtype, where)
    else:
        _check_inline(tensor, dtype, where)


def _dtype(tensor: onnx.TensorProto, where: str) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(
            "PORT-0117", f"the tensor has no known element type ({tensor.data_type})", where=where
        )
    return dtype


def _check_dims(tensor: onnx.TensorProto, where: str) -> None:
    if len(tensor.dims) > MAX_RANK or any(d < 0 for d in tensor.dims):
        raise ModelError(
            "PORT-0115", f"the tensor's shape is impossible: {shown(list(tensor.dims))}", where=where
        )
    if math.prod(d for d in tensor.dims if d) > MAX_ELEMENTS:  # zeros left out: numpy multiplies the rest too
        raise ModelError(
            "PORT-0115", f"the tensor's shape is absurd: {shown(list(tensor.dims))}", where=where
        )


def _check_external(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    """Keep the entries that ONNX defines; each must be single and, where a number, plain decimal digits."""
    if dtype == ir.DataType.STRING:
        raise ModelError("PORT-0117", "strings cannot be stored as external data", where=where)
    if tensor.HasField("raw_data") or any(len(getattr(tensor, f)) for f in _FIELDS):
        raise ModelError("PORT-0118", "the tensor has both external and inline data", where=where)
    known = [(e.key, e.value) for e in tensor.external_data if e.key in ("location", "offset", "length")]
    entries = dict(known)
    text = all(isinstance(v, str) for v in entries.values())  # protobuf gives bytes for bad UTF-8
    if not text or len(entries) != len(known) or not entries.get("location"):
        raise ModelError(
            "PORT-0118", "external data wants exactly one location, offset and length", where=where
        )
    for key in ("offset", "length"):
        if key in entries and not re.fullmatch(r"[0-9]{1,18}", entries[key]):
            what = f"the {key} of external data is not a sensible number: {shown(entries[key])!r}"
            raise ModelError("PORT-0113", what, where=where)
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_FIELD = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}  # every other type: int32_data


def _check_inline(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    """The data is in one field, the right one, and there is as much of it as the shape says."""
    present = {f: len(getattr(tensor, f)) for f in _FIELDS if len(getattr(tensor, f))}
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        wanted, found = (
            {"raw_data": byte_count(dtype, tensor.dims)},
            {"raw_data": len(tensor.raw_data)} | present,
        )
    else:
        wanted, found = {_FIELD.get(dtype, "int32_data"): _entries(dtype, tensor.dims)}, present
    if {f: n for f, n in found.items() if n} != {f: n for f, n in wanted.items() if n}:
        shape = f"{dtype.name} {shown(list(tensor.dims))}"
        what = f"a tensor of {shape} wants {_counts(wanted)}, not {_counts(found)}"
        raise ModelError("PORT-0116", what, where=where)


def _entries(dtype: ir.DataType, dims: Iterable[int]) -> int:
    """How many numbers a typed data field holds: complex numbers take two, sub-byte integers share a byte."""
    count = math.prod(dims)
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * count
    if dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        return byte_count(dtype, dims)
    return count


def _counts(fields: dict[str, int]) -> str:
    return " and ".join(f"{n} of {f}" for f, n in fields.items()) or "none"

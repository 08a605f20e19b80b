"""ONNX in and out: load, save, verify, digest; and the few edits that passes share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from google.protobuf.message import EncodeError

from porter import untrusted
from porter.errors import EnvironmentFailure, ModelError
from porter.mapped import CHUNK, MappedTensor, all_nodes, open_beneath, pin
from porter.structure import sort, verify
from porter.untrusted import shown

__all__ = [
    "all_nodes",
    "check_finite",
    "digest",
    "initializer",
    "load",
    "replace_all_uses",
    "save",
    "sort",
    "unique_name",
    "verify",
    "weight_bytes",
]

# A vector register and a cache line of the widest host. Mapped files start on a page, so a tensor is aligned
# in memory as in the file. ONNX Runtime maps any offset; whole pages would waste 4 KiB for every bias and
# norm.
ALIGNMENT = 64


def load(path: str | os.PathLike) -> ir.Model:
    """Read a model of any size; weights in external data stay on disk until they are read.

    External data must be regular files in the model's folder, reached without links. Nodes that are merely
    out of order are sorted. Raises ModelError PORT-0101 to PORT-0125, PORT-0127 or PORT-0129; NaN and
    infinity are `check_finite`'s.
    """
    path = Path(path)
    proto = untrusted.read(path)
    try:
        untrusted.check(proto)
        with _quiet(logging.getLogger("onnx_ir.serde")):  # verify says it, as an error
            model = ir.from_proto(proto)
        pin(model, path.parent)
        _verify_sorted(model)
    except ModelError:
        raise
    except Exception as error:  # the boundary to parsers of a file that may hold anything
        what = f"the model is damaged: {shown(_root(error))}"
        raise ModelError("PORT-0127", what, where=str(path)) from error
    return model


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _verify_sorted(model: ir.Model) -> None:
    try:
        verify(model)
    except ModelError as error:
        if error.code != "PORT-0120":
            raise
        sort(model)
        verify(model)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def save(model: ir.Model, path: str | os.PathLike, *, threshold: int = 1024) -> None:
    """Write `path` and, for initializers above `threshold` bytes, `<stem>.onnx.data` beside it.

    The same model gives the same bytes: tensors lie in graph order at multiples of 64. One tensor at a time
    is in memory. Both files are written under temporary names and renamed, data first; an interrupted save
    leaves the old files. The model may be mapped from the very files that are replaced, and stays readable
    afterwards. A data file that is no longer needed is left alone, because another model may use it. Raises
    ModelError PORT-0128 when it cannot be written, EnvironmentFailure PORT-0901 when the disk is full.
    """
    path = Path(path)
    data = path.with_name(f"{path.stem}.onnx.data")
    pin(model)
    layout = _layout(model, threshold)
    content = _serialize(model, layout, data.name)
    with _replacing([data, path] if layout else [path]) as files:
        if layout:
            _write_data(layout, files[0])
        files[-1].write(content)


Layout = dict[int, tuple[ir.TensorProtocol, int]]  # by id: the tensor, and where it lies in the data file


def _layout(model: ir.Model, threshold: int) -> Layout:
    layout: Layout = {}
    end = inline = 0
    for tensor in _weights(model):
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes <= threshold:
            inline += 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        layout[id(tensor)] = tensor, offset
        end = offset + tensor.nbytes
    inline += sum(t.nbytes for t in _constants(model) if t.dtype != ir.DataType.STRING)
    if inline > untrusted.PROTOBUF_LIMIT:
        hint = "clean.constants makes initializers of Constant nodes; or lower the threshold"
        raise ModelError("PORT-0128", f"{inline} bytes of tensors would stay in the protobuf", hint=hint)
    return layout


def _serialize(model: ir.Model, layout: Layout, location: str) -> bytes:
    """The model's own file. Weights are swapped for references while it is made, and back."""
    swapped: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for value in _initialized(model):
            tensor = value.const_value
            swapped.append((value, tensor))
            value.const_value = _stored(value, tensor, layout, location)
        return ir.to_proto(model).SerializeToString(deterministic=True)
    except (EncodeError, ir.serde.SerdeError, ValueError) as error:
        what = f"the model cannot be serialized: {shown(_root(error))}"
        raise ModelError("PORT-0128", what) from error
    finally:
        for value, tensor in swapped:
            value.const_value = tensor


def _stored(value: ir.Value, tensor: ir.TensorProtocol, layout: Layout, location: str) -> ir.TensorProtocol:
    if id(tensor) in layout:
        place = location, layout[id(tensor)][1], tensor.nbytes, tensor.dtype
        return ir.ExternalTensor(*place, shape=ir.Shape(tensor.shape), name=value.name or "")
    if isinstance(tensor, ir.ExternalTensor):  # small, so it moves into the protobuf
        return ir.Tensor(tensor.numpy(), tensor.dtype, name=value.name)
    return tensor


def _write_data(layout: Layout, file: BinaryIO) -> None:
    for tensor, offset in layout.values():
        file.seek(offset)
        if isinstance(tensor, MappedTensor):
            tensor.tofile(file)
        else:
            file.write(_bytes(tensor))
        assert file.tell() == offset + tensor.nbytes, f"{tensor.name}: wrote {file.tell() - offset} bytes"


def _bytes(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The stored form; a view where the array in memory already is that."""
    if tensor.dtype.bitwidth < 8 or not isinstance(tensor, ir.Tensor):
        return tensor.tobytes()
    array = np.ascontiguousarray(tensor.numpy())
    return memoryview(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _replacing(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    """Files under temporary names, renamed to `paths` in order when all went well, else removed."""
    mark = secrets.token_hex(4)
    temporary = [p.with_name(f".{p.name}.{mark}") for p in paths]
    try:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open(t, "xb")) for t in temporary]
        for t, p in zip(temporary, paths, strict=True):
            os.replace(t, p)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure("PORT-0901", "the disk is full", where=str(paths[-1])) from error
        raise ModelError(
            "PORT-0128", f"cannot write the model: {error.strerror}", where=str(paths[-1])
        ) from error
    finally:
        for t in temporary:
            with contextlib.suppress(OSError):
                t.unlink()


def digest(path: str | os.PathLike) -> str:
    """sha256, in hex, of a model with its external data.

    Without external data: that of the file. Else that of the text `<sha256 of the model>\\n`, followed by
    `<sha256>  <location>\\n` for every whole data file, sorted by location. Raises as `load` does.
    """
    path = Path(path)
    proto = untrusted.read(path)
    with open(path, "rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    locations = sorted(set(untrusted.locations(proto)))
    if not locations:
        return own
    text = f"{own}\n" + "".join(f"{_file_digest(path.parent, name)}  {name}\n" for name in locations)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(folder: Path, location: str) -> str:
    with open_beneath(folder, location) as fd, open(fd, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finite(model: ir.Model) -> None:
    """Raise ModelError PORT-0126 for a tensor with NaN or infinity; reads all weights, a chunk at a time.

    Masks are let through: scalars (a bound of Clip, a filler of Where), and tensors whose finite values are
    all zero and whose others are -inf.
    """
    named = [(v.name, v.const_value) for v in _initialized(model)]
    for name, tensor in [*named, *((t.name, t) for t in _constants(model))]:
        if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
            continue
        for start, part in _chunks(tensor):
            bad = ~np.isfinite(part)
            if bad.any() and (np.isnan(part).any() or not (tensor.size == 1 or _is_mask(part))):
                at = start + int(bad.argmax())
                what = (
                    f"the tensor holds {int(bad.sum())} or more values that are not finite, the first at {at}"
                )
                hint = "the training or a cast overflowed; look at the checkpoint"
                raise ModelError("PORT-0126", what, where=shown(name or "a Constant"), hint=hint)


def _is_mask(part: np.ndarray) -> bool:
    return bool(((part == 0) | (part == -np.inf)).all())


def _chunks(tensor: ir.TensorProtocol) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first, values) of consecutive flat parts; a mapped tensor's pages leave memory again."""
    flat = tensor.numpy().reshape(-1)
    step = CHUNK // flat.itemsize
    for start in range(0, flat.size, step):
        yield start, flat[start : start + step]
        if isinstance(tensor, MappedTensor):
            tensor.forget(start * flat.itemsize, (start + step) * flat.itemsize)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers as stored, a shared tensor counted once."""
    return sum(t.nbytes for t in _weights(model) if t.dtype != ir.DataType.STRING)


def _initialized(model: ir.Model) -> list[ir.Value]:
    return [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """Tensors of all initializers in graph order, each once."""
    return list({id(v.const_value): v.const_value for v in _initialized(model)}.values())


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                yield from attribute.as_tensors()


def unique_name(model: ir.Model, base: str) -> str:
    """`base`, or `base_1`, `base_2`, … when a value of the model has that name already."""
    taken = {v.name for g in model.graphs() for v in [*g.inputs, *g.initializers.values()]}
    taken |= {v.name for n in all_nodes(model) for v in n.outputs}
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def initializer(model: ir.Model, name: str, value: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Add a weight to the main graph and return it; the name is made unique."""
    tensor = ir.tensor(value) if isinstance(value, np.ndarray) else value
    name = unique_name(model, name)
    made = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
    )
    model.graph.initializers.add(made)
    return made


def replace_all_uses(old: ir.Value, new: ir.Value) -> int:
    """Let every user of `old` use `new`, and return how many did.

    If `old` is a graph output, `new` takes its place and its name, through an Identity when `new` has a name
    that the outside knows too (an input, an initializer or another output).
    """
    edits = len(old.uses()) + old.is_graph_output()
    output = old.is_graph_output()
    if not output:
        old.replace_all_uses_with(new)
        return edits
    graph, name = old.graph, old.name
    assert graph is not None
    ends = [i for i, v in enumerate(graph.outputs) if v is old]
    stand_in = _named_apart(new, graph)
    stand_in.shape, stand_in.type = stand_in.shape or old.shape, stand_in.type or old.type
    for i in ends:
        graph.outputs[i] = stand_in
    old.replace_all_uses_with(new)
    old.name = f"{name}_replaced"
    stand_in.name = name
    return edits


def _named_apart(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """`value` if it may be renamed, else a copy of it made at the graph's end."""
    if (
        not (value.is_graph_input() or value.is_initializer() or value.is_graph_output())
        and value.graph is graph
    ):
        return value
    copy = ir.Node("", "Identity", [value])
    graph.append(copy)
    return copy.outputs[0]

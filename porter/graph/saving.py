"""Write a model: weights streamed beside it, the same bytes every time, all or nothing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from google.protobuf.message import EncodeError

from porter.errors import EnvironmentFailure, ModelError
from porter.formats import packing
from porter.graph import untrusted
from porter.graph.mapped import MappedTensor, constants, initialized, pin, weights
from porter.graph.untrusted import shown

# A vector register and a cache line of the widest host. Mapped files start on a page, so a tensor is aligned
# in memory as in the file. ONNX Runtime maps any offset; whole pages would waste 4 KiB for every bias and
# norm.
ALIGNMENT = 64


def save(model: ir.Model, path: str | os.PathLike, *, threshold: int = 1024) -> None:
    """Write `path` and, for initializers above `threshold` bytes, `<stem>.onnx.data` beside it.

    The same model gives the same bytes: tensors lie in graph order at multiples of 64. A few tensors at a
    time are in memory: while one is written, a thread reads and computes the next. Both files are written
    under temporary names and renamed, data first; an interrupted save leaves the old files. The model may be
    mapped from the very files that are replaced, and stays readable afterwards. A data file that is no longer
    needed is left alone, because another model may use it. Raises ModelError PORT-0128 when it cannot be
    written, EnvironmentFailure PORT-0901 when the disk is full.
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
    for tensor in weights(model):
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes <= threshold:
            inline += 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        layout[id(tensor)] = tensor, offset
        end = offset + tensor.nbytes
    inline += sum(t.nbytes for t in constants(model) if t.dtype != ir.DataType.STRING)
    if inline > untrusted.PROTOBUF_LIMIT:
        hint = "clean.constants makes initializers of Constant nodes; or lower the threshold"
        raise ModelError("PORT-0128", f"{inline} bytes of tensors would stay in the protobuf", hint=hint)
    return layout


def _serialize(model: ir.Model, layout: Layout, location: str) -> bytes:
    """The model's own file. Weights are swapped for references while it is made, and back."""
    swapped: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for value in initialized(model):
            tensor = value.const_value
            swapped.append((value, tensor))
            value.const_value = _stored(value, tensor, layout, location)
        with quiet():  # it warns of shapes without types, which are allowed
            return ir.to_proto(model).SerializeToString(deterministic=True)
    except (EncodeError, ir.serde.SerdeError, ValueError) as error:
        what = f"the model cannot be serialized: {shown(root(error))}"
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


AHEAD = 2  # tensors that are made while another is written
AHEAD_BYTES = 256 << 20  # a tensor is not made while so many bytes wait to be written


def _write_data(layout: Layout, file: BinaryIO) -> None:
    for tensor, offset, content in _made(layout):
        file.seek(offset)
        if isinstance(tensor, MappedTensor):
            tensor.tofile(file)
        else:
            file.write(content)
        assert file.tell() == offset + tensor.nbytes, f"{tensor.name}: wrote {file.tell() - offset} bytes"


def _made(layout: Layout) -> Iterator[tuple[ir.TensorProtocol, int, bytes | memoryview | None]]:
    """Each tensor, its place and its bytes, in order; a thread makes the next ones meanwhile.

    One thread, for computing a tensor takes all of them. What fails there is raised here. When the caller
    stops early, so does the thread, after the tensor that it is at.
    """
    todo = list(layout.values())
    with ThreadPoolExecutor(1, "porter-save") as maker:
        waiting: deque[Future[bytes | memoryview | None]] = deque()
        try:
            for i, (tensor, offset) in enumerate(todo):
                ahead = todo[i + len(waiting) : i + 1 + AHEAD]
                held = sum(t.nbytes for t, _ in todo[i : i + len(waiting)])
                for other, _ in ahead:
                    if waiting and held + other.nbytes > AHEAD_BYTES:
                        break
                    held += other.nbytes
                    waiting.append(maker.submit(_prepared, other))
                yield tensor, offset, waiting.popleft().result()
        finally:
            maker.shutdown(cancel_futures=True)


def _prepared(tensor: ir.TensorProtocol) -> bytes | memoryview | None:
    """The bytes of a tensor; of a mapped one nothing, but its pages are on their way to memory."""
    if isinstance(tensor, MappedTensor):
        tensor.prefetch()
        return None
    return _bytes(tensor)


def _bytes(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The stored form; a view where the array in memory already is that."""
    if not isinstance(tensor, ir.Tensor | ir.LazyTensor):
        return tensor.tobytes()
    array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    if tensor.dtype.bitwidth < 8:
        return packing.pack(array.view(np.uint8), tensor.dtype.bitwidth).data
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep onnx_ir from writing about models to the log, where porter answers with errors."""
    logger = logging.getLogger("onnx_ir.serde")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def root(error: BaseException) -> BaseException:
    """The exception that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

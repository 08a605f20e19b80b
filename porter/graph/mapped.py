"""A model's tensors, and those whose bytes stay in a file: found safely, checked, mapped lazily."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from porter import memory
from porter.errors import ModelError
from porter.graph.untrusted import byte_count, shown

CHUNK = 1 << 24  # bytes read or written at a time

Mapping = mmap.mmap | bytes  # bytes: an empty file, which cannot be mapped


class MappedTensor(ir.ExternalTensor):
    """An external tensor that holds its file's mapping, so a file renamed over the old one changes nothing.

    `release` forgets the decoded array only; the mapping is shared with the file's other tensors. As with
    every memory map, a process that truncates the file meanwhile kills this one: replace files, do not
    rewrite them.
    """

    __slots__ = ()

    def __init__(self, tensor: ir.ExternalTensor, folder: str, mapping: Mapping) -> None:
        super().__init__(
            tensor.location,
            tensor.offset or 0,
            byte_count(tensor.dtype, tensor.shape.numpy()),
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=folder,
        )
        self.raw = mapping

    def view(self) -> memoryview:
        """The tensor's bytes as stored, without a copy."""
        return memoryview(self.raw)[self.offset : self.offset + self.length]

    def _load(self) -> None:
        self.prefetch()
        flat = np.frombuffer(self.view(), np.uint8)
        if self.dtype.bitwidth < 8:
            self._array = ir.PackedTensor(flat, self.dtype, shape=self.shape).numpy()
        else:
            dtype = np.dtype(self.dtype.numpy()).newbyteorder("<")
            self._array = flat.view(dtype).reshape(self.shape.numpy())

    def tobytes(self) -> bytes:
        """The bytes as stored, copied."""
        return bytes(self.view())

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes in chunks; pages read for it leave memory again."""
        view = self.view()
        for start in range(0, self.length, CHUNK):
            self.prefetch(start + CHUNK, start + 2 * CHUNK)
            file.write(view[start : start + CHUNK])
            self.forget(start, start + CHUNK)

    def prefetch(self, start: int = 0, stop: int = CHUNK) -> None:
        """Let the kernel begin to read the pages of bytes `start` to `stop`."""
        self._advise("MADV_WILLNEED", start, stop)

    def forget(self, start: int, stop: int) -> None:
        """Let the kernel drop the pages of bytes `start` to `stop`; they are read again when needed."""
        self._advise("MADV_DONTNEED", start, stop)

    def _advise(self, what: str, start: int, stop: int) -> None:
        if not isinstance(self.raw, mmap.mmap) or not hasattr(mmap, what):
            return
        first = (self.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(self.offset + stop, self.offset + self.length) - first
        if length > 0:
            self.raw.madvise(getattr(mmap, what), first, length)

    def release(self) -> None:
        """Forget the decoded array."""
        self._array = None


def pin(model: ir.Model, folder: Path | None = None) -> None:
    """Make every external tensor of the model a MappedTensor; those in attributes become plain tensors.

    `folder` is where their files must lie; None takes each tensor's own base_dir. Values do not change.
    Raises ModelError PORT-0108 to PORT-0114.
    """
    maps: dict[tuple[str, str], Mapping] = {}

    def mapped(tensor: ir.ExternalTensor) -> MappedTensor:
        base = os.fspath(folder if folder is not None else tensor.base_dir) or "."
        key = base, os.fspath(tensor.location)
        if key not in maps:
            maps[key] = _map(*key, shown(tensor.name))
        _check_bounds(tensor, len(maps[key]))
        return MappedTensor(tensor, base, maps[key])

    for graph in model.graphs():
        for value in graph.initializers.values():
            if _foreign(value.const_value):
                value.const_value = mapped(value.const_value)
    for node in all_nodes(model):
        for attribute in list(node.attributes.values()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes.add(ir.AttrTensor(attribute.name, _plain(attribute.value, mapped)))
            elif attribute.type == ir.AttributeType.TENSORS:
                tensors = [_plain(t, mapped) for t in attribute.value]
                node.attributes.add(ir.AttrTensors(attribute.name, tensors))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the graph, of functions, and of every graph nested in them."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def initialized(model: ir.Model) -> list[ir.Value]:
    """Values of all initializers that have a tensor, in graph order."""
    return [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]


def weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """Tensors of all initializers in graph order, each once."""
    return list({id(v.const_value): v.const_value for v in initialized(model)}.values())


def constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Tensors in attributes of all nodes."""
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.value  # not as_tensor, which asks a string tensor for its bytes
            elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                yield from attribute.value


def _plain(tensor: ir.TensorProtocol, mapped: object) -> ir.TensorProtocol:
    """An attribute's tensor without external data: ONNX lets only initializers have a file of their own."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    pinned = mapped(tensor) if _foreign(tensor) else tensor  # type: ignore[operator]
    return ir.Tensor(pinned.numpy(), tensor.dtype, name=tensor.name)


def _foreign(tensor: object) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and not isinstance(tensor, MappedTensor)


def _check_bounds(tensor: ir.ExternalTensor, size: int) -> None:
    where, wanted = shown(tensor.name), byte_count(tensor.dtype, tensor.shape.numpy())
    offset = tensor.offset or 0
    if tensor.length is not None and tensor.length != wanted:
        what = f"external data of {tensor.length} bytes, where shape and type want {wanted}"
        raise ModelError("PORT-0114", what, where=where)
    if offset < 0 or offset + wanted > size:
        what = f"external data at {offset} to {offset + wanted}, past the end of a file of {size} bytes"
        raise ModelError(
            "PORT-0113", what, where=where, hint="the data file may be truncated, or another model's"
        )


def _map(folder: str, location: str, name: str) -> Mapping:
    with open_beneath(folder, location, name) as fd:
        size = os.fstat(fd).st_size
        try:
            mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:  # every mapping holds a file descriptor
            what = f"cannot map the external data: {error.strerror}"
            raise ModelError("PORT-0112", what, where=shown(location)) from error
    if size:
        memory.mapped.add(mapping)
    return mapping


@contextlib.contextmanager
def open_beneath(folder: str | Path, location: str, name: str = "") -> Iterator[int]:
    """A file descriptor of a regular file inside `folder`, reached without following any link.

    Every part of the path is opened relative to the one before it, so nothing can be swapped in between.
    Refuses with ModelError: a path that leaves the folder PORT-0108, a symbolic link PORT-0109, a hard link
    PORT-0110, what is not a regular file PORT-0111, a missing or unreadable file PORT-0112.
    """
    where = f"{name}: {shown(location)}" if name else shown(location)
    parts = _parts(location, where)
    fds: list[int] = []
    try:
        fds.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in parts[:-1]:
            _check_entry(os.stat(part, dir_fd=fds[-1], follow_symlinks=False), stat.S_ISDIR, where)
            fds.append(
                os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fds[-1])
            )
        # Looked at before it is opened, because opening a device may do something, and again after.
        _check_entry(os.stat(parts[-1], dir_fd=fds[-1], follow_symlinks=False), stat.S_ISREG, where)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fds.append(os.open(parts[-1], flags, dir_fd=fds[-1]))
        _check_entry(os.fstat(fds[-1]), stat.S_ISREG, where)
    except OSError as error:
        _close(fds)
        what = f"cannot open the external data: {error.strerror}"
        raise ModelError("PORT-0112", what, where=where, hint="it belongs beside the model file") from error
    except BaseException:
        _close(fds)
        raise
    try:
        yield fds[-1]
    finally:
        _close(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _parts(location: str, where: str) -> list[str]:
    """The parts of a relative path; anything that could lead outside, on any system, is refused."""
    parts = [p for p in location.split("/") if p not in ("", ".")]
    bad = location.startswith("/") or "\\" in location or "\0" in location or ".." in parts or not parts
    if bad or re.match(r"[A-Za-z]:", location):
        what = "external data must lie in the model's folder"
        raise ModelError("PORT-0108", what, where=where, hint="use a relative path without .. or backslashes")
    return parts


def _check_entry(found: os.stat_result, wanted: object, where: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        hint = "a link can lead anywhere; copy the file itself into the model's folder"
        raise ModelError(
            "PORT-0109", "the external data is reached through a symbolic link", where=where, hint=hint
        )
    if not wanted(found.st_mode):  # type: ignore[operator]
        raise ModelError("PORT-0111", "the external data is not a regular file in a folder", where=where)
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        hint = "a hard link can be someone else's file; make it a copy: cp --remove-destination"
        raise ModelError(
            "PORT-0110", f"the external data has {found.st_nlink} hard links", where=where, hint=hint
        )

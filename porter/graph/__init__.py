"""ONNX in and out: load, save, verify, digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter.errors import ModelError
from porter.graph import untrusted
from porter.graph.mapped import (
    CHUNK,
    MappedTensor,
    all_nodes,
    constants,
    initialized,
    open_beneath,
    pin,
    weights,
)
from porter.graph.saving import quiet, root, save
from porter.graph.structure import sort, verify
from porter.graph.untrusted import shown

__all__ = [
    "all_nodes",
    "check_finite",
    "digest",
    "float_count",
    "load",
    "save",
    "sort",
    "verify",
    "weight_bytes",
]


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
        with quiet():  # verify says it, as an error
            model = ir.from_proto(proto)
        pin(model, path.parent)
        _verify_sorted(model)
    except ModelError:
        raise
    except Exception as error:  # the boundary to parsers of a file that may hold anything
        cause = root(error)
        what = f"the model is damaged: {type(cause).__name__}: {shown(cause)}"
        raise ModelError("PORT-0127", what, where=str(path)) from error
    return model


def _verify_sorted(model: ir.Model) -> None:
    try:
        verify(model)
    except ModelError as error:
        if error.code != "PORT-0120":
            raise
        sort(model)
        verify(model)


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
    named = [(v.name, v.const_value) for v in initialized(model)]
    for name, tensor in [*named, *((t.name, t) for t in constants(model))]:
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
    return sum(t.nbytes for t in weights(model) if t.dtype != ir.DataType.STRING)


def float_count(model: ir.Model) -> int:
    """Numbers in all initializers of floats, a shared tensor counted once."""
    return sum(t.size for t in weights(model) if t.dtype.is_floating_point())

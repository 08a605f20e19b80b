"""ONNX in and out: load, save, verify, digest; and the few edits that passes share."""

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
    "initializer",
    "load",
    "replace_all_uses",
    "save",
    "sort",
    "unique_name",
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


def unique_name(model: ir.Model, base: str) -> str:
    """`base`, or `base_1`, `base_2`, … when a value of the main graph or its subgraphs has that name."""
    return _unused(base, model.graph)


def _unused(base: str, graph: ir.Graph) -> str:
    graphs = [graph, *graph.subgraphs()]
    taken = {v.name for g in graphs for v in [*g.inputs, *g.initializers.values()]}
    taken |= {v.name for g in graphs for n in g for v in n.outputs}
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
    old.name = _unused(f"{name}_replaced", graph)
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

"""Faults as ports have them, planted in a model: each says which nodes are then the right ones to blame."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from porter.decoder import recognise
from porter.drift.blame.sites import named

Fault = Callable[[ir.Model, int], set[str]]


def transposed(model: ir.Model, layer: int) -> set[str]:
    """One weight transposed: the output projection of attention, which is square."""
    linear = linears(model, layer)["o"]
    turn = linear.inputs[1].producer()
    assert turn.op_type == "Transpose"
    linear.replace_input_with(1, turn.inputs[0])
    return {named(linear)}


def shifted_scales(model: ir.Model, layer: int) -> set[str]:
    """Every scale of one weight is that of the group before; where all are the same, those of cached keys are
    of the head before."""
    linear = linears(model, layer)["down"]
    scale = decode_of(linear).inputs[1]
    if np.ptp(scale.const_value.numpy()) == 0:
        return shifted_heads(model, layer)
    replace(scale, np.roll(scale.const_value.numpy(), 1, axis=-1))
    return {named(linear)}


def shifted_heads(model: ir.Model, layer: int) -> set[str]:
    """The scales of one layer's new keys are those of the head before."""
    scatter = next(n for n in model.graph if n.outputs[0].name == f"present.{layer}.key_scale")
    count = int(scatter.inputs[0].shape[1])
    order = weight(model, "fault.order", np.roll(np.arange(count), 1))
    rolled = op(model, scatter, "Gather", scatter.inputs[1], order, axis=1)
    scatter.replace_input_with(1, rolled)
    read = {named(use.node) for use in scatter.outputs[0].uses()}
    return {named(scatter), named(rolled.producer()), *read, named(buffer_of(model, layer))}


def buffer_of(model: ir.Model, layer: int) -> ir.Node:
    """What writes a layer's keys."""
    return next(n for n in model.graph if n.outputs[0].name == f"present.{layer}.key")


def one_scale(model: ir.Model, layer: int) -> set[str]:
    """A single group has the scale of its neighbour, where these differ most."""
    linear = linears(model, layer)["down"]
    scale = decode_of(linear).inputs[1]
    array = scale.const_value.numpy().copy()
    if np.ptp(array) == 0:
        return shifted_heads(model, layer)
    ratio = np.abs(np.log(np.abs(array[:, 1:] / array[:, :-1])))
    row, column = np.unravel_index(ratio.argmax(), ratio.shape)
    array[row, column] = array[row, column + 1]
    replace(scale, array)
    return {named(linear)}


def swapped_nibbles(model: ir.Model, layer: int) -> set[str]:
    """The two codes of each byte of one weight in the other order."""
    linear = linears(model, layer)["gate"]
    codes = decode_of(linear).inputs[0]
    array = codes.const_value.numpy()
    replace(codes, array.reshape(-1, 2)[:, ::-1].reshape(array.shape), codes.const_value.dtype)
    return {named(linear)}


def unsaturated(model: ir.Model, layer: int) -> set[str]:
    """An fp8 weight whose largest codes overflowed to NaN."""
    linear = linears(model, layer)["down"]
    codes = decode_of(linear).inputs[0]
    array = codes.const_value.numpy().copy()
    assert array.dtype == ml_dtypes.float8_e4m3fn
    raw = array.view(np.uint8)
    raw[(raw & 0x7F) == 0x7E] = 0x7F
    replace(codes, array, codes.const_value.dtype)
    return {named(linear)}


def no_epsilon(model: ir.Model, layer: int) -> set[str]:
    """A norm without its epsilon, where that matters: the first, which reads embeddings; the last, where
    there are norms with a tiny epsilon, whose model has large embeddings."""
    norms = [n for n in model.graph if n.op_type == "RMSNormalization"]
    tiny = any(n.attributes.get_float("epsilon", 1e-5) < 1e-8 for n in norms)
    norm = norms[-1 if tiny else 0]
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    return {named(norm)}


def late_positions(model: ir.Model, layer: int) -> set[str]:
    """Tokens after cached ones stand one too far."""
    lengths = next(v for v in model.graph.inputs if v.name == "past_lengths")
    node = next(n for n in model.graph if n.op_type == "Unsqueeze" and n.inputs[0] is lengths)
    zero = weight(model, "fault.zero", np.zeros(1, np.int64))
    some = op(model, node, "Greater", lengths, zero)
    one = op(model, node, "Cast", some, to=ir.DataType.INT64)
    late = op(model, node, "Add", lengths, one)
    node.replace_input_with(0, late)
    return {named(node), named(late.producer()), *after_positions(node)}


def after_positions(node: ir.Node) -> set[str]:
    """The nodes that only turn positions into angles."""
    found, stack = set(), [node]
    while stack:
        for value in stack.pop().outputs:
            for reader, _ in value.uses():
                if reader.op_type in ("Add", "Expand", "Unsqueeze", "Cast", "Mul"):
                    found.add(named(reader))
                    stack.append(reader)
    return found


def early_attention(model: ir.Model, layer: int) -> set[str]:
    """The causal mask lets each token see the next."""
    attention = attentions(model)[layer]
    one = weight(model, "fault.one", np.ones(1, np.int64))
    attention.replace_input_with(6, op(model, attention, "Add", attention.inputs[6], one))
    return {named(attention)}


def swapped_caches(model: ir.Model, layer: int) -> set[str]:
    """Attention reads values as keys and keys as values."""
    attention = attentions(model)[layer]
    keys, values = attention.inputs[1:3]
    attention.replace_input_with(1, values)
    attention.replace_input_with(2, keys)
    return {named(attention)}


def wrong_repeat(model: ir.Model, layer: int) -> set[str]:
    """Query head h reads key head h mod heads instead of h div group."""
    attention = attentions(model)[layer]
    groups = heads(model, attention)
    made = []
    for i in (1, 2):
        repeated = op(model, attention, "Concat", *[attention.inputs[i]] * groups, axis=1)
        attention.replace_input_with(i, repeated)
        made.append(repeated)
    return {named(attention), *(named(v.producer()) for v in made)}


def stale_slot(model: ir.Model, layer: int) -> set[str]:
    """A step's first key is written over the last one before it, and its own slot keeps what was there."""
    attention = attentions(model)[layer]
    scatter = attention.inputs[1].producer()
    while scatter.op_type != "TensorScatter":
        scatter = scatter.inputs[0].producer()
    zero, one = (
        weight(model, "fault.zero", np.zeros(1, np.int64)),
        weight(model, "fault.one", np.ones(1, np.int64)),
    )
    less = op(model, scatter, "Sub", scatter.inputs[2], one)
    scatter.replace_input_with(2, op(model, scatter, "Max", less, zero))
    return {named(scatter)}


def dropped_bias(model: ir.Model, layer: int) -> set[str]:
    """The bias of a query projection that has one (`with_bias`)."""
    add = next(
        n for n in model.graph if any(v is not None and v.name == f"fault.bias.{layer}" for v in n.inputs)
    )
    source = next(v for v in add.inputs if v.name != f"fault.bias.{layer}")
    readers = {named(use.node) for use in add.outputs[0].uses()}
    add.outputs[0].replace_all_uses_with(source)
    model.graph.remove(add, safe=True)
    return {named(source.producer()), *readers}


def with_bias(model: ir.Model) -> None:
    """Give each layer's down projection a bias, a tenth of its weight's spread; the decoders have none."""
    rng = np.random.default_rng(0)
    for i, node in enumerate([n for n in model.graph if n.op_type == "MatMul" and "down" in module(n)]):
        width = node.outputs[0].shape[-1]
        bias = weight(model, f"fault.bias.{i}", (rng.standard_normal(int(width)) * 0.3).astype(np.float32))
        made = ir.node("Add", [node.outputs[0], bias], name=f"bias_{i}")
        made.outputs[0].name = f"biased_{i}"
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(made.outputs[0])
        made.replace_input_with(0, node.outputs[0])
        made.metadata_props.update(node.metadata_props)
        model.graph.insert_after(node, made)


# Finding one's way.


def module(node: ir.Node) -> str:
    return node.metadata_props.get("porter.module", "")


def linears(model: ir.Model, layer: int) -> dict[str, ir.Node]:
    """The linear layers of a decoder layer by role; a fused one stands under each of its parts."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        text = f"{module(node)} {node.outputs[0].name} {weight_name(node)}"
        if f"layers.{layer}." not in text:
            continue
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            if (
                f"{role}_proj" in text
                or (role in "qkv" and "qkv_proj" in text)
                or (role == "gate" and "gate_up" in text)
            ):
                found[role] = node
    return found


def weight_name(node: ir.Node) -> str:
    value = node.inputs[1]
    while value.producer() is not None:
        value = value.producer().inputs[0]
    return value.name


def decode_of(linear: ir.Node) -> ir.Node:
    node = linear.inputs[1].producer()
    while node.op_type != "DequantizeLinear":
        node = node.inputs[0].producer()
    return node


def attentions(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "Attention"]


def heads(model: ir.Model, attention: ir.Node) -> int:
    """How many query heads read one key head."""
    query, key = attention.inputs[0], next(v for v in model.graph.inputs if v.name.endswith(".key"))
    return int(query.shape[1]) // int(key.shape[1])


def weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    model.graph.register_initializer(value)
    return value


def replace(value: ir.Value, array: np.ndarray, dtype: ir.DataType | None = None) -> None:
    array = np.ascontiguousarray(array)
    value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)


def op(model: ir.Model, before: ir.Node, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
    """A new node before another one."""
    count = sum(n.name.startswith("fault_") for n in model.graph if n.name)
    node = ir.node(kind, inputs, attributes, name=f"fault_{kind}_{count}")
    node.outputs[0].name = f"fault.{count}"
    model.graph.insert_before(before, node)
    return node.outputs[0]


# What each is planted in: the weights and cache that the port has.
FAULTS: dict[str, tuple[Fault, str]] = {
    "transposed": (transposed, "int4"),
    "shifted scales": (shifted_scales, "int4"),
    "one scale": (one_scale, "int4"),
    "nibbles": (swapped_nibbles, "int4"),
    "fp8 overflow": (unsaturated, "fp8"),
    "epsilon": (no_epsilon, "int4"),
    "positions": (late_positions, "int4"),
    "causal offset": (early_attention, "int4"),
    "k and v": (swapped_caches, "int4"),
    "gqa": (wrong_repeat, "int4"),
    "stale slot": (stale_slot, "int4"),
    "bias": (dropped_bias, "bias"),
}


# Faults in the lowered program: `lowered(…)` compiles with them what a clean model stands beside.


@contextlib.contextmanager
def narrow_accumulator(node: str) -> Iterator[None]:
    """The product of this node adds up in bfloat16."""
    from porter.lower.importer.program import Importer
    from porter.lower.kernels import matmul as kernels

    store, kernel = kernels.store, Importer.kernel
    active = False

    def rounded(buffer: Any, value: Any, *indices: Any) -> None:
        if active and len(indices) == 1 and buffer.shape[0] > kernels.LANES:
            value = _bfloat16(value)
        store(buffer, value, *indices)

    def made(self: Importer, key: Any, make: Callable[[], Any]) -> Any:
        nonlocal active
        active = self.current == node and isinstance(key, tuple)
        try:
            return kernel(self, (key, "narrow") if active else key, make)
        finally:
            active = False

    kernels.store, Importer.kernel = rounded, made
    try:
        yield
    finally:
        kernels.store, Importer.kernel = store, kernel


def _bfloat16(value: Any) -> Any:
    """To the nearest of 8 bits of mantissa, ties to even, as bits: LLVM's own casts are not to be trusted."""
    from porter.lower.kernels.define import T, tirx

    bits = T.reinterpret("uint32", value)
    one, half, mask = (tirx.const(n, "uint32") for n in (1, 0x7FFF, 0xFFFF0000))
    return T.reinterpret("float32", (bits + half + ((bits >> tirx.const(16, "uint32")) & one)) & mask)


def lowered(clean: ir.Model, faulty: ir.Model, folder: Path) -> ir.Model:
    """What a bundle's folder holds: `clean` as its model, and the program that `faulty` compiles to."""
    from porter import graph, target
    from porter.convert import _bounds
    from porter.lower.lower import lower

    folder.mkdir(parents=True, exist_ok=True)
    graph.save(faulty, folder / "faulty.onnx")
    model = graph.load(folder / "faulty.onnx")
    lower(model, target.load("host"), folder, _bounds(model, recognise(model)))
    graph.save(clean, folder / "model.onnx")
    return graph.load(folder / "model.onnx")


ACCUMULATOR = "accumulator"  # in the lowered program alone: `narrow_accumulator`

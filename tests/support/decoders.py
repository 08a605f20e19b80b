"""Small decoders with random weights, in the form that the fuse passes leave, and a way to run them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import ShapeInferencePass

FLOAT, INT = ir.DataType.FLOAT, ir.DataType.INT64
POSITIONS = ("range", "add", "mul", "table", "input", "learned", "sliced")


@dataclass(frozen=True)
class Size:
    """The shape of a decoder. `positions` is how it finds out where its tokens stand:

    `range`: Range(past, past + sequence); `add`: Range(0, sequence) + past; `mul`: the same, multiplied by
    the frequencies rather than matrix-multiplied; `table`: rows of a cosine table; `sliced`: a slice of it;
    `input`: a model input `position_ids`; `learned`: an embedding added to the tokens', no rotation.
    `window`: tokens that a query of every other layer sees, the first among them, by its mask; 0: all.
    """

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    ffn: int = 44
    vocab: int = 61
    context: int = 64
    tied: bool = True
    positions: str = "range"
    window: int = 0
    softcap: float = 0.0
    fused: bool = True
    opset: int = 24
    seed: int = 0


@dataclass
class Builder:
    """Nodes and weights in the making."""

    size: Size
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.size.seed)

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None, num_outputs=outputs)
        self.nodes.append(node)
        for i, out in enumerate(node.outputs):
            out.name = f"{kind.lower()}_{len(self.nodes)}" + (f"_{i}" if i else "")
        return node.outputs[0] if outputs == 1 else node.outputs

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.weights:
            tensor = ir.tensor(array, name=name)
            self.weights[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
            )
        return self.weights[name]

    def ints(self, *values: int) -> ir.Value:
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> ir.Value:
        return self.weight(f"scalar_{value}", np.array(value, np.int64))

    def noise(self, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return self.weight(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def linear(self, x: ir.Value, *parts: tuple[str, int], inputs: int) -> ir.Value:
        """x times the transpose of one weight [sum of rows, inputs] named after all its parts."""
        name = "+".join(p for p, _ in parts)
        w = self.noise(f"{name}.weight", sum(rows for _, rows in parts), inputs)
        return self.op("MatMul", x, self.op("Transpose", w, perm=[1, 0]))

    def heads(self, x: ir.Value, count: int) -> ir.Value:
        """[B,S,count*D] -> [B,count,S,D]."""
        apart = self.op("Reshape", x, self.ints(0, 0, count, self.size.head_size))
        return self.op("Transpose", apart, perm=[0, 2, 1, 3])


def tiny_decoder(**sizes: object) -> ir.Model:
    """A decoder with a concatenated cache: inputs input_ids and past_key_values.{i}.key/value, outputs logits
    [batch, sequence, vocab] and present.{i}.key/value; options as in `Size`."""
    size = Size(**sizes)
    b = Builder(size)
    tokens = _input("input_ids", INT, ["batch", "sequence"])
    cache_shape = ["batch", size.kv_heads, "past", size.head_size]
    kinds = [f"{i}.{kind}" for i in range(size.layers) for kind in ("key", "value")]
    caches = {k: _input(f"past_key_values.{k}", FLOAT, cache_shape) for k in kinds}
    inputs = [tokens, *caches.values()]
    if size.positions == "input":
        inputs.append(_input("position_ids", INT, ["batch", "sequence"]))
    embedding = b.noise("model.embed_tokens.weight", size.vocab, size.hidden, scale=1.0)
    x = b.op("Gather", embedding, tokens)
    rotation = _positions(b, tokens, caches["0.key"], inputs[-1])
    if size.positions == "learned":
        x, rotation = b.op("Add", x, rotation[0]), ()
    outputs, mask = [], _window(b, tokens, caches["0.key"]) if size.window else None
    for i in range(size.layers):
        past = caches[f"{i}.key"], caches[f"{i}.value"]
        x, key, value = _layer(b, x, i, past, rotation, None if i % 2 else mask)
        outputs += [_named(key, f"present.{i}.key"), _named(value, f"present.{i}.value")]
    x = b.op(
        "RMSNormalization", x, b.weight("model.norm.weight", np.ones(size.hidden, np.float32)), epsilon=1e-5
    )
    head = embedding if size.tied else b.noise("lm_head.weight", size.vocab, size.hidden)
    logits = _named(b.op("MatMul", x, b.op("Transpose", head, perm=[1, 0])), "logits")
    graph = ir.Graph(
        inputs,
        [logits, *outputs],
        nodes=b.nodes,
        initializers=list(b.weights.values()),
        opset_imports={"": size.opset},
        name="tiny",
    )
    model = ir.Model(graph, ir_version=11, metadata_props={"porter.context_length": str(size.context)})
    ShapeInferencePass()(model)
    return model


def _window(b: Builder, tokens: ir.Value, past: ir.Value) -> ir.Value:
    """Key j is seen by query i where j > past + i - window: bool [1,1,S,past+S]."""
    count = b.op("Squeeze", b.op("Shape", tokens, start=1, end=2))
    before = b.op("Squeeze", b.op("Shape", past, start=2, end=3))
    total = b.op("Add", before, count)
    rows = b.op("Unsqueeze", b.op("Range", before, total, b.scalar(1)), b.ints(0, 1, 3))
    keys = b.op("Unsqueeze", b.op("Range", b.scalar(0), total, b.scalar(1)), b.ints(0, 1, 2))
    return b.op("Greater", keys, b.op("Sub", rows, b.scalar(b.size.window)))


def _layer(
    b: Builder,
    x: ir.Value,
    index: int,
    past: tuple[ir.Value, ir.Value],
    rotation: tuple[ir.Value, ...],
    mask: ir.Value | None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    s, name = b.size, f"model.layers.{index}"
    query_rows, kv_rows = s.heads * s.head_size, s.kv_heads * s.head_size
    norm = b.op(
        "RMSNormalization", x, b.noise(f"{name}.input_layernorm.weight", s.hidden, scale=1.0), epsilon=1e-5
    )
    parts = (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    parts = tuple((f"{name}.self_attn.{p}", rows) for p, rows in parts)
    q, k, v = _split(b, norm, parts)
    q, k, v = b.heads(q, s.heads), b.heads(k, s.kv_heads), b.heads(v, s.kv_heads)
    if rotation:
        q, k = b.op("RotaryEmbedding", q, *rotation), b.op("RotaryEmbedding", k, *rotation)
    softcap = {"softcap": s.softcap} if s.softcap else {}
    y, key, value = b.op("Attention", q, k, v, mask, *past, outputs=3, is_causal=1, **softcap)
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, query_rows))
    x = b.op("Add", x, b.linear(y, (f"{name}.self_attn.o_proj", s.hidden), inputs=query_rows))
    norm_weight = b.noise(f"{name}.post_attention_layernorm.weight", s.hidden, scale=1.0)
    norm = b.op("RMSNormalization", x, norm_weight, epsilon=1e-5)
    gate, up = _split(b, norm, ((f"{name}.mlp.gate_proj", s.ffn), (f"{name}.mlp.up_proj", s.ffn)))
    inner = b.op("Mul", b.op("Swish", gate), up)
    return b.op("Add", x, b.linear(inner, (f"{name}.mlp.down_proj", s.hidden), inputs=s.ffn)), key, value


def _split(b: Builder, x: ir.Value, parts: tuple[tuple[str, int], ...]) -> list[ir.Value]:
    """The linears `parts` of x: one MatMul and a Split, or one MatMul each."""
    if not b.size.fused:
        return [b.linear(x, part, inputs=b.size.hidden) for part in parts]
    both = b.linear(x, *parts, inputs=b.size.hidden)
    return b.op("Split", both, b.ints(*(rows for _, rows in parts)), outputs=len(parts), axis=-1)


def _positions(b: Builder, tokens: ir.Value, past: ir.Value, last_input: ir.Value) -> tuple[ir.Value, ...]:
    """What RotaryEmbedding takes after X, or for learned positions their embedding [1,S,hidden]."""
    size, style = b.size, b.size.positions
    if style == "input":
        return (*_tables(b), last_input)
    count = b.op("Squeeze", b.op("Shape", tokens, start=1, end=2))
    before = b.op("Squeeze", b.op("Shape", past, start=2, end=3))
    after = b.op("Add", before, count)
    if style == "sliced":
        ends = [b.op("Unsqueeze", v, b.ints(0)) for v in (before, after)]
        shape = b.op("Concat", b.op("Shape", tokens), b.ints(size.head_size // 2), axis=0)
        rows = [b.op("Slice", t, *ends, b.ints(0)) for t in _tables(b)]
        return tuple(b.op("Expand", r, shape) for r in rows)
    if style in ("add", "mul"):
        rows = b.op("Add", b.op("Range", b.scalar(0), count, b.scalar(1)), before)
    else:
        rows = b.op("Range", before, after, b.scalar(1))
    rows = b.op("Unsqueeze", rows, b.ints(0))
    if style == "learned":
        return (b.op("Gather", b.noise("model.embed_positions.weight", size.context, size.hidden), rows),)
    if style == "mul":
        column = b.op("Cast", b.op("Unsqueeze", rows, b.ints(2)), to=FLOAT)
        angles = b.op("Mul", column, _frequencies(b, (-1,)))
        shape = b.op("Concat", b.op("Shape", tokens), b.ints(size.head_size // 2), axis=0)
        return tuple(b.op("Expand", b.op(f, angles), shape) for f in ("Cos", "Sin"))
    rows = b.op("Expand", rows, b.op("Shape", tokens))
    if style == "table":
        return (*_tables(b), rows)
    row = b.op("Cast", b.op("Unsqueeze", rows, b.ints(1)), to=FLOAT)
    angles = b.op("Transpose", b.op("MatMul", _frequencies(b, (1, -1, 1)), row), perm=[0, 2, 1])
    return b.op("Cos", angles), b.op("Sin", angles)


def _frequencies(b: Builder, shape: tuple[int, ...]) -> ir.Value:
    half = b.size.head_size // 2
    return b.weight("inv_freq", (10000.0 ** -(np.arange(half) / half)).astype(np.float32).reshape(shape))


def _tables(b: Builder) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [context, head_size/2]."""
    half = b.size.head_size // 2
    angles = np.outer(np.arange(b.size.context), 10000.0 ** -(np.arange(half) / half))
    return b.weight("cos", np.cos(angles).astype(np.float32)), b.weight(
        "sin", np.sin(angles).astype(np.float32)
    )


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _named(value: ir.Value, name: str) -> ir.Value:
    value.name = name
    return value


def copy(model: ir.Model) -> ir.Model:
    """A model of its own, through its serialized form."""
    return ir.from_proto(ir.to_proto(model))


def session(model: ir.Model) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, one thread, nothing optimized away."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model | ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs by name."""
    live = model if isinstance(model, ort.InferenceSession) else session(model)
    return dict(zip((o.name for o in live.get_outputs()), live.run(None, feeds), strict=True))


def empty_cache(model: ir.Model, batch: int, past: int = 0, seed: int | None = None) -> dict[str, np.ndarray]:
    """A value for every cache input, of `past` tokens where that is open: zeros, or noise from `seed`."""
    random = np.random.default_rng(seed)
    cache = {}
    for value in model.graph.inputs:
        if value.name.startswith("past_key_values."):
            shape = (batch, *(d if isinstance(d, int) else past for d in list(value.shape)[1:]))
            zeros = np.zeros(shape, value.dtype.numpy())
            cache[value.name] = zeros if seed is None else random.standard_normal(shape).astype(zeros.dtype)
    return cache

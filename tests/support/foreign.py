"""Decoders as other tools write them: the graph of ONNX Runtime GenAI's builder, around tiny weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Size:
    """The shape of a decoder and the form of its export.

    `past`: `growing` (past and present), `shared` (both are buffers of `context` tokens) or `told` (growing,
    and the model has the inputs `seqlens_k` and `total_sequence_length` instead of a mask). `bits` is 0 for
    float weights. `rotary`: inside GroupQueryAttention, or an operator of its own with `position_ids`.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    ffn: int = 80
    vocab: int = 61
    context: int = 64
    block: int = 32
    bits: int = 4
    zeros: bool = False
    past: str = "growing"
    packed: bool = True
    rotary: str = "inside"
    tied: bool = False
    window: int = -1
    seed: int = 0


@dataclass
class Builder:
    """Nodes and weights in the making."""

    size: Size
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.size.seed)

    def op(
        self, kind: str, *inputs: str, domain: str = "", outputs: int | list[str] = 1, **attributes: object
    ):
        """The name of the result, or a list of names."""
        number = len(self.nodes)
        names = outputs if isinstance(outputs, list) else [f"{kind}_{number}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, inputs, names, f"{kind}_{number}", domain=domain, **attributes)
        )
        return names if len(names) > 1 else names[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def noise(self, name: str, *shape: int, scale: float | None = None) -> str:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return self.weight(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        """x times a weight, as MatMulNBits with codes of every value."""
        size = self.size
        if not size.bits:
            return self.op("MatMul", x, self.noise(f"{name}.weight", columns, rows, scale=columns**-0.5))
        codes, scale, zeros = self.codes(name, rows, columns)
        return self.op(
            "MatMulNBits", x, codes, scale, *zeros, domain=MICROSOFT, outputs=[f"/{name}/output_0"],
            K=columns, N=rows, bits=size.bits, block_size=size.block,
        )  # fmt: skip

    def codes(self, name: str, rows: int, columns: int) -> tuple[str, str, list[str]]:
        size, groups = self.size, -(-columns // self.size.block)
        stored = self.random.integers(0, 256, (rows, groups, size.block * size.bits // 8), np.uint8)
        codes = self.weight(f"{name}.MatMul.weight_Q{size.bits}", stored)
        # Of such codes the mean square is 2^2b / 12: weights of the usual size.
        scale = (self.random.random((rows, groups)) + 0.5) * (12 / columns) ** 0.5 / 2**size.bits
        scale = self.weight(f"{name}.MatMul.weight_scales", scale.astype(np.float32))
        if not size.zeros:
            return codes, scale, []
        low, high = 2 ** (size.bits - 1) - 1, 2 ** (size.bits - 1) + 2
        points = self.random.integers(low, high, (rows, -(-groups * size.bits // 8), 8 // size.bits))
        points = (points << (np.arange(8 // size.bits) * size.bits)).sum(-1).astype(np.uint8)
        return codes, scale, [self.weight(f"{name}.MatMul.weight_zp", points)]


def genai_decoder(**sizes: object) -> ir.Model:
    """A decoder of SkipSimplifiedLayerNormalization, MatMulNBits and GroupQueryAttention."""
    size = Size(**sizes)
    b = Builder(size)
    inputs, counts = _interface(b)
    x, embedding = _embedded(b)
    scale = b.noise("model.layers.0.input_layernorm.weight", size.hidden, scale=1.0)
    norm = b.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=1e-5, stash_type=1)
    for i in range(size.layers):
        x, norm = _layer(b, i, x, norm, counts)
    if embedding:
        logits = b.op(
            "MatMulNBits", norm, *embedding, domain=MICROSOFT,
            K=size.hidden, N=size.vocab, bits=size.bits, block_size=size.block,
        )  # fmt: skip
    else:
        logits = b.linear(norm, "lm_head", size.vocab, size.hidden)
    b.op("Identity", logits, outputs=["logits"])
    tokens = size.context if size.past == "shared" else "total_sequence_length"
    caches = ["batch_size", size.kv_heads, tokens, size.head_size]
    made = [_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", size.vocab])]
    made += [_info(f"present.{n}", TensorProto.FLOAT, caches) for n in _cache_names(size)]
    graph = helper.make_graph(b.nodes, "main_graph", inputs, made, list(b.weights.values()))
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="onnxruntime-genai")
    found = ir.from_proto(model)
    found.metadata_props["porter.context_length"] = str(size.context)
    return found


def _info(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _cache_names(size: Size) -> list[str]:
    return [f"{i}.{kind}" for i in range(size.layers) for kind in ("key", "value")]


def _interface(b: Builder) -> tuple[list[onnx.ValueInfoProto], list[str]]:
    """The inputs, and the names of seqlens_k and total_sequence_length."""
    size = b.size
    inputs = [_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])]
    if size.past == "told":
        inputs.append(_info("seqlens_k", TensorProto.INT32, ["batch_size"]))
        inputs.append(_info("total_sequence_length", TensorProto.INT32, []))
        counts = ["seqlens_k", "total_sequence_length"]
    else:
        inputs.append(_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]))
        one = b.weight("/model/constants/INT64/[1]", np.array([1], np.int64))
        total = b.op("ReduceSum", "attention_mask", one)
        last = b.op("Sub", total, one)
        length = b.op(
            "Gather", b.op("Shape", "attention_mask"), b.weight("one", np.array(1, np.int64)), axis=0
        )
        counts = [b.op("Cast", c, to=TensorProto.INT32) for c in (last, length)]
    if size.rotary == "outside":
        inputs.append(_info("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    tokens = size.context if size.past == "shared" else "past_sequence_length"
    caches = ["batch_size", size.kv_heads, tokens, size.head_size]
    inputs += [_info(f"past_key_values.{n}", TensorProto.FLOAT, caches) for n in _cache_names(size)]
    half = size.head_size // 2
    table = np.outer(np.arange(size.context), 10000.0 ** -(np.arange(half) / half))
    b.weight("cos_cache", np.cos(table).astype(np.float32))
    b.weight("sin_cache", np.sin(table).astype(np.float32))
    return inputs, counts


def _embedded(b: Builder) -> tuple[str, list[str]]:
    """The embedded tokens; and codes, scale and zero points of the table when it is the head's too."""
    size = b.size
    if not size.tied:
        table = b.noise("model.embed_tokens.weight", size.vocab, size.hidden, scale=1.0)
        return b.op("Gather", table, "input_ids"), []
    codes, scale, zeros = b.codes("lm_head", size.vocab, size.hidden)
    shape = b.weight("table_shape", np.array([size.vocab, size.hidden * size.bits // 8], np.int64))
    flat = b.op("Reshape", codes, shape)
    x = b.op(
        "GatherBlockQuantized", flat, "input_ids", scale, *zeros, domain=MICROSOFT,
        bits=size.bits, block_size=size.block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    return x, [codes, scale, *zeros]


def _layer(b: Builder, index: int, x: str, norm: str, counts: list[str]) -> tuple[str, str]:
    """The residual stream and its norm, from the same of the layer before."""
    size, name = b.size, f"model.layers.{index}"
    y = b.linear(_attention(b, f"{name}.attn", index, norm, counts), f"{name}.attn.o_proj", size.hidden,
                 size.heads * size.head_size)  # fmt: skip
    x, norm = _skipped(b, x, y, f"{name}.post_attention_layernorm.weight")
    gate, up = (b.linear(norm, f"{name}.mlp.{p}_proj", size.ffn, size.hidden) for p in ("gate", "up"))
    inner = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    down = b.linear(inner, f"{name}.mlp.down_proj", size.hidden, size.ffn)
    last = index + 1 == size.layers
    return _skipped(
        b, x, down, "model.norm.weight" if last else f"model.layers.{index + 1}.input_layernorm.weight"
    )


def _skipped(b: Builder, x: str, y: str, name: str) -> tuple[str, str]:
    scale = b.noise(name, b.size.hidden, scale=1.0)
    number = len(b.nodes)
    outputs = [f"norm_{number}", "", "", f"sum_{number}"]
    b.op("SkipSimplifiedLayerNormalization", x, y, scale, domain=MICROSOFT, outputs=outputs, epsilon=1e-5)
    return outputs[3], outputs[0]


def _attention(b: Builder, name: str, index: int, norm: str, counts: list[str]) -> str:
    size = b.size
    widths = [size.heads * size.head_size, *[size.kv_heads * size.head_size] * 2]
    if size.packed and size.rotary == "inside":
        parts = [b.linear(norm, f"{name}.qkv_proj", sum(widths), size.hidden), "", ""]
    else:
        parts = [
            b.linear(norm, f"{name}.{p}_proj", w, size.hidden) for p, w in zip("qkv", widths, strict=True)
        ]
    tables = ["cos_cache", "sin_cache"]
    if size.rotary == "outside":
        for i in (0, 1):
            parts[i] = b.op("RotaryEmbedding", parts[i], "position_ids", *tables, domain=MICROSOFT)
        tables = []
    past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
    y, *_ = b.op(
        "GroupQueryAttention", *parts, *past, *counts, *tables, domain=MICROSOFT,
        outputs=[f"{name}.y", f"present.{index}.key", f"present.{index}.value"],
        num_heads=size.heads, kv_num_heads=size.kv_heads, do_rotary=int(size.rotary == "inside"),
        rotary_interleaved=0, scale=size.head_size**-0.5, local_window_size=size.window,
    )  # fmt: skip
    return y


def fused_encoder(hidden: int = 32, heads: int = 4, vocab: int = 61, layers: int = 2) -> ir.Model:
    """An encoder as ONNX Runtime's transformer optimizer leaves it: output last_hidden_state.

    Its inputs are int32 input_ids, token_type_ids and attention_mask, [batch, sequence].
    """
    b = Builder(Size(hidden=hidden, heads=heads, vocab=vocab))
    rows = [("word", vocab), ("position", 40), ("type", 2)]
    tables = [b.noise(f"{name}_embeddings.weight", n, hidden, scale=1.0) for name, n in rows]
    norm = [b.noise(f"embeddings.norm.{n}", hidden, scale=1.0) for n in ("weight", "bias")]
    x = b.op(
        "EmbedLayerNormalization", "input_ids", "token_type_ids", *tables, *norm, domain=MICROSOFT,
        outputs=["embedded", "mask_index"], epsilon=1e-12,
    )[0]  # fmt: skip
    for i in range(layers):
        x = _encoder_layer(b, f"layer.{i}", x, packed=i == 0)
    b.op("Identity", x, outputs=["last_hidden_state"])
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = [_info(n, TensorProto.INT32, ["batch", "sequence"]) for n in names]
    made = [_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", hidden])]
    graph = helper.make_graph(b.nodes, "encoder", inputs, made, list(b.weights.values()))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))


def _encoder_layer(b: Builder, name: str, x: str, *, packed: bool) -> str:
    """Attention by one packed matrix, or by three; then the mlp."""
    hidden, heads = b.size.hidden, b.size.heads
    bias = b.noise(f"{name}.qkv.bias", 3 * hidden, scale=0.1)
    if packed:
        weight = b.noise(f"{name}.qkv.weight", hidden, 3 * hidden)
        y = b.op("Attention", x, weight, bias, "attention_mask", domain=MICROSOFT, num_heads=heads)
    else:
        parts = [b.op("MatMul", x, b.noise(f"{name}.{p}.weight", hidden, hidden)) for p in "qkv"]
        y = b.op("MultiHeadAttention", *parts, bias, "attention_mask", domain=MICROSOFT, num_heads=heads)
    y = b.op("MatMul", y, b.noise(f"{name}.out.weight", hidden, hidden))
    x = _skip_norm(b, f"{name}.attention", x, y)
    inner = b.op("MatMul", x, b.noise(f"{name}.up.weight", hidden, 2 * hidden))
    inner = b.op("BiasGelu", inner, b.noise(f"{name}.up.bias", 2 * hidden, scale=0.1), domain=MICROSOFT)
    return _skip_norm(b, name, x, b.op("MatMul", inner, b.noise(f"{name}.down.weight", 2 * hidden, hidden)))


def _skip_norm(b: Builder, name: str, x: str, y: str) -> str:
    parts = [b.noise(f"{name}.{n}", b.size.hidden, scale=1.0) for n in ("norm.weight", "norm.bias", "bias")]
    return b.op("SkipLayerNormalization", x, y, *parts, domain=MICROSOFT, epsilon=1e-12)

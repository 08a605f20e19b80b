"""Decoders of someone else's code, as torch's own exporter writes them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

POSITIONS = 45  # no multiple of a group
SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT2 = {"vocab_size": 61, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": 64}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, head_dim=20)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=9, query_pre_attn_scalar=16)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=9)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=12)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=61,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=44,
            max_position_embeddings=POSITIONS,
            rotary_pct=0.25,
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=61,
            hidden_size=48,
            word_embed_proj_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=POSITIONS,
        )
    ),
}
"""Grouped and plain heads, sizes that are no powers of two, learned positions, some counted from the mask,
and partly rotated ones, sliding windows with and without a softcap, normalized queries and keys."""


class Flat(torch.nn.Module):
    """Tokens and a flat list of keys and values in, logits and as flat a list out: what users write."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self.run(past, input_ids=tokens)

    def run(self, past: list[torch.Tensor], **given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One step of the model on a cache made of `past`."""
        cache = transformers.DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(**given, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


class Masked(Flat):
    """With a mask that tells tokens from what fills a row up."""

    def forward(
        self, tokens: torch.Tensor, past: list[torch.Tensor], mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.run(past, input_ids=tokens, attention_mask=mask)


class Placed(Flat):
    """With a mask and positions."""

    def forward(
        self, tokens: torch.Tensor, past: list[torch.Tensor], mask: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.run(past, input_ids=tokens, attention_mask=mask, position_ids=positions)


def exported(
    family: str, folder: Path, opset: int = 20, form: type[Flat] = Flat, attention: str = ""
) -> Path:
    """A random model. Without a mask, its inputs have names that say nothing of layers or sides."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention or ("eager" if family in ("gemma2", "neox") else "sdpa"))
    for p in model.parameters():  # attention that looks somewhere, norms around 1
        p.data = torch.randn(p.shape) * 0.15 + (p.dim() == 1)
    config = model.config
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.randn(2, heads, 7, size) for _ in range(2 * layers)]
    batch, sequence = torch.export.Dim("b", min=1, max=64), torch.export.Dim("s", min=1, max=30)
    before = torch.export.Dim("p", min=0, max=POSITIONS - 1)
    given = {
        "tokens": (torch.randint(0, 61, (2, 5)), {0: batch, 1: sequence}),
        "past": (past, [{0: batch, 2: before}] * len(past)),
        "mask": (torch.ones(2, 12, dtype=torch.int64), {0: batch, 1: torch.export.Dim.AUTO}),
        "positions": (torch.arange(7, 12).repeat(2, 1), {0: batch, 1: sequence}),
    }
    given = dict(list(given.items())[: {Flat: 2, Masked: 3, Placed: 4}[form]])
    sides = [f"{i}.{side}" for i in range(layers) for side in ("key", "value")]
    names = [["x", *(f"in_{i}" for i in range(len(past)))], ["y", *(f"out_{i}" for i in range(len(past)))]]
    if form is not Flat:
        inputs = ["input_ids", *(f"past_key_values.{s}" for s in sides), "attention_mask", "position_ids"]
        names = [inputs[: len(past) + len(given) - 1], ["logits", *(f"present.{s}" for s in sides)]]
    torch.onnx.export(
        form(model).eval(),
        tuple(example for example, _ in given.values()),
        folder / "model.onnx",
        dynamo=True,
        verbose=False,
        opset_version=opset,
        dynamic_shapes={name: shape for name, (_, shape) in given.items()},
        input_names=names[0],
        output_names=names[1],
    )
    return folder / "model.onnx"

"""Decoders of someone else's code with quantized caches, from the command to the lowered program."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cached import beside_onnx_runtime, planned_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from porter import cli  # noqa: E402
from porter.bundle import Bundle  # noqa: E402
from porter.convert import Options, convert  # noqa: E402
from porter.kv import parse  # noqa: E402

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
}
"""Grouped and plain heads, sizes that are no powers of two, learned and partly rotated positions, sliding
windows with and without a softcap, normalized queries and keys."""


class Flat(torch.nn.Module):
    """Tokens and a flat list of keys and values in, logits and as flat a list out: what users write."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        cache = transformers.DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def exported(family: str, folder: Path, opset: int = 20) -> Path:
    """A random model as torch's own exporter writes it, under names that say nothing of layers or sides."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    if family in ("gemma2", "neox"):
        model.set_attn_implementation("eager")
    for p in model.parameters():  # attention that looks somewhere, norms around 1
        p.data = torch.randn(p.shape) * 0.15 + (p.dim() == 1)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.randn(2, heads, 7, size) for _ in range(2 * config.num_hidden_layers)]
    batch, sequence = torch.export.Dim("b", min=1, max=64), torch.export.Dim("s", min=1, max=30)
    before = torch.export.Dim("p", min=0, max=POSITIONS - 1)
    torch.onnx.export(
        Flat(model).eval(),
        (torch.randint(0, 61, (2, 5)), past),
        folder / "model.onnx",
        dynamo=True,
        verbose=False,
        opset_version=opset,
        dynamic_shapes={"tokens": {0: batch, 1: sequence}, "past": [{0: batch, 2: before}] * len(past)},
        input_names=["x", *(f"in_{i}" for i in range(len(past)))],
        output_names=["y", *(f"out_{i}" for i in range(len(past)))],
    )
    return folder / "model.onnx"


def check(folder: Path, kv: str) -> None:
    """The report's bytes are those of the scheme and of the lowered program, which does in every row what
    ONNX Runtime does."""
    held, bits = planned_bytes(folder, parse(kv))
    report = json.loads((folder / "report.json").read_text())
    found = {name: figure["value"] for name, figure in report["memory"].items() if "KV cache" in name}
    capacity = Bundle.open(folder).decoder.capacity
    assert found == {
        f"KV cache, {capacity} tokens x batch 1": held,
        "KV cache, scales and windows included": float(f"{bits:.4f}"),
    }
    beside_onnx_runtime(folder)


QUICK = [
    ("llama", "innerq recent=8 sink=2 key=int3-g8-fp16 value=int3-g8-tokens-fp16"),
    ("gpt2", "kivi2 recent=8 key=uint2-g16-tokens-fp16 keep-first=1"),
]


@pytest.mark.parametrize(("family", "kv"), QUICK)
def test_a_cache_is_quantized_without_naming_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture, family: str, kv: str
) -> None:
    """Learned positions say how many tokens fit; a model that says nothing gets what is asked for."""
    context = 0 if family == "gpt2" else POSITIONS
    path = exported(family, tmp_path)
    capfd.readouterr()
    cli.convert(path, tmp_path / "out", kv=kv, context=context, decode=2, data="random", json_=True)
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "KV cache, 45 tokens x batch 1" in json.loads(printed.out)["memory"]
    check(tmp_path / "out", kv)


SHORT = (
    "int8",
    "int4 rotate",
    "fp8",
    "fp8-dynamic",
    "kivi2 recent=8 key=uint2-g16-tokens-fp16",
    "innerq recent=16 sink=4 key=int3-g8-fp16 value=int3-g8-tokens-fp16",
    "innerq-hybrid recent=8 sink=2 value=int2-g8-tokens-fp16-hybrid rotate",
    "turboquant4",
    "turboquant2.5",
    "kivi4 keep-first=1 keep-last=1",
    "int8 value=kivi2 recent=3",
    "innerq recent=64",
)
MATRIX = [("llama", kv) for kv in SHORT] + [
    (family, kv) for family in FAMILIES if family != "llama" for kv in (SHORT[2], *SHORT[4:7], SHORT[8])
]


@pytest.mark.long
@pytest.mark.parametrize(("family", "kv"), MATRIX)
def test_every_family_with_every_kind_of_cache(tmp_path: Path, family: str, kv: str) -> None:
    tokens = np.random.default_rng(1).integers(0, 61, (2, POSITIONS))
    np.save(tmp_path / "tokens.npy", tokens)
    path = exported(family, tmp_path, opset=23 if family in ("gpt2", "mistral") else 20)
    options = Options(kv=kv, context=POSITIONS, decode=1, data=str(tmp_path / "tokens.npy"))
    convert(path, tmp_path / "out", options)
    check(tmp_path / "out", kv)

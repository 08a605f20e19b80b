"""Public decoders by the sizes of their configs, with their published numbers of parameters."""

from __future__ import annotations

from typing import Any


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
    } | more


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (llama(4096, 32, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama-2-70b": (llama(8192, 80, 64, 8, 28672, 32000), 68_976_648_192),
    "Llama-3-8B": (llama(4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "Llama-3-70B": (llama(8192, 80, 64, 8, 28672, 128256), 70_553_706_496),
    "Mistral-7B": (
        llama(4096, 32, 32, 8, 14336, 32000, model_type="mistral", sliding_window=4096),
        7_241_732_096,
    ),
    "Mixtral-8x7B": (
        llama(
            4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2
        ),
        46_702_792_704,
    ),
    "Qwen2-7B": (
        llama(
            3584,
            28,
            28,
            4,
            18944,
            152064,
            model_type="qwen2",
            sliding_window=131072,
            use_sliding_window=False,
        ),
        7_615_616_512,
    ),
    "Qwen3-8B": (
        llama(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128),
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        llama(
            2048,
            48,
            32,
            4,
            6144,
            151936,
            model_type="qwen3_moe",
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        30_532_122_624,
    ),
    "gemma-2-9b": (
        llama(3584, 42, 16, 8, 14336, 256000, model_type="gemma2", head_dim=256, sliding_window=4096),
        9_241_705_984,
    ),
    "gemma-3-1b": (
        llama(1152, 26, 4, 1, 6912, 262144, model_type="gemma3_text", head_dim=256, sliding_window=512),
        999_885_952,
    ),
    "gpt2": (
        {
            "model_type": "gpt2",
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "vocab_size": 50257,
            "n_positions": 1024,
        },
        124_439_808,
    ),
    "opt-125m": (
        {
            "model_type": "opt",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        125_239_296,
    ),
}

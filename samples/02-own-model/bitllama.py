"""A model of your own: a Llama with ternary weights and a norm before every linear."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    """Root-mean-square norm over the last axis, without a weight unless asked for."""

    def __init__(self, size: int, eps: float, weighted: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else self.weight * x


class Attention(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, self.size = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, hidden, bias=False)
        self.attn_sub_norm = Norm(self.heads * self.size, config["sub_norm_eps"])

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = rotate(self.split(self.q_proj(x)), cos, sin)
        k = torch.cat([past[0], rotate(self.split(self.k_proj(x)), cos, sin)], dim=2)
        v = torch.cat([past[1], self.split(self.v_proj(x))], dim=2)
        y = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), attn_mask=mask)
        y = y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.o_proj(self.attn_sub_norm(y)), k, v

    def split(self, x: Tensor) -> Tensor:
        """[batch, sequence, heads * size] -> [batch, heads, sequence, size]."""
        return x.view(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        """Every key and value head serves heads / kv_heads query heads."""
        batch, _, length, _ = x.shape
        shape = (batch, self.kv_heads, self.heads // self.kv_heads, length, self.size)
        return x[:, :, None].expand(shape).reshape(batch, self.heads, length, self.size)


class MLP(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.ffn_sub_norm = Norm(inner, config["sub_norm_eps"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ffn_sub_norm(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.input_layernorm = Norm(config["hidden_size"], config["sub_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config["hidden_size"], config["sub_norm_eps"])
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *rest: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.self_attn(self.input_layernorm(x), *rest)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Body(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"], weighted=True)


class BitLlama(nn.Module):
    """What `porter export` asks of a module: the dict `porter`, and this forward."""

    def __init__(self, config: dict, tokenizer: str = "") -> None:
        super().__init__()
        self.model = Body(config)
        frequency = config["rope_theta"] ** (
            -torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]
        )
        self.register_buffer("frequency", frequency, persistent=False)
        self.porter = {
            "layers": config["num_hidden_layers"],
            "kv_heads": config["num_key_value_heads"],
            "head_size": config["head_dim"],
            "context_length": config["max_position_embeddings"],
            "bos": config["bos_token_id"],
            "eos": config["eos_token_id"],
            "model_type": config["model_type"],
            "tokenizer": tokenizer,
        }

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """int64 [batch, sequence], [k0, v0, …] of [batch, kv_heads, past, size] -> (logits, *presents)."""
        (batch, length), start = input_ids.shape, past[0].shape[2]
        positions = torch.arange(start, start + length)
        angles = positions.expand(batch, length)[:, :, None].float() * self.frequency
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        mask = (torch.arange(start + length)[None, :] <= positions[:, None])[None, None]
        mask = mask.expand(batch, 1, length, start + length)
        x, presents = self.model.embed_tokens(input_ids), []
        for i, layer in enumerate(self.model.layers):
            x, *new = layer(x, cos, sin, mask, (past[2 * i], past[2 * i + 1]))
            presents += new
        return (F.linear(self.model.norm(x), self.model.embed_tokens.weight), *presents)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding that pairs element i with element i + size / 2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def bitllama(folder: str = "") -> BitLlama:
    """The trained model in `folder`, or in the folder that the environment variable BITLLAMA names."""
    folder = folder or os.environ["BITLLAMA"]
    model = BitLlama(json.loads(Path(folder, "config.json").read_text()), tokenizer=folder)
    weights = load_file(Path(folder, "model.safetensors"))
    known = model.state_dict().keys()
    for name in weights.keys() - known:  # the checkpoint stores the weightless norms as ones
        assert (weights.pop(name) == 1).all(), name
    model.load_state_dict(weights)
    return model

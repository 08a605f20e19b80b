"""A Llama in numpy, float64, whose matrix products round their operands: the oracle of whole decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import operands

from porter import formats

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Numerics:
    """How a target multiplies: `floats` is what becomes of float32 operands, `codes` of weights in `weights`
    (a format with a scale for each group, or for each row) and of what they meet; `flush` its subnormals.
    `activations`, where given, is the format in which what meets those weights is encoded, by rows."""

    floats: str = "fp32"
    weights: str = ""
    codes: str = "fp32"
    flush: bool = False
    activations: str = ""

    def rounded(self, x: np.ndarray, form: str) -> np.ndarray:
        """An operand."""
        return operands.rounded(form, x.astype(np.float32), flush=self.flush)

    def encoded(self, x: np.ndarray) -> formats.Encoded:
        """Rows of activations."""
        return formats.encode(formats.parse(self.activations), x.astype(np.float32))

    def linear(self, x: np.ndarray, w: np.ndarray, *, kept: bool = False) -> np.ndarray:
        """x Wᵀ; `kept` weights stay floats."""
        if kept or not self.weights:
            return self.rounded(x, self.floats) @ self.rounded(w, self.floats).T
        encoded = formats.encode(formats.parse(self.weights), w)
        if encoded.form.group:
            return self.rounded(x, self.codes) @ self.rounded(formats.decode(encoded), self.codes).T
        if self.activations:
            made = self.encoded(x.reshape(-1, x.shape[-1]))
            return (exact(formats.decode(made)) @ exact(formats.decode(encoded)).T).reshape(*x.shape[:-1], -1)
        codes = encoded.form.elements.decode(encoded.codes).astype(np.float64)
        assert np.array_equal(self.rounded(codes, self.codes), codes)
        return self.rounded(x, self.codes) @ codes.T * encoded.scales.astype(np.float64).T


def exact(x: np.ndarray) -> np.ndarray:
    """Wide."""
    return x.astype(np.float64)


@dataclass(frozen=True)
class Llama:
    """A checkpoint with Hugging Face's names, tied embeddings and the sizes that these need."""

    weights: Weights
    heads: int
    kv_heads: int
    layers: int
    epsilon: float = 1e-5
    theta: float = 10000.0

    def logits(self, tokens: np.ndarray, how: Numerics) -> np.ndarray:
        """int [batch, sequence] -> [batch, sequence, vocabulary]."""
        table = self.weights["model.embed_tokens.weight"]
        x = exact(table[tokens])
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            x = x + self._attention(self._norm(x, layer + "input_layernorm"), layer + "self_attn.", how)
            h = self._norm(x, layer + "post_attention_layernorm")
            gate, up = (how.linear(h, self.weights[f"{layer}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
            x = x + how.linear(gate / (1 + np.exp(-gate)) * up, self.weights[layer + "mlp.down_proj.weight"])
        return how.linear(self._norm(x, "model.norm"), table, kept=True)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * exact(self.weights[name + ".weight"])
        )

    def _attention(self, x: np.ndarray, name: str, how: Numerics) -> np.ndarray:
        q, k, v = (
            self._heads(how.linear(x, self.weights[f"{name}{n}_proj.weight"]), count)
            for n, count in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        q, k = self._turned(q), self._turned(k)
        k, v = (np.repeat(t, self.heads // self.kv_heads, 1) for t in (k, v))
        score = how.rounded(q, how.floats) @ how.rounded(k, how.floats).swapaxes(2, 3) * q.shape[-1] ** -0.5
        score = np.where(np.tri(x.shape[1], dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        y = how.rounded(weight, how.floats) @ how.rounded(v, how.floats) / weight.sum(-1, keepdims=True)
        joined = y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return how.linear(joined, self.weights[name + "o_proj.weight"])

    @staticmethod
    def _heads(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)

    def _turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions, halves apart (Su et al. 2021)."""
        half = x.shape[-1] // 2
        angle = np.outer(np.arange(x.shape[2]), self.theta ** (-np.arange(half) / half))
        c, s = np.cos(angle), np.sin(angle)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

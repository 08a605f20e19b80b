"""A Hugging Face config.json as a Model: sizes alone, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.errors import ModelError
from porter.estimate.model import Attention, Between, Linear, Model

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions",),
    "num_experts": ("num_local_experts",),
}
_UNKNOWN = ("kv_lora_rank", "ssm_state_size", "mamba_d_state", "linear_num_key_heads", "is_encoder_decoder")
"""Keys of mechanisms that are not modelled: latent attention, state spaces, encoders."""


@dataclass(frozen=True)
class _Kind:
    """What a model type implies and its config does not say. `norms`: vectors of the hidden size in a layer
    and after the last; `layer_norm`: they have a bias; `biases`: of which products (`q`, `a` all of
    attention, `m` the MLP's)."""

    gated: bool = True
    norms: int = 2
    layer_norm: bool = False
    biases: str = ""
    tied: bool = False
    head_norms: bool = False
    positions: int = -1  # rows of a learned table beyond max_position_embeddings; -1: there is none
    windows: str = ""  # "all" layers, "pairs" (every other), "sixths" (five of six)


_KINDS = {
    "llama": _Kind(),
    "mistral": _Kind(windows="all"),
    "mixtral": _Kind(windows="all"),
    "qwen2": _Kind(biases="q"),
    "qwen3": _Kind(head_norms=True),
    "qwen3_moe": _Kind(head_norms=True),
    "gemma": _Kind(tied=True),
    "gemma2": _Kind(norms=4, tied=True, windows="pairs"),
    "gemma3_text": _Kind(norms=4, tied=True, head_norms=True, windows="sixths"),
    "phi3": _Kind(windows="all"),
    "smollm3": _Kind(tied=True),
    "gpt2": _Kind(gated=False, layer_norm=True, biases="am", tied=True, positions=0),
    "opt": _Kind(gated=False, layer_norm=True, biases="am", tied=True, positions=2),
    "gpt_neox": _Kind(gated=False, layer_norm=True, biases="am"),
}


def read(path: Path) -> Model:
    """The decoder that a config.json describes.

    Raises ModelError PORT-0330 when it is no config.json of a decoder, PORT-0331 for a type of model that is
    not known or has parts that are not modelled.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("PORT-0330", f"this is no config.json: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise ModelError("PORT-0330", "this is no config.json: it is not an object", where=str(path))
    if isinstance(inner := config.get("text_config"), dict):
        config = config | inner
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return _Reader(config, str(path)).model(name)


class _Reader:
    """One config, checked as it is read."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self.type = str(config.get("model_type", ""))
        if self.type not in _KINDS:
            self._refuse(f"its model_type {self.type!r} is not known")
        if found := next((key for key in _UNKNOWN if config.get(key)), None):
            self._refuse(f"it has {found}, which stands for parts that are not modelled")
        self.kind = _KINDS[self.type]

    def _refuse(self, what: str) -> None:
        hint = f"known: {', '.join(_KINDS)}; or estimate the exported ONNX file"
        raise ModelError("PORT-0331", f"no estimate from this config: {what}", where=self.where, hint=hint)

    def number(self, key: str, default: int = 0) -> int:
        """A count above zero; without a default it must be there."""
        names = (key, *_OTHER_NAMES.get(key, ()))
        found = next((self.config[n] for n in names if self.config.get(n) is not None), default)
        if (
            isinstance(found, bool)
            or not isinstance(found, int)
            or not (0 < found < 1 << 40 or found == default)
        ):
            what = f"{key} is {found!r}, not a whole number above zero"
            raise ModelError("PORT-0330", what, where=self.where)
        if not found and not default and key in _REQUIRED:
            raise ModelError("PORT-0330", f"it has no {key}", where=self.where)
        return found

    def flag(self, key: str, default: bool) -> bool:
        """Whether something is said to be so."""
        return bool(self.config.get(key, default))

    def model(self, name: str) -> Model:
        """The whole of it, as serving runtimes fuse its products."""
        hidden, layers = self.number("hidden_size"), self.number("num_hidden_layers")
        heads, vocab = self.number("num_attention_heads"), self.number("vocab_size")
        kv_heads = self.number("num_key_value_heads", heads)
        size = self.number("head_dim", max(1, hidden // heads))
        tied = self.flag("tie_word_embeddings", self.kind.tied)
        queries, cached = heads * size, kv_heads * size
        linears = (
            Linear("qkv", hidden, queries + 2 * cached, layers, "column"),
            Linear("attention out", queries, hidden, layers, "row"),
            *self._mlp(hidden, layers),
        )
        wide = sum(w.n * w.count * w.chosen for w in linears if w.name in ("gate and up", "up"))
        inner = sum(w.k * w.count * w.chosen for w in linears if w.name == "down")
        between = (
            Between("norm and residual", self.kind.norms * layers + 1, 4 * hidden, split=False),
            Between("rotate and cache", layers, 2 * (queries + 2 * cached), split=True),
            Between("activation", layers, (wide + inner) // layers, split=True),
        )
        attention = tuple(
            Attention(n, heads, kv_heads, size, size, window)
            for window, n in self._windows(layers).items()
            if n
        )
        return Model(
            name,
            hidden,
            vocab,
            linears,
            attention,
            between,
            Linear("logits", hidden, vocab, 1, "column"),
            tied,
            self._small(hidden, layers, queries, cached, size, linears),
            2 * layers,
        )

    def _mlp(self, hidden: int, layers: int) -> list[Linear]:
        """The feed-forward products, of dense layers and of those with experts."""
        inner = self.number("intermediate_size", 4 * hidden if self.type == "gpt2" else 0)
        experts = self.number("num_experts", 1)
        dense, found = layers, []
        if experts > 1:
            only, every = self.config.get("mlp_only_layers") or [], self.number("decoder_sparse_step", 1)
            sparse = sum(1 for i in range(layers) if i not in only and (i + 1) % every == 0)
            chosen, size = self.number("num_experts_per_tok", 2), self.number("moe_intermediate_size", inner)
            found = [
                Linear("router", hidden, experts, sparse, "whole"),
                Linear("gate and up", hidden, 2 * size, sparse, "column", experts, chosen),
                Linear("down", size, hidden, sparse, "row", experts, chosen),
            ]
            dense -= sparse
        if dense:
            up = ("gate and up", 2 * inner) if self.kind.gated else ("up", inner)
            found += [
                Linear(up[0], hidden, up[1], dense, "column"),
                Linear("down", inner, hidden, dense, "row"),
            ]
        return found

    def _windows(self, layers: int) -> dict[int, int]:
        """How many layers see how many of the newest tokens (0: all)."""
        window = self.config.get("sliding_window")
        if not isinstance(window, int) or window <= 0 or not self.flag("use_sliding_window", True):
            return {0: layers}
        if isinstance(types := self.config.get("layer_types"), list):
            sliding = sum(1 for t in types[:layers] if t == "sliding_attention")
        elif self.type in ("qwen2", "qwen3", "qwen3_moe"):
            sliding = (
                max(0, layers - self.number("max_window_layers", layers))
                if self.flag("use_sliding_window", False)
                else 0
            )
        else:
            every = self.number("sliding_window_pattern", {"pairs": 2, "sixths": 6}.get(self.kind.windows, 1))
            sliding = {"": 0, "all": layers}.get(self.kind.windows, layers - layers // every)
        return {window: sliding, 0: layers - sliding}

    def _small(
        self, hidden: int, layers: int, queries: int, cached: int, size: int, linears: tuple[Linear, ...]
    ) -> int:
        """Parameters of norms, biases and tables of positions."""
        kind = self.kind
        count = (kind.norms * layers + 1) * hidden * (2 if kind.layer_norm else 1)
        count += 2 * size * layers if kind.head_norms else 0
        attention = kind.biases + ("q" if self.flag("attention_bias", False) else "")
        if "q" in attention or "a" in attention:
            count += (queries + 2 * cached) * layers
        if "a" in attention:
            count += hidden * layers
        if "m" in kind.biases or self.flag("mlp_bias", False):
            count += sum(w.n * w.count for w in linears if w.name in ("gate and up", "up", "down"))
        if kind.positions >= 0:
            count += (self.number("max_position_embeddings", 1024) + kind.positions) * hidden
        return count


_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")

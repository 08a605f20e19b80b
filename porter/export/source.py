"""What is exported: a PyTorch module made flat for torch.onnx, with its sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from porter.errors import ExportError

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONVENTION = "docs/errors/PORT-0711.md has the convention"
_FACTORY = re.compile(r"(?P<module>[\w./\\-]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Source:
    """A module ready to be exported.

    `module` has one child, `inner`, the model as its author wrote it. A decoder's forward takes (input_ids
    int64 [batch, sequence], past: list of float32 [batch, kv_heads, past, head_size], k0 v0 k1 v1 …) and
    returns (logits, *presents); an encoder's takes a list of int64 [batch, sequence] named by `inputs` and
    returns (hidden states,). `caches` is (kv_heads, head_size) per cache tensor. `metadata` goes into the
    ONNX file. `plain` maps input_ids to logits without a cache, when the model offers that. `left_out` are
    weights that the folder has and the export does not use.
    """

    module: torch.nn.Module
    kind: str
    inputs: tuple[str, ...]
    vocab_size: int
    context_length: int
    caches: tuple[tuple[int, int], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    plain: Callable | None = None
    tokenizer: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()


def load(source: str) -> Source:
    """Read a folder, `package.module:factory` or `file.py:factory`. Raises PORT-0701 to PORT-0711."""
    if source and Path(source).is_dir():
        from porter.export.folder import from_folder

        return from_folder(Path(source).resolve())
    if match := _FACTORY.fullmatch(source):
        from porter.export.factory import from_factory

        return from_factory(match["module"], match["name"])
    hint = "give a Hugging Face folder, package.module:factory or file.py:factory"
    raise ExportError("PORT-0701", "the source is neither a folder nor a factory", where=source, hint=hint)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files in `folder`; a vocab.json only when it holds pieces, scores and types."""
    found = (folder / n for n in TOKENIZER_FILES)
    return tuple(f for f in found if f.is_file() and (f.name != "vocab.json" or _is_piece_table(f)))


def _is_piece_table(file: Path) -> bool:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and {"pieces", "scores", "types"} <= table.keys()


def flat_causal(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """The flat form of a transformers decoder."""
    import torch
    from transformers import DynamicCache

    def forward(
        self: torch.nn.Module, input_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for i in range(layers):
            cache.update(past[2 * i], past[2 * i + 1], i)
        start, (batch, length) = past[0].shape[2], input_ids.shape
        # One row of positions would do for PyTorch, but ONNX's RotaryEmbedding wants one per batch row.
        positions = torch.arange(start, start + length).unsqueeze(0).expand(batch, length)
        out = self.inner(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        presents = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return (out.logits, *presents)

    return _flat(model, forward)


def flat_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The flat form of a decoder that follows porter's convention."""

    def forward(
        self: torch.nn.Module, input_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        return tuple(self.inner(input_ids, past))

    return _flat(model, forward)


def flat_encoder(
    model: torch.nn.Module, inputs: tuple[str, ...], hugging_face: bool = False
) -> torch.nn.Module:
    """The flat form of an encoder that takes `inputs` by name."""

    def forward(self: torch.nn.Module, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out = self.inner(**dict(zip(inputs, tokens, strict=True)))
        return (out.last_hidden_state if hugging_face else out,)

    return _flat(model, forward)


def _flat(inner: torch.nn.Module, forward: Callable) -> torch.nn.Module:
    import torch

    module = type("Flat", (torch.nn.Module,), {"forward": forward})()
    module.inner = inner
    return module.eval()


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """`model` on the CPU in float32, for inference."""
    return model.to(device="cpu").float().eval().requires_grad_(False)


def metadata(context: int, model_type: str, bos: object, eos: object) -> dict[str, str]:
    """metadata_props of the file; several end tokens are joined by commas."""
    said = {"porter.context_length": str(context), "porter.model_type": model_type}
    for name, value in (("porter.bos", bos), ("porter.eos", eos)):
        ids = value if isinstance(value, list | tuple) else [value]
        if ids and all(isinstance(i, int) for i in ids):
            said[name] = ",".join(map(str, ids))
    return dict(sorted((k, v) for k, v in said.items() if v))


def first_line(error: BaseException) -> str:
    """The kind of a foreign exception and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

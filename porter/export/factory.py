"""A factory, `package.module:name` or `file.py:name`, as a Source."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.errors import ExportError
from porter.export.source import (
    CONVENTION,
    Source,
    first_line,
    flat_decoder,
    flat_encoder,
    frozen,
    metadata,
    tokenizer_files,
)

if TYPE_CHECKING:
    import torch

_DECODER_KEYS = {
    "kind",
    "layers",
    "kv_heads",
    "head_size",
    "context_length",
    "bos",
    "eos",
    "model_type",
    "tokenizer",
}
_ENCODER_KEYS = {"kind", "inputs", "vocab_size", "context_length", "model_type", "tokenizer"}


def from_factory(module: str, name: str) -> Source:
    """Import the factory and call it. Raises ExportError PORT-0701 (import) and PORT-0711 (what it gives)."""
    import torch
    from transformers import PreTrainedModel

    from porter.export.folder import from_transformers

    where = f"{module}:{name}"
    try:
        factory = getattr(_import(module), name)
    except Exception as error:
        raise ExportError(
            "PORT-0701", f"the factory cannot be imported: {first_line(error)}", where=where
        ) from error
    try:
        model = factory()
    except Exception as error:
        raise ExportError("PORT-0711", f"the factory failed: {first_line(error)}", where=where) from error
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            "PORT-0711", f"the factory returned {type(model).__name__}, not a torch.nn.Module", where=where
        )
    if isinstance(model, PreTrainedModel):
        return from_transformers(model)
    return _from_module(frozen(model), where)


def _import(module: str) -> Any:
    """Import by name, the current folder first, or from a file."""
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(os.getcwd())


def _from_module(model: torch.nn.Module, where: str) -> Source:
    said = _convention(model, where)
    common = {
        "context_length": said["context_length"],
        "metadata": metadata(
            said["context_length"], said.get("model_type", ""), said.get("bos"), said.get("eos")
        ),
        "tokenizer": tokenizer_files(Path(said["tokenizer"])) if said.get("tokenizer") else (),
    }
    if said.get("kind") == "encoder":
        inputs = tuple(said["inputs"])
        return Source(flat_encoder(model, inputs), "encoder", inputs, vocab_size=said["vocab_size"], **common)
    caches = ((said["kv_heads"], said["head_size"]),) * (2 * said["layers"])
    vocab_size = _try_forward(model, caches, where)
    return Source(
        flat_decoder(model), "decoder", ("input_ids",), vocab_size=vocab_size, caches=caches, **common
    )


def _convention(model: torch.nn.Module, where: str) -> dict[str, Any]:
    """The checked `porter` attribute of a module of the user's own. Raises PORT-0711."""
    said = getattr(model, "porter", None)
    if not isinstance(said, dict):
        raise ExportError(
            "PORT-0711",
            "the module has no attribute `porter`, a dict of its sizes",
            where=where,
            hint=CONVENTION,
        )
    encoder = said.get("kind", "decoder") == "encoder"
    known = _ENCODER_KEYS if encoder else _DECODER_KEYS
    sizes = (
        ("vocab_size", "context_length") if encoder else ("layers", "kv_heads", "head_size", "context_length")
    )
    wrong = [f"does not know {k!r}" for k in said.keys() - known]
    wrong += [f"wants a positive whole number for {k!r}" for k in sizes if not _positive(said.get(k))]
    if said.get("kind", "decoder") not in ("decoder", "encoder"):
        wrong.append("has kind decoder or encoder")
    if encoder and "input_ids" not in (said.get("inputs") or ()):
        wrong.append("wants 'inputs', names that begin with input_ids")
    if wrong:
        raise ExportError(
            "PORT-0711", f"the attribute `porter` {sorted(wrong)[0]}", where=where, hint=CONVENTION
        )
    return said


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _try_forward(model: torch.nn.Module, caches: tuple[tuple[int, int], ...], where: str) -> int:
    """Run batch 2, sequence 3, past 1 and compare the shapes with the convention; the vocabulary's size."""
    import torch

    past = [torch.zeros(2, heads, 1, size) for heads, size in caches]
    try:
        with torch.no_grad():
            logits, *presents = model(torch.zeros(2, 3, dtype=torch.long), past)
        got = [tuple(logits.shape[:2]), *(tuple(p.shape) for p in presents)]
    except Exception as error:
        what = f"forward(input_ids, past) failed: {first_line(error)}"
        raise ExportError("PORT-0711", what, where=where, hint=CONVENTION) from error
    wanted = [(2, 3), *((2, heads, 4, size) for heads, size in caches)]
    if got != wanted or logits.dim() != 3:
        off = next(
            (i for i, (g, w) in enumerate(zip(got, wanted, strict=False)) if g != w),
            min(len(got), len(wanted)),
        )
        what = f"forward returned {len(got)} of {len(wanted)} tensors, and tensor {off} has a wrong shape"
        raise ExportError("PORT-0711", what, where=where, hint=CONVENTION)
    return int(logits.shape[-1])

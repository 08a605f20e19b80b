"""A local Hugging Face folder (config.json and safetensors) as a Source: no network, none of its code."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.errors import ExportError
from porter.export.source import (
    CONVENTION,
    Source,
    first_line,
    flat_causal,
    flat_encoder,
    frozen,
    metadata,
    some,
    tokenizer_files,
)

if TYPE_CHECKING:
    import torch


def from_folder(folder: Path) -> Source:
    """Read `folder`. Raises ExportError PORT-0704 to PORT-0710."""
    settings = _read_config(folder)
    _check_model_type(settings, folder)
    _check_weights(folder)
    with _offline():
        model, left_out = _pretrained(folder, encoder=not _is_decoder(settings))
    return from_transformers(model, folder, left_out)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ExportError("PORT-0704", "the folder has no config.json", where=str(folder))
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError("PORT-0704", f"config.json cannot be read: {error}", where=str(path)) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ExportError("PORT-0704", "config.json names no model_type", where=str(path))
    return settings


def _check_model_type(settings: dict[str, Any], folder: Path) -> None:
    """Refuse what transformers has no code for, encoder-decoders, and weights that are already quantized."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, where = settings["model_type"], str(folder / "config.json")
    if kind not in CONFIG_MAPPING_NAMES:
        what = f"transformers has no model of type {kind!r}, and code from the folder is never run"
        hint = f"write the module yourself and export package.module:factory; {CONVENTION}"
        raise ExportError("PORT-0705", what, where=where, hint=hint)
    if settings.get("is_encoder_decoder"):
        raise ExportError("PORT-0705", f"{kind!r} has both an encoder and a decoder", where=where)
    if settings.get("quantization_config"):
        hint = "export the unquantized checkpoint; porter convert quantizes"
        raise ExportError("PORT-0705", "the checkpoint is already quantized", where=where, hint=hint)


def _is_decoder(settings: dict[str, Any]) -> bool:
    """By the architecture's name; without one, whether transformers knows the type as causal only."""
    from transformers.models.auto import modeling_auto as auto

    names = settings.get("architectures")
    if isinstance(names, list) and names:
        return any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    kind = settings["model_type"]
    return (
        kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _check_weights(folder: Path) -> None:
    """Every safetensors file is there and its header holds together; pickles are refused."""
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(folder):
        if not path.is_file():
            raise ExportError("PORT-0706", f"the weights file {path.name} is missing", where=str(folder))
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            what = f"the weights file {path.name} is damaged: {error}"
            raise ExportError("PORT-0706", what, where=str(path), hint="fetch it again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExportError(
                "PORT-0706", "the index of the weights cannot be read", where=str(index)
            ) from error
        if bad := [n for n in names if Path(str(n)).name != n]:
            raise ExportError(
                "PORT-0706", f"the index names a file outside the folder: {bad[0]!r}", where=str(index)
            )
        return [folder / n for n in sorted(names)]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    if pickles:
        what = f"the weights are a pickle ({pickles[0]}), which can run code when it is read"
        raise ExportError(
            "PORT-0707", what, where=str(folder), hint="convert them to model.safetensors first"
        )
    raise ExportError("PORT-0706", "the folder has no model.safetensors", where=str(folder))


@contextmanager
def _offline() -> Iterator[None]:
    """Tell the Hugging Face libraries to stay off the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    before = {n: os.environ.get(n) for n in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _pretrained(folder: Path, encoder: bool) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model in float32 and the names of weights it has no place for. Raises PORT-0708, PORT-0709."""
    import torch
    import transformers

    loader = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    cls = _class_of(folder, loader)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager",
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if encoder and cls and "add_pooling_layer" in inspect.signature(cls).parameters:
        options["add_pooling_layer"] = False  # no part of the exported output
    try:
        model, info = loader.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers raises whatever its parts raise
        what = f"transformers could not load the folder: {first_line(error)}"
        raise ExportError("PORT-0708", what, where=str(folder)) from error
    _check_loading(info, folder, encoder)
    return model, tuple(sorted(info["unexpected_keys"]))


def _class_of(folder: Path, loader: Any) -> type | None:
    """The class that `loader` would make; None when that fails, as from_pretrained then says why."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        cls = loader._model_mapping[type(config)]
    except Exception:
        return None
    return cls if inspect.isclass(cls) else None


def _check_loading(info: Mapping[str, Any], folder: Path, encoder: bool) -> None:
    """transformers fills what is missing with random numbers and only warns; an export must not."""
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} of the model's tensors: {some(missing)}"
        raise ExportError(
            "PORT-0709", what, where=str(folder), hint="does config.json belong to these weights?"
        )
    if wrong := sorted(str(k[0]) for k in info["mismatched_keys"]):
        raise ExportError(
            "PORT-0709", f"tensors have another shape than config.json says: {some(wrong)}", where=str(folder)
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected and not encoder:  # an encoder may leave out its pooler and its heads
        what = f"the weights hold {len(unexpected)} tensors the model does not know: {some(unexpected)}"
        raise ExportError(
            "PORT-0709", what, where=str(folder), hint="does config.json belong to these weights?"
        )


def from_transformers(model: Any, folder: Path | None = None, left_out: tuple[str, ...] = ()) -> Source:
    """A Source around a transformers model. Raises ExportError PORT-0704, PORT-0705, PORT-0710."""
    config, model = model.config.get_text_config(), frozen(model)
    decoder = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    caches = _probe_caches(model) if decoder else ()
    context = _context_length(model, config)
    common = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "metadata": metadata(
            context,
            config.model_type,
            getattr(config, "bos_token_id", None),
            getattr(config, "eos_token_id", None),
        ),
        "tokenizer": tokenizer_files(folder) if folder else (),
        "left_out": left_out,
    }
    if decoder:
        return Source(
            flat_causal(model, len(caches) // 2),
            "decoder",
            ("input_ids",),
            caches=caches,
            plain=lambda ids: model(input_ids=ids, use_cache=False).logits,
            **common,
        )
    inputs = _encoder_inputs(model)
    return Source(flat_encoder(model, inputs, hugging_face=True), "encoder", inputs, **common)


def _context_length(model: Any, config: Any) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        where = f"model_type {config.model_type}"
        raise ExportError("PORT-0704", "the configuration has no max_position_embeddings", where=where)
    for name, part in model.named_modules():
        # RoBERTa numbers its positions from after the padding index.
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return context - part.padding_idx - 1
    return context


def _probe_caches(model: Any) -> tuple[tuple[int, int], ...]:
    """(kv_heads, head_size) of every cache tensor, seen by running one token. Raises PORT-0710."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        shapes = [t.shape for layer in cache.layers for t in (layer.keys, layer.values)]
        ok = bool(shapes) and all(len(s) == 4 and s[2] == 1 for s in shapes)
    except Exception:
        ok = False
    if not ok:
        kind = model.config.model_type
        hint = f"write the module yourself; {CONVENTION}"
        raise ExportError(
            "PORT-0710", f"the state of a {kind!r} model is not one key and value per layer", hint=hint
        )
    return tuple((s[1], s[3]) for s in shapes)


def _encoder_inputs(model: Any) -> tuple[str, ...]:
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken:
        raise ExportError("PORT-0705", f"a {model.config.model_type!r} model does not read tokens")
    types = getattr(model.config, "type_vocab_size", 0) > 1
    wanted = ("input_ids", "attention_mask") + (("token_type_ids",) if types else ())
    return tuple(n for n in wanted if n in taken)

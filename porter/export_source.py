"""Where the PyTorch module comes from: a local Hugging Face folder or a factory, made flat for torch.onnx."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.errors import ExportError, PorterError

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
_DECODER_KEYS = {"kind", "layers", "kv_heads", "head_size", "context_length", "bos", "eos", "model_type", "tokenizer"}
_ENCODER_KEYS = {"kind", "inputs", "vocab_size", "context_length", "model_type", "tokenizer"}


@dataclass(frozen=True)
class Source:
    """A module ready to be exported.

    `module` has one child, `inner`, the model as its author wrote it. A decoder's forward takes
    (input_ids int64 [batch, sequence], past: list of float32 [batch, kv_heads, past, head_size], k0 v0 k1 v1 …) and
    returns (logits, *presents); an encoder's takes a list of int64 [batch, sequence] named by `inputs` and returns
    (hidden states,). `caches` is (kv_heads, head_size) per cache tensor. `metadata` goes into the ONNX file. `plain`
    maps input_ids to logits without a cache, when the model offers that. `left_out` are weights that the folder has
    and the export does not use.
    """

    module: torch.nn.Module
    kind: str
    inputs: tuple[str, ...]
    vocab_size: int
    context_length: int
    caches: tuple[tuple[int, int], ...] = ()
    metadata: Mapping[str, str] = None  # type: ignore[assignment]
    plain: Callable | None = None
    tokenizer: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()


def load(source: str) -> Source:
    """Read a folder, `package.module:factory` or `file.py:factory`. Raises ExportError PORT-0701 to PORT-0711."""
    if Path(source).is_dir():
        return _from_folder(Path(source).resolve())
    if match := _FACTORY.fullmatch(source):
        return _from_factory(match["module"], match["name"])
    hint = "give a Hugging Face folder, package.module:factory or file.py:factory"
    raise ExportError("PORT-0701", "the source is neither a folder nor a factory", where=source, hint=hint)


# ---- a Hugging Face folder


def _from_folder(folder: Path) -> Source:
    settings = _read_config(folder)
    _check_model_type(settings, folder)
    _check_weights(folder)
    with _offline():
        model, left_out = _pretrained(folder, encoder=not _is_decoder(settings))
    return _from_transformers(model, folder, left_out)


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
    """By the architecture's name; without one, by whether transformers knows the type as a causal model only."""
    from transformers.models.auto import modeling_auto as auto

    names = settings.get("architectures")
    if isinstance(names, list) and names:
        return any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    kind = settings["model_type"]
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


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
            raise ExportError("PORT-0706", "the index of the weights cannot be read", where=str(index)) from error
        if bad := [n for n in names if Path(str(n)).name != n]:
            raise ExportError("PORT-0706", f"the index names a file outside the folder: {bad[0]!r}", where=str(index))
        return [folder / n for n in sorted(names)]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    if pickles:
        what = f"the weights are a pickle ({pickles[0]}), which can run code when it is read"
        raise ExportError("PORT-0707", what, where=str(folder), hint="convert them to model.safetensors first")
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
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa",
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if encoder and _has_pooler(folder):
        options["add_pooling_layer"] = False
    try:
        model, info = loader.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers raises whatever its parts raise
        what = f"transformers could not load the folder: {_first_line(error)}"
        raise ExportError("PORT-0708", what, where=str(folder)) from error
    _check_loading(info, folder, encoder)
    return model, tuple(sorted(info["unexpected_keys"]))


def _has_pooler(folder: Path) -> bool:
    """Whether the encoder's class takes `add_pooling_layer`; the pooler is no part of the exported output."""
    import inspect

    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return "add_pooling_layer" in inspect.signature(transformers.AutoModel._model_mapping[type(config)]).parameters
    except (KeyError, ValueError, TypeError):
        return False  # from_pretrained says what is wrong


def _check_loading(info: Mapping[str, Any], folder: Path, encoder: bool) -> None:
    """transformers fills what is missing with random numbers and only warns; an export must not."""
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} of the model's tensors: {_some(missing)}"
        raise ExportError("PORT-0709", what, where=str(folder), hint="does config.json belong to these weights?")
    if wrong := sorted(str(k[0]) for k in info["mismatched_keys"]):
        raise ExportError("PORT-0709", f"tensors have another shape than config.json says: {_some(wrong)}", where=str(folder))
    unexpected = sorted(info["unexpected_keys"])
    if unexpected and not encoder:  # an encoder may leave out its pooler and its heads
        what = f"the weights hold {len(unexpected)} tensors the model does not know: {_some(unexpected)}"
        raise ExportError("PORT-0709", what, where=str(folder), hint="does config.json belong to these weights?")


def _from_transformers(model: Any, folder: Path | None = None, left_out: tuple[str, ...] = ()) -> Source:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(context, int):
        raise ExportError("PORT-0704", "the configuration has no max_position_embeddings", where=str(folder or config.model_type))
    common = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "metadata": _metadata(context, config.model_type, config.bos_token_id, config.eos_token_id),
        "tokenizer": tokenizer_files(folder) if folder else (),
        "left_out": left_out,
    }
    model = _frozen(model)
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        caches = _probe_caches(model)
        plain = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
        return Source(_flat_causal(model, len(caches) // 2), "decoder", ("input_ids",), caches=caches, plain=plain, **common)
    inputs = _encoder_inputs(model)
    return Source(_flat_encoder(model, inputs, hugging_face=True), "encoder", inputs, **common)


def _probe_caches(model: Any) -> tuple[tuple[int, int], ...]:
    """(kv_heads, head_size) of every cache tensor, seen by running one token. Raises PORT-0710."""
    import torch
    from transformers import DynamicCache

    try:
        with torch.no_grad():
            cache = DynamicCache()
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return tuple((t.shape[1], t.shape[3]) for t in tensors if t.shape[2] == 1) or _no_cache(model)
    except PorterError:
        raise
    except Exception as error:
        _no_cache(model, error)


def _no_cache(model: Any, error: Exception | None = None) -> Any:
    kind = model.config.model_type
    raise ExportError("PORT-0710", f"the state of a {kind!r} model is not keys and values per layer") from error


def _encoder_inputs(model: Any) -> tuple[str, ...]:
    import inspect

    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken:
        raise ExportError("PORT-0705", f"a {model.config.model_type!r} model does not read tokens")
    types = getattr(model.config, "type_vocab_size", 0)
    wanted = ("input_ids", "attention_mask") + (("token_type_ids",) if types else ())
    return tuple(n for n in wanted if n in taken)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files in `folder`."""
    return tuple(folder / n for n in TOKENIZER_FILES if (folder / n).is_file())


# ---- a factory


def _from_factory(module: str, name: str) -> Source:
    import torch
    from transformers import PreTrainedModel

    where = f"{module}:{name}"
    try:
        factory = getattr(_import(module), name)
    except Exception as error:
        raise ExportError("PORT-0701", f"the factory cannot be imported: {_first_line(error)}", where=where) from error
    try:
        model = factory()
    except Exception as error:
        raise ExportError("PORT-0711", f"the factory failed: {_first_line(error)}", where=where) from error
    if not isinstance(model, torch.nn.Module):
        raise ExportError("PORT-0711", f"the factory returned {type(model).__name__}, not a torch.nn.Module", where=where)
    if isinstance(model, PreTrainedModel):
        return _from_transformers(model)
    return _from_module(_frozen(model), where)


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
    metadata = _metadata(said["context_length"], said.get("model_type", ""), said.get("bos"), said.get("eos"))
    tokenizer = tokenizer_files(Path(said["tokenizer"])) if said.get("tokenizer") else ()
    common = {"context_length": said["context_length"], "metadata": metadata, "tokenizer": tokenizer}
    if said.get("kind") == "encoder":
        inputs = tuple(said["inputs"])
        return Source(_flat_encoder(model, inputs), "encoder", inputs, vocab_size=said["vocab_size"], **common)
    caches = ((said["kv_heads"], said["head_size"]),) * (2 * said["layers"])
    vocab_size = _try_forward(model, caches, where)
    return Source(_flat_decoder(model), "decoder", ("input_ids",), vocab_size=vocab_size, caches=caches, **common)


def _convention(model: torch.nn.Module, where: str) -> dict[str, Any]:
    """The checked `porter` attribute of a module of the user's own. Raises PORT-0711."""
    said = getattr(model, "porter", None)
    if not isinstance(said, dict):
        raise ExportError("PORT-0711", "the module has no attribute `porter`, a dict of its sizes", where=where, hint=CONVENTION)
    encoder = said.get("kind", "decoder") == "encoder"
    known = _ENCODER_KEYS if encoder else _DECODER_KEYS
    sizes = ("vocab_size", "context_length") if encoder else ("layers", "kv_heads", "head_size", "context_length")
    wrong = [f"does not know {k!r}" for k in said.keys() - known]
    wrong += [f"wants a positive whole number for {k!r}" for k in sizes if not _positive(said.get(k))]
    if said.get("kind", "decoder") not in ("decoder", "encoder"):
        wrong.append("has kind decoder or encoder")
    if encoder and "input_ids" not in (said.get("inputs") or ()):
        wrong.append("wants 'inputs', names that begin with input_ids")
    if wrong:
        raise ExportError("PORT-0711", f"the attribute `porter` {sorted(wrong)[0]}", where=where, hint=CONVENTION)
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
        what = f"forward(input_ids, past) failed: {_first_line(error)}"
        raise ExportError("PORT-0711", what, where=where, hint=CONVENTION) from error
    wanted = [(2, 3), *((2, heads, 4, size) for heads, size in caches)]
    if got != wanted or logits.dim() != 3:
        off = next((i for i, (g, w) in enumerate(zip(got, wanted, strict=False)) if g != w), min(len(got), len(wanted)))
        what = f"forward returned {len(got)} tensors for {len(wanted)}, and number {off} has another shape than agreed"
        raise ExportError("PORT-0711", what, where=where, hint=CONVENTION)
    return int(logits.shape[-1])


# ---- flat modules (their classes live inside functions because torch is imported late)


def _flat_causal(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    import torch
    from transformers import DynamicCache

    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache()
            for i in range(layers):
                cache.update(past[2 * i], past[2 * i + 1], i)
            start, (batch, length) = past[0].shape[2], input_ids.shape
            # One row of positions would do for PyTorch, but ONNX's RotaryEmbedding wants one per batch row.
            positions = torch.arange(start, start + length).unsqueeze(0).expand(batch, length)
            out = self.inner(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
            presents = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
            return (out.logits, *presents)

    return Flat(model).eval()


def _flat_decoder(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(self.inner(input_ids, past))

    return Flat(model).eval()


def _flat_encoder(model: torch.nn.Module, inputs: tuple[str, ...], hugging_face: bool = False) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            out = self.inner(**dict(zip(inputs, tokens, strict=True)))
            return (out.last_hidden_state if hugging_face else out,)

    return Flat(model).eval()


def _frozen(model: torch.nn.Module) -> torch.nn.Module:
    return model.to(device="cpu").float().eval().requires_grad_(False)


def _metadata(context: int, model_type: str, bos: object, eos: object) -> dict[str, str]:
    """metadata_props of the file; several end tokens are joined by commas."""
    said = {"porter.context_length": str(context), "porter.model_type": model_type}
    for name, value in (("porter.bos", bos), ("porter.eos", eos)):
        ids = value if isinstance(value, list | tuple) else [value]
        if ids and all(isinstance(i, int) for i in ids):
            said[name] = ",".join(map(str, ids))
    return dict(sorted((k, v) for k, v in said.items() if v))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

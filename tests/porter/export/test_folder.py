"""What is refused in a Hugging Face folder, and that nothing is ever filled in or run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from porter.errors import ExportError  # noqa: E402
from porter.export.source import load, tokenizer_files  # noqa: E402

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def refused(source: Path | str, code: str, *words: str) -> ExportError:
    with pytest.raises(ExportError) as caught:
        load(str(source))
    assert caught.value.code == code
    assert caught.value.exit_code == 1
    for word in words:
        assert word in str(caught.value)
    return caught.value


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_folder_loads(folder: Path) -> None:
    source = load(str(folder))
    assert (source.kind, source.vocab_size, source.context_length, source.caches) == (
        "decoder",
        20,
        16,
        ((2, 4),) * 2,
    )


@pytest.mark.parametrize("source", ["no/such/folder", "", "a:b:c", "https://example.org/model", "gpt2"])
def test_neither_folder_nor_factory(source: str) -> None:
    refused(source, "PORT-0701")


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"vocab_size": 3}', '{"model_type": 3}', "[" * 100_000]
)
def test_config(folder: Path, text: str | None) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, "PORT-0704", "config.json")


def test_unknown_model_type_is_named_and_a_factory_suggested(folder: Path) -> None:
    configure(folder, model_type="llama-subnorm-ternary", auto_map={"AutoConfig": "own.Config"})
    refused(folder, "PORT-0705", "'llama-subnorm-ternary'", "factory")


def test_encoder_decoder_and_quantized(folder: Path) -> None:
    configure(folder, is_encoder_decoder=True)
    refused(folder, "PORT-0705", "both an encoder and a decoder")
    configure(folder, is_encoder_decoder=False, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "PORT-0705", "already quantized")


def test_no_weights_and_pickles(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    refused(folder, "PORT-0706", "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "PORT-0707", "pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "PORT-0706", "model.safetensors", "damaged")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ('{"weight_map": {"a": "model-1.safetensors"}}', "model-1.safetensors is missing"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"a": 3}}', "outside the folder"),
        ('{"weight_map": 3}', "index"),
        ("[]", "index"),
        ("{", "index"),
    ],
)
def test_shards(folder: Path, index: str, word: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "PORT-0706", word)


def test_shards_load(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in halves.items():
        save_file({n: whole[n] for n in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    state = load(str(folder)).module.inner.state_dict()
    for name, array in whole.items():
        np.testing.assert_array_equal(state[name].numpy(), array)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_not_made_up(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "PORT-0709", name)


def test_a_tensor_too_many(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "PORT-0709", "model.layers.0.self_attn.q_proj.bias")


def test_another_shape(folder: Path) -> None:
    configure(folder, intermediate_size=10)
    assert refused_with(folder, "PORT-0708", "PORT-0709")


def refused_with(folder: Path, *codes: str) -> bool:
    with pytest.raises(ExportError) as caught:
        load(str(folder))
    return caught.value.code in codes


def test_nonsense_sizes(folder: Path) -> None:
    configure(folder, num_attention_heads=3)
    assert refused_with(folder, "PORT-0708", "PORT-0709")


def test_a_state_that_is_no_cache(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "PORT-0710", "'mamba'")


def test_not_a_text_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert refused_with(tmp_path, "PORT-0704", "PORT-0705", "PORT-0708")


def test_roberta_counts_positions_from_after_the_padding(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**CONFIG | {"max_position_embeddings": 18}, type_vocab_size=1)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    source = load(str(tmp_path))
    assert (source.kind, source.context_length) == ("encoder", 16)
    assert source.inputs == ("input_ids", "attention_mask")  # one token type is no choice
    tokens = [torch.full((1, 16), 5), torch.ones(1, 16, dtype=torch.long)]
    assert source.module(tokens)[0].shape == (1, 16, 8)


def test_tokenizer_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "notes.txt", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "vocab.json").write_text('{"pieces": [], "scores": [], "types": []}')
    assert [f.name for f in tokenizer_files(tmp_path)] == ["tokenizer.json", "vocab.json", "vocab.txt"]
    (tmp_path / "vocab.json").write_text('{"hello": 1}')
    assert [f.name for f in tokenizer_files(tmp_path)] == ["tokenizer.json", "vocab.txt"]

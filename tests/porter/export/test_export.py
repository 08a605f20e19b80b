"""Real exports: the file's interface, names, bytes and numbers, and what is left after a failure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from porter.errors import ExportError  # noqa: E402
from porter.export import export  # noqa: E402

ROOT = Path(__file__).parent.parent.parent.parent
STORIES = ROOT / "samples" / "stories260k"
BITLLAMA = ROOT / "samples" / "02-own-model" / "bitllama.py"
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
# The greedy continuation in llama2.c's own test of this checkpoint.
ONCE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def save_random(folder: Path, model: torch.nn.Module) -> Path:
    """Trained-looking random weights (std 0.3, norms around 1) in a Hugging Face folder."""
    random = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=random) * 0.3 + (p.dim() == 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied one-layer Llama."""
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    return save_random(tmp_path_factory.mktemp("tiny"), transformers.LlamaForCausalLM(config))


def digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.parent.glob(f"{path.name}*")}


def runner(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def empty_past(session: onnxruntime.InferenceSession, batch: int = 1) -> dict[str, np.ndarray]:
    return {
        i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[1:]
    }


# ---- stories260k


def test_interface(stories_onnx: Path) -> None:
    model = ir.load(stories_onnx)
    kinds = [f"{i}.{k}" for i in range(5) for k in ("key", "value")]
    assert [v.name for v in model.graph.inputs] == ["input_ids", *(f"past_key_values.{k}" for k in kinds)]
    assert [v.name for v in model.graph.outputs] == ["logits", *(f"present.{k}" for k in kinds)]
    ids, past, logits = model.graph.inputs[0], model.graph.inputs[1], model.graph.outputs[0]
    assert (ids.dtype, str(ids.shape)) == (ir.DataType.INT64, "[batch,sequence]")
    assert (past.dtype, str(past.shape)) == (ir.DataType.FLOAT, "[batch,4,past,8]")
    assert str(logits.shape) == "[batch,sequence,512]"
    assert dict(model.opset_imports) == {"": 23}
    assert dict(model.metadata_props) == {
        "porter.bos": "1",
        "porter.context_length": "512",
        "porter.eos": "2",
        "porter.model_type": "llama",
    }
    onnx.checker.check_model(stories_onnx, full_check=True)


def test_weights_keep_names_layout_and_bits(stories_onnx: Path) -> None:
    model = ir.load(stories_onnx)
    stored = load_file(STORIES / "model.safetensors")
    found = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    assert found.keys() == stored.keys() | {"model.rotary_emb.inv_freq"}
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array)


def test_linears_are_matmul_of_a_transpose_and_know_their_module(stories_onnx: Path) -> None:
    graph = ir.load(stories_onnx).graph
    for name, weight in graph.initializers.items():
        if not name.endswith("_proj.weight"):
            continue
        (transpose,) = (u.node for u in weight.uses())
        (product,) = (u.node for u in transpose.outputs[0].uses())
        assert (transpose.op_type, list(transpose.attributes["perm"].as_ints())) == ("Transpose", [1, 0])
        assert product.op_type == "MatMul"
        assert product.metadata_props["porter.module"] == name.removesuffix(".weight")
    assert {k for n in graph for k in n.metadata_props} == {"porter.module"}


def test_tied_embedding_is_stored_once(stories_onnx: Path) -> None:
    weight = ir.load(stories_onnx).graph.initializers["model.embed_tokens.weight"]
    assert sorted(u.node.op_type for u in weight.uses()) == ["Gather", "Transpose"]
    # 260,032 parameters, four frequencies, and at most 64 bytes of alignment per tensor.
    size = sum(f.stat().st_size for f in stories_onnx.parent.glob("*.data"))
    assert size <= 4 * (260_032 + 4) + 64 * 48


def test_nothing_is_dead_and_no_local_path_is_left(stories_onnx: Path) -> None:
    model = ir.load(stories_onnx)
    assert not [n for n in model.graph if n.op_type == "Identity"]
    assert not [n.name for n in model.graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)]
    assert not [v.name for v in model.graph.initializers.values() if not v.uses()]
    raw = stories_onnx.read_bytes()
    assert not [
        word for word in (b".py", b"site-packages", b"pkg.torch", str(ROOT).encode(), b"File ") if word in raw
    ]


def test_greedy_text_is_that_of_the_models_author(stories_onnx: Path) -> None:
    import sentencepiece

    folder = stories_onnx.with_suffix(".tokenizer")
    assert sorted(f.name for f in folder.iterdir()) == ["tokenizer.model", "vocab.json"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    session = runner(stories_onnx)
    tokens = [1, *tokenizer.encode("Once upon a time")]
    new, past = tokens, empty_past(session)
    while len(tokens) < 90:
        logits, *presents = session.run(None, {"input_ids": np.array([new]), **past})
        past = dict(zip(past, presents, strict=True))
        new = [int(logits[0, -1].argmax())]
        tokens += new
    assert tokenizer.decode(tokens).startswith(ONCE)


def test_rows_of_a_batch_do_not_touch_each_other(stories_onnx: Path) -> None:
    session = runner(stories_onnx)
    tokens = np.random.default_rng(0).integers(0, 512, (3, 6))
    together = session.run(["logits"], {"input_ids": tokens, **empty_past(session, 3)})[0]
    for row in range(3):
        alone = session.run(["logits"], {"input_ids": tokens[row : row + 1], **empty_past(session)})[0]
        # The same sums in another blocking: 4 eps sqrt(172 * 36 products) of logits up to 20.
        assert np.abs(together[row] - alone[0]).max() < 4 * 2.0**-23 * np.sqrt(172 * 36) * 20


# ---- small models


def test_export_twice_is_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "elsewhere" / "deep" / "model.onnx"
    export(str(tiny), first)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    second.parent.mkdir(parents=True)
    code = (
        "from pathlib import Path; from porter.export import export; export('../../copy', Path('model.onnx'))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=second.parent, env=environment, check=True)
    assert copy.is_dir()
    assert digests(first) == digests(second)
    assert len(digests(first)) == 2


def test_export_is_silent_offline_and_reports(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the export opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "remote").mkdir()
    folder = shutil.copytree(tiny, tmp_path / "remote" / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    stages: list[str] = []
    report = export(str(folder), tmp_path / "model.onnx", progress=stages.append, opset=24)
    assert stages == ["load", "trace", "clean", "write", "check", "publish"]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "ran").exists()
    assert (report.kind, report.opset, report.tokenizer, report.left_out) == ("decoder", 24, None, ())
    assert report.parameters == sum(a.size for a in load_file(folder / "model.safetensors").values())
    assert dict(ir.load(report.path).metadata_props)["porter.eos"] == "2,3"
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= ir.load(report.path).graph.initializers.keys()
    # Logits up to 6 through 9 products of at most 44 terms: rounding explains 4 eps sqrt(44 * 9) * 6 = 6e-5.
    assert 0 < report.max_abs < 6e-5


def test_biases_on_a_tied_model(tmp_path: Path) -> None:
    """Qwen2 has biases on q, k and v; the oracle is transformers with another attention and no cache."""
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, tie_word_embeddings=True))
    folder = save_random(tmp_path / "qwen", model)
    path = tmp_path / "qwen.onnx"
    export(str(folder), path)
    graph = ir.load(path).graph
    assert "model.layers.1.self_attn.k_proj.bias" in graph.initializers
    assert "lm_head.weight" not in graph.initializers
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = np.random.default_rng(3).integers(0, 50, (2, 9))
    with torch.no_grad():
        wanted = plain(torch.from_numpy(tokens)).logits.numpy()
    session = runner(path)
    got = session.run(["logits"], {"input_ids": tokens, **empty_past(session, 2)})[0]
    # 17 products of at most 44 terms, logits up to 7: 4 eps sqrt(44 * 17) * 7.
    assert np.abs(got - wanted).max() < 4 * 2.0**-23 * np.sqrt(44 * 17) * 7


def test_encoder_from_half_precision(tmp_path: Path) -> None:
    sizes = {
        k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
    }
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    folder = save_random(tmp_path / "bert", model.half())
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "vocab.json").write_text('{"a": 0}')  # another tokenizer's table: not copied
    path = tmp_path / "bert.onnx"
    report = export(str(folder), path)
    assert report.kind == "encoder"
    assert report.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert report.outputs == ("last_hidden_state",)
    assert report.left_out == ("pooler.dense.bias", "pooler.dense.weight")
    assert report.tokenizer is not None
    assert [f.name for f in report.tokenizer.iterdir()] == ["vocab.txt"]
    assert {v.const_value.dtype for v in ir.load(path).graph.initializers.values()} <= {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }
    plain = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    random = np.random.default_rng(0)
    feeds = {n: random.integers(0, 2, (3, 7)) for n in report.inputs}
    feeds["attention_mask"][:, 0] = 1
    with torch.no_grad():
        wanted = plain(**{n: torch.from_numpy(a) for n, a in feeds.items()}).last_hidden_state.numpy()
    got = runner(path).run(None, feeds)[0]
    # 16 products of at most 44 terms, hidden states up to 6: 4 eps sqrt(44 * 16) * 6.
    assert np.abs(got - wanted).max() < 4 * 2.0**-23 * np.sqrt(44 * 16) * 6


# ---- the epsilon that torch's optimizer drops


@pytest.fixture(scope="session")
def small_bitllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's architecture, tiny, with activations so small that its epsilon of 1e-12 counts."""
    folder = tmp_path_factory.mktemp("bitllama")
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 20,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "sub_norm_eps": 1e-12,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "model_type": "llama-subnorm-ternary",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    shapes |= {
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    weights = {
        f"model.layers.{i}.{n}.weight": random.normal(0, 1e-5, s) for i in range(2) for n, s in shapes.items()
    }
    weights["model.embed_tokens.weight"] = random.normal(0, 1e-5, (20, 16))
    weights["model.norm.weight"] = np.full(16, 3e5)  # brings logits back to a scale of about 1
    weights["model.layers.0.input_layernorm.weight"] = np.ones(16)
    save_file({n: a.astype(np.float32) for n, a in weights.items()}, folder / "model.safetensors")
    return folder


def test_own_module_keeps_its_epsilon(
    small_bitllama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLAMA", str(small_bitllama))
    report = export(f"{BITLLAMA}:bitllama", tmp_path / "model.onnx")
    assert "a zero embedding row" in {p.name for p in report.probes}
    graph = ir.load(report.path).graph
    assert "model.layers.1.mlp.ffn_sub_norm.weight" not in graph.initializers
    norms = {n.metadata_props.get("porter.module") for n in graph if n.op_type == "Pow"}
    assert "model.layers.1.mlp.ffn_sub_norm" in norms


def test_the_check_refuses_what_the_optimizer_broke(
    small_bitllama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from porter.export import check as export_check

    seen: list[export_check.Probe] = []
    real = export_check.measure

    def watched(*arguments: object) -> list[export_check.Probe]:
        seen.extend(real(*arguments))
        return seen

    monkeypatch.setattr(export_check, "measure", watched)
    monkeypatch.setenv("BITLLAMA", str(small_bitllama))
    with pytest.raises(ExportError) as caught:
        export(f"{BITLLAMA}:bitllama", tmp_path / "out" / "model.onnx", _optimize=True)
    assert (caught.value.code, caught.value.exit_code) == ("PORT-0720", 3)
    assert list(tmp_path.iterdir()) == []
    shares = {p.name.split(",")[0]: p.share for p in seen}
    assert shares["a zero embedding row"] == np.inf  # 0 / 0
    assert shares["sampled text"] > 1  # and on ordinary text too


# ---- failure leaves nothing, and leaves what was there


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_changes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupt(*_: object) -> None:
        raise error

    monkeypatch.setattr("porter.export.check.check", interrupt)
    monkeypatch.setattr(
        "porter.export._trace",
        lambda *_: ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=11),
    )
    (tmp_path / "model.onnx").write_text("before")
    with pytest.raises(error):
        export(str(tiny), tmp_path / "model.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_an_interrupt_between_the_renames_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from porter.export import _staged

    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_text("before")
    rename, calls = Path.rename, []

    def third_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", third_fails)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_staged(tmp_path / "model.onnx"))
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_text("after")
        with pytest.raises(KeyboardInterrupt):
            stack.pop_all().close()
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        "model.onnx": "before",
        "model.onnx.data": "before",
    }


def test_a_new_export_replaces_all_files_of_the_old(tmp_path: Path) -> None:
    from porter.export import _staged

    (tmp_path / "model.onnx.data").write_text("before")
    (tmp_path / "model.tokenizer").mkdir()
    with _staged(tmp_path / "model.onnx") as folder:
        (folder / "model.onnx").write_text("after")
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["model.bin", "model"])
def test_output_name(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="PORT-0716"):
        export(str(tiny), tmp_path / name)


def test_unwritable_output(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="PORT-0730"):
        export(str(tiny), tmp_path / "file" / "model.onnx")


@pytest.mark.parametrize("opset", [17, 22, 25])
def test_opset(tiny: Path, tmp_path: Path, opset: int) -> None:
    with pytest.raises(ExportError, match="PORT-0715"):
        export(str(tiny), tmp_path / "model.onnx", opset=opset)


@pytest.mark.parametrize("name", ["torch", "transformers", "safetensors"])
def test_missing_package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = importlib_find_spec()
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == name else real(n, *a))
    with pytest.raises(ExportError, match=rf"PORT-0702.*{name}.*pip install 'porter\[export\]'"):
        export(str(tiny), tmp_path / "model.onnx")


def importlib_find_spec() -> object:
    import importlib.util

    return importlib.util.find_spec


@pytest.mark.parametrize("version", ["2.12.1", "3.0.0", "2.1.3"])
def test_wrong_torch(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ExportError, match=f"PORT-0703.*{version}"):
        export(str(tiny), tmp_path / "model.onnx")


# ---- minutes: the other trained models, other families


@pytest.mark.long
def test_bitllama_keeps_its_perplexity(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    folder = models / "bitllama-3m"
    monkeypatch.setenv("BITLLAMA", str(folder))
    report = export(f"{BITLLAMA}:bitllama", tmp_path / "model.onnx")
    assert report.max_abs < 5e-5  # logits up to 25, K = 256, 65 products: 1.6e-3 is allowed, 2.5e-5 was seen
    session = runner(report.path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    loss, count = 0.0, 0
    for text in json.loads((models / "eval-text" / "handwritten.json").read_text()):
        tokens = np.array([[1, *tokenizer.encode(text)]])
        logits = session.run(["logits"], {"input_ids": tokens, **empty_past(session)})[0][0, :-1].astype(
            np.float64
        )
        top = logits.max(-1, keepdims=True)
        logged = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        loss -= logged[np.arange(len(logged)), tokens[0, 1:]].sum()
        count += len(logged)
    assert count == 754
    assert abs(np.exp(loss / count) - 3.9493) < 5e-5  # the published figure, to its last digit


@pytest.mark.long
def test_bitllama_is_refused_with_the_optimizer(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLAMA", str(models / "bitllama-3m"))
    with pytest.raises(ExportError, match="PORT-0720"):
        export(f"{BITLLAMA}:bitllama", tmp_path / "model.onnx", _optimize=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_minilm(models: Path, tmp_path: Path) -> None:
    report = export(str(models / "minilm-l6-v2"), tmp_path / "model.onnx")
    assert report.max_abs < 1e-5  # hidden states up to 6; 4e-6 was seen
    tokenizer = transformers.BertTokenizerFast(vocab=str(models / "minilm-l6-v2" / "vocab.txt"))
    session, vectors = runner(report.path), []
    for text in ("A man is eating food.", "A man is eating a piece of bread."):
        ids = np.array([tokenizer(text)["input_ids"]])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = session.run(None, feeds)[0][0].mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    assert abs(vectors[0] @ vectors[1] - 0.7553) < 5e-5  # the published figure, to its last digit


@pytest.mark.long
@pytest.mark.parametrize(
    "family", ["Llama", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Mistral", "Phi3", "GPT2"]
)
def test_families(family: str, tmp_path: Path) -> None:
    sizes = SMALL | {"Qwen3": {"head_dim": 16}, "Phi3": {"pad_token_id": 0}}.get(family, {})
    if family.startswith("Gemma"):
        sizes |= {"head_dim": 16, "sliding_window": 8}
    if family == "Mistral":
        sizes |= {"sliding_window": 8}
    cls = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, cls)(getattr(transformers, f"{family}Config")(**sizes))
    folder = save_random(tmp_path / "model", model)
    report = export(str(folder), tmp_path / "model.onnx")
    names = [p.name for p in report.probes]
    assert {"text in two parts", "without a cache", "a zero embedding row"} <= set(names)
    assert sum("past 7" in n for n in names) == 2


def test_the_check_is_kept_beside_the_file(stories_onnx: Path, tmp_path: Path) -> None:
    from porter import exported, graph

    digest = graph.digest(stories_onnx)
    found = exported.read(stories_onnx, digest)
    # Twelve cases of up to 256 tokens; the same function, so what is left is the order of float32 sums.
    assert found.tokens > 256
    assert found.kl_mean < 1e-8
    assert found.top1 == 1.0
    assert found.ppl is None  # no text says which token is next
    assert exported.read(stories_onnx, digest[::-1]) is None  # of another file
    assert exported.read(tmp_path / "model.onnx", digest) is None
    (tmp_path / "model.export.json").write_text('{"schema": "porter.export/1", "sha256": "' + digest + '"}')
    assert exported.read(tmp_path / "model.onnx", digest) is None  # half written

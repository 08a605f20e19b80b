"""Modules of the user's own: the convention, its error messages, and names that get in each other's way."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from porter.errors import ExportError  # noqa: E402
from porter.export import export  # noqa: E402
from porter.export.source import load  # noqa: E402

OWN = '''
import torch
from torch.nn import functional as F

class Own(torch.nn.Module):
    """One head that attends to the embedding itself; a buffer `cos`, a parameter `logits`, a tied head."""
    def __init__(self, **changes):
        super().__init__()
        self.porter = dict(layers=1, kv_heads=1, head_size=4, context_length=20) | changes
        random = torch.Generator().manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(9, 4, generator=random))
        self.register_buffer("cos", torch.randn(4, generator=random))
        self.add = torch.nn.Parameter(torch.randn(4, generator=random))
        self.head = self.logits

    def forward(self, input_ids, past):
        x = F.embedding(input_ids, self.logits)
        x = x + torch.cos(x) * self.cos + self.add
        k, v = torch.cat([past[0], x[:, None]], 2), torch.cat([past[1], x[:, None] * 2], 2)
        start, length = past[0].shape[2], input_ids.shape[1]
        mask = torch.arange(start + length)[None] <= torch.arange(start, start + length)[:, None]
        y = F.scaled_dot_product_attention(x[:, None], k, v, attn_mask=mask)[:, 0]
        return (x + y) @ self.head.T, k, v

class Encoder(torch.nn.Module):
    def __init__(self, **changes):
        super().__init__()
        inputs = ["input_ids", "attention_mask"]
        self.porter = dict(kind="encoder", inputs=inputs, vocab_size=9, context_length=20) | changes
        self.table = torch.nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids) * attention_mask[..., None]

def own(): return Own()
def encoder(): return Encoder()
def raises(): raise ValueError("no weights here")
def nothing(): return None
def without(): return torch.nn.Linear(2, 2)
def unknown(): return Own(hidden=3)
def zero(): return Own(layers=0)
def text(): return Own(kv_heads="1")
def truth(): return Own(layers=True)
def kind(): return Own(kind="both")
def no_inputs(): return Encoder(inputs=["tokens"])
def heads(): return Own(kv_heads=2)
def layers(): return Own(layers=2)
def folder(): return Own(tokenizer="words")

def changed(change):
    class Changed(Own):
        def forward(self, input_ids, past):
            return change(input_ids, past, *super().forward(input_ids, past))
    return Changed()

def fails(): return changed(lambda ids, past, l, k, v: 1 / 0)
def forgets(): return changed(lambda ids, past, l, k, v: (l, k.flip(2), v))
def branches(): return changed(lambda ids, past, l, k, v: (l if ids.sum() > 3 else 2 * l, k, v))
def fixes(): return changed(lambda ids, past, l, k, v: (l * 2 if l.shape[0] == 2 else l, k, v))
def nan(): return changed(lambda ids, past, l, k, v: (l * (0 * l / (l - l)), k, v))
def short():
    table = torch.zeros(12, 1)
    def add(ids, past, l, k, v):
        return l + table[past[0].shape[2] + torch.arange(ids.shape[1])], k, v
    return changed(add)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own_model.py"
    path.write_text(OWN)
    return path


def refused(source: str, code: str, *words: str) -> None:
    with pytest.raises(ExportError) as caught:
        load(source)
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_names_do_not_collide(own: Path, tmp_path: Path) -> None:
    report = export(f"{own}:own", tmp_path / "model.onnx")
    graph = ir.load(report.path).graph
    assert [o.name for o in graph.outputs] == ["logits", "present.0.key", "present.0.value"]
    assert graph.initializers.keys() == {
        "inner.logits",
        "cos",
        "add",
    }  # tied head once; `logits` is an output
    names = [o.name for n in graph for o in n.outputs]
    assert len({*names, *graph.initializers}) == len(names) + 3


def test_by_module_name_from_the_current_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    before = list(sys.path)
    source = load("own_model:own")
    monkeypatch.delitem(sys.modules, "own_model")
    assert sys.path == before
    assert (source.kind, source.vocab_size, source.caches) == ("decoder", 9, ((1, 4), (1, 4)))
    assert dict(source.metadata) == {"porter.context_length": "20"}


def test_encoder(own: Path, tmp_path: Path) -> None:
    report = export(f"{own}:encoder", tmp_path / "model.onnx")
    assert (report.kind, report.inputs) == ("encoder", ("input_ids", "attention_mask"))
    assert report.max_abs == 0  # a table and a product with 0 or 1


def test_tokenizer_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    Path("words").mkdir()
    Path("words", "tokenizer.json").write_text("{}")
    assert [f.name for f in load(f"{own}:folder").tokenizer] == ["tokenizer.json"]


@pytest.mark.parametrize("source", ["no_such_module:f", "{}:no_such_factory", "nowhere.py:f"])
def test_import(own: Path, source: str) -> None:
    refused(source.format(own), "PORT-0701", "cannot be imported")


def test_a_module_with_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    refused(f"{tmp_path / 'bad.py'}:f", "PORT-0701", "SyntaxError")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("raises", "ValueError: no weights here"),
        ("nothing", "returned NoneType"),
        ("without", "no attribute `porter`"),
        ("unknown", "does not know 'hidden'"),
        ("zero", "whole number for 'layers'"),
        ("text", "whole number for 'kv_heads'"),
        ("truth", "whole number for 'layers'"),
        ("kind", "decoder or encoder"),
        ("no_inputs", "input_ids"),
        ("fails", "ZeroDivisionError"),
        ("heads", "forward"),
        ("layers", "3 of 5 tensors"),
    ],
)
def test_convention(own: Path, factory: str, words: str) -> None:
    refused(f"{own}:{factory}", "PORT-0711", words)


@pytest.mark.parametrize(
    ("factory", "code", "exit_code"),
    [
        ("branches", "PORT-0712", 1),
        ("fixes", "PORT-0713", 1),
        ("forgets", "PORT-0721", 3),
        ("nan", "PORT-0723", 1),
        ("short", "PORT-0724", 1),
    ],
)
def test_what_cannot_be_exported(own: Path, tmp_path: Path, factory: str, code: str, exit_code: int) -> None:
    with pytest.raises(ExportError) as caught:
        export(f"{own}:{factory}", tmp_path / "out" / "model.onnx")
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert not (tmp_path / "out").exists()

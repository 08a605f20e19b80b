"""The text form of pipelines, its errors, passes from elsewhere, and what a failure names."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from porter import registry
from porter.context import Context
from porter.errors import PassError, PorterError
from porter.pipeline import Foreign, Pass, Pipeline, Promise

HEAD = '<ir_version: 10, opset_import: ["" : 24]>'
MODEL = f"{HEAD} g (float[2] x) => (float[2] y) {{ a = Identity (x) y = Neg (a) }}"
USER_PASS = '''"""Count down: an example."""
from __future__ import annotations
from dataclasses import dataclass
from porter.pipeline import Pass

@dataclass(frozen=True)
class CountDown(Pass):
    times: int = 1
    ratio: float = 0.5
    loudly: bool = False
    names: tuple[str, ...] = ("a",)

    def run(self, model, context):
        return self.times
'''


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(MODEL)


@pytest.fixture
def user_pass(tmp_path: Path) -> Path:
    path = tmp_path / "count_down.py"
    path.write_text(USER_PASS, encoding="utf-8")
    return path


@pytest.fixture
def graph_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline.run checks the graph after each pass; here any graph is right."""
    fake = types.ModuleType("porter.graph")
    fake.verify = lambda model: None
    monkeypatch.setitem(sys.modules, "porter.graph", fake)
    monkeypatch.setattr("porter.graph", fake, raising=False)


@pytest.mark.parametrize(
    "text",
    ["clean.dead", "clean.opset,clean.dead", "clean.constants{max-elements=16},clean.dead", ""],
)
def test_parse_print(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_spaces_newlines_and_empty_items_are_nothing() -> None:
    assert Pipeline.parse(" clean.dead ,,\n clean.opset{} ,") == Pipeline.parse("clean.dead,clean.opset")


def test_a_default_is_not_printed() -> None:
    assert str(Pipeline.parse("clean.constants{max-elements=1024}")) == "clean.constants"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("clean.nothing", "PORT-0201"),
        ("missing.py", "PORT-0201"),
        ("clean.dead}", "PORT-0202"),
        ("clean.dead{a=1", "PORT-0202"),
        ("clean.dead{loud}", "PORT-0203"),
        ("clean.constants{max-elements}", "PORT-0204"),
        ("clean.constants{max-elements=many}", "PORT-0204"),
        ("clean.constants{max-elements=-1}", "PORT-0204"),
        ("clean.constants,clean.opset", "PORT-0205"),
    ],
)
def test_errors(text: str, code: str) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline.parse(text)
    assert caught.value.code == code


def test_an_unknown_option_names_those_that_exist() -> None:
    with pytest.raises(PassError, match="max-elements"):
        Pipeline.parse("clean.constants{elements=1}")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            "times=3 loudly ratio=0.25 names=b+c",
            {"times": 3, "loudly": True, "ratio": 0.25, "names": ("b", "c")},
        ),
        ("loudly=true", {"loudly": True}),
        ("", {}),
    ],
)
def test_a_pass_from_a_file(
    user_pass: Path, model: ir.Model, options: str, wanted: dict[str, object]
) -> None:
    (step,) = Pipeline.parse(f"{user_pass}{{{options}}}").passes
    for name, value in wanted.items():
        assert getattr(step, name) == value
    assert Pipeline.parse(str(step)).passes[0].__dict__ == step.__dict__
    assert step.run(model, Context()) == wanted.get("times", 1)


def test_a_file_without_a_pass(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1", encoding="utf-8")
    with pytest.raises(PassError, match=r"PORT-0208.*found 0"):
        Pipeline.parse(str(path))


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(PassError, match=r"PORT-0208.*division"):
        Pipeline.parse(str(path))


def test_an_onnx_ir_pass_is_a_step(model: ir.Model, graph_module: None) -> None:
    """It runs, says whether it changed the model, and promises nothing of the numbers."""
    step = Foreign(common.IdentityEliminationPass())
    assert step.promise is Promise.LOSSY
    assert [s.edits for s in Pipeline((step, step)).run(model, Context())] == [1, 0]
    assert [n.op_type for n in model.graph] == ["Neg"]


def test_a_porter_pass_is_an_onnx_ir_pass(model: ir.Model) -> None:
    result = registry.find("clean.identity")()(model)
    assert result.modified
    assert [n.op_type for n in result.model.graph] == ["Neg"]


def test_a_foreign_pass_takes_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda name: Foreign(common.IdentityEliminationPass()))
    with pytest.raises(PassError, match="PORT-0203"):
        Pipeline.parse("theirs{a=1}")


def test_a_foreign_pass_must_edit_in_place(model: ir.Model) -> None:
    other = ir.from_onnx_text(MODEL)
    step = Foreign(lambda model: ir.passes.PassResult(other, modified=True))
    with pytest.raises(PassError, match="PORT-0206"):
        step.run(model, Context())


@dataclass(frozen=True)
class Fails(Pass):
    name = "fails"
    error: type[Exception] = KeyError

    def run(self, model: ir.Model, context: Context) -> int:
        raise self.error("x") if self.error is KeyError else PorterError("PORT-0999", "mine")


def test_a_failing_pass_names_those_before_it(model: ir.Model, graph_module: None) -> None:
    pipeline = Pipeline((*Pipeline.parse("clean.identity,clean.dead").passes, Fails()))
    with pytest.raises(PassError) as caught:
        pipeline.run(model, Context())
    assert caught.value.code == "PORT-0207"
    assert caught.value.where == "fails"
    assert "clean.identity, clean.dead" in caught.value.hint
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_porter_error_passes_through(model: ir.Model, graph_module: None) -> None:
    with pytest.raises(PorterError, match="PORT-0999"):
        Pipeline((Fails(error=PorterError),)).run(model, Context())


def test_steps_and_watch(model: ir.Model, graph_module: None) -> None:
    seen = []
    steps = Pipeline.parse("clean.identity,clean.dead").run(
        model, Context(), watch=lambda step, m: seen.append((step.name, len(m.graph)))
    )
    assert seen == [("clean.identity", 2), ("clean.dead", 1)]
    assert [(s.name, s.edits, s.promise) for s in steps] == [
        ("clean.identity", 1, Promise.EXACT),
        ("clean.dead", 0, Promise.EXACT),
    ]
    assert all(s.seconds >= 0 for s in steps)

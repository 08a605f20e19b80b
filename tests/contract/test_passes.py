"""What every built-in pass owes: a text form, a docstring, honest edits, and its promise about numbers."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pass, Pipeline, Promise
from porter.registry import builtin, find

NAMES = builtin()
GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.rglob("*.onnxtxt"))
SIZES = {"batch": 3, "sequence": 5, "past": 4, "total": 9, "keys": 9}
SUBJECTS = [n for n in NAMES if (GOLDEN / n.replace(".", "/")).is_dir() and not n.startswith("check.")]
# What keeps the interface and is not lossy; the others have their numbers held in tests/passes.
COMPARABLE = [p for p in CASES if p.relative_to(GOLDEN).parts[0] in ("clean", "fuse")]


def source(name: str) -> str:
    return inspect.getsource(importlib.import_module(f"porter.passes.{name}"))


def before(path: Path) -> ir.Model:
    return ir.from_onnx_text(path.read_text(encoding="utf-8").split("\n---\n")[1])


def cases(name: str) -> list[Path]:
    return sorted((GOLDEN / name.replace(".", "/")).glob("*.onnxtxt"))


@pytest.mark.parametrize("name", NAMES)
def test_text_form_reads_back(name: str) -> None:
    step = find(name)()
    assert str(step) == name
    assert Pipeline.parse(str(step)).passes == (step,)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_default_and_reads_back_when_changed(name: str) -> None:
    """An option of another value than its default is written in the text, and read from it."""
    cls = find(name)
    for option in dataclasses.fields(cls):
        assert option.default is not dataclasses.MISSING, option.name
        other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 2 + 1}.get(
            type(option.default)
        )
        if other is not None:
            step = cls(**{option.name: other(option.default)})
            assert Pipeline.parse(str(step)).passes == (step,)


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(PassError, match="PORT-0204"):
        Pipeline.parse("clean.constants{max-elements=0}")


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name: str) -> None:
    """The module says before -> after; the class and its `run` have a line of their own."""
    cls = find(name)
    module = importlib.import_module(f"porter.passes.{name}")
    assert cls.__doc__
    assert module.__doc__
    assert "->" in module.__doc__ or name.startswith("check.")
    assert isinstance(cls.promise, Promise)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_in_a_file(name: str) -> None:
    module = importlib.import_module(f"porter.passes.{name}")
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert sum(issubclass(c, Pass) for c in own) == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_pass_reads_the_targets_name(name: str) -> None:
    """Neither `target.name` nor `target.family`: a pass asks what a target can do, not what it is called."""
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Attribute) and node.attr in ("name", "family"):
            assert "target" not in ast.unparse(node.value), ast.unparse(node)


@pytest.mark.parametrize("name", NAMES)
def test_order_names_passes_that_exist(name: str) -> None:
    assert set(find(name).after) <= set(NAMES)


def test_the_order_of_every_target_is_allowed() -> None:
    from porter import target

    for name in target.names():
        known = [s for s in target.load(name).pipeline.split(",") if s.strip() in NAMES]
        Pipeline.parse(",".join(known)).check_order()


@pytest.mark.parametrize("path", CASES, ids=lambda p: str(p.relative_to(GOLDEN)))
def test_second_run_makes_no_edits(path: Path) -> None:
    pipeline = Pipeline.parse(path.read_text(encoding="utf-8").split("\n---\n")[0])
    model = before(path)
    for step in pipeline.passes:
        step.run(model, Context())
        text = onnx.printer.to_text(ir.to_proto(model))
        assert step.run(model, Context()) == 0
        assert onnx.printer.to_text(ir.to_proto(model)) == text


@pytest.mark.parametrize("name", SUBJECTS)
def test_some_case_is_edited(name: str) -> None:
    """Without this the promises below could hold of nothing."""
    pipelines = [Pipeline.parse(p.read_text(encoding="utf-8").split("\n---\n")[0]) for p in cases(name)]
    assert any(
        _edits_of_last(pipeline, before(p)) for pipeline, p in zip(pipelines, cases(name), strict=True)
    )


def _edits_of_last(pipeline: Pipeline, model: ir.Model) -> int:
    return [step.run(model, Context()) for step in pipeline.passes][-1]


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("path", COMPARABLE, ids=lambda p: str(p.relative_to(GOLDEN)))
def test_promise(path: Path, past: int, run_onnx: Callable, make_feeds: Callable, worst: Callable) -> None:
    sizes = SIZES | {"past": past, "total": past + 5, "keys": past + 5}
    if path.stem == "one_row_of_the_operator":  # ONNX Runtime runs the model before for a batch of one only
        sizes["batch"] = 1
    pipeline = Pipeline.parse(path.read_text(encoding="utf-8").split("\n---\n")[0])
    model = before(path)
    feeds = make_feeds(model, 1, **sizes)
    wanted = run_onnx(model, feeds)
    peak = peak_of(before(path), feeds, run_onnx)
    for step in pipeline.passes:
        step.run(model, Context())
    found = run_onnx(model, feeds)
    if all(step.promise is Promise.EXACT for step in pipeline.passes):
        assert all(wanted[k].tobytes() == found[k].tobytes() for k in wanted)
    else:
        assert worst(wanted, found) <= bound(model, peak, wanted)


def peak_of(model: ir.Model, feeds: dict[str, np.ndarray], run_onnx: Callable) -> float:
    """The largest finite magnitude of any float value that the model computes, masks left out."""
    floats = [
        v
        for node in model.graph
        for v in node.outputs
        if not v.is_graph_output()
        and node.op_type in ("Add", "Div", "MatMul", "Mul", "Pow", "Reciprocal", "Softmax")
    ]
    model.graph.outputs.extend(floats)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    values = run_onnx(ir.from_proto(proto), feeds).values()
    sizes = [np.abs(v.astype(np.float64)) for v in values if v.dtype.kind == "f" and v.size]
    return max([1.0, *(float(s[s < 1e9].max(initial=0)) for s in sizes)])


def bound(model: ir.Model, peak: float, wanted: dict[str, np.ndarray]) -> float:
    """How far a reordered float sum may move.

    A sum of n terms of magnitude at most m moves by at most n * u * (n * m) for the unit roundoff u when it
    is associated in another way (Higham, 4.2, to first order). n is at most 16 here: eight channels and up to
    nine keys, four channels elsewhere. A fused operator replaces three sums (scores, softmax, output), whose
    factors are at most the peak; 8 more roundings are left for the elementwise part.
    """
    half = any(v.dtype == np.float16 for v in wanted.values())
    unit, n = (2.0**-11, 4) if half else (2.0**-24, 16)
    return 3 * (n + 8) * unit * peak


def test_the_bound_would_catch_a_wrong_epsilon(
    run_onnx: Callable, make_feeds: Callable, worst: Callable
) -> None:
    """The bound is no formality: a norm whose epsilon went from 1e-5 to 1e-2 is far outside."""
    path = GOLDEN / "fuse" / "rms_norm" / "reciprocal.onnxtxt"
    model = before(path)
    feeds = make_feeds(model, 1, **SIZES)
    wanted = run_onnx(model, feeds)
    find("fuse.rms_norm")().run(model, Context())
    node = next(iter(model.graph))
    node.attributes.add(ir.AttrFloat32("epsilon", 1e-2))
    assert worst(wanted, run_onnx(model, feeds)) > 10 * bound(
        model, peak_of(before(path), feeds, run_onnx), wanted
    )

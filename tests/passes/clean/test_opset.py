"""clean.opset: what it refuses, functions, and that it reviews every operator that changed."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from porter.passes.clean import opset

from porter.context import Context
from porter.errors import PassError
from porter.registry import find


def raised(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    find("clean.opset")().run(model, Context())
    return model


@pytest.mark.parametrize(
    ("version", "types", "node"),
    [
        (12, "(float[2] x) => (float[2] y)", "y = Softmax (x)"),
        (
            13,
            "(float[1,2,3] x, float[2] s) => (float[1,2,3] y, float[2] m, float[2] v)",
            "y, m, v = BatchNormalization (x, s, s, s, s)",
        ),
        (
            18,
            "(float[1,2,3] x, float[1] s) => (float[1,2,3] y)",
            "y = GroupNormalization <num_groups: int = 1> (x, s, s)",
        ),
        (17, "(float[1,2,3,1] x) => (float[1,2,3,2] y)", "y = DFT (x)"),
        (
            11 + 4,
            "(float[1,1,4] x) => (float[1,1,2] y)",
            "y = AveragePool <kernel_shape: ints = [2], ceil_mode: int = 1> (x)",
        ),
        (18, "(float[2] x) => (float[2] y)", "y = Misspelt (x)"),
    ],
)
def test_refuses_what_changed_its_meaning(version: int, types: str, node: str) -> None:
    with pytest.raises(PassError, match="PORT-0212"):
        raised(f'<ir_version: 8, opset_import: ["" : {version}]> g {types} {{ {node} }}')


def test_every_operator_that_changed_is_reviewed() -> None:
    """A new onnx release with a new version of an operator fails here before it can be raised unseen."""
    history: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, set()).add(schema.since_version)
    changed = {
        name
        for name, versions in history.items()
        if any(opset.OLDEST < v <= opset.TARGET for v in versions)
        and min(versions) <= opset.TARGET
        and any(v < max(w for w in versions if w <= opset.TARGET) for v in versions)
    }
    refused = {"DFT", "GroupNormalization"}
    assert (
        changed - opset._UNCHANGED - opset._REDUCE - set(opset._CHANGES) - refused == {"Upsample"} & changed
    )


def test_functions_are_raised_too() -> None:
    model = raised(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]>'
        "g (float[2,3] x) => (float[2,1] y) { y = own.mean (x) }"
        '<domain: "own", opset_import: ["" : 17]> mean (x) => (y) { y = ReduceMean <axes: ints = [1]> (x) }'
    )
    (function,) = model.functions.values()
    assert function.opset_imports[""] == opset.TARGET
    assert [n.op_type for n in function] == ["Constant", "ReduceMean"]
    onnx.checker.check_model(ir.to_proto(model))


def test_a_newer_model_is_left_alone() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 13, opset_import: ["" : 25]> g (float[2] x) => (float[2] y) { y = Neg (x) }'
    )
    assert find("clean.opset")().run(model, Context()) == 0
    assert model.opset_imports[""] == 25

from __future__ import annotations

import subprocess
import sys

import decoders
import onnx.defs
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass
from porter.passes.check.support import CheckSupport

from porter.context import Context
from porter.errors import TargetError
from porter.lower.supported import OPERATORS, TYPES
from porter.pipeline import Pipeline


def check(body: str, opset: str = '"": 24') -> int:
    text = f"<ir_version: 11, opset_import: [{opset}]> g (float[n] x) => (float[n] y) {{ {body} }}"
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return CheckSupport().run(model, Context())


@pytest.mark.parametrize(
    "passes",
    [
        "quantize.rtn",
        "kv.static_cache",
        "kv.static_cache,kv.quantize",
        "kv.static_cache,kv.quantize{scheme=int4}",
    ],
)
@pytest.mark.parametrize("positions", decoders.POSITIONS)
def test_decoders_pass_and_nothing_changes(positions, passes):
    model = decoders.tiny_decoder(positions=positions)
    for step in Pipeline.parse(passes).passes:
        step.run(model, Context())
    before = ir.to_proto(model).SerializeToString()
    assert CheckSupport().run(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_one_error_names_every_operator_with_its_nodes():
    body = "a = Celu(x) b = Mish(a) c = Mish(b) d = Mish(c) e = Mish(d) y = Add(e, e)"
    with pytest.raises(TargetError) as error:
        check(body)
    assert error.value.code == "PORT-0401"
    assert error.value.exit_code == 4
    assert error.value.what == "the lowering has no Celu (1 node: a), Mish (4 nodes: b, c, d, …)"


def test_operators_of_other_domains_are_named_with_them():
    with pytest.raises(TargetError, match=r"com\.microsoft\.Gelu \(1 node: y\)"):
        check("y = com.microsoft.Gelu(x)", '"": 24, "com.microsoft": 1')


def test_subgraphs_are_looked_into():
    branch = "b () => (float[n] {0}) {{ {0} = {1}(x) }}"
    body = f"c = Constant<value = bool {{1}}>() y = If(c) <then_branch = {branch.format('t', 'Celu')}, "
    with pytest.raises(TargetError, match=r"Celu \(1 node: t\), If \(1 node: y\), Mish \(1 node: e\)"):
        check(f"{body}else_branch = {branch.format('e', 'Mish')}>")


def test_one_error_names_every_element_type():
    with pytest.raises(TargetError) as error:
        check(
            "a = Cast<to=20>(x) b = Cast<to=18>(x) c = Cast<to=18>(x) d = CastLike(a, x) y = CastLike(b, x)"
        )
    assert (error.value.code, error.value.exit_code) == ("PORT-0402", 4)
    found = "float8e4m3fnuz (2 tensors: b, c), float8e5m2fnuz (1 tensor: a)"
    assert error.value.what == f"the lowering has no tensors of {found}"


def test_the_names_are_onnx_names():
    schemas = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    assert {o for o in OPERATORS if "." not in o} <= schemas
    assert {t.name for t in ir.DataType} >= TYPES


def test_the_names_can_be_read_without_tvm():
    code = "import sys, porter.lower.supported; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

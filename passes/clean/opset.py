"""Raise the default opset to 24, so that later passes meet one form of each operator.

    ReduceMean<axes=[-1]>(x)                 opset 13 to 17
    -> ReduceMean(x, axes)                   opset 24

Between 13 and 24 most new versions only allow more types, or add an attribute or input whose absence means
what it meant before; those are listed in `_UNCHANGED`. The rest is handled here, or refused:

- Reduce* (18): `axes` moves from an attribute to an input. (ReduceSum did so at 13.)
- Split (18): without sizes, `num_outputs` must be stated.
- RoiAlign (16): `coordinate_transformation_mode` is by default `half_pixel`; the old meaning is stated.
- GridSample (20): modes `bilinear` and `bicubic` are renamed `linear` and `cubic`.
- BatchNormalization (14): extra outputs used to mean training; refused.
- DFT (20), GroupNormalization (21), and pools with `ceil_mode` (19, 22): the meaning itself changed; refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from porter.context import Context
from porter.errors import PassError
from porter.graph.structure import FOREIGN
from porter.match import attribute, words
from porter.pipeline import Pass, Promise

TARGET = 24
OLDEST = 13  # before it, Softmax and Squeeze mean something else

_UNCHANGED = words(
    "Acos Acosh Add Asin Asinh Atan Atanh Attention Bernoulli Cast CastLike Constant ConstantOfShape Conv "
    "ConvTranspose Cos Cosh CumSum DeformConv DequantizeLinear Det Div Dropout Elu Equal EyeLike Flatten "
    "GRU GlobalAveragePool GlobalLpPool GlobalMaxPool GreaterOrEqual HardSigmoid HardSwish Identity If "
    "InstanceNormalization IsInf IsNaN LSTM LeakyRelu LessOrEqual Loop LpNormalization MaxPool MaxRoiPool "
    "MaxUnpool Mish Mul Multinomial NegativeLogLikelihoodLoss OptionalGetElement OptionalHasElement PRelu "
    "Pad Pow QLinearMatMul QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike Relu Reshape Resize Round Scan ScatterElements ScatterND Selu Shape Sin Sinh Size "
    "Softplus Softsign SplitToSequence Squeeze Sub Tan ThresholdedRelu TopK Transpose Unsqueeze Where"
)
_REDUCE = frozenset(
    f"Reduce{k}" for k in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"]
)


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise the default opset of the model and its functions to 24."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, model: ir.Model, context: Context) -> int:
        """Nodes that changed form, plus one for each import raised. PassError PORT-0212 if unsound."""
        edits = 0
        for graph in (model.graph, *model.functions.values()):
            version = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", TARGET))
            if version >= TARGET:
                continue
            if version < OLDEST:
                raise _refusal(
                    f"opset {version} is older than {OLDEST}", str(graph.name), "export the model again"
                )
            edits += 1 + sum(
                _raise(node, version) for node in list(ir.traversal.RecursiveGraphIterator(graph))
            )
            graph.opset_imports.pop("ai.onnx", None)
            graph.opset_imports[""] = TARGET
        if edits:
            lowest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", TARGET)])
            model.ir_version = max(model.ir_version, lowest)
        return edits


def _refusal(what: str, where: str, hint: str = "export the model at opset 23 or newer") -> PassError:
    return PassError("PORT-0212", what, where=where, hint=hint)


def _raise(node: ir.Node, version: int) -> bool:
    """Bring one node from `version` to TARGET; whether its form changed."""
    if node.domain not in ("", "ai.onnx") or node.op_type in FOREIGN:
        return False
    node.version = None
    if not onnx.defs.has(node.op_type):
        raise _refusal(
            f"there is no standard operator {node.op_type}", str(node.name), "is its domain missing?"
        )
    newest = onnx.defs.get_schema(node.op_type, TARGET, "").since_version
    if newest <= version or node.op_type in _UNCHANGED:
        return False
    if node.op_type in _REDUCE:
        return version < 18 and _axes_to_input(node)
    change = _CHANGES.get(node.op_type)
    if change is None:
        raise _refusal(f"{node.op_type} changed its meaning after opset {version}", str(node.name))
    return change(node, version)


def _axes_to_input(node: ir.Node) -> bool:
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return False
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(axes.value, np.int64))})
    constant.outputs[0].name = f"{node.outputs[0].name}_axes"
    constant.outputs[0].dtype, constant.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(axes.value)])
    node.graph.insert_before(node, constant)  # type: ignore[union-attr]
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])
    return True


def _split(node: ir.Node, version: int) -> bool:
    if version >= 18 or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return False
    node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))
    return True


def _roi_align(node: ir.Node, version: int) -> bool:
    if version >= 16:
        return False
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))
    return True


def _grid_sample(node: ir.Node, version: int) -> bool:
    if version >= 20:
        return False
    mode = attribute(node, "mode", "bilinear")
    node.attributes.add(ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)))
    return True


def _batch_normalization(node: ir.Node, version: int) -> bool:
    if version < 14 and len(node.outputs) > 1:
        raise _refusal("this BatchNormalization is in training mode", str(node.name))
    return False


def _pool(node: ir.Node, version: int) -> bool:
    if attribute(node, "ceil_mode", 0):
        raise _refusal(f"{node.op_type} with ceil_mode changed after opset {version}", str(node.name))
    return False


_CHANGES: dict[str, Callable[[ir.Node, int], bool]] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalization,
    "GridSample": _grid_sample,
    "LpPool": _pool,
    "RoiAlign": _roi_align,
    "Split": _split,
}

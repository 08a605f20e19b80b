"""Write what other tools' quantizers and optimizers leave in standard operators.

    MatMulNBits(x, codes, scales[, zeros])
        -> MatMul(x, Transpose(DequantizeLinear<block_size>(codes', scales[, zeros'])))
    GatherBlockQuantized(codes, ids, scales) -> Gather(DequantizeLinear<block_size>(codes', scales), ids)
    GroupQueryAttention<do_rotary>(q, k, v, past_k, past_v, seqlens_k, total, cos, sin)
        -> Attention<is_causal=1>(RotaryEmbedding(q'), RotaryEmbedding(k'), v', , past_k, past_v)
    SkipSimplifiedLayerNormalization(x, skip, w)  -> RMSNormalization(Add(x, skip), w)
    QLinearMatMul(a, sa, za, b, sb, zb, sy, zy)
        -> QuantizeLinear(MatMul(DequantizeLinear(a, sa, za), DequantizeLinear(b, sb, zb)), sy, zy)

and so on for each operator in `porter.foreign.table`, where the algebra of each stands beside it. Codes are
laid out anew when somebody reads them. What a kernel does inside (`accuracy_level=4` rounds activations to
int8) is not in the model and is left out: the result is what the stored weights mean. A kernel sums in its
own order, and so do the standard operators.

Where a growing cache's `seqlens_k` says that all rows are full, as everything that porter feeds says, no
mask is left; inputs that nothing else reads (`attention_mask`, `seqlens_k`) go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.errors import PassError
from porter.foreign.editor import Editor, Later
from porter.foreign.table import CONTRIB, rewriter
from porter.match import graphs, tidy
from porter.pipeline import Pass, Promise
from porter.symbolic.symbols import write_shapes

OPSET = 24  # the first with all that is written here


@dataclass(frozen=True)
class UnderstandContrib(Pass):
    """Rewrite com.microsoft operators, and products of codes, in standard ones; `only`: those so named."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset",)

    only: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> int:
        """The number of nodes rewritten.

        Raises PassError PORT-0265 to PORT-0269 for what has no standard form.
        """
        found = [node for graph in graphs(model) for node in graph if rewriter(node) and self._wants(node)]
        if not found:
            return 0
        if model.opset_imports.get("", 0) < OPSET:
            what = f"standard forms need opset {OPSET}, and the model has {model.opset_imports.get('', 0)}"
            raise PassError("PORT-0265", what, where=found[0].op_type, hint="let clean.opset stand before")
        read = {v for v in model.graph.inputs if v.uses()}
        editors = {graph: Editor(model, graph) for graph in graphs(model)}
        left = found
        while left:
            waiting = [node for node in left if not _rewritten(editors[node.graph], node)]
            tidy(model)
            write_shapes(model)
            if len(waiting) == len(left):
                node = left[0]
                what = f"{node.op_type}: the number of axes of an input is not known"
                hint = "run ONNX shape inference before exporting it"
                raise PassError("PORT-0268", what, where=node.name or str(node.outputs[0].name), hint=hint)
            left = waiting
        _drop_inputs(model, read)
        if not any(node.domain == CONTRIB for node in model.graph.all_nodes()):
            model.opset_imports.pop(CONTRIB, None)
        return len(found)

    def _wants(self, node: ir.Node) -> bool:
        return not self.only or node.op_type in self.only


def _rewritten(edit: Editor, node: ir.Node) -> bool:
    """Rewrite one node; False when that has to wait until more shapes are known."""
    edit.node, memo = node, dict(edit.memo)
    try:
        rewriter(node)(edit)  # type: ignore[misc]
    except Later:
        edit.memo = memo  # what the attempt left behind nobody reads: it goes
        return False
    return True


def _drop_inputs(model: ir.Model, read: set[ir.Value]) -> None:
    """Remove the inputs that only what was rewritten has read."""
    for value in [v for v in model.graph.inputs if v in read and not v.uses()]:
        if not value.is_graph_output():
            model.graph.inputs.remove(value)

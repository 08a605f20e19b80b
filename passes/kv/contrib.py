"""Write attention over static caches of codes as ONNX Runtime's own GroupQueryAttention.

    k = porter.AppendCache_…(past_k, new_k, L, step_k), and v alike
    Y = Attention<is_causal=1>(Q, porter.ReadCache_…(k, L + S, step_k), porter.ReadCache_…(v, …), , , , L + S)
    ->
    y, k, v = GroupQueryAttention<k_quant_type, v_quant_type, kv_cache_bit_width>(
                  q, new_k', new_v', past_k, past_v, seqlens_k, total_sequence_length, …, k_scale, v_scale)

for schemes with static steps: `fp8`, and int8 or int4 for a tensor, head or channel, the same element for
keys and values. seqlens_k is L + S - 1, of each row; total_sequence_length the largest L + S. The
model's inputs and outputs stay what they are, but that e4m3fn codes, bytes so far, get their type, and that
int4 codes are stored as c + 8. The algebra and the operator's own limits: `porter.kvgraph.grouped`.
`clean.contrib` writes it back in standard form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.errors import PassError
from porter.kv import names
from porter.kvgraph import grouped
from porter.kvgraph.body import DOMAIN
from porter.kvgraph.graph import DONE
from porter.match import tidy
from porter.pipeline import Pass, Promise


@dataclass(frozen=True)
class WriteGroupedAttention(Pass):
    """`floats`: layers whose static caches are floats too; those that the operator cannot compute stay."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("kv.static_cache", "kv.quantize", "check.support", "clean.contrib")

    floats: bool = False

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite; the count is of layers.

        Raises PassError PORT-0283 for a scheme that the operator cannot hold, PORT-0284 for an Attention over
        such caches that it cannot compute.
        """
        if DONE in model.metadata_props:
            grouped.check(names.parse(model.metadata_props[DONE]))
        found = grouped.coded_layers(model.graph)
        for layer in found:
            if why := grouped.check_layer(layer):
                what = f"GroupQueryAttention cannot compute this attention: {why}"
                hint = "leave out --form contrib, or choose --kv int8, which needs no operator of its own"
                where = layer.attention.name or str(layer.attention.outputs[0].name)
                raise PassError("PORT-0284", what, where=where, hint=hint)
        if self.floats:
            found += [x for x in grouped.float_layers(model.graph) if not grouped.check_layer(x)]
        for layer in found:
            grouped.write(model, layer)
        if found:
            tidy(model)
            _drop_functions(model)
        return len(found)


def _drop_functions(model: ir.Model) -> None:
    """Remove the cache functions that nothing calls any more."""
    called = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [f for f in model.functions if f[0] == DOMAIN and f not in called]:
        del model.functions[identifier]
    if not any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)

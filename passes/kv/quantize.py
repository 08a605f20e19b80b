"""Keep a static KV cache in fewer bits, by a scheme of `porter.kv.names`.

    present = TensorScatter<axis=2>(past, new, past_lengths)                    past float [B,H,C,D]
    Y = Attention(Q, present, …)
    ->
    present, present_scale, … = porter.AppendCache_…(past, past_scale, …, new, past_lengths)
    Y = Attention(Q, porter.ReadCache_…(present, present_scale, …, total_lengths), …)

The buffers of the scheme (`porter.kv.layout`) become the model's inputs and outputs: codes keep the cache's
name (the usual one, where its own does not say layer and side), the others are named after it, as
`past_key_values.0.key_scale` and `present.0.key_scale`. What the two functions write and read is in
`porter.kvgraph.functions`; integers with a scale for each token and head are spelled with ONNX's own
operators instead (`porter.kvgraph.plain`), and kept floats of another type with Cast. Rotations
become products around the Attention (`porter.kvgraph.turning`), normalizers constants of the projections
before it (`porter.kvgraph.folding`), or products where they cannot. Constants are taken from the calibration
feeds. Where tags decide a token's bits, there are an input `tags` and one more buffer for all layers
(`porter.kvgraph.slots`).

A token is rounded once, when it is written or leaves the window, and is read rounded even in the step that
does it. All tokens that are fed count: a window holds what was fed last.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from porter.passes.kv.static_cache import why_not

from porter.context import Context
from porter.errors import PassError
from porter.kv import names
from porter.kv.scheme import Scheme
from porter.kvgraph import calibrate, slots
from porter.kvgraph.folding import fold
from porter.kvgraph.graph import BITS, BYTES, CAPACITY, DONE, READ, layers, name_caches
from porter.kvgraph.store import check, store
from porter.kvgraph.turning import turn
from porter.pipeline import Pass, Promise


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """`scheme`: a name such as int8 or kivi2; the other options override what it says (`porter.kv.names`):
    `key` and `value` how either is stored, as int4-g32 or a scheme's name; `recent` and `sink` the tokens
    that stay in `high` precision (-1: the scheme's own), `keep-first` and `keep-last` the layers; `rotate`
    and `normalize` as well; `scales` and `static` of both sides; `copy`, `tolerance`, `share` and `bits`;
    `layers` keys and values of each layer by itself, as int8/int4:fp16/int8.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    after: ClassVar[tuple[str, ...]] = ("kv.static_cache",)

    scheme: str = "int8"
    key: str = ""
    value: str = ""
    recent: int = -1
    sink: int = -1
    keep_first: int = -1
    keep_last: int = -1
    high: str = ""
    rotate: bool = False
    normalize: bool = False
    scales: str = ""
    static: str = ""
    copy: str = ""
    tolerance: str = ""
    share: str = ""
    bits: str = ""
    layers: str = ""

    def __post_init__(self) -> None:
        self.parsed()  # what cannot be read is refused at once

    def parsed(self) -> Scheme:
        """The scheme with its options. Raises PassError PORT-0270, PORT-0271."""
        words = [self.scheme]
        for option in dataclasses.fields(self)[1:]:
            name, value = option.name.replace("_", "-"), getattr(self, option.name)
            if value is True:
                words.append(name)
            elif value is not False and value not in ("", -1):  # 0 is a number of tokens
                words.append(f"{name}={value}")
        return names.parse(" ".join(words))

    @property
    def calibrates(self) -> bool:
        """Whether the scheme has constants from calibration."""
        return calibrate.wanted(self.parsed())

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite every float cache; the count is of caches. Raises PassError PORT-0262 to PORT-0264,
        PORT-0272 to PORT-0274."""
        if DONE in model.metadata_props:
            return 0
        found, scheme = layers(model.graph), self.parsed()
        if not found:
            what, declined = "the model has no static key and value cache to quantize", why_not(model)
            hint = (
                f"kv.static_cache declined: {declined}" if declined else "kv.static_cache must stand before"
            )
            raise PassError("PORT-0263", what, hint=hint)
        scheme = slots.resolved(scheme, found)
        schemes = [scheme.layer(i, len(found)) for i in range(len(found))]
        slots.check(model.graph, schemes)
        for layer, each in zip(found, schemes, strict=True):
            for side in ("key", "value"):
                check(layer, side, each)
        folds = [fold(layer) if each.normalize else None for layer, each in zip(found, schemes, strict=True)]
        made = calibrate.constants(model, found, schemes, folds, context.calibration)
        pasts = [s.inputs[0] for layer in found for s in (layer.key, layer.value)]
        values, capacity = sum(math.prod(list(v.shape)[1:]) for v in pasts), pasts[0].shape[2]
        name_caches(model.graph, found)
        more = next((m.more for m in made if m.more is not None), None)
        shared = slots.assign(model, found, schemes, more)
        buffers = {*pasts, *([] if shared is None else [shared.producer().inputs[0]])}
        others = {*model.graph.inputs} - buffers
        edits = 0
        for layer, each, constants, folded in zip(found, schemes, made, folds, strict=True):
            turn(layer, each, constants, folded)
            edits += store(model, layer, each, constants, shared)
        held = [v for v in model.graph.inputs if v not in others]
        total, copies = (sum(map(_bytes, v)) for v in (held, [v for v in held if v.name.endswith("_copy")]))
        about = {
            DONE: names.text_of(scheme),
            CAPACITY: capacity,
            BYTES: total,
            BITS: f"{8 * total / values:.4f}",
            **({READ: f"{8 * (total - copies) / values:.4f}"} if copies else {}),
        }
        model.metadata_props.update({name: str(value) for name, value in about.items()})
        return edits


def _bytes(value: ir.Value) -> int:
    """Of a batch of 1."""
    return math.prod(list(value.shape)[1:]) * value.dtype.numpy().itemsize

"""Templates of a chip: kernels of blocks, in the numerics of its profile."""

from __future__ import annotations

from dataclasses import replace

from porter.lower.blocks import attention, pairs, vector
from porter.lower.blocks.operand import Operand
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import VECTOR_STEP, Profile
from porter.lower.blocks.unit import Unit
from porter.lower.kernels.attention import Attention
from porter.lower.kernels.define import Dim, tirx
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.naming import format_name, format_of
from porter.lower.kernels.products import Activation

_WHOLE = Operand("int32")
_INTEGERS = Unit(_WHOLE, _WHOLE, VECTOR_STEP, "int32")  # sums that a model asks for as integers: exact


class Chip:
    """Implements `porter.lower.importer.templates.Templates` for a target that is no host."""

    keeps_codes, reads_caches = True, False
    gather = staticmethod(vector.rows)
    matrices = staticmethod(vector.matrices)
    rms_norm = staticmethod(vector.rms_norm)
    rotary = staticmethod(vector.rotary)
    append = staticmethod(vector.append)

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def layout(self, layout: Layout) -> Layout:
        """Row by row."""
        return replace(layout, lanes=1)

    def matmul(self, layout: Layout) -> tirx.PrimFunc:
        """See Templates."""
        return Product(layout, self.profile.unit(format_name(layout))).kernel()

    def products(self, layout: Layout, x: Activation, out: str = "float32") -> tirx.PrimFunc:
        """See Templates. Codes are multiplied as they are where the unit takes both, and no zero points."""
        if out == "int32":
            return Product(layout, _INTEGERS, x, out=out).kernel()
        plain = not (x.zero or layout.zero)
        unit = self.profile.unit(format_name(layout), format_of(x.codec) if plain else "")
        if unit.x.coded and x.codec == "fp32":
            unit = self.profile.unit(format_name(layout))
        return Product(layout, unit, x).kernel()

    def stacked(self, layout: Layout, *, picked: bool, shared: bool) -> tirx.PrimFunc:
        """See Templates."""
        unit = self.profile.unit(format_name(layout))
        return Product(layout, unit, stack="picked" if picked else "all", shared=shared).kernel()

    def attention(self, spec: Attention) -> tirx.PrimFunc:
        """See Templates."""
        keys, values = (self.profile.unit(format_of(side.label)) for side in (spec.key, spec.value))
        return attention.attention(spec, keys, values)

    def pairs(self, m: Dim, k: Dim, n: Dim) -> tirx.PrimFunc:
        """See Templates."""
        return pairs.pairs(m, k, n, self.profile.unit("fp32"))

"""Templates of a chip: kernels of blocks, in the numerics of its profile."""

from __future__ import annotations

from dataclasses import replace

from porter.errors import TargetError
from porter.lower.blocks import append, attention, caches, pairs, vector
from porter.lower.blocks.operand import MANTISSA, Operand
from porter.lower.blocks.product import Product
from porter.lower.blocks.profile import VECTOR_STEP, Profile
from porter.lower.blocks.unit import Unit
from porter.lower.importer.templates import Append
from porter.lower.kernels.attention import Attention
from porter.lower.kernels.define import Dim, tirx
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.naming import format_name, format_of
from porter.lower.kernels.products import Activation
from porter.lower.kernels.stored import Cache, Readable, Source, Stored

_WHOLE = Operand("int32")
_INTEGERS = Unit(_WHOLE, _WHOLE, VECTOR_STEP, "int32")  # sums that a model asks for as integers: exact


class Chip:
    """Implements `porter.lower.importer.templates.Templates` for a target that is no host."""

    keeps_codes, rare_caches = True, False
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
        keys, values = (self._of_cache(side) for side in (spec.key, spec.value))
        return attention.attention(spec, keys, values)

    def _of_cache(self, side: Source) -> Unit:
        """What multiplies a side. Codes become float32. Raises TargetError PORT-0432."""
        if not isinstance(side, Cache):
            self._checked(side)
        form = format_of(side.label)
        return self.profile.unit(form if form in MANTISSA else "fp32")

    def appends(self, spec: Stored, heads: int) -> list[Append]:
        """See Templates: codes are made of what the window holds, so that comes last."""
        self._checked(spec)
        suffixes = [suffix for suffix, _, _ in spec.planned(heads)]
        kept = [suffix for suffix in suffixes if suffix in append.KEPT]
        made = []
        if coded := tuple(suffix for suffix in suffixes if suffix not in kept):
            held = tuple(suffix for suffix in kept if suffix == "_window")
            made.append(Append("encode", lambda: append.encode(spec, heads), coded, held))
        made += [
            Append(f"keep{s}", lambda s=s: append.keep(spec, heads, s), (s,), beside=False) for s in kept
        ]
        return made

    def read(self, spec: Readable, heads: int) -> tirx.PrimFunc:
        """See Templates."""
        return caches.read(self._checked(spec), heads)

    @staticmethod
    def _checked(spec: Source) -> Stored:
        if type(spec) is not Stored or spec.side.residual:
            what = f"a cache of {spec.label} has a lowering for family host alone"
            raise TargetError("PORT-0432", what, hint="choose another scheme with --kv")
        return spec

    def pairs(self, m: Dim, k: Dim, n: Dim) -> tirx.PrimFunc:
        """See Templates."""
        return pairs.pairs(m, k, n, self.profile.unit("fp32"))

"""Profile: which unit of a target multiplies what, and in which operands."""

from __future__ import annotations

from dataclasses import dataclass

from porter.errors import TargetError
from porter.lower.blocks.operand import MANTISSA, Operand, codec_of
from porter.lower.blocks.unit import Unit
from porter.lower.kernels.codecs import CODECS
from porter.target import Placement, TargetSpec, placement
from porter.target.placing import base, known

VECTOR_STEP = 32  # products that lanes of a vector unit sum before they are added to the total


@dataclass(frozen=True)
class Profile:
    """The numeric profile of `spec` as kernels execute it."""

    spec: TargetSpec

    def placed(self, weights: str, activations: str = "") -> Placement:
        """Where numbers of a format (`int4-g32`) meet activations of a format ("": floats).

        Raises TargetError PORT-0430 when the target says nothing of them.
        """
        found = placement(self.spec, weights, activations) if base(weights) in known() else None
        if found is None:
            what = f"{self.spec.name} has no place for products with {weights}"
            what += f" and activations in {activations}" if activations else ""
            hint = "name the format, or its class, under numerics.widened or numerics.emulated"
            raise TargetError("PORT-0430", what, hint=hint)
        return found

    def unit(self, weights: str, activations: str = "") -> Unit:
        """What multiplies them. Raises TargetError PORT-0430."""
        place = self.placed(weights, activations)
        right = self._operand(place.format)
        left = right
        if right.coded and codec_of(activations) != codec_of(right.form):
            left = self._operand(activations or "bf16")  # of two native formats that mix
        step, accumulator = VECTOR_STEP, "fp32"
        if place.unit == "matrix":
            assert self.spec.matrix is not None
            native = self.spec.matrix.formats[place.format]
            step, accumulator = int(native.step.value[2]), str(native.accumulator.value)
        both = left.integer and right.integer
        if not both and accumulator == "int32":
            accumulator = "fp32"
        return Unit(left, right, step, accumulator, place.format if place.unit == "matrix" else "")

    def _operand(self, form: str) -> Operand:
        rules = self.spec.numerics
        assert rules is not None
        assert form in MANTISSA or codec_of(form) in CODECS, form  # no activations come in blocks
        return Operand(form, bool(rules.saturates.value), str(rules.subnormals.value) == "flush")

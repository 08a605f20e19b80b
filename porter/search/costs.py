"""Costs: what an option takes, in bytes, and in a decode step's time as the estimate has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from porter.errors import OptionError, SpecError
from porter.estimate.model import Attention, Linear, Model
from porter.estimate.timing import roofline
from porter.estimate.work import Step, Stored, Work, kernels, product
from porter.kv import layout
from porter.kv.scheme import Scheme, Side
from porter.target import TargetSpec
from porter.weights.select import FLOATS, Matrix

MINIMIZE = ("bytes", "time", "dollars")
_WIDE = dict(zip(FLOATS, ("fp32", "fp16", "bf16"), strict=True))
_KEPT = 16.0  # bits of a cached number that nothing is said of


@dataclass(frozen=True)
class Costs:
    """What is minimized on `spec`, at `batch` rows with caches of `context` tokens.

    `model`: sizes of what is between the weights; None where nothing is asked of time, and seconds are nan
    then. `activations` is the format that linear layers multiply in ("": floats).
    """

    spec: TargetSpec
    minimize: str
    model: Model | None
    context: int
    batch: int = 1
    activations: str = ""

    def __post_init__(self) -> None:
        if self.minimize == "dollars" and self.spec.price is None:
            what = f"{self.spec.name} has no price, so dollars cannot be minimized"
            raise OptionError(
                "PORT-0633", what, where="--minimize", hint="take --minimize time, or another target"
            )

    def of(self, size: float, seconds: float) -> float:
        """The one of bytes and seconds that is minimized; dollars are seconds at a price."""
        return size if self.minimize == "bytes" else seconds

    def weight(self, matrix: Matrix, name: str, size: float) -> float:
        """Seconds of the product with a matrix in a format of `size` bytes ("": as it is); inf where the
        target does not multiply it, 0 for a table that tokens pick from."""
        if self.model is None:
            return math.nan
        if matrix.roles == {"embedding"}:
            return 0.0
        *lead, rows, columns = matrix.shape
        experts = math.prod(lead)
        wide = _WIDE[matrix.tensor.dtype]
        linear = Linear(matrix.name, columns, rows, 1, "whole", experts, experts, name or wide,
                        self.activations if name else "", math.ceil(size / experts))  # fmt: skip
        return self._product(linear)

    def _product(self, linear: Linear) -> float:
        try:
            work = product(linear, self.spec, self.batch, Stored("", "", _KEPT, 1))
        except SpecError:
            return math.inf
        return roofline(work, self.spec).seconds

    def side(self, side: Side, heads: int, size: int) -> tuple[float, float]:
        """Bytes of a layer's keys (or values) in all rows, and seconds of half the attention over such, with
        the products that rotate them there and back."""
        planned = layout.buffers(Scheme(side, side), size, heads, self.context, self.batch)
        held = float(sum(b.nbytes for b in planned if b.name.split("_")[0] == "key"))
        bits = 8 * held / (self.batch * heads * size * self.context)
        if self.model is None:
            return held, math.nan
        turned = 2 * self._product(
            Linear("rotation", size, size, 1, "whole", weights="fp32", stored=4 * size**2)
        )
        return held, self._attention(bits, heads, size) / 2 + (turned if side.rotate else 0.0)

    def _attention(self, bits: float, heads: int, size: int) -> float:
        assert self.model is not None
        one = Attention(1, max(heads, self.model.attention[0].heads), heads, size, size)
        found = self._kernels(replace(self.model, attention=(one,)), bits)
        return sum(roofline(w, self.spec).seconds for w in found if w.kernel == "decode-attention")

    def rest(self, bits: float | None) -> float:
        """Seconds of a decode step without products; `bits` of a cached number, None: without attention."""
        assert self.model is not None
        found = self._kernels(self.model, bits or _KEPT)
        left_out = {"gemm"} | ({"decode-attention"} if bits is None else set())
        return sum(w.count * roofline(w, self.spec).seconds for w in found if w.kernel not in left_out)

    def _kernels(self, model: Model, bits: float) -> list[Work]:
        wide = Stored("bf16", "", bits, 1)
        return kernels(model, self.spec, Step(self.batch, 1, self.context - 1), wide)

    def shown(self, cost: float) -> tuple[float, str]:
        """A cost with its unit: dollars are those of a million tokens."""
        if self.minimize == "dollars":
            assert self.spec.price is not None
            return cost / self.batch * float(self.spec.price.per_hour.value) / 3600 * 1e6, "USD/Mtok"
        return cost, "bytes" if self.minimize == "bytes" else "s"

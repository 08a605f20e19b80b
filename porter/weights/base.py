"""WeightPass: what passes that store weights in a format have in common; each adds how codes are chosen."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.formats import Encoded, Format
from porter.pipeline import Pass, Promise
from porter.weights import lazy, select, store

SCALES = ("fp32", "fp16", "bf16")
Plan = Iterable[tuple[select.Matrix, Callable[[], Encoded]]]


@dataclass(frozen=True)
class WeightPass(Pass):
    """`format` is a name that `porter.formats.parse` reads, or a family (`fp8`) that the target knows.

    `skip` and `only` list roles and patterns of names (see `porter.weights.select.choose`). `scales` is the
    type that scales are stored in, where the format leaves it open: fp32 (the default), fp16 or bf16.

    A method writes `encode`; one that needs the layers in order, or activations, overrides `plan`.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "fuse.matmul")

    format: str = "int8"
    skip: tuple[str, ...] = ("embedding", "head")
    only: tuple[str, ...] = ()
    scales: str = ""

    def __post_init__(self) -> None:
        for option in ("skip", "only"):  # `skip=` skips nothing
            object.__setattr__(self, option, tuple(word for word in getattr(self, option) if word))
        if self.scales and self.scales not in SCALES:
            raise ValueError(f"scales are {', '.join(SCALES)}, not {self.scales!r}")

    def run(self, model: ir.Model, context: Context) -> int:
        """Store weights in the format; the count is of weights. Raises PassError PORT-0250 to PORT-0257."""
        form = self.form(context)
        if form.element == "fp32":
            return 0
        chosen = select.choose(model.graph, self.skip, self.only, str(self))
        for matrix in chosen:
            select.refuse_not_finite(matrix)
        shelf = lazy.Shelf()
        for matrix, compute in self.plan(model, form, chosen, context):
            store.replace(model, matrix, form, compute, shelf)
        store.put_parts_together(model.graph)
        return len(chosen)

    def form(self, context: Context) -> Format:
        """The format: the target's flavour, with the scales that were asked for and its MX rounding."""
        target = context.target
        form = formats.parse(target.flavour(self.format) if target else self.format)
        if target and form.scale == "e8m0":
            form = dataclasses.replace(form, mx=target.mx)
        if self.scales and form.scale != self.scales:
            if form.scale != "fp32":
                what = f"the scales of {form.name} are {form.scale}, and cannot be {self.scales}"
                raise PassError("PORT-0257", what, where=str(self), hint="leave `scales` out")
            form = dataclasses.replace(form, scale=self.scales)
        return form

    def plan(self, model: ir.Model, form: Format, chosen: list[select.Matrix], context: Context) -> Plan:
        """Each chosen matrix and what computes its Encoded: here `encode`, when somebody reads the weight.

        A matrix is replaced in the model as soon as it is given out, so the next one may be computed from
        what the model has become.
        """
        return ((matrix, _Rounded(self, form, matrix)) for matrix in chosen)

    @abc.abstractmethod
    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """float32 [N,K] or [E,N,K] of the weight called `name`, rows its output channels, in the format."""


@dataclass(frozen=True)
class _Rounded:
    """Reads a weight and encodes it, whenever it is called; its pages leave memory again."""

    method: WeightPass
    form: Format
    matrix: select.Matrix

    def __call__(self) -> Encoded:
        try:
            return self.method.encode(self.form, self.matrix.read(), self.matrix.name)
        finally:
            self.matrix.forget()

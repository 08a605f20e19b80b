"""Placed: what became of a class of tensors on a target, as the report says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from porter.target.placing import How

Tensors = Literal["weights", "activations", "cache", "tensors", "rest"]
_COUNTED = {
    "weights": ("matrix", "matrices"),
    "activations": ("product", "products"),
    "cache": ("side", "sides"),
    "tensors": ("product", "products"),
}


@dataclass(frozen=True)
class Placed:
    """`count` tensors of a class in `format` are multiplied as `to` on the `unit`.

    `weights` are counted by matrices, `activations` by the products that they go into, `cache` by keys and
    values of a layer; `tensors` are products of two that are computed at run time, and `rest` is all that is
    no product. `beside` is the format that they are multiplied with, where that decides.
    """

    tensors: Tensors
    format: str
    count: int
    how: How
    to: str
    unit: Literal["matrix", "vector"]
    beside: str = ""

    def __str__(self) -> str:
        """One line: "int4-g32 weights (112 matrices): widened to bf16 on the matrix unit"."""
        where = f"on the {self.unit} unit"
        if self.tensors == "rest":
            return f"norms, softmax, rotations and all else: {self.to} {where}"
        done = {"native": "native", "widened": f"widened to {self.to}", "emulated": f"emulated in {self.to}"}
        beside = f" beside {self.beside}" if self.beside else ""
        named = _COUNTED[self.tensors][self.count != 1]
        return f"{self.format} {self.tensors}{beside} ({self.count} {named}): {done[self.how]} {where}"

    def to_json(self) -> dict[str, object]:
        """The fields, and the line as `text`."""
        fields = ("tensors", "format", "count", "how", "to", "unit", "beside")
        return {name: getattr(self, name) for name in fields} | {"text": str(self)}

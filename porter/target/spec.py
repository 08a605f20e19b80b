"""TargetSpec: all that porter knows of a target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from porter.target import checks
from porter.target.costs import Efficiency, Kernel, Power, Price
from porter.target.figure import Figure, Part
from porter.target.limits import Limits
from porter.target.links import Link
from porter.target.machine import Dma, Level, Matrix, Vector
from porter.target.numerics import Numerics


class TargetSpec(Part):
    """One target as its .toml describes it; unknown keys are refused, and parts that contradict each other.

    `pipeline` is a pipeline text with the two slots `{weights}` and `{kv}`; `weights` and `kv` list the
    storage formats that the target's kernels read directly, weights by their names without the suffix that
    says what shares a scale (`int4` stands for `int4-g32` and `int4-b128`); `activations` the formats
    that they multiply in; `aliases` map a short name (`fp8`) to the target's flavour.

    `memory` goes from the outermost level inwards. What a family does not need may be absent.
    """

    name: str
    family: Literal["host", "tile", "simt"]
    summary: str
    pipeline: str
    weights: tuple[str, ...]
    kv: tuple[str, ...]
    activations: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    tvm: dict[str, str | int]
    sources: dict[str, str] = Field(default_factory=dict)
    memory: dict[str, Level] = Field(default_factory=dict)
    matrix: Matrix | None = None
    vector: Vector | None = None
    dma: dict[str, Dma] = Field(default_factory=dict)
    links: dict[str, Link] = Field(default_factory=dict)
    limits: Limits = Limits()
    numerics: Numerics | None = None
    efficiency: dict[Kernel, dict[str, Efficiency]] = Field(default_factory=dict)
    price: Price | None = None
    power: Power | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        checks.check(self, dict(figures(self)))
        return self

    @property
    def mx(self) -> str:
        """How the target rounds the shared exponents of MX formats (see `porter.formats.Format`)."""
        return str(self.numerics.mx.value) if self.numerics and self.numerics.mx else "floor"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON, under the keys of the file; quantities in SI units."""
        return self.model_dump(mode="json", by_alias=True)

    def flavour(self, name: str) -> str:
        """The full name of a format or scheme: `fp8` -> `fp8-e4m3fn`."""
        return self.aliases.get(name, name)

    def reads(self, name: str) -> bool:
        """Whether the kernels read weights in a format, in full: `int4-g64`, where `weights` lists `int4`."""
        base = re.fullmatch(r"(.+?)(-(r|t|[gb][1-9]\d*))?", name)
        return base is not None and (name in self.weights or base[1] in self.weights)


def figures(part: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure of a spec or a part of it, with the path of its key: `memory.hbm.size`."""
    if isinstance(part, Figure):
        yield path, part
        return
    if isinstance(part, BaseModel):
        entries = [(f.alias or name, getattr(part, name)) for name, f in type(part).model_fields.items()]
    elif isinstance(part, dict):
        entries = list(part.items())
    elif isinstance(part, tuple):
        entries = [(str(i), entry) for i, entry in enumerate(part)]
    else:
        return
    for key, entry in entries:
        yield from figures(entry, f"{path}.{key}" if path else key)

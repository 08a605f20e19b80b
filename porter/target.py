"""TargetSpec: a target's data file, read and checked."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from porter.errors import SpecError


class TargetSpec(BaseModel):
    """One target as its .toml describes it; unknown keys are refused.

    `pipeline` is a pipeline text with the two slots `{weights}` and `{kv}`; `weights` and `kv` list the
    storage formats that the target's kernels read directly, weights by their names without the suffix that
    says what shares a scale (`int4` stands for `int4-g32` and `int4-b128`); `activations` the formats
    that they multiply in; `aliases` map a short name (`fp8`) to the
    target's flavour. `mx` is how the target rounds the shared exponents of MX formats (see
    `porter.formats.Format`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    family: Literal["host"]
    summary: str
    pipeline: str
    weights: tuple[str, ...]
    kv: tuple[str, ...]
    activations: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    mx: Literal["floor", "ceil", "larger"] = "floor"
    tvm: dict[str, str | int]

    def flavour(self, name: str) -> str:
        """The full name of a format or scheme: `fp8` -> `fp8-e4m3fn`."""
        return self.aliases.get(name, name)

    def reads(self, name: str) -> bool:
        """Whether the kernels read weights in a format, in full: `int4-g64`, where `weights` lists `int4`."""
        base = re.fullmatch(r"(.+?)(-(r|t|[gb][1-9]\d*))?", name)
        return base is not None and (name in self.weights or base[1] in self.weights)


def names() -> list[str]:
    """Names of the built-in targets, sorted."""
    folder = resources.files("porter.targets")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str) -> TargetSpec:
    """A built-in target by name, or any by the path of its .toml.

    Raises SpecError PORT-0301 when there is none, PORT-0302 when the file cannot be read as a target.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise SpecError("PORT-0301", "there is no such target file", where=name)
        text = path.read_text(encoding="utf-8")
    elif name in names():
        text = (resources.files("porter.targets") / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise SpecError(
            "PORT-0301", f"there is no target named {name!r}", hint=f"known: {', '.join(names())}"
        )
    try:
        return TargetSpec(**tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}" if first else str(error)
        raise SpecError("PORT-0302", f"not a target description: {what}", where=name) from error

"""Every key of a target's file, from the code that reads it."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from pydantic import BaseModel

from porter.target.figure import Figure
from porter.target.spec import TargetSpec


def keys(model: type[BaseModel] = TargetSpec, path: str = "") -> Iterator[tuple[str, bool]]:
    """Path of each key, NAME where the file chooses a name, and whether its table cannot do without it."""
    for name, field in model.model_fields.items():
        whole = f"{path}.{field.alias or name}".lstrip(".")
        yield from _of(field.annotation, whole, field.is_required())


def _of(kind: object, path: str, required: bool) -> Iterator[tuple[str, bool]]:
    inner = typing.get_args(kind)
    models = [i for i in (*inner, kind) if isinstance(i, type) and issubclass(i, BaseModel)]
    if typing.get_origin(kind) is dict:
        yield from _of(inner[1], f"{path}.NAME", required)
    elif typing.get_origin(kind) is tuple and inner:
        yield from _of(inner[0], path, required)
    elif models and models[0] is not Figure:
        yield from keys(models[0], path)
    else:
        yield path, required

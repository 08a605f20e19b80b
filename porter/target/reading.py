"""Reading a target's file: the built-in ones by name, anyone's own by its path."""

from __future__ import annotations

import difflib
import functools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from porter.errors import SpecError
from porter.target.spec import TargetSpec

# What a file that is silent has from host: the kernels are the same templates on every target.
SHARED = ("pipeline", "weights", "kv")


def names() -> list[str]:
    """Names of the built-in targets, sorted."""
    folder = resources.files("porter.targets")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str) -> TargetSpec:
    """A built-in target by name, or any by the path of its .toml.

    Raises SpecError PORT-0301 when there is none, PORT-0302 when the file is not TOML, lacks a key or has one
    too many, PORT-0303 for a unit, PORT-0304 for a value that no chip has, PORT-0305 for a figure without a
    source, PORT-0306 when parts contradict each other, PORT-0307 for formats that do not go together.
    """
    return _parsed(text(name), name) if name.endswith(".toml") else _built_in(name)


def text(name: str) -> bytes:
    """The file of a target, as it is. Raises SpecError PORT-0301 when there is none."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise SpecError("PORT-0301", "there is no such target file", where=name)
        return Path(name).read_bytes()
    if name not in names():
        raise SpecError(
            "PORT-0301", f"there is no target named {name!r}", hint=f"known: {', '.join(names())}"
        )
    return (resources.files("porter.targets") / f"{name}.toml").read_bytes()


@functools.cache
def _built_in(name: str) -> TargetSpec:
    return _parsed(text(name), name)


def _parsed(written: bytes, where: str) -> TargetSpec:
    try:
        keys = tomllib.loads(written.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError("PORT-0302", f"not a target description: {error}", where=where) from error
    return checked(keys, where)


def checked(keys: dict[str, Any], where: str) -> TargetSpec:
    """A target from what its file says; `where` is the file. Raises what `load` does, PORT-0301 aside."""
    if keys.get("family") in ("tile", "simt"):
        host = _built_in("host")
        keys = {key: getattr(host, key) for key in SHARED} | keys
    try:
        return TargetSpec.model_validate(keys)
    except ValidationError as error:
        raise _refused(error.errors()[0], where) from error


def _refused(fault: Any, where: str) -> SpecError:
    """The first fault that pydantic found, as one of ours."""
    path = ".".join(map(str, fault["loc"]))
    if fault["type"].startswith("PORT-"):
        what = f"{path}: {fault['msg']}" if path else fault["msg"]
        return SpecError(fault["type"], what, where=where)
    words = {"extra_forbidden": "there is no such key", "missing": "the key is missing"}
    what, hint = words.get(fault["type"], fault["msg"].lower()), ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _keys(), 1)
        hint = f"is {near[0]} meant?" if near else "docs/targets.md lists them"
    return SpecError("PORT-0302", f"not a target description: {path}: {what}", where=where, hint=hint)


@functools.cache
def _keys() -> list[str]:
    """Every key of a target's file, wherever it stands."""
    schema = TargetSpec.model_json_schema(by_alias=True)
    parts = [schema, *schema["$defs"].values()]
    return sorted({key for part in parts for key in part.get("properties", {})})

"""Find a pass by name: built in, from an installed package's entry point, or from a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from porter.errors import PassError
from porter.pipeline import Foreign, Pass

GROUP = "porter.passes"


def builtin() -> list[str]:
    """Names of the passes that come with porter, sorted."""
    import porter.passes

    found = pkgutil.walk_packages(porter.passes.__path__, "porter.passes.")
    return sorted(m.name.removeprefix("porter.passes.") for m in found if not m.ispkg)


def find(name: str) -> type[Pass] | Pass:
    """The pass class named `name`, or a ready Foreign pass.

    `name` is a built-in (`fuse.rms_norm`), a name of the entry-point group `porter.passes`, or a path ending
    in .py. Raises PassError PORT-0201 when there is none, PORT-0208 when two things claim the name or a file
    holds no pass.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    outside = [e for e in entry_points(group=GROUP) if e.name == name]
    if len(outside) + (name in builtin()) > 1:
        raise PassError("PORT-0208", f"more than one installed package offers a pass named {name!r}")
    if outside:
        return _as_pass(outside[0].load(), name)
    if name in builtin():
        return _only_pass(importlib.import_module(f"porter.passes.{name}"), name)
    raise PassError("PORT-0201", f"there is no pass named {name!r}", hint="porter passes lists them")


def describe() -> list[dict[str, str]]:
    """Every pass that can be named: built-in ones, then those of installed packages."""
    names = builtin() + sorted({e.name for e in entry_points(group=GROUP)} - set(builtin()))
    rows = []
    for name in names:
        found = find(name)
        doc = (inspect.getmodule(found) or found).__doc__ if inspect.isclass(found) else ""
        rows.append(
            {"name": name, "promise": found.promise.value, "what": (doc or "").strip().split("\n")[0]}
        )
    return rows


def _from_file(path: Path) -> type[Pass]:
    if not path.is_file():
        raise PassError("PORT-0201", "there is no such pass file", where=str(path))
    cls = _only_pass(_load(path), str(path))
    cls.name = str(path)  # so that the pipeline text reads back
    return cls


def _load(path: Path) -> ModuleType:
    """The file as a module, once for each content: so the text of a pipeline reads back to equal passes."""
    digest = hashlib.sha256(bytes(path.resolve()) + path.read_bytes()).hexdigest()
    name = f"porter_pass_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PassError("PORT-0208", f"the file does not load: {error}", where=str(path)) from error
    return module


def _only_pass(module: object, name: str) -> type[Pass]:
    """The one Pass class that a module itself defines."""
    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Pass) and c.__module__ == module.__name__ and not inspect.isabstract(c)  # type: ignore[attr-defined]
    ]
    if len(own) != 1:
        raise PassError("PORT-0208", f"wanted one pass, found {len(own)}", where=name)
    return own[0]


def _as_pass(thing: object, name: str) -> type[Pass] | Pass:
    if inspect.isclass(thing) and issubclass(thing, Pass):
        thing.name = name
        return thing
    if inspect.isclass(thing):
        thing = thing()
    if callable(thing):
        return Foreign(thing, name)
    raise PassError("PORT-0208", "the entry point is neither a pass nor a function", where=name)

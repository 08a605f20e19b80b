"""Pass, Promise and Pipeline: what a pass is, its text form, and how a list of them runs."""

from __future__ import annotations

import abc
import dataclasses
import enum
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.errors import PassError, PorterError


class Promise(enum.Enum):
    """What a pass says about the outputs of the model that it changed."""

    EXACT = "exact"  # the same bits
    REORDERS = "reorders"  # float sums and products associate differently; bounded by the summation length
    LOSSY = "lossy"  # information is thrown away; the drift report measures it


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A frozen value whose fields are its options (snake_case here, kebab-case in text).

    Subclasses set `promise` and implement `run`. `name` is where the class lives:
    `porter/passes/fuse/rms_norm.py` is `fuse.rms_norm`. `after` names passes that must stand before this one
    when both are in a pipeline. `calibrates` says that it reads `context.calibration`, which is empty else.
    """

    name: ClassVar[str] = ""
    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ()
    calibrates: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.removeprefix("porter.passes.")

    @abc.abstractmethod
    def run(self, model: ir.Model, context: Context) -> int:
        """Edit `model` in place and return how many edits were made (0: nothing to do)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The onnx_ir entry: the same run, with an empty context."""
        return ir.passes.PassResult(model, modified=bool(self.run(model, Context())))

    def __str__(self) -> str:
        """The text form, which `Pipeline.parse` reads back to an equal pass."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        options = " ".join(_option_text(f.name, getattr(self, f.name)) for f in changed)
        return f"{self.name}{{{options}}}" if options else self.name


@dataclass(frozen=True)
class Foreign(Pass):
    """Any onnx_ir pass (or function from model to PassResult) as a step of a porter pipeline."""

    promise: ClassVar[Promise] = Promise.LOSSY  # nothing is known of it
    inner: Callable[[ir.Model], ir.passes.PassResult] = None  # type: ignore[assignment]
    label: str = ""  # the name that found it

    def run(self, model: ir.Model, context: Context) -> int:
        """Run it; 1 when it says that it changed the model, which it must do in place."""
        result = self.inner(model)
        if result.model is not model:
            raise PassError(
                "PORT-0206", "the pass returned another model instead of editing in place", where=str(self)
            )
        return int(result.modified)

    def __str__(self) -> str:
        return self.label or f"{type(self.inner).__module__}:{type(self.inner).__name__}"


@dataclass(frozen=True)
class Step:
    """What one pass did: its text form, its edits and its time."""

    name: str
    promise: Promise
    edits: int
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; `Pipeline.parse(str(p)) == p`."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `name{key=value flag},./mine.py{x=1},…`. Raises PassError PORT-0201 to PORT-0205."""
        from porter.registry import find  # the registry imports passes, which import this module

        pipeline = cls(tuple(_build(find(name), options, item) for item, name, options in _items(text)))
        pipeline.check_order()
        return pipeline

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def check_order(self) -> None:
        """Raise PassError PORT-0205 when a pass stands before one that it declares itself `after`."""
        names = [p.name for p in self.passes]
        for i, p in enumerate(self.passes):
            for other in p.after:
                if other in names and other not in names[:i]:
                    raise PassError("PORT-0205", f"{p.name} must stand after {other}", where=str(self))

    def run(
        self,
        model: ir.Model,
        context: Context,
        watch: Callable[[Pass, ir.Model], None] = lambda step, model: None,
    ) -> list[Step]:
        """Run each pass on `model` in place and check the graph after it; `watch` is called before each.

        A PorterError passes through; any other failure becomes PassError PORT-0207 and names the passes
        before it.
        """
        from porter import graph

        steps: list[Step] = []
        for p in self.passes:
            watch(p, model)
            start = time.perf_counter()
            try:
                edits = p.run(model, context)
                graph.verify(model)
            except PorterError:
                raise
            except Exception as error:
                done = ", ".join(s.name for s in steps) or "none"
                what = f"the pass failed: {type(error).__name__}: {error}"
                raise PassError("PORT-0207", what, where=str(p), hint=f"passes before it: {done}") from error
            steps.append(Step(str(p), p.promise, edits, time.perf_counter() - start))
        return steps


_ITEM = re.compile(r"\s*(?P<name>[^\s,{}]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?:,|$)")


def _items(text: str) -> Iterator[tuple[str, str, str]]:
    """Split a pipeline text into (item, name, options); empty items are skipped so that slots may vanish."""
    at = 0
    while at < len(text):
        if not text[at:].strip(" \t\r\n,"):
            return
        while text[at] in " \t\r\n,":
            at += 1
        match = _ITEM.match(text, at)
        if not match:
            raise PassError(
                "PORT-0202", f"cannot read the pipeline at {text[at:][:40]!r}", where=f"character {at}"
            )
        at = match.end()
        yield match.group(0).strip(" \t\r\n,"), match["name"], match["options"] or ""


def _build(cls: type[Pass] | Pass, options: str, item: str) -> Pass:
    """A pass from its class and option text; a Foreign pass takes no options."""
    if isinstance(cls, Pass):
        if options:
            raise PassError("PORT-0203", "a pass from outside porter takes no options", where=item)
        return cls
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for word in options.split():
        key, equals, raw = word.partition("=")
        field = fields.get(key.replace("-", "_"))
        if field is None:
            known = ", ".join(f.replace("_", "-") for f in fields) or "none"
            raise PassError(
                "PORT-0203", f"{cls.name} has no option {key!r}", where=item, hint=f"it has: {known}"
            )
        values[field.name] = _value(field, raw if equals else None, item)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise PassError("PORT-0204", str(error), where=item) from error


def _value(field: dataclasses.Field, raw: str | None, item: str) -> object:
    """Read one option by the type of its field's annotation: bool, int, float, str or a tuple of str."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    try:
        if kind == "bool":
            return {None: True, "true": True, "false": False}[raw]
        if raw is None:
            raise ValueError
        if kind.startswith("tuple"):
            return tuple(raw.split("+"))
        return {"int": int, "float": float, "str": str}[kind](raw)
    except (KeyError, ValueError):
        key = field.name.replace("_", "-")
        raise PassError("PORT-0204", f"option {key!r} wants {kind}, not {raw!r}", where=item) from None


def _option_text(name: str, value: object) -> str:
    key = name.replace("_", "-")
    if value is True:
        return key
    if isinstance(value, tuple):
        return f"{key}={'+'.join(map(str, value))}"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"

"""Cell: one conversion, measured. Plain data goes in and comes out, so that it runs anywhere."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from porter import bundle, target
from porter.bundle import Bundle
from porter.convert import convert
from porter.errors import EnvironmentFailure, PorterError
from porter.estimate import Options as Asked
from porter.estimate import compare
from porter.options import Options
from porter.report.report import DriftReport
from porter.sweep.shared import file_digest, made_by
from porter.sweep.store import digest
from porter.sweep.work import said

Found = dict[str, Any]
"""What a cell gave: JSON values. `status` is done, refused (the target or the model does not allow it: the
same whenever it is tried) or failed (the machine's doing, or a fault in porter); `again`: worth trying."""


def measure(task: dict[str, Any]) -> Found:
    """Do the conversion that a task (`porter.sweep.matrix`) describes, in its folder `work`; never raises.

    Of a cell that is done: `drift` (total, passes, lowering, each with its kind), `bytes` of the lowered
    program's weights and of a cache for one row of `tokens`, and `estimate` or why there is none.
    """
    started = time.perf_counter()
    out = Path(task["work"]) / task["name"]
    try:
        _check_the_same(task)
        report = convert(Path(task["source"]), out, Options(**task["options"], repeat=task["repeat"]))
        if report.model["sha256"] != task["inputs"]["source"]:
            raise _another("the model")
        found = {"status": "done", **_figures(report, out), **_estimate(out, task)}
        if task["keep"]:
            _move(out, Path(task["keep"]))
    except EnvironmentFailure as error:
        found = {"status": "failed", "error": said(error), "again": True}
    except PorterError as error:
        found = {"status": "refused", "error": said(error)}
    except MemoryError:
        lacking = EnvironmentFailure("PORT-0645", "there was not enough memory", hint="take fewer --workers")
        found = {"status": "failed", "error": said(lacking), "again": True}
    except Exception as error:  # a fault in one cell must not end the others
        first = (str(error).strip() or "no message").splitlines()[0]
        bug = PorterError("PORT-0999", f"a bug in porter: {type(error).__name__}: {first}")
        found = {"status": "failed", "error": said(bug)}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {**found, "seconds": time.perf_counter() - started}


def _check_the_same(task: dict[str, Any]) -> None:
    """Refuse to answer for files or a porter other than those that the cell is named after: they may have
    changed since the sweep began, or be others on this machine."""
    inputs, options = task["inputs"], task["options"]
    if made_by() != inputs["versions"]:
        raise _another("porter, or a package that it needs,")
    if digest(target.load(options["target"]).to_dict()) != inputs["target"]:
        raise _another("the target's file")
    if not Path(options["data"]).is_file() or file_digest(Path(options["data"])) != inputs["data"]:
        raise _another("the text that drift is measured on")


def _another(what: str) -> EnvironmentFailure:
    hint = "leave files alone while a sweep runs, and give all machines the same"
    return EnvironmentFailure("PORT-0644", f"{what} is not what the sweep began with", hint=hint)


def _figures(report: DriftReport, out: Path) -> Found:
    opened = Bundle.open(out)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    caches = {c.past for c in opened.decoder.caches}
    held = [b for b in plan["buffers"] if b["name"] in caches]
    rows = [plan["bounds"].get(b["shape"][0]) or int(b["shape"][0]) for b in held]
    cache = sum(b["bytes"] // n for b, n in zip(held, rows, strict=True))
    size = {"weights": int(report.memory["weights of the port"].value), "kv": cache}
    drift = {name: {**d.to_json(), "kind": report.kind(name)} for name, d in report.drift.items()}
    return {"drift": drift, "bytes": {**size, "tokens": opened.decoder.capacity}}


def _estimate(out: Path, task: dict[str, Any]) -> Found:
    """What `porter estimate` says of the bundle, or why it says nothing."""
    name = task["options"]["target"]
    try:
        model, lowered = compare.load_model(out, None), compare.load_lowered(out)
        found = compare.compare(model, name, Asked(**task["inputs"]["estimate"]), lowered)
    except PorterError as error:
        return {"estimate": None, "no_estimate": said(error)}
    entry = found.estimates[0].to_dict()
    entry["program"] = None  # kernel by kernel; a record is small
    return {"estimate": entry, "no_estimate": None}


def _move(made: Path, to: Path) -> None:
    """The bundle, where bundles are kept."""
    to.parent.mkdir(exist_ok=True)
    with bundle.writing(to) as folder:
        folder.rmdir()
        made.rename(folder)

"""What an export's check found of a file, kept beside it: the drift between PyTorch and ONNX, for reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from porter import graph
from porter.drift.measures import Drift

SCHEMA = "porter.export/1"


def name(model: Path) -> str:
    """The name of the file beside `model`."""
    return f"{model.stem}.export.json"


def write(model: Path, drift: Drift) -> None:
    """Keep `drift` beside `model`, with the digest of what it was measured on."""
    found = {"schema": SCHEMA, "sha256": graph.digest(model), "drift": drift.to_json()}
    model.with_name(name(model)).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(model: Path, digest: str) -> Drift | None:
    """The drift that is kept beside `model`; None where there is none, or none of a file of that `digest`."""
    try:
        found = json.loads(model.with_name(name(model)).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or found["sha256"] != digest:
            return None
        known = {f.name for f in dataclasses.fields(Drift)}
        values = {k: None if v is None else float(v) for k, v in found["drift"].items() if k in known}
        return Drift(**values | {"tokens": int(values["tokens"] or 0)})
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None  # nobody promised one

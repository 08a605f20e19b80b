"""Shared: what all cells of a sweep have in common, made once: texts, digests, versions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import porter
from porter import graph, passes
from porter.convert import versions
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import RANDOM, SINGLE, Runnable, feeds_for
from porter.errors import OptionError
from porter.evidence import gather
from porter.options import Options
from porter.sweep.store import Store

CONTEXT = 4096  # tokens at which a step is timed, of a model that does not say how many it was made for


@dataclass(frozen=True)
class Shared:
    """The model `source` with its digest, and what it is measured on: `data` is a file of texts or tokens,
    `about` says what these are. `context`: tokens that the model was made for."""

    source: Path
    sha256: str
    data: str
    data_sha256: str
    about: Mapping[str, object]
    calibration_sha256: str
    context: int
    versions: Mapping[str, str]


def share(source: Path, data: str, calibration: str, seed: int, store: Store) -> Shared:
    """Read the model, and have it write texts unless the user gave some: once for all cells, and once for all
    runs in the same folder. They are long enough to fill a cache, whatever a cell does with its own, so that
    cells can be compared.

    Raises what reading the model and the data does, and OptionError PORT-0807 for tokens that it has not.
    """
    source, sha256, found = source.absolute(), graph.digest(source), made_by()
    model = graph.load(source)
    graph.check_finite(model)
    evidence = gather(source, model, Options(data=data, seed=seed), 0, SINGLE)
    reference = evidence.reference
    reference.runner  # noqa: B018 (a model that cannot be run is refused before any work)
    if evidence.feeds:
        feeds, file = evidence.feeds, Path(data).absolute()
    else:
        inputs = {"source": sha256, "data": data, "seed": seed, "versions": found}
        file = store.texts(inputs)
        feeds = _read(file, seed) or _written(file, reference, data, seed, store)
    feeds.check(reference.vocabulary)
    calibrated = _calibration_digest(calibration) if calibration not in ("", RANDOM) else calibration
    context = min(CONTEXT, reference.decoder.context or CONTEXT)
    return Shared(source, sha256, str(file), file_digest(file), feeds.to_json(), calibrated, context, found)


def _written(file: Path, reference: Runnable, data: str, seed: int, store: Store) -> TokenFeeds:
    """Texts of the model's own, or random tokens, in the file from now on."""
    feeds = feeds_for(reference, data, seed, full=True)
    store.write(file, {feeds.kind: [tokens.tolist() for tokens in feeds.sequences]})
    read = _read(file, seed)
    assert read is not None
    return read


def _read(file: Path, seed: int) -> TokenFeeds | None:
    """What `_written` wrote: an object with the kind of texts as its only key; None where there is none."""
    try:
        ((kind, sequences),) = json.loads(file.read_text(encoding="utf-8")).items()
        return TokenFeeds(tuple(np.asarray(t, np.int64) for t in sequences), kind, file.name, seed)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _calibration_digest(name: str) -> str:
    try:
        return file_digest(Path(name))
    except OSError as error:
        raise OptionError("PORT-0804", f"cannot read the feeds: {error.strerror}", where=name) from error


@functools.cache
def made_by() -> dict[str, str]:
    """The versions of porter and of what it needs, and the sha256 of its code and passes: between two
    releases they change under one version."""
    found = hashlib.sha256()
    for package in (porter, passes):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{file.relative_to(folder)} {file_digest(file)}\n".encode())
    return {**versions(), "code": found.hexdigest()}


def file_digest(path: Path) -> str:
    """sha256, in hex, of a file's bytes; raises OSError as reading it does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

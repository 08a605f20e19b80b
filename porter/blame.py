"""blame: which node made the drift of a port, or of one runnable model against another."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from porter import decoder, graph
from porter.bundle import Bundle
from porter.drift import feeds as feeding
from porter.drift.blame import sides, verdict
from porter.drift.blame.blame import Stage, Suspect, blame, total
from porter.drift.blame.repro import write
from porter.drift.blame.sides import Side
from porter.drift.measure import RANDOM, Runnable
from porter.errors import OptionError, PorterError
from porter.evidence import standard

PREFILL, SECOND, SINGLE = 32, 12, 4  # tokens of a text: in one piece, in one after it, one by one
ROWS = 4  # texts
TOP = 6  # nodes that are tried by substitution

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Blamed:
    """What was found: `stages` in the order of the port; `drift` of the last candidate against the first
    reference, in nats per token (`unit`); `suspects` of all stages, the worst first; `texts` what was fed."""

    reference: str
    candidate: str
    stages: tuple[Stage, ...]
    drift: float
    unit: str
    suspects: tuple[Suspect, ...]
    texts: dict[str, object]
    repro: Path | None = None

    @property
    def verdict(self) -> str:
        """One line."""
        return verdict.line(self.stages, self.suspects, self.drift, self.unit)

    def nodes(self) -> list[dict[str, object]]:
        """A report's `nodes`: the worst first, without those that are exact."""
        return verdict.nodes(self.suspects)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: docs/blame.md says what they are."""
        return verdict.document(self)


def blame_bundle(path: Path, reference: Path | None = None, **options: object) -> Blamed:
    """Blame in the bundle `path`: its passes against `reference`, and its lowering against its passes.

    Without `reference` it is the file that the bundle was made from, where the bundle's report tells and the
    file still is what it was; else only the lowering is looked at. Raises what opening and running them
    does, and OptionError PORT-0612 for what is no bundle.
    """
    if not path.is_dir():
        raise OptionError("PORT-0612", "blame takes a bundle", where=str(path),
                          hint="porter diff A B --blame compares any two models")  # fmt: skip
    return run(reference or source(path), path, **options)  # type: ignore[arg-type]


def note(path: Path, found: Blamed) -> None:
    """Write the nodes into the report of the bundle `path`, if it has one and the folder can be written."""
    file = path / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        report["nodes"] = found.nodes()
        file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, TypeError):
        return  # blame is what was asked for; the report is a courtesy


def source(path: Path) -> Path | None:
    """The file that a bundle was made from, if it is still there as it was."""
    manifest = Bundle.open(path).manifest
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        words = shlex.split(str(report.get("repeat", "")))
    except (OSError, ValueError):
        return None
    wanted = manifest.get("source", {}).get("sha256")
    for word in words:
        file = Path(word)
        if file.suffix == ".onnx" and file.is_file():
            try:
                if graph.digest(file) == wanted:
                    return file
            except PorterError:
                continue
    return None


def run(
    a: Path | None,
    b: Path,
    *,
    data: str = "",
    seed: int = 0,
    samples: int = ROWS,
    top: int = TOP,
    out: Path | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> Blamed:
    """Blame in `b` against `a`, each an ONNX file or a bundle; without `a`, in the bundle `b`'s lowering.

    `samples` texts run side by side. The worst node's repro is written to the folder `out`. Raises what
    opening, reading and running them does.
    """
    progress("load", 0.0)
    candidates = opened(b)
    first = opened(a)[-1] if a else candidates.pop(0)
    progress("feeds", 0.0)
    steps, texts = steps_of(a or b, data, seed, samples)
    stages, reference = [], first
    for candidate in candidates:
        name = "lowering" if candidate.lowered else "passes"
        stages.append(
            blame(name, reference, candidate, steps, top, lambda f, name=name: progress(f"blame {name}", f))
        )
        reference = candidate
    unit = "nats per token" if first.decoder.cache != "none" else "of the signal's power"
    drift = stages[0].drift if len(stages) == 1 else total(first, candidates[-1], steps)
    suspects = _with_kernels(verdict.ranked(stages, drift), candidates[-1])
    found = Blamed(str(first.name), b.name, tuple(stages), drift, unit, tuple(suspects), texts)
    if out is not None and suspects:
        progress("repro", 0.0)
        at = next(i for i, stage in enumerate(stages) if stage.name == suspects[0].stage)
        write(out, suspects[0], stages[at], [first, *candidates][at], candidates[at], steps)
        found = replace(found, repro=out)
    return found


def _with_kernels(suspects: list[Suspect], last: Side) -> list[Suspect]:
    """Nodes of a bundle's model with the kernels that they became."""
    return [
        s if s.site.kernel else replace(s, site=replace(s.site, kernel=last.kernels.get(s.site.name, "")))
        for s in suspects
    ]


def opened(path: Path) -> list[Side]:
    """What can be compared of a path: an ONNX model; of a bundle its model, and the lowered program."""
    if not path.is_dir():
        model = standard(graph.load(path))
        return [sides.onnx(path.name, model, decoder.recognise(model))]
    bundle = Bundle.open(path)
    model = standard(graph.load(bundle.model))
    meaning = decoder.recognise(model)
    return [
        sides.onnx(f"{path.name}/{bundle.model.name}", model, meaning),
        sides.program(path.name, path, model, bundle.decoder),
    ]


def steps_of(path: Path, data: str, seed: int, samples: int) -> tuple[list[np.ndarray], dict[str, object]]:
    """Tokens to feed, int64 [rows, n] for each step: some at once, some more on top of them, some one by one;
    and what they are. A user's text, else what the model at `path` writes; an encoder gets random tokens."""
    model = Runnable.of(path)
    length = PREFILL + SECOND + SINGLE + 1
    longest = min((n for n in (model.decoder.context, model.decoder.capacity) if n), default=length)
    length = min(length, longest)
    if data and data != RANDOM:
        texts = feeding.from_file(Path(data), model.words)
    elif data == RANDOM or model.decoder.cache == "none":
        texts = feeding.random_tokens(
            model.vocabulary, count=samples, length=length, seed=seed, bos=model.bos
        )
    else:
        texts = feeding.self_generated(
            model.session, bos=model.bos or 0, length=length, count=samples, seed=seed
        )
    texts.check(model.vocabulary)
    pieces = [t[at : at + length] for t in texts.sequences for at in range(0, len(t), length)]
    pieces = sorted(pieces, key=len, reverse=True)[:samples]
    tokens = np.stack([p[: len(pieces[-1])] for p in pieces])
    facts = texts.to_json() | {"rows": len(tokens), "tokens": int(tokens.size)}
    return cut(tokens, whole=model.decoder.cache == "none"), facts


def cut(tokens: np.ndarray, *, whole: bool) -> list[np.ndarray]:
    """The steps of tokens, int64 [rows, n]."""
    if whole:
        return [tokens]
    n = tokens.shape[1]
    single = min(SINGLE, n - 1)
    second = min(SECOND, (n - single) // 2)
    first = n - single - second
    ends = [first, first + second, *range(first + second + 1, n + 1)]
    return [tokens[:, a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]

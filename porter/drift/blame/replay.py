"""Run a repro: `python -m porter.drift.blame.replay FOLDER`. It fails (1) while the piece is off."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from porter.drift.blame.judge import FLOAT32
from porter.drift.blame.measure import Noise
from porter.drift.blame.repro import ARGUMENTS, EXPECTED, FACTS, INPUTS, LIBRARY, PIECE
from porter.run.reference import ReferenceRunner


def replay(folder: Path) -> dict[str, float]:
    """SQNR in dB of the piece in ONNX Runtime, and of a lowered one's kernel, against what is expected."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    expected = np.load(folder / EXPECTED)["expected"]
    runner = ReferenceRunner(folder / PIECE)
    with np.load(folder / INPUTS) as stored:
        inputs = {n: _typed(stored[n], runner.inputs[n].dtype) for n in runner.inputs}
    found = {"onnx": _db(expected, runner.run(inputs)[facts["value"]], slots=facts["slots"])}
    if "kernel" in facts:
        from porter.run.watched import call

        with np.load(folder / ARGUMENTS) as stored:
            arguments = [stored[f"arr_{i}"] for i in range(len(stored.files))]
        made = call(folder / LIBRARY, facts["kernel"], arguments)[facts["argument"]]
        found["kernel"] = _db(expected, made, slots=False)
    return found


def _typed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """numpy keeps types of others as bytes."""
    return array.view(dtype) if array.dtype.kind == "V" else array


def _db(expected: np.ndarray, made: np.ndarray, *, slots: bool) -> float:
    if slots:
        made = made[:, :, : expected.shape[2]]
    noise = Noise()
    noise.add(expected, made, 1)
    return noise.db


def main(arguments: list[str]) -> int:
    """Print what came out."""
    if len(arguments) != 1:
        print("usage: python -m porter.drift.blame.replay FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    found = replay(folder)
    for what, db in found.items():
        print(f"{facts['op']} {facts['node']}, {what}: {db:.1f} dB against the reference")
    return int(min(found.values()) < FLOAT32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

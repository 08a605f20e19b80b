"""Planted faults and what blame says of them: python benchmarks/blame.py FOLDER [NAME…]

FOLDER/NAME/model.onnx are exported decoders. For each, a row a fault, as `docs/benchmarks.md` has them; then
the seeds of twenty texts at which an unfaulted port is blamed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import blamed
import faults

from porter.blame import steps_of
from porter.drift.blame.blame import blame

LOWERED = (faults.ACCUMULATOR, "stale slot", "causal offset", "epsilon")
SEEDS = 20


def main(folder: Path, names: list[str]) -> None:
    """Print the tables."""
    for name in names or sorted(p.parent.name for p in folder.glob("*/model.onnx")):
        path = folder / name / "model.onnx"
        steps, started = steps_of(path, "", 0, 4)[0], time.perf_counter()
        print(f"\n{name}\n\n| fault | named first | node | by | local dB | usual dB | share | drift |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for fault in faults.FAULTS:
            print(blamed.planted(path, fault, steps).line, flush=True)
        with tempfile.TemporaryDirectory() as beside:
            for i, fault in enumerate(LOWERED):
                outcome = blamed.planted_lowered(path, fault, steps, Path(beside) / str(i))
                print(outcome.line.replace("| ", "| kernel: ", 1), flush=True)
        for port in ("int4", "fp8"):
            print(
                f"\nwithout a fault, {port}: blamed at seeds {unfaulted(path, port)} of {SEEDS}", flush=True
            )
        print(f"{time.perf_counter() - started:.0f} s")


def unfaulted(path: Path, port: str) -> list[int]:
    """The seeds at which a node stands out."""
    source, model = blamed.ported(path, port)
    a, b = blamed.side("source", source), blamed.side("port", model)
    found = []
    for seed in range(SEEDS):
        stage = blame("passes", a, b, steps_of(path, "", seed, 4)[0], 0)
        found += [seed] if any(s.kind == "spike" for s in stage.suspects) else []
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

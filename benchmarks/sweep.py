"""A sweep of 5 targets x 6 weight formats x 4 KV schemes: how long it takes, and what a kill loses.

python benchmarks/sweep.py [--model FILE.onnx] [--work FOLDER] [--corner] [--workers N] [--no-ray]

Without --model, samples/stories260k is exported. First the sweep runs in processes, is killed (SIGKILL) when
half of the cells are done, and is begun again; then it runs through a local Ray cluster into another folder.
Printed: wall times, records that the kill changed or lost, how many cells were under way, and cells that
came out differently through Ray. --corner sweeps 2 x 2 x 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
AXES = {
    "targets": ("maia-200", "h100", "tpu-v6e", "trainium2", "a100"),
    "weights": ("fp32", "int4", "fp8", "int8", "bf16", "mxfp4"),
    "kv": ("fp32", "int8", "fp8", "kivi2"),
}


def command(model: Path, out: Path, given: argparse.Namespace, *more: str) -> list[str]:
    """The sweep, as a command line."""
    count = 2 if given.corner else None
    axes = [f"--{axis}={','.join(values[:count])}" for axis, values in AXES.items()]
    workers = [f"--workers={given.workers}"] if given.workers else []
    return [
        sys.executable,
        "-m",
        "porter",
        "sweep",
        str(model),
        "-o",
        str(out),
        "--json",
        *axes,
        *workers,
        *more,
    ]


def records(out: Path) -> dict[str, bytes]:
    """What is kept, by cell."""
    return {f.stem: f.read_bytes() for f in (out / "cells").glob("[!.]*.json")}


def run(arguments: list[str]) -> tuple[dict[str, Any], float]:
    """The sweep's document, and how long it took."""
    started = time.perf_counter()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(done.returncode)
    return json.loads(done.stdout), time.perf_counter() - started


def killed(arguments: list[str], out: Path, cells: int) -> float:
    """Run it until so many cells are done, kill it, and say how long that took."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(records(out)) < cells:
        time.sleep(0.1)
    process.kill()
    process.wait()
    return time.perf_counter() - started


def say(document: dict[str, Any], name: str, seconds: float) -> None:
    """Wall time and the cells' own."""
    took = [c["seconds"] for c in document["cells"] if c["status"] == "done"]
    share = f"{statistics.mean(took):.1f} s a cell ({min(took):.1f} to {max(took):.1f})"
    print(f"{name}: {document['counts']}, {seconds:.0f} s in all, {share} [measured]", flush=True)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Cells whose figures are not the same."""
    figures = ("status", "drift", "bytes", "estimate", "error")
    rows = [
        {(c["target"], c["weights"], c["kv"]): [c[f] for f in figures] for c in d["cells"]}
        for d in (one, other)
    ]
    return [" ".join(cell) for cell in rows[0] if rows[0][cell] != rows[1].get(cell)]


def measure(model: Path, work: Path, given: argparse.Namespace) -> None:
    """Both ways."""
    total = 8 if given.corner else 120
    out = work / "processes"
    first = killed(command(model, out, given), out, total // 2)
    kept = records(out)
    document, rest = run(command(model, out, given))
    after = records(out)
    lost = [name for name, text in kept.items() if after.get(name) != text]
    print(f"killed after {first:.0f} s with {len(kept)} records; begun again: {rest:.0f} s [measured]")
    print(f"records changed or lost by the kill: {len(lost)}; used again: {document['counts']['reused']}")
    workers = given.workers or len(os.sched_getaffinity(0))
    print(f"begun and thrown away: at most {workers} cells, those under way")
    say(document, "in processes", first + rest)
    if given.ray:
        other, seconds = run(command(model, work / "ray", given, "--ray", "local"))
        say(other, "through Ray", seconds)
        print(f"cells that differ: {differing(document, other) or 'none'}")


def main() -> None:
    """Export the model if need be, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--corner", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        model = given.model or work / "stories260k.onnx"
        if not model.exists():
            from porter.export import export

            export(str(ROOT / "samples" / "stories260k"), model)
        measure(model, work, given)


if __name__ == "__main__":
    main()

"""Sweeps in tests: a chip whose cells are cheap to make, and workers that do as they are told."""

from __future__ import annotations

import os
import signal
import time
from importlib import resources
from pathlib import Path
from typing import Any

# Added to the file of host: conversions take a second or two, and there are estimates.
_PRICED = """
[sources]
T = "a test"
[memory.dram]
scope = "chip"
managed = "hardware"
size = { value = "64 GB", published = "T" }
bandwidth = { value = "4 MB/s", published = "T" }
[memory.registers]
scope = "core"
managed = "software"
count = { value = 1, published = "T" }
size = { value = "1 MB", published = "T" }
[matrix]
units = { value = 1, published = "T" }
clock = { value = "1 GHz", published = "T" }
reads = "dram"
accumulates = "registers"
[matrix.formats.fp32]
rate = { value = "1 TFLOP/s", published = "T" }
step = { value = [4, 4, 4], published = "T" }
accumulator = { value = "fp32", published = "T" }
[matrix.formats.bf16]
rate = { value = "1 TFLOP/s", published = "T" }
step = { value = [4, 4, 4], published = "T" }
accumulator = { value = "fp32", published = "T" }
[numerics]
rounding = { value = "nearest-even", published = "T" }
saturates = { value = true, published = "T" }
subnormals = { value = "keep", published = "T" }
[numerics.widened]
int = { value = "bf16", published = "T" }
[price]
per-hour = { value = "%s USD/h", published = "T" }
terms = "on-demand"
basis = "a test"
date = 2026-11-22
"""


def chip(folder: Path, name: str = "priced", dollars: float = 0.5) -> Path:
    """The file of a target that is host under another name, with a memory and a price."""
    host = (resources.files("porter.targets") / "host.toml").read_text("utf-8")
    file = folder / f"{name}.toml"
    file.write_text(host.replace('name = "host"', f'name = "{name}"') + _PRICED % dollars)
    return file


def quick(task: dict[str, Any]) -> dict[str, Any]:
    """A cell that takes a moment; its drift and speed follow from its name, so that each time is like the
    other."""
    time.sleep(0.05)
    number = int(task["name"][-4:], 16)
    drift = {"kl_mean": number / 65536, "top1": 0.9, "tokens": 64, "kind": "measured"}
    estimate = {
        "fits": True,
        "chips": 1,
        "tokens_per_s": 1e3,
        "usd_per_mtok": 1 + number % 7,
        "kind": "estimated",
    }
    size = {"weights": number, "kv": 1, "tokens": 64}
    every = dict.fromkeys(("total", "passes", "lowering"), drift)
    found = {"drift": every, "bytes": size, "estimate": estimate, "no_estimate": None}
    return {"status": "done", **found, "seconds": 0.05, "pid": os.getpid()}


def dies_once(task: dict[str, Any]) -> dict[str, Any]:
    """As `quick`, but the worker of a cell in int8 is killed the first time, of one in int4 each time."""
    weights = task["options"]["weights"]
    mark = Path(task["source"]).parent / f"{task['name']}.died"
    if weights == "int4" or (weights == "int8" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(task)


def real_but_dies_once(task: dict[str, Any]) -> dict[str, Any]:
    """As the real thing, but the worker of a cell in int8 is killed the first time."""
    mark = Path(task["source"]).parent / f"{task['name']}.died"
    if task["options"]["weights"] == "int8" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    from porter.sweep.cell import measure  # here, so that workers that need no porter start at once

    return measure(task)


def lacking_once(task: dict[str, Any]) -> dict[str, Any]:
    """As `quick`, but the first time says that the machine had no room."""
    mark = Path(task["source"]).parent / f"{task['name']}.lacked"
    if mark.exists():
        return quick(task)
    mark.touch()
    error = {"code": "PORT-0901", "what": "the disk is full", "where": "", "hint": ""}
    return {"status": "failed", "error": error, "again": True, "seconds": 0.0}


def slow(task: dict[str, Any]) -> dict[str, Any]:
    """As `quick`, but cells in int8 never end. The process says which it is."""
    pids = Path(task["source"]).parent / "pids"
    pids.mkdir(exist_ok=True)
    (pids / str(os.getpid())).touch()
    if task["options"]["weights"] == "int8":
        time.sleep(600)
    return quick(task)


def speaks(task: dict[str, Any]) -> dict[str, Any]:
    """As `quick`, but it prints, and its answer has the threads that it was given."""
    print("a line that nobody asked for", flush=True)
    os.system("echo another")
    return {**quick(task), "threads": {n: os.environ[n] for n in os.environ if n.endswith("_THREADS")}}

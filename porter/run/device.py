"""DeviceRunner: a lowered program on an accelerator, whatever drives it; weights and caches stay there.

A machine (`porter.run.webgpu`, `porter.run.cuda`) offers buffers, kernels and a way to launch them in order;
all else, what a plan says and how numpy's arrays become what is stored, is here.
"""

from __future__ import annotations

import base64
import itertools
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from porter.context import Feeds
from porter.errors import BundleError
from porter.run import fitting
from porter.run.protocol import TensorSpec
from porter.run.trees import evaluate

RECORDS = 8  # programs with all sizes filled in that are kept: a prefill, a decode, for some sessions
LEAST = 16  # bytes of a buffer: none may be empty


@dataclass(frozen=True)
class Kernel:
    """A kernel of the plan: `writes` of its buffers, types of its `scalars`, threads of a `block`."""

    name: str
    source: str
    block: tuple[int, int, int]
    writes: tuple[bool, ...]
    scalars: tuple[str, ...]


@dataclass(frozen=True)
class Binding:
    """A part of a machine's buffer."""

    buffer: Any
    offset: int
    size: int


@dataclass(frozen=True)
class Step:
    """A launch with all sizes filled in."""

    kernel: Kernel
    bindings: tuple[Binding, ...]
    scalars: tuple[int, ...]
    grid: tuple[int, int, int]


class Machine(Protocol):
    """What a kind of accelerator offers; `name` is the device's own."""

    name: str

    def allocate(self, size: int) -> Any:
        """A buffer of so many bytes."""

    def write(self, buffer: Any, data: np.ndarray, offset: int = 0) -> None:
        """Copy bytes to a buffer."""

    def read(self, buffer: Any, size: int) -> np.ndarray:
        """The first bytes of a buffer, uint8 [size]."""

    def record(self, steps: Sequence[Step]) -> Any:
        """Steps made ready to be run again and again."""

    def run(self, record: Any) -> None:
        """Launch the steps, each after what came before it."""


class Resident:
    """An input that a program overwrites, on the device; `np.asarray` copies it from there."""

    def __init__(
        self, machine: Machine, buffer: Any, spec: TensorSpec, shape: tuple[int, ...], stored: str
    ) -> None:
        self.buffer, self.dtype, self.shape = buffer, spec.dtype, shape
        self._machine, self._stored = machine, stored

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = fetched(self._machine, self.buffer, self._stored, self.dtype, self.shape)
        return array if dtype is None else array.astype(dtype)


class DeviceRunner:
    """Runs a bundle's folder on a machine. Implements Runner.

    What an output overwrites stays on the device: it comes back as an array-like that is copied when numpy
    asks for it, and fed again costs nothing. Raises BundleError PORT-0501 when the program cannot be loaded,
    OptionError PORT-0502 for feeds that do not fit.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        self._machine = machine
        try:
            self._plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            self._kernels = _kernels(folder, self._plan["kernels"])
            self._fixed = self._constants() | self._weights(folder / "lib" / "weights.bin")
        except (OSError, ValueError, KeyError) as error:
            what = f"the program cannot be loaded: {error}"
            raise BundleError("PORT-0501", what, where=str(folder), hint="convert the model again") from error
        plan = self._plan
        self.inputs = {i["name"]: _spec(i) for i in plan["inputs"]}
        self.outputs = {o["name"]: _spec(o) for o in plan["outputs"]}
        self.in_place: dict[str, str] = plan["in_place"]
        self.bounds: dict[str, int] = plan["bounds"]
        self.machine = machine.name
        self._own: dict[Any, tuple[Any, int]] = {}  # buffers that grow, by storage's number or tensor's name
        self._records: dict[Any, Any] = {}

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name; those that overwrite an input stay on the device."""
        fitting.check(feeds, self.inputs, self.bounds)
        written = set(self.in_place.values())
        places = [id(feeds[n]) if np.prod(feeds[n].shape) else None for n in self.inputs]
        fitting.check_apart(list(self.inputs), places, written)
        symbols = {s: int(feeds[n].shape[axis]) for s, (n, axis) in self._plan["symbols"].items()}
        held = {n: self._resident(n, feeds[n]) for n in self.inputs if n in written}
        for name in self.inputs:
            if name not in written:
                array = converted(np.asarray(feeds[name]), self._plan["tensors"][name]["stored"])
                self._machine.write(self._grown(name, array.nbytes), array)
        self._machine.run(self._recorded(symbols, {n: r.buffer for n, r in held.items()}))
        return {
            name: held[self.in_place[name]] if name in self.in_place else self._output(name, result, symbols)
            for name, result in zip(self.outputs, self._plan["results"], strict=True)
        }

    def _resident(self, name: str, array: Any) -> Resident:
        if isinstance(array, Resident) and array._machine is self._machine:
            return array
        stored = self._plan["tensors"][name]["stored"]
        data = converted(np.asarray(array), stored)
        buffer = self._machine.allocate(max(LEAST, data.nbytes))
        self._machine.write(buffer, data)
        return Resident(self._machine, buffer, self.inputs[name], tuple(array.shape), stored)

    def _output(self, name: str, result: str, symbols: dict[str, int]) -> np.ndarray:
        tensor = self._plan["tensors"][result]
        shape = tuple(evaluate(d, symbols) for d in tensor["shape"])
        buffer = self._bound(result, symbols, {}).buffer
        return fetched(self._machine, buffer, tensor["stored"], self.outputs[name].dtype, shape)

    def _recorded(self, symbols: dict[str, int], residents: dict[str, Any]) -> Any:
        """All launches with sizes and buffers filled in, kept for the next time."""
        for tensor in self._plan["tensors"].values():
            if tensor["storage"] is not None:
                self._grown(tensor["storage"], evaluate(tensor["bytes"], symbols))
        for name in self._plan["results"]:
            if name not in residents:
                self._bound(name, symbols, residents)
        key = (*symbols.values(), *map(id, residents.values()))
        if key not in self._records:
            if len(self._records) >= RECORDS:
                del self._records[next(iter(self._records))]
            steps = [self._step(d, symbols, residents) for d in self._plan["dispatches"]]
            # A record holds its buffers, so that no other can have their ids while it is kept.
            self._records[key] = self._machine.record([s for s in steps if all(s.grid)]), residents
        return self._records[key][0]

    def _step(self, entry: dict[str, Any], symbols: dict[str, int], residents: dict[str, Any]) -> Step:
        grid = tuple(max(0, evaluate(g, symbols)) for g in entry["grid"])
        return Step(
            self._kernels[entry["kernel"]],
            tuple(self._bound(b, symbols, residents) for b in entry["buffers"]),
            tuple(evaluate(s, symbols) for s in entry["scalars"]),
            (grid[0], grid[1], grid[2]),
        )

    def _bound(self, name: str, symbols: dict[str, int], residents: dict[str, Any]) -> Binding:
        if name in self._fixed:
            return self._fixed[name]
        tensor = self._plan["tensors"][name]
        size = max(LEAST, evaluate(tensor["bytes"], symbols))
        if name in residents:
            return Binding(residents[name], 0, size)
        place = name if tensor["storage"] is None else tensor["storage"]
        return Binding(self._grown(place, size), 0, size)

    def _grown(self, place: Any, size: int) -> Any:
        """A buffer of at least so many bytes; a new one ends what was recorded with the old."""
        buffer, had = self._own.get(place, (None, 0))
        if had < size or buffer is None:
            size = max(LEAST, -(-size // 4) * 4)
            self._own[place] = self._machine.allocate(size), size
            self._records.clear()
        return self._own[place][0]

    def _constants(self) -> dict[str, Binding]:
        found = {}
        for name, entry in self._plan["constants"].items():
            array = np.frombuffer(base64.b64decode(entry["data"]), dtype_of(entry["dtype"]))
            found[name] = self._kept(array, self._plan["tensors"][name]["stored"])
        return found

    def _weights(self, path: Path) -> dict[str, Binding]:
        """A shard is one buffer; a weight that is stored otherwise than in the file has its own."""
        found: dict[str, Binding] = {}
        if not self._plan["shards"]:
            return found
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            whole = np.frombuffer(data, np.uint8)
            for number, shard in enumerate(self._plan["shards"]):
                start, size = shard["offset"], shard["bytes"]
                if start + size > len(whole):
                    raise ValueError(f"{path.name} has {len(whole)} bytes, fewer than its weights take")
                buffer = self._machine.allocate(max(LEAST, size))
                self._machine.write(buffer, whole[start : start + size])
                for weight in (w for w in self._plan["weights"] if w["shard"] == number):
                    at, size = weight["offset"], weight["bytes"]
                    stored = self._plan["tensors"][weight["name"]]["stored"]
                    if _same_bytes(weight["dtype"], stored):
                        binding = Binding(buffer, at - start, max(LEAST, -(-size // 4) * 4))
                    else:
                        binding = self._kept(whole[at : at + size].view(dtype_of(weight["dtype"])), stored)
                    found[weight["name"]] = binding
            del whole
        return found

    def _kept(self, array: np.ndarray, stored: str) -> Binding:
        data = converted(array, stored)
        size = max(LEAST, -(-data.nbytes // 4) * 4)
        buffer = self._machine.allocate(size)
        self._machine.write(buffer, data)
        return Binding(buffer, 0, size)


def fetched(
    machine: Machine, buffer: Any, stored: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """An array of what a buffer holds."""
    kind = dtype_of(stored)
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    data = machine.read(buffer, -(-count * kind.itemsize // 4) * 4)[: count * kind.itemsize]
    return data.view(kind).reshape(shape).astype(dtype)


def converted(array: np.ndarray, stored: str) -> np.ndarray:
    """The bytes of an array as they are stored, uint8, in whole words."""
    if not _same_bytes(str(array.dtype), stored):
        array = array.astype(dtype_of(stored))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.pad(data, (0, -len(data) % 4)) if len(data) % 4 else data


def _same_bytes(dtype: str, stored: str) -> bool:
    """Whether elements are stored as they are, or packed in words, byte by byte as they are too."""
    return stored in (dtype, "packed")


def dtype_of(name: str) -> np.dtype:
    """numpy's dtype of TVM's name."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _spec(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(dtype_of(entry["dtype"]), tuple(entry["shape"]), entry.get("rows", 0))


def _kernels(folder: Path, entries: dict[str, Any]) -> dict[str, Kernel]:
    """Kernels by name; a file is read once."""
    found = {}
    for file, names in itertools.groupby(
        sorted(entries, key=lambda n: entries[n]["file"]), lambda n: entries[n]["file"]
    ):
        source = (folder / file).read_text(encoding="utf-8")
        for name in names:
            e = entries[name]
            found[name] = Kernel(name, source, tuple(e["block"]), tuple(e["writes"]), tuple(e["scalars"]))
    return found

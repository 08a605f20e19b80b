"""HostRunner: a lowered program on this machine's CPU, in TVM's virtual machine; weights are mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
import tvm
from tvm import relax

from porter import memory
from porter.context import Feeds
from porter.errors import BundleError, OptionError
from porter.run import fitting
from porter.run.protocol import CPU, TensorSpec

ALIGNMENT = 64  # kernels load whole vectors, so a buffer must begin on a cache line


class HostRunner:
    """Runs a bundle's folder. Implements Runner.

    A C-contiguous, writable array that begins on a cache line goes in without being copied; so do outputs
    come out. Raises BundleError PORT-0501 when the program cannot be loaded, OptionError PORT-0502 when feeds
    do not fit the interface, exceed the sizes that memory was planned for, or are refused by the program
    itself.
    """

    def __init__(self, folder: Path) -> None:
        try:
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            library = tvm.runtime.load_module(str(folder / plan["library"]))
            self._machine = relax.VirtualMachine(library, tvm.cpu())
            self._weights = _map_weights(folder / "lib" / "weights.bin", plan["weights"])
            self._main = self._machine["main"]
        except Exception as error:  # TVM, the loader and broken files raise many kinds
            what = f"the program cannot be loaded: {_last_line(error)}"
            raise BundleError("PORT-0501", what, where=str(folder), hint="convert the model again") from error
        self.inputs = {i["name"]: _spec(i) for i in plan["inputs"]}
        self.outputs = {o["name"]: _spec(o) for o in plan["outputs"]}
        self.in_place: dict[str, str] = plan["in_place"]
        self.bounds: dict[str, int] = plan["bounds"]
        self.machine = CPU

    def instrument(self, watch: Callable[..., int]) -> None:
        """Let `watch` be told of every call that the program makes; see `relax.VirtualMachine`."""
        self._machine.set_instrument(watch)

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name; one that overwrites an input is that input's own array, if that can be written."""
        fitting.check(feeds, self.inputs, self.bounds)
        arrays = [np.asarray(feeds[name]) for name in self.inputs]
        places = [a.ctypes.data if a.size else None for a in arrays]
        fitting.check_apart(list(self.inputs), places, set(self.in_place.values()))
        lent = dict(zip(self.inputs, map(_lend, arrays), strict=True))
        try:
            results = self._main(*lent.values(), *self._weights)
        except Exception as error:  # TVM raises many kinds
            raise OptionError("PORT-0502", f"the program refuses these feeds: {_last_line(error)}") from error
        taken = {
            source: _taken_back(lent[source], np.asarray(feeds[source])) for source in self.in_place.values()
        }
        return {
            name: taken[self.in_place[name]] if name in self.in_place else _array(result)
            for name, result in zip(self.outputs, results, strict=True)
        }


def _spec(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(_dtype(entry["dtype"]), tuple(entry["shape"]), entry.get("rows", 0))


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _lend(array: np.ndarray) -> tvm.runtime.Tensor:
    """The array itself where a kernel can use it, else a copy."""
    usable = (
        array.size
        and not array.ctypes.data % ALIGNMENT
        and array.flags.c_contiguous
        and array.flags.writeable
    )
    if not usable or array.dtype == ml_dtypes.bfloat16:
        return tvm.runtime.tensor(array)
    return tvm.runtime.from_dlpack(array)


def _taken_back(tensor: tvm.runtime.Tensor, array: np.ndarray) -> np.ndarray:
    """The caller's array with what the program wrote; the program's own where that cannot be written to."""
    made = _array(tensor)
    if made.ctypes.data == array.ctypes.data or not array.size:
        return array
    if not array.flags.writeable:
        return made
    np.copyto(array, made)
    return array


def _array(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """The tensor's own memory as an array; numpy takes no bfloat16 over DLPack."""
    return tensor.numpy() if str(tensor.dtype) == "bfloat16" else np.from_dlpack(tensor)


def _map_weights(path: Path, entries: list[dict[str, Any]]) -> list[tvm.runtime.Tensor]:
    """Views of the mapped file; pages are read when first used and can be dropped again."""
    size = path.stat().st_size
    if any(e["offset"] + e["bytes"] > size for e in entries):
        raise ValueError(f"{path.name} has {size} bytes, fewer than its weights take")
    mapped = np.memmap(path, np.uint8, mode="c") if size else np.empty(0, np.uint8)
    if size:
        memory.mapped.add(mapped._mmap)
    return [_weight(mapped[e["offset"] : e["offset"] + e["bytes"]], e) for e in entries]


def _weight(view: np.ndarray, entry: dict[str, Any]) -> tvm.runtime.Tensor:
    array = np.asarray(view).view(_dtype(entry["dtype"])).reshape(entry["shape"])
    return (
        tvm.runtime.from_dlpack(array)
        if array.dtype != ml_dtypes.bfloat16 and array.size
        else tvm.runtime.tensor(array)
    )

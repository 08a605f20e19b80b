"""HostRunner: a lowered program on this machine's CPU, in TVM's virtual machine; weights are mapped, not read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from porter.context import Feeds
from porter.errors import BundleError, OptionError
from porter.lower import tvm_setup  # noqa: F401  (before TVM)
from porter.run.protocol import TensorSpec


class HostRunner:
    """Runs a bundle's folder. Implements Runner; numpy arrays go in and out without being copied.

    Raises BundleError PORT-0501 when the library cannot be loaded, OptionError PORT-0502 when feeds do not fit the
    interface or exceed the sizes that memory was planned for.
    """

    def __init__(self, folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.inputs = {i["name"]: _spec(i) for i in plan["inputs"]}
        self.outputs = {o["name"]: _spec(o) for o in plan["outputs"]}
        self.in_place: dict[str, str] = plan["in_place"]
        self.bounds: dict[str, int] = plan["bounds"]
        try:
            self._machine = relax.VirtualMachine(
                tvm.runtime.load_module(str(folder / "lib" / "model.so")), tvm.cpu()
            )
        except Exception as error:  # TVM and the loader raise many kinds
            raise BundleError(
                "PORT-0501", f"the library cannot be loaded: {error}", where=str(folder)
            ) from error
        self._main = self._machine["main"]
        self._weights = _map_weights(folder / "lib" / "weights.bin", plan["weights"])

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name; an output that overwrites an input is that input's own array."""
        self._check(feeds)
        lent = {name: _lend(feeds[name]) for name in self.inputs}
        results = self._main(*lent.values(), *self._weights)
        outputs: Feeds = {}
        for (name, _), result in zip(self.outputs.items(), results, strict=True):
            source = self.in_place.get(name)
            outputs[name] = np.from_dlpack(result) if source is None else feeds[source]
        return outputs

    def _check(self, feeds: Feeds) -> None:
        """Every wrong feed is named before any kernel runs: kernels trust their sizes."""
        sizes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise OptionError("PORT-0502", "an input is missing", where=name)
            array = feeds[name]
            if array.dtype != spec.dtype or array.ndim != len(spec.shape):
                what = (
                    f"wanted {spec.dtype} of rank {len(spec.shape)}, got {array.dtype} of rank {array.ndim}"
                )
                raise OptionError("PORT-0502", what, where=name)
            for wanted, got in zip(spec.shape, array.shape, strict=True):
                self._check_size(name, wanted, got, sizes)

    def _check_size(self, name: str, wanted: int | str, got: int, sizes: dict[str, int]) -> None:
        if isinstance(wanted, int) and got != wanted:
            raise OptionError("PORT-0502", f"wanted a dimension of {wanted}, got {got}", where=name)
        if not isinstance(wanted, str) or "+" in wanted:
            return  # a sum is checked by the program itself
        if sizes.setdefault(wanted, got) != got:
            raise OptionError("PORT-0502", f"{wanted} is {sizes[wanted]} elsewhere, {got} here", where=name)
        if got > self.bounds.get(wanted, got):
            what = f"{wanted} is {got}, but memory was planned for at most {self.bounds[wanted]}"
            raise OptionError("PORT-0502", what, where=name, hint="convert with a larger limit")


def _spec(entry: dict) -> TensorSpec:
    return TensorSpec(np.dtype(entry["dtype"]), tuple(entry["shape"]))


def _lend(array: np.ndarray) -> tvm.runtime.Tensor:
    """The array itself where a kernel can use it; kernels load whole vectors, so buffers must be aligned and dense."""
    if not array.size or array.ctypes.data % 64 or not (array.flags.c_contiguous and array.flags.writeable):
        return tvm.runtime.tensor(array)
    return tvm.runtime.from_dlpack(array)


def _map_weights(path: Path, entries: list[dict]) -> list[tvm.runtime.Tensor]:
    """Views of the mapped file; pages are read when first used and can be dropped again."""
    if not entries:
        return []
    mapped = np.memmap(path, np.uint8, mode="c")
    views = [mapped[e["offset"] : e["offset"] + e["bytes"]] for e in entries]
    return [
        tvm.runtime.from_dlpack(np.asarray(view).view(e["dtype"]).reshape(e["shape"]))
        for view, e in zip(views, entries, strict=True)
    ]

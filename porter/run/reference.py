"""The reference: a model as ONNX Runtime computes it on the CPU, operator by operator."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort

from porter import graph
from porter.context import Feeds
from porter.errors import ModelError, OptionError
from porter.graph.untrusted import shown
from porter.run.protocol import CPU, TensorSpec

_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8e5m2": ml_dtypes.float8_e5m2,
    "float8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "string": np.object_,
}


class ReferenceRunner:
    """Runs a model file or an in-memory model; see `porter.run.protocol.Runner`.

    `engine` is "onnxruntime", or "onnx.reference" for a model with an operator that ONNX Runtime lacks. Graph
    optimization stays at the level that keeps each operator's own arithmetic: above it, ONNX Runtime merges
    DequantizeLinear and MatMul into kernels that round the activations to int8. Threads come from
    PORTER_THREADS, else TVM_NUM_THREADS, else ONNX Runtime decides. Raises what `graph.load` does, and
    ModelError PORT-0143 when the model does not run at all.

    `briefly`: it will run a few times. Weights are then decoded in each run, instead of when it is opened,
    where ONNX Runtime would keep all that lies between a packed weight and its floats.
    """

    def __init__(self, model: str | os.PathLike | ir.Model, *, briefly: bool = False) -> None:
        self.in_place: Mapping[str, str] = {}
        self.bounds: Mapping[str, int] = {}
        self.machine = CPU
        self.engine = "onnxruntime"
        if isinstance(model, ir.Model):
            with tempfile.TemporaryDirectory(prefix="porter-") as folder:
                path = Path(folder) / "model.onnx"
                graph.save(model, path)
                self._open(path, model, briefly)
        else:
            self._open(Path(model), graph.load(model), briefly)

    def _open(self, path: Path, model: ir.Model, briefly: bool) -> None:
        options, left_out = _options(), ["ConstantFolding"] if briefly else []
        options.enable_cpu_mem_arena = not briefly  # an arena keeps what one weight took for the next
        try:
            self._session: Any = ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
            )
            found = self._session.get_inputs(), self._session.get_outputs()
            self.inputs, self.outputs = ({a.name: _spec(a) for a in args} for args in found)
        except ort.capi.onnxruntime_pybind11_state.NotImplemented:
            self.engine = "onnx.reference"
            self._session = onnx.reference.ReferenceEvaluator(onnx.load(path))
            self.inputs, self.outputs = ({v.name: spec(v) for v in vs} for vs in _interface(model))
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            what = f"ONNX Runtime refuses the model: {_reason(error)}"
            raise ModelError(
                "PORT-0143", what, hint="porter inspect shows its operators and opsets"
            ) from error

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name, in fresh arrays. Raises OptionError PORT-0141 for feeds that do not fit."""
        check_feeds(feeds, self.inputs)
        try:
            arrays = {name: np.asarray(array) for name, array in feeds.items()}  # a cache may be elsewhere
            return dict(zip(self.outputs, self._session.run(list(self.outputs), arrays), strict=True))
        except Exception as error:  # as above
            what = f"{self.engine} cannot run the model on these feeds: {_reason(error)}"
            raise OptionError("PORT-0145", what) from error


def check_feeds(feeds: Feeds, inputs: Mapping[str, TensorSpec]) -> None:
    """Raise OptionError PORT-0141 unless `feeds` are exactly `inputs`, of those types and shapes.

    A symbolic size may be anything, but the same wherever its name stands.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name in [*inputs, *feeds]:
        if (name in inputs) != (name in feeds):
            what = f"the model {'wants' if name in inputs else 'has no'} the input {shown(name)!r}"
            raise OptionError("PORT-0141", what, hint=f"its inputs are: {shown(', '.join(inputs))}")
        _check_feed(name, np.asarray(feeds[name]), inputs[name], sizes)


def _check_feed(name: str, array: np.ndarray, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    where = shown(name)
    if array.dtype != spec.dtype:
        raise OptionError("PORT-0141", f"the input wants {spec.dtype}, not {array.dtype}", where=where)
    wanted = f"[{', '.join(map(str, spec.shape))}]"
    if array.ndim != len(spec.shape):
        raise OptionError(
            "PORT-0141", f"the input wants shape {wanted}, not {list(array.shape)}", where=where
        )
    for size, symbol in zip(array.shape, spec.shape, strict=True):
        if isinstance(symbol, int) and size != symbol:
            raise OptionError(
                "PORT-0141", f"the input wants shape {wanted}, not {list(array.shape)}", where=where
            )
        known, other = (
            sizes.setdefault(symbol, (size, name)) if isinstance(symbol, str) and symbol else (size, name)
        )
        if known != size:
            what = f"{symbol!r} is {size} here, but {known} in the input {shown(other)!r}"
            raise OptionError("PORT-0141", what, where=where)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails comes back as an exception, which says the same
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.use_deterministic_compute = True
    threads = os.environ.get("PORTER_THREADS") or os.environ.get("TVM_NUM_THREADS") or "0"
    if not threads.isdecimal():
        raise OptionError("PORT-0147", f"the number of threads must be a number, not {threads!r}")
    options.intra_op_num_threads = int(threads)
    return options


def _spec(arg: Any) -> TensorSpec:
    kind = arg.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(d if isinstance(d, int) else d or "" for d in arg.shape)
    return TensorSpec(np.dtype(_DTYPES.get(kind, kind)), shape)


def _interface(model: ir.Model) -> tuple[list[ir.Value], list[ir.Value]]:
    return [v for v in model.graph.inputs if not v.is_initializer()], list(model.graph.outputs)


def spec(value: ir.Value) -> TensorSpec:
    """The type and shape of an input or output. Raises ModelError PORT-0143 when it has none."""
    if value.dtype is None or value.shape is None:
        raise ModelError("PORT-0143", "an input or output has no type and shape", where=shown(value.name))
    shape = tuple(d if isinstance(d, int) else str(d.value or "") for d in value.shape)
    return TensorSpec(np.dtype(value.dtype.numpy()), shape)


def _reason(error: Exception) -> str:
    return shown(str(error).strip().split("\n")[0].split("Status Message: ")[-1], 600)

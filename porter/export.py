"""PyTorch -> ONNX: a local Hugging Face folder or a factory becomes one checked file with an explicit KV cache.

`load -> trace -> clean -> write -> check -> publish`. torch.onnx runs with `optimize=False`, because its optimizer
drops `x + c` for |c| <= 1e-8 and with it the epsilon of some norms; the cleaning here changes no arithmetic. The file
is checked against PyTorch before it gets its name.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from porter import __version__
from porter.errors import ExportError

if TYPE_CHECKING:
    from porter.export_check import Probe
    from porter.export_source import Source

TORCH = "2.13"
OPSETS = (23, 24)
_PREFIX = "inner."


@dataclass(frozen=True)
class ExportReport:
    """What was written and how close it is to PyTorch.

    `inputs` and `outputs` are the graph's; `parameters` counts weights once; `probes` compare the written file with
    PyTorch; `max_abs` is the largest difference of the first output (logits or hidden states) over all of them.
    `left_out` are weights of the folder that the export does not use; `tokenizer` is the folder of tokenizer files,
    if there were any.
    """

    path: Path
    kind: str
    opset: int
    nodes: int
    parameters: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_abs: float
    probes: tuple[Probe, ...]
    left_out: tuple[str, ...]
    tokenizer: Path | None
    seconds: float


def export(
    source: str,
    out: Path,
    *,
    opset: int = 23,
    progress: Callable[[str], None] | None = None,
    debug: bool = False,
    _optimize: bool = False,
) -> ExportReport:
    """Export `source` (a folder, `package.module:factory` or `file.py:factory`) to the ONNX file `out`.

    `out` gets its weights beside it in `<out>.data` and the tokenizer's files in `<stem>.tokenizer/`; all three appear
    together or not at all. `progress` is called with the name of each stage. `debug` lets what torch prints through.
    `_optimize` turns torch's unsound optimizer on, for the test that shows the check refuses what it makes.
    Raises ExportError PORT-0701 to PORT-0730; PORT-0720 and PORT-0721 with exit code 3.
    """
    say, start, out = progress or (lambda stage: None), time.perf_counter(), Path(out)
    _check_options(out, opset)
    _check_installed()
    from porter.export_check import check
    from porter.export_source import load

    say("load")
    with _quiet(debug):
        flat = load(str(source))
    say("trace")
    with _quiet(debug):
        model = _trace(flat, opset, _optimize)
    say("clean")
    clean(model, flat)
    with _staged(out) as folder:
        say("write")
        _write(model, folder / out.name, flat)
        say("check")
        with _quiet(debug):
            probes = check(folder / out.name, model, flat)
        say("publish")
    return _report(out, model, flat, probes, time.perf_counter() - start)


def _check_options(out: Path, opset: int) -> None:
    if opset not in OPSETS:
        raise ExportError("PORT-0715", f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    if out.suffix != ".onnx" or out.is_dir():
        raise ExportError("PORT-0716", "the output's name must end in .onnx", where=str(out))


def _check_installed() -> None:
    """torch and transformers are there, in versions whose exports were tried."""
    hint = "pip install 'porter[export]'"
    for name in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise ExportError("PORT-0702", f"export needs {name}, which is not installed", hint=hint)
    version = importlib.metadata.version("torch")
    if version.split(".")[:2] != TORCH.split("."):
        raise ExportError("PORT-0703", f"export needs torch {TORCH}, and {version} is installed", hint=hint)


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Swallow what torch and transformers print, warn and log."""
    if debug:
        yield
        return
    sink, disabled = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---- trace


def _trace(flat: Source, opset: int, optimize: bool) -> ir.Model:
    """The graph as torch.onnx writes it. Raises ExportError PORT-0712."""
    import torch

    arguments, shapes, inputs, outputs = _signature(flat)
    try:
        program = torch.onnx.export(
            flat.module,
            arguments,
            dynamo=True,
            optimize=optimize,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            verify=False,
        )
    except Exception as error:  # torch.onnx wraps whatever the model raises
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        hint = "forward must not decide by the values of tensors, nor fix batch, sequence or past; --debug shows all"
        raise ExportError("PORT-0712", f"torch.onnx cannot export the model: {cause[0]}", hint=hint) from error
    return program.model


def _signature(flat: Source) -> tuple[tuple, dict, list[str], list[str]]:
    """Example arguments (batch 2, sequence 5, past 7), dynamic shapes, input names and output names."""
    import torch

    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    if flat.kind == "encoder":
        tokens = [torch.ones(2, 5, dtype=torch.long) for _ in flat.inputs]
        return (tokens,), {"tokens": [{0: batch, 1: sequence}] * len(tokens)}, [*flat.inputs], ["last_hidden_state"]
    past = torch.export.Dim("past", min=0)
    random = torch.Generator().manual_seed(0)
    caches = [torch.randn(2, heads, 7, size, generator=random) for heads, size in flat.caches]
    kinds = [f"{i}.{kind}" for i in range(len(caches) // 2) for kind in ("key", "value")]
    shapes = {"input_ids": {0: batch, 1: sequence}, "past": [{0: batch, 2: past}] * len(caches)}
    inputs = ["input_ids", *(f"past_key_values.{k}" for k in kinds)]
    return (torch.ones(2, 5, dtype=torch.long), caches), shapes, inputs, ["logits", *(f"present.{k}" for k in kinds)]


# ---- clean


def clean(model: ir.Model, flat: Source) -> None:
    """Tidy in place, changing no arithmetic: PyTorch names, one copy of tied weights, no dead nodes, no local paths."""
    import onnx

    common = ir.passes.common
    _name_weights(model, flat.module)
    for step in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    _clear_metadata(model)
    model.producer_name, model.producer_version = "porter", __version__
    opset = onnx.helper.make_opsetid("", model.opset_imports[""])
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for([opset]))
    model.metadata_props.update(flat.metadata)


def _name_weights(model: ir.Model, module: object) -> None:
    """Give every initializer its PyTorch name; tensors that share memory become one, under the first of their names."""
    first = _first_names(module)
    weights = model.graph.initializers
    for value in list(weights.values()):
        name = first.get(value.name, value.name).removeprefix(_PREFIX)
        if name == value.name:
            continue
        if name in weights:
            value.replace_all_uses_with(weights[name])
            weights.pop(value.name)
        else:
            _make_room(model, name)
            value.name = name


def _first_names(module: object) -> dict[str, str]:
    """Name -> the first name of a parameter or buffer that is the same memory seen the same way."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    seen: dict[tuple, str] = {}
    return {n: seen.setdefault((t.data_ptr() or n, t.dtype, t.shape, t.stride()), n) for n, t in tensors}


def _make_room(model: ir.Model, name: str) -> None:
    """Rename a computed value that holds `name`; an input or output keeps its name, and is no weight's name."""
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                value.name = f"{name}_computed"


def _clear_metadata(model: ir.Model) -> None:
    """Drop the exporter's notes, which hold local paths, except where in the module tree each node comes from."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(f for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _clear_value(value)
    for node in model.graph.all_nodes():
        path = _module_path(node)
        node.metadata_props.clear()
        node.doc_string = None
        if path:
            node.metadata_props["porter.module"] = path
        for value in node.outputs:
            _clear_value(value)


def _clear_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    if value.const_value is not None:
        value.const_value.doc_string = None


def _module_path(node: ir.Node) -> str:
    """`model.layers.0.self_attn` of a node that was traced inside that module, else an empty text."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    inside = [s for s in scopes[:-1] if s.startswith(_PREFIX)]  # the last is the operation itself
    return inside[-1].removeprefix(_PREFIX) if inside else ""


# ---- write and publish


def _write(model: ir.Model, path: Path, flat: Source) -> None:
    _save(model, path)
    if flat.tokenizer:
        folder = path.parent / f"{path.stem}.tokenizer"
        folder.mkdir()
        for file in flat.tokenizer:
            shutil.copyfile(file, folder / file.name)


def _save(model: ir.Model, path: Path) -> None:
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out`; what is in it moves to its place when the block ends well, and vanishes otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as name:
            new, old = Path(name, "new"), Path(name, "old")
            new.mkdir()
            old.mkdir()
            yield new
            _publish(new, old, out)
    except OSError as error:
        what = f"the output cannot be written: {error.strerror or error}"
        raise ExportError("PORT-0730", what, where=str(out)) from error


def _publish(new: Path, old: Path, out: Path) -> None:
    """Swap the files of an earlier export for the new ones; put them back if that is interrupted."""
    names = (f"{out.name}.data", f"{out.stem}.tokenizer", out.name)
    done: list[tuple[Path, Path]] = []
    try:
        for name in names:
            for source, target in ((out.parent / name, old / name), (new / name, out.parent / name)):
                if source.exists():
                    source.rename(target)
                    done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _report(out: Path, model: ir.Model, flat: Source, probes: tuple[Probe, ...], seconds: float) -> ExportReport:
    names = _signature(flat)
    return ExportReport(
        path=out,
        kind=flat.kind,
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        parameters=sum(p.numel() for p in flat.module.parameters()),
        inputs=tuple(names[2]),
        outputs=tuple(names[3]),
        max_abs=max(p.max_abs for p in probes),
        probes=probes,
        left_out=flat.left_out,
        tokenizer=out.parent / f"{out.stem}.tokenizer" if flat.tokenizer else None,
        seconds=seconds,
    )

"""PyTorch -> ONNX: a Hugging Face folder or a factory becomes one checked file with an explicit KV cache.

`load -> trace -> clean -> write -> check -> publish`. torch.onnx runs with `optimize=False`, because its
optimizer drops `x + c` for |c| <= 1e-8 and with it the epsilon of some norms; the cleaning here changes no
arithmetic. The file is checked against PyTorch before it gets its name.
"""

from __future__ import annotations

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

from porter import exported, graph
from porter.errors import ExportError

if TYPE_CHECKING:
    from porter.export.check import Probe
    from porter.export.source import Source

TORCH = "2.13"
OPSETS = (23, 24)


@dataclass(frozen=True)
class ExportReport:
    """What was written and how close it is to PyTorch.

    `inputs` and `outputs` are the graph's; `parameters` counts weights once; `probes` compare the written
    file with PyTorch; `max_abs` is the largest difference of the first output (logits or hidden states) over
    all of them. `left_out` are weights of the folder that the export does not use; `tokenizer` is the folder
    of tokenizer files, if there were any.
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

    def summary(self) -> str:
        """What was written, how close it is to PyTorch, and what was left out: a line each."""
        lines = [
            f"{self.path}: {self.kind}, {self.parameters:,} parameters, "
            f"{self.nodes} nodes, opset {self.opset}",
            f"largest difference from PyTorch: {self.max_abs:.3g} over {len(self.probes)} cases (measured)",
        ]
        if self.left_out:
            lines.append(f"weights that the export does not use: {', '.join(self.left_out)}")
        return "\n".join(lines)


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

    `out` gets its weights beside it in `<out>.data`, the tokenizer's files in `<stem>.tokenizer/`, and what
    the check found in `<stem>.export.json`; all appear together or not at all. `progress` is called with the
    name of each stage. `debug` lets what
    torch prints through. `_optimize` turns torch's unsound optimizer on, for the test that shows the check
    refuses what it makes. Raises ExportError PORT-0701 to PORT-0730; PORT-0720 and PORT-0721 with exit code
    3.
    """
    say, start, out = progress or (lambda stage: None), time.perf_counter(), Path(out)
    _check_options(out, opset)
    _check_installed()
    from porter.export.check import check
    from porter.export.clean import clean
    from porter.export.source import load

    with _staged(out) as folder:
        say("load")
        with _quiet(debug):
            flat = load(str(source))
        say("trace")
        with _quiet(debug):
            model = _trace(flat, opset, _optimize)
        say("clean")
        clean(model, flat)
        say("write")
        with _writing(out):
            _write(model, folder / out.name, flat)
        say("check")
        with _quiet(debug):
            probes, drift = check(folder / out.name, model, flat)
        with _writing(out):
            exported.write(folder / out.name, drift)
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
        hint = "forward must not decide by the values of tensors, nor fix a size; --debug shows all"
        raise ExportError(
            "PORT-0712", f"torch.onnx cannot export the model: {cause[0]}", hint=hint
        ) from error
    _check_free(program.model, flat)
    return program.model


def _check_free(model: ir.Model, flat: Source) -> None:
    """torch.export silently fixes a size that the model branches on. Raises ExportError PORT-0713."""
    for value in model.graph.inputs:
        free = ("batch", "sequence") if value.type.dtype == ir.DataType.INT64 else ("batch", "", "past")
        for axis, name in enumerate(free):
            if name and isinstance(value.shape[axis], int):
                what = f"the model only works with {name} {value.shape[axis]}"
                hint = "forward must not branch on the sizes of its inputs"
                raise ExportError("PORT-0713", what, where=value.name, hint=hint)


def _signature(flat: Source) -> tuple[tuple, dict, list[str], list[str]]:
    """Example arguments (batch 2, sequence 5, past 7), dynamic shapes, input names and output names."""
    import torch

    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    if flat.kind == "encoder":
        tokens = [torch.ones(2, 5, dtype=torch.long) for _ in flat.inputs]
        return (
            (tokens,),
            {"tokens": [{0: batch, 1: sequence}] * len(tokens)},
            [*flat.inputs],
            ["last_hidden_state"],
        )
    past = torch.export.Dim("past", min=0)
    random = torch.Generator().manual_seed(0)
    caches = [torch.randn(2, heads, 7, size, generator=random) for heads, size in flat.caches]
    kinds = [f"{i}.{kind}" for i in range(len(caches) // 2) for kind in ("key", "value")]
    shapes = {"input_ids": {0: batch, 1: sequence}, "past": [{0: batch, 2: past}] * len(caches)}
    inputs = ["input_ids", *(f"past_key_values.{k}" for k in kinds)]
    return (
        (torch.ones(2, 5, dtype=torch.long), caches),
        shapes,
        inputs,
        ["logits", *(f"present.{k}" for k in kinds)],
    )


# ---- write and publish


def _write(model: ir.Model, path: Path, flat: Source) -> None:
    graph.save(model, path)
    if flat.tokenizer:
        folder = path.parent / f"{path.stem}.tokenizer"
        folder.mkdir()
        for file in flat.tokenizer:
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the output cannot be written: {error.strerror or error}"
        raise ExportError("PORT-0730", what, where=str(out)) from error


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out`; its files move to their place when the block ends well, and vanish otherwise."""
    with contextlib.ExitStack() as stack:
        with _writing(out):
            stack.enter_context(_parents(out.parent))
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent))
            new, old = Path(name, "new"), Path(name, "old")
            new.mkdir()
            old.mkdir()
        yield new
        with _writing(out):
            _publish(new, old, out)


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make `folder`, and unmake what was made of it when the block fails."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for made in missing:
                made.rmdir()
        raise


def _publish(new: Path, old: Path, out: Path) -> None:
    """Swap the files of an earlier export for the new ones; put them back if that is interrupted."""
    names = (f"{out.name}.data", f"{out.stem}.tokenizer", exported.name(out), out.name)
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


def _report(
    out: Path, model: ir.Model, flat: Source, probes: tuple[Probe, ...], seconds: float
) -> ExportReport:
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

"""Compare an exported ONNX file with the PyTorch module it came from, and refuse it when they differ.

Two float32 programs that sum in different orders differ, so equality is no test. A product of length K rounds
K times; rounding errors walk at random, so it is off by about `eps * sqrt(K)` of its scale, and n products in
a row by `eps * sqrt(K * n)`. Each output may differ by four times that, measured against its own largest
element:

    max |onnx - torch|  <=  4 * 2**-23 * sqrt(K * n) * max |torch|

with K the longest row of any weight and n the number of matrix products. A lost epsilon or a wrong mask is a
change of the function, not of rounding, and lies orders of magnitude above. NaN or infinity at different
places is refused whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from porter.drift.measures import Accumulator, Drift, Scores, score, score_hidden
from porter.errors import ExportError
from porter.export.feeds import cases, computed, feeds
from porter.export.source import first_line

if TYPE_CHECKING:
    import torch

    from porter.export.source import Source

FACTOR = 4.0
EPSILON = 2.0**-23


@dataclass(frozen=True)
class Probe:
    """One comparison: the largest difference of the first output, its scale, the worst share of the bound.

    `share` is over all outputs; above 1 the export is refused. `output` is where it was worst.
    """

    name: str
    max_abs: float
    scale: float
    share: float
    output: str


class ExportMismatch(ExportError):
    """The ONNX file does not compute what PyTorch computes (codes 072x)."""

    exit_code = 3


def check(path: Path, model: ir.Model, flat: Source) -> tuple[tuple[Probe, ...], Drift]:
    """Measure all probes and refuse the file when one is over its bound; they, and the drift over all
    positions that were fed.

    Raises ExportMismatch PORT-0720 (they differ), PORT-0721 (the cache does not carry the context), PORT-0722
    (the file does not run) and ExportError PORT-0723 (PyTorch itself gives NaN or infinity), PORT-0724
    (PyTorch fails).
    """
    allowed = relative_bound(model, flat.module)
    against_itself = cache_probes(flat, allowed) if flat.kind == "decoder" else []
    sums = Accumulator()
    probes = [*against_itself, *measure(path, model, flat, allowed, sums)]
    _refuse(probes)
    return tuple(probes), _drift(sums)


def measure(path: Path, model: ir.Model, flat: Source, allowed: float, sums: Accumulator) -> list[Probe]:
    """Run ONNX Runtime on `path` and `flat.module` on the same inputs; `allowed` is `relative_bound`. The
    first outputs, logits or hidden states, are added to `sums`, each case as a text of its own."""
    names = [o.name for o in model.graph.outputs]
    run = _runner(path, {})
    probes = []
    for i, (name, inputs) in enumerate(cases(flat)):
        wanted, got = computed(flat, inputs, name), run(inputs)
        probes.append(compare(name, names, wanted, got, allowed))
        if wanted[0].shape == got[0].shape:
            sums.add(_scores(flat, *(x[0].reshape(-1, x[0].shape[-1]) for x in (wanted, got))), i)
    return probes + _zero_row(path, model, flat, names, allowed)


def _scores(flat: Source, wanted: np.ndarray, got: np.ndarray) -> Scores:
    """The drift of each position [n, width]; no text says which token is next, so PyTorch's choice is."""
    return score_hidden(wanted, got) if flat.kind == "encoder" else score(wanted, got, wanted.argmax(axis=1))


def _drift(sums: Accumulator) -> Drift:
    """All but what is about next tokens of a text."""
    nothing = ("rms_dp", "rms_dp_ci95", "ppl", "ppl_ratio", "ppl_ratio_ci95")
    return replace(sums.drift(), **dict.fromkeys(nothing))


def relative_bound(model: ir.Model, module: torch.nn.Module) -> float:
    """The difference allowed, as a share of an output's largest element: 4 eps sqrt(K n) (see the module)."""
    products = sum(n.op_type in {"MatMul", "Gemm", "Attention", "Conv"} for n in model.graph.all_nodes())
    longest = max((p.shape[1] for p in module.parameters() if p.dim() == 2), default=1)
    return FACTOR * EPSILON * math.sqrt(longest * max(products, 1))


def compare(
    name: str, outputs: list[str], wanted: list[np.ndarray], got: list[np.ndarray], allowed: float
) -> Probe:
    """One Probe from both sides; `share` is infinite where only one side is finite, or shapes differ."""
    shares, first = [], (0.0, 0.0)
    for i, (w, g) in enumerate(zip(wanted, got, strict=True)):
        error, scale = _difference(w, g)
        first = (error, scale) if i == 0 else first
        shares.append(0.0 if error == 0 else error / (allowed * scale) if scale else math.inf)
    worst = int(np.argmax(shares))
    return Probe(name, *first, share=shares[worst], output=outputs[worst])


def _difference(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """(largest absolute difference, largest absolute wanted value) over the elements finite on both sides."""
    finite = np.isfinite(wanted)
    scale = float(np.abs(wanted[finite]).max(initial=0.0))
    if wanted.shape != got.shape or not np.array_equal(finite, np.isfinite(got)):
        return math.inf, scale
    if not np.array_equal(wanted[~finite], got[~finite], equal_nan=True):
        return math.inf, scale
    error = np.abs(wanted[finite].astype(np.float64) - got[finite].astype(np.float64))
    return float(error.max(initial=0.0)), scale


def _refuse(probes: list[Probe]) -> None:
    worst = max(probes, key=lambda p: p.share)
    if worst.share <= 1:
        return
    what = f"the exported file is off from PyTorch by {worst.share:.3g} times what rounding explains"
    where = f"{worst.output}, {worst.name}"
    hint = "nothing was written; docs/errors/PORT-0720.md tells how to find the operation"
    raise ExportMismatch("PORT-0720", what, where=where, hint=hint)


# ---- ONNX Runtime


def _runner(path: Path, replaced: dict[str, np.ndarray]) -> Callable[[dict], list[np.ndarray]]:
    """Run the file in ONNX Runtime, with initializers `replaced` by other values. Raises PORT-0722."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in replaced.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    if replaced:  # folding would bake in the file's own weights
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = f"ONNX Runtime cannot load the exported file: {first_line(error)}"
        raise ExportMismatch("PORT-0722", what) from error

    def run(inputs: dict[str, np.ndarray], keep: object = values) -> list[np.ndarray]:
        try:
            return session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        except Exception as error:
            what = f"ONNX Runtime cannot run the exported file: {first_line(error)}"
            raise ExportMismatch("PORT-0722", what) from error

    return run


# ---- the adapter itself


def cache_probes(flat: Source, allowed: float) -> list[Probe]:
    """The flat module against itself: a text in two parts, and against the model without a cache.

    Raises ExportMismatch PORT-0721 when a difference is over the bound.
    """
    import torch

    tokens = np.random.default_rng(2).integers(0, flat.vocab_size, (2, min(12, flat.context_length)))
    half = tokens.shape[1] // 2
    if not half:
        return []
    whole = computed(flat, feeds(flat, tokens))[0]
    past = computed(flat, feeds(flat, tokens[:, :half]))[1:]
    parts = computed(flat, feeds(flat, tokens[:, half:], past))[0]
    probes = [compare("text in two parts", ["logits"], [whole[:, half:]], [parts], allowed)]
    if flat.plain:
        with torch.no_grad():
            plain = flat.plain(torch.from_numpy(tokens)).numpy()
        probes.append(compare("without a cache", ["logits"], [plain], [whole], allowed))
    if (worst := max(probes, key=lambda p: p.share)).share > 1:
        what = f"PyTorch with a cache differs from PyTorch without by {worst.share:.3g} times the bound"
        hint = "present must be past with the new tokens after it"
        raise ExportMismatch("PORT-0721", what, where=worst.name, hint=hint)
    return probes


# ---- a zero row


def _zero_row(path: Path, model: ir.Model, flat: Source, names: list[str], allowed: float) -> list[Probe]:
    """Zero one row of the embedding on both sides: a norm that lost its epsilon divides by nothing there."""
    embedding = _embedding(model)
    if embedding is None or f"inner.{embedding}" not in dict(flat.module.named_parameters()):
        return []
    with _zeroed(flat.module, f"inner.{embedding}") as table:
        run = _runner(path, {embedding: table})
        tokens = np.array([[0, 1 % len(table), 0]])
        inputs = (
            feeds(flat, tokens) if flat.kind == "decoder" else {n: np.ones_like(tokens) for n in flat.inputs}
        )
        inputs["input_ids"] = tokens
        return [
            compare("a zero embedding row", names, computed(flat, inputs, finite=False), run(inputs), allowed)
        ]


def _embedding(model: ir.Model) -> str | None:
    """The weight whose rows the tokens choose, if they do so directly or after a change of shape."""
    values = [model.graph.inputs[0]]
    for value in values:
        for node in (use.node for use in value.uses()):
            table = node.inputs[0]
            if node.op_type == "Gather" and table is not None and table.is_initializer():
                return table.name
            if node.op_type in {"Reshape", "Unsqueeze", "Squeeze", "Cast"}:
                values.append(node.outputs[0])
    return None


@contextmanager
def _zeroed(module: torch.nn.Module, name: str) -> Iterator[np.ndarray]:
    """Row 0 of a parameter as zeros, for as long as the block lasts."""
    table = module.get_parameter(name).data
    kept = table[0].clone()
    table[0] = 0
    try:
        yield table.numpy()
    finally:
        table[0] = kept

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from porter.errors import ExportError

if TYPE_CHECKING:
    import torch

    from porter.export_source import Source

FACTOR = 4.0
EPSILON = 2.0**-23
LONGEST = 256  # tokens of the longest probe: enough to leave every short-sequence path, and cheap
SAMPLED = 24


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


def check(path: Path, model: ir.Model, flat: Source) -> tuple[Probe, ...]:
    """Measure all probes and refuse the file when one is over its bound.

    Raises ExportMismatch PORT-0720 (they differ), PORT-0721 (the cache does not carry the context), PORT-0722
    (the file does not run) and ExportError PORT-0723 (PyTorch itself gives NaN or infinity), PORT-0724
    (PyTorch fails).
    """
    allowed = relative_bound(model, flat.module)
    against_itself = cache_probes(flat, allowed) if flat.kind == "decoder" else []
    probes = [*against_itself, *measure(path, model, flat, allowed)]
    _refuse(probes)
    return tuple(probes)


def measure(path: Path, model: ir.Model, flat: Source, allowed: float) -> list[Probe]:
    """Run ONNX Runtime on `path` and `flat.module` on the same inputs; `allowed` is `relative_bound`."""
    names = [o.name for o in model.graph.outputs]
    run = _runner(path, {})
    probes = [
        compare(name, names, _torch(flat, inputs, name), run(inputs), allowed)
        for name, inputs in _cases(flat)
    ]
    return probes + _zero_row(path, model, flat, names, allowed)


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


# ---- the two sides


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
        raise ExportMismatch(
            "PORT-0722", f"ONNX Runtime cannot load the exported file: {_line(error)}"
        ) from error

    def run(inputs: dict[str, np.ndarray], keep: object = values) -> list[np.ndarray]:
        try:
            return session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        except Exception as error:
            raise ExportMismatch(
                "PORT-0722", f"ONNX Runtime cannot run the exported file: {_line(error)}"
            ) from error

    return run


def _torch(
    flat: Source, inputs: dict[str, np.ndarray], name: str = "", finite: bool = True
) -> list[np.ndarray]:
    """The outputs of the PyTorch module. Raises PORT-0723 (not `finite`), PORT-0724 (it fails)."""
    import torch

    tensors = [torch.from_numpy(a) for a in inputs.values()]
    arguments = (tensors,) if flat.kind == "encoder" else (tensors[0], tensors[1:])
    try:
        with torch.no_grad():
            outputs = [t.numpy() for t in flat.module(*arguments)]
    except Exception as error:
        raise ExportError("PORT-0724", f"the PyTorch model fails: {_line(error)}", where=name) from error
    if finite and not all(np.isfinite(o).all() for o in outputs):
        raise ExportError("PORT-0723", "the PyTorch model gives NaN or infinity", where=name)
    return outputs


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- what is fed


def _cases(flat: Source) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, inputs) of each comparison; caches come from running PyTorch, so that they have a real scale."""
    random = np.random.default_rng(0)
    longest = min(flat.context_length, LONGEST)
    if flat.kind == "encoder":
        yield from _encoder_cases(flat, random, longest)
        return
    story = sampled(flat, min(SAMPLED, longest))
    yield f"sampled text, batch 1, sequence {story.shape[1]}, past 0", feeds(flat, story)
    for batch, sequence, past in (
        (1, 1, 0),
        (3, 5, 0),
        (3, 1, 1),
        (1, 5, 7),
        (3, 4, 7),
        (1, longest, 0),
        (1, 1, longest - 1),
    ):
        if sequence + past > longest:
            continue
        tokens = random.integers(0, flat.vocab_size, (batch, past + sequence))
        caches = _torch(flat, feeds(flat, tokens[:, :past]))[1:] if past else None
        name = f"random tokens, batch {batch}, sequence {sequence}, past {past}"
        yield name, feeds(flat, tokens[:, past:], caches)


def _encoder_cases(flat: Source, random: np.random.Generator, longest: int) -> Iterator[tuple[str, dict]]:
    for batch, sequence in ((1, 1), (1, 17), (3, 5), (1, longest)):
        tokens = random.integers(0, flat.vocab_size, (batch, min(sequence, longest)))
        for padded in (False, True):
            mask = np.ones_like(tokens)
            if padded:
                mask[0, tokens.shape[1] // 2 + 1 :] = 0
            types = (np.arange(tokens.shape[1]) >= 2).astype(np.int64) * np.ones_like(tokens)
            known = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
            name = f"random tokens, batch {batch}, sequence {tokens.shape[1]}{', padded' if padded else ''}"
            yield name, {n: known.get(n, np.zeros_like(tokens)) for n in flat.inputs}


def feeds(flat: Source, tokens: np.ndarray, caches: list[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Inputs of a decoder, in the graph's order; without `caches` the past is empty."""
    empty = (np.zeros((len(tokens), heads, 0, size), np.float32) for heads, size in flat.caches)
    kinds = (f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(flat.caches)))
    return {"input_ids": tokens, **dict(zip(kinds, caches or empty, strict=True))}


def sampled(flat: Source, length: int) -> np.ndarray:
    """int64 [1, length] drawn from the model itself at temperature 1, beginning with its first token."""
    random = np.random.default_rng(1)
    tokens = [int(flat.metadata.get("porter.bos", "0").split(",")[0])]
    caches = None
    while len(tokens) < length:
        logits, *caches = _torch(flat, feeds(flat, np.array([tokens[-1:]]), caches))
        chances = np.exp(logits[0, -1].astype(np.float64) - logits[0, -1].max())
        tokens.append(int(random.choice(len(chances), p=chances / chances.sum())))
    return np.array([tokens])


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
    whole = _torch(flat, feeds(flat, tokens))[0]
    parts = _torch(flat, feeds(flat, tokens[:, half:], _torch(flat, feeds(flat, tokens[:, :half]))[1:]))[0]
    probes = [compare("text in two parts", ["logits"], [whole[:, half:]], [parts], allowed)]
    if flat.plain:
        with torch.no_grad():
            probes.append(
                compare(
                    "without a cache",
                    ["logits"],
                    [flat.plain(torch.from_numpy(tokens)).numpy()],
                    [whole],
                    allowed,
                )
            )
    if (worst := max(probes, key=lambda p: p.share)).share > 1:
        what = f"PyTorch with a cache differs from PyTorch without by {worst.share:.3g} times the bound"
        raise ExportMismatch(
            "PORT-0721", what, where=worst.name, hint="present must be past with the new tokens after it"
        )
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
            compare("a zero embedding row", names, _torch(flat, inputs, finite=False), run(inputs), allowed)
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

"""Work: the kernels of one step, what each computes and moves; as the roofline reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from porter import formats
from porter.errors import SpecError
from porter.estimate.model import Attention, Between, Linear, Model
from porter.target import TargetSpec, placement
from porter.target.placing import WIDE, base

Kernel = Literal[
    "gemm", "decode-attention", "prefill-attention", "copy", "all-reduce", "all-gather", "lowered"
]
WORD = 2  # bytes of an activation


@dataclass(frozen=True)
class Work:
    """`count` runs of a kernel on one chip, alike.

    `operations` of one run are done in `format`, on the matrix or the `unit` that is named; `bytes` of it
    pass the outermost memory. `weights` is the stored format of a product, `activations` the other operand's
    where the unit multiplies it as it is, `shape` its [m, n, k] (`groups`
    of them in one run), `tokens` the length of the prompt that attention works on. A collective's `bytes`
    are those of its result. `lowered` is a kernel of a bundle's own program.
    """

    kernel: Kernel
    name: str
    count: int
    bytes: float
    operations: float = 0.0
    format: str = ""
    unit: str = "matrix"
    weights: str = ""
    activations: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    groups: float = 1.0
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """What is asked of a model at once: `batch` rows of `tokens` new tokens each, over `past` cached ones."""

    batch: int
    tokens: int
    past: int

    @property
    def rows(self) -> int:
        """New tokens of all rows."""
        return self.batch * self.tokens


@dataclass(frozen=True)
class Stored:
    """How weights, activations and the cache are kept: two formats, and bits of a cached number."""

    weights: str
    activations: str
    kv_bits: float
    tp: int


def kernels(model: Model, spec: TargetSpec, step: Step, stored: Stored) -> list[Work]:
    """The kernels of a step on one of `stored.tp` chips, in the order in which a layer runs them.

    Serving kernels are taken for granted: q, k and v are one product, as gate and up are; a norm comes with
    the sum before it, the rotation with writing the cache, and activations leave the kernel before a product
    in the product's format. Raises SpecError PORT-0338 for a format that the target does not multiply.
    """
    found = [Work("copy", "embedding", 1, 2 * step.rows * model.hidden * WORD)]
    found += [product(linear, spec, step.rows, stored) for linear in model.linears]
    found += [_attention(a, step, stored) for a in model.attention]
    found += [_between(b, step, stored.tp) for b in model.between]
    found.append(product(model.head, spec, step.batch, stored))
    logits = step.batch * model.vocab
    found.append(Work("copy", "sampling", 1, logits * WORD))
    if stored.tp > 1:
        size = step.rows * model.hidden * WORD
        found.append(Work("all-reduce", "sums over chips", model.reduced, size))
        found.append(Work("all-gather", "logits of all chips", 1, logits * WORD))
    return found


def product(linear: Linear, spec: TargetSpec, rows: int, stored: Stored) -> Work:
    """A product of `rows` vectors with one chip's part of a matrix, or of the experts that are chosen."""
    k, n = part(linear, stored.tp)
    weights = linear.weights or stored.weights
    activations = linear.activations or stored.activations
    placed = placement(spec, weights, activations)
    if placed is None:
        what = f"{spec.name} says nothing of how weights in {weights} are multiplied"
        raise SpecError(
            "PORT-0338", what, where="--weights", hint=f"porter targets {spec.name} shows what is"
        )
    touched = linear.experts * (1 - (1 - linear.chosen / linear.experts) ** rows)
    pairs = rows * linear.chosen
    narrow = placed.how == "native" and base(placed.format) not in (*WIDE, "tf32")
    width = bits(activations, pairs, k) / 8 if narrow and activations else WORD
    moved = pairs * k * width + touched * bytes_of(linear, k, n, stored) + pairs * n * WORD
    return Work(
        "gemm",
        linear.name,
        linear.count,
        moved,
        2.0 * pairs * n * k,
        placed.format,
        placed.unit,
        weights,
        (activations or "bf16") if narrow else "",
        (math.ceil(pairs / touched), n, k),
        touched,
    )


def part(linear: Linear, tp: int) -> tuple[int, int]:
    """[k, n] of one chip's part."""
    k = math.ceil(linear.k / tp) if linear.side == "row" else linear.k
    n = math.ceil(linear.n / tp) if linear.side == "column" else linear.n
    return k, n


def bytes_of(linear: Linear, k: int, n: int, stored: Stored) -> float:
    """Stored bytes of [k, n] of a linear's matrix, scales included."""
    if linear.stored:
        return linear.stored * (k * n) / (linear.k * linear.n)
    return n * k * bits(linear.weights or stored.weights, n, k) / 8


def bits(name: str, rows: int, columns: int) -> float:
    """Stored bits of an element of a matrix in a format."""
    return formats.parse(name).bits_per_weight(rows, columns)


def heads_of(attention: Attention, tp: int) -> tuple[int, int]:
    """Query and cached heads of one chip; cached ones are replicated when there are more chips."""
    return math.ceil(attention.heads / tp), math.ceil(attention.kv_heads / tp)


def _attention(attention: Attention, step: Step, stored: Stored) -> Work:
    """Scores, softmax and sum, causal; the cache is read as it is stored."""
    heads, kv_heads = heads_of(attention, stored.tp)
    window = attention.window or step.past + step.tokens
    if step.tokens == 1:
        seen = float(min(step.past + 1, window))
        cached = step.batch * seen
        kernel: Kernel = "decode-attention"
    else:
        full = min(step.tokens, window)
        seen = full * (full + 1) / 2 + (step.tokens - full) * full  # pairs of a query and a key that it sees
        cached, kernel = step.rows, "prefill-attention"
    sizes = attention.size + attention.value
    operations = 2.0 * step.batch * heads * seen * sizes
    moved = cached * kv_heads * sizes * stored.kv_bits / 8 + step.rows * heads * sizes * WORD
    return Work(
        kernel,
        "attention",
        attention.count,
        moved,
        operations,
        "bf16",
        tokens=min(step.past + step.tokens, window),
    )


def _between(between: Between, step: Step, tp: int) -> Work:
    elements = math.ceil(between.elements / tp) if between.split else between.elements
    return Work("copy", between.name, between.count, step.rows * elements * WORD)

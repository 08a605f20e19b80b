"""Model: a decoder as an estimate sees it: sizes of its products, of its attention, of what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["column", "row", "whole"]


@dataclass(frozen=True)
class Linear:
    """`count` products with a constant matrix of `k` inputs and `n` outputs each.

    `side` says how tensor parallelism splits it: its outputs (`column`), its inputs (`row`, the sum is then
    all-reduced), or not at all. Of `experts` such matrices a token takes `chosen`. `weights` and
    `activations` are the formats it is stored and multiplied in, "" for those that the estimate is asked
    for; `stored` its bytes (one expert's), 0 where the format says them.
    """

    name: str
    k: int
    n: int
    count: int
    side: Side
    experts: int = 1
    chosen: int = 1
    weights: str = ""
    activations: str = ""
    stored: int = 0


@dataclass(frozen=True)
class Attention:
    """`count` layers of attention with `heads` query heads of `size` channels and `kv_heads` cached ones.

    `window`: how many of the newest tokens a token sees, 0 for all. `value` is the size of a value head.
    """

    count: int
    heads: int
    kv_heads: int
    size: int
    value: int
    window: int = 0


@dataclass(frozen=True)
class Between:
    """`count` element-wise kernels that move `elements` of 16 bits for each token; `split` over chips or
    done by each."""

    name: str
    count: int
    elements: int
    split: bool


@dataclass(frozen=True)
class Model:
    """A decoder. `head` makes logits; `tied` when its matrix is the embedding's. `small` are the parameters
    of norms, biases and tables of positions, which stay 16 bits wide. `reduced`: sums over the hidden size
    that tensor parallelism takes for each token. `kv` is the scheme of its cache where it has one of its own;
    `tokens` the most that it takes in a row, 0 where it does not say.
    """

    name: str
    hidden: int
    vocab: int
    linears: tuple[Linear, ...]
    attention: tuple[Attention, ...]
    between: tuple[Between, ...]
    head: Linear
    tied: bool
    small: int
    reduced: int
    kv: str = ""
    tokens: int = 0

    @property
    def layers(self) -> int:
        """How many have a cache."""
        return sum(a.count for a in self.attention)

    @property
    def heads(self) -> int:
        """Query heads of the layer that has the fewest: the most chips that attention splits over."""
        return min(a.heads for a in self.attention)

    @property
    def parameters(self) -> int:
        """All of them, a tied table once."""
        matrices = sum(w.k * w.n * w.count * w.experts for w in self.linears)
        return matrices + self.vocab * self.hidden * (1 if self.tied else 2) + self.small

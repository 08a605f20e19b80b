"""Needs: the memory that each stage of a conversion will take, and the way of measuring that a limit allows.

Counted is memory that the kernel cannot drop (`porter.memory`). Figures are bounds from the sizes of the
model; the constants were measured and rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from porter import graph, memory
from porter.decoder import Decoder
from porter.errors import EnvironmentFailure
from porter.graph.mapped import weights
from porter.graph.saving import AHEAD_BYTES

BASE = 320 << 20  # Python, ONNX Runtime, TVM and its compiler, and all that does not grow with the model
NODE = 24 << 10  # bytes that a node takes in the importer and the compiler
OPEN = 1.1  # ONNX Runtime keeps its own copy of every weight, laid out for its kernels
PIECE = 2.6  # of a piece's weights, or of one weight larger than a piece: read, laid out anew, and decoded
SHARE = 0.6  # of the memory that is free, what a conversion without a limit takes before it streams
PIECES = 64 << 20, 512 << 20  # the smallest and the largest piece, in bytes of float32


@dataclass(frozen=True)
class Sizes:
    """What the needs follow from: bytes as float32 of all weights and of the largest, nodes, tokens.

    `rows` windows of `tokens` tokens run side by side; `cached` bytes are kept of each token, `wide` numbers
    are the most that a layer makes of it, `vocabulary` the logits.
    """

    weights: int
    largest: int
    nodes: int
    rows: int
    tokens: int
    cached: int
    wide: int
    vocabulary: int

    @classmethod
    def of(cls, model: ir.Model, decoder: Decoder, rows: int, tokens: int, vocabulary: int) -> Sizes:
        """The sizes of a model that is fed `rows` windows of `tokens` tokens."""
        floats = [t for t in weights(model) if t.dtype.is_floating_point()]
        shapes = {v.name: v.shape for v in model.graph.inputs}
        caches = [shapes[c.past] for c in decoder.caches]
        elements = sum(
            int(s[1]) * int(s[3]) for s in caches if isinstance(s[1], int) and isinstance(s[3], int)
        )
        matrices = [max(t.shape) for t in floats if len(t.shape) > 1 and vocabulary not in t.shape]
        return cls(
            weights=4 * sum(t.size for t in floats),
            largest=4 * max((t.size for t in floats), default=0),
            nodes=sum(1 for _ in graph.all_nodes(model)),
            rows=rows,
            tokens=tokens,
            cached=4 * elements,
            wide=int(max(matrices, default=0)),
            vocabulary=vocabulary,
        )

    @property
    def answers(self) -> int:
        """Bytes of the logits of a step of one model."""
        return 4 * self.rows * self.tokens * self.vocabulary

    @property
    def activations(self) -> int:
        """Bytes that a model holds of such a step: caches twice, a dozen of its widest values, logits."""
        return self.rows * self.tokens * (2 * self.cached + 48 * self.wide) + self.answers


@dataclass(frozen=True)
class Plan:
    """How a conversion will measure, and the bytes each stage will take.

    `piece` is the bytes of weights that are run at a time, 0: a whole model is opened. `limit` 0 is none.
    """

    limit: int
    piece: int
    stages: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most that any stage takes."""
        return max(self.stages.values())


def plan(sizes: Sizes, limit: int) -> Plan:
    """Open whole models where the limit (0: the machine's free memory) has room for it, else stream them.

    Raises EnvironmentFailure PORT-0905 when the limit is too small for either.
    """
    opened = Plan(limit, 0, stages(sizes, 0))
    if opened.peak <= (limit or SHARE * memory.available()):
        return opened
    room = (limit or SHARE * memory.available()) - BASE
    piece = int(np.clip(room / (2 * PIECE), *PIECES))
    streamed = Plan(limit, piece, stages(sizes, piece))
    if limit and streamed.peak > limit:
        smallest = Plan(limit, PIECES[0], stages(sizes, PIECES[0]))
        if smallest.peak > limit:
            raise refusal(smallest)
        return smallest
    return streamed


def stages(s: Sizes, piece: int) -> dict[str, int]:
    """Bytes that each stage takes at its peak."""
    compiler = NODE * s.nodes
    reference = int(PIECE * max(piece, s.largest)) if piece else int(OPEN * s.weights)
    found = {
        "load": BASE + compiler,
        "feeds": BASE + compiler + (0 if piece else reference + s.activations),
        "passes": BASE + compiler + s.largest,
        # the largest weight turned, its codes, and those packed, and what waits to be written
        "save": BASE + compiler + s.largest + s.largest // 2 + AHEAD_BYTES // 2,
        "lower": BASE + 3 * compiler + 3 * s.largest,  # a weight laid out anew, and copied on the way
        "measure": BASE + compiler + reference + 2 * s.answers + s.activations,
    }
    return {name: int(size) for name, size in found.items()}


def refusal(needed: Plan) -> EnvironmentFailure:
    """The error that says what would be needed."""
    stage = max(needed.stages, key=needed.stages.__getitem__)
    allowed = f"--max-memory allows {memory.shown(needed.limit)}"
    what = f"the stage {stage} would take {memory.shown(needed.peak)}, and {allowed}"
    return EnvironmentFailure("PORT-0905", what, hint="allow more; shorter texts in --data take less")

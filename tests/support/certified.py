"""Certified attention over caches of one's choice: true errors, the definition's bounds, and adversaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from porter.kv import Cache, attend, parse
from porter.kv.bounds import bounds
from porter.kvgraph.certified import Certified, certified_function
from porter.kvgraph.functions import Cached

OPSET = 24


@dataclass(frozen=True)
class Case:
    """A layer: how its cache is stored, and how it attends."""

    text: str = "certified"
    heads: int = 2
    shared: int = 2
    size: int = 16
    capacity: int = 40
    softcap: float = 0.0
    window: int = 0
    scale: float = 0.0

    @property
    def tau(self) -> float:
        """The softmax's scale."""
        return self.scale or self.size**-0.5

    @property
    def tolerance(self) -> float:
        """The scheme's."""
        return parse(self.text).tolerance

    @property
    def function(self) -> Certified:
        """As the graph has it."""
        sides = [Cached(parse(self.text), s, self.heads, self.size, self.capacity) for s in ("key", "value")]
        return Certified(*sides, self.tau, self.softcap, True, bool(self.window))

    def model(self) -> ir.Model:
        """One call of the function, from the inputs of `feeds`."""
        made = self.function
        kind = dict.fromkeys(made.inputs, ir.DataType.FLOAT) | {"total_lengths": ir.DataType.INT64}
        kind["mask"] = ir.DataType.BOOL
        shapes: dict[str, list] = {
            "q": ["b", self.heads * self.shared, "s", self.size],
            "total_lengths": ["b"],
            "mask": ["b", 1, "s", self.capacity],
        }
        for cached in (made.key, made.value):
            for b in cached.buffers:
                name = cached.name + b.name
                shapes[name], kind[name] = ["b", *b.shape[1:]], ir.DataType.from_numpy(b.dtype)
        given = [
            ir.Value(name=n, type=ir.TensorType(kind[n]), shape=ir.Shape(shapes[n])) for n in made.inputs
        ]
        node = ir.node(made.name, given, made.attributes, domain="porter", num_outputs=3)
        types = (ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.BOOL)
        for value, name, dtype in zip(node.outputs, ("y", "bound", "exact"), types, strict=True):
            value.name, value.type = name, ir.TensorType(dtype)
            value.shape = ir.Shape(shapes["q"] if name == "y" else shapes["q"][:3])
        opsets = {"": OPSET, "porter": 1}
        graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports=opsets, name="certified")
        found = ir.Model(graph, ir_version=11, functions=[certified_function(made, OPSET)])
        onnx.checker.check_model(ir.to_proto(found), full_check=True)
        return found


@dataclass(frozen=True)
class Layer:
    """A case with tokens in its cache: float32 keys and values [H,T,D] of each row, queries [B,Hq,S,D]."""

    case: Case
    keys: list[np.ndarray]
    values: list[np.ndarray]
    queries: np.ndarray

    def __post_init__(self) -> None:
        c = self.case
        cache = Cache(parse(c.text), c.size, c.heads, c.capacity, len(self.keys))
        longest = max(k.shape[1] for k in self.keys)
        both = [np.zeros((len(self.keys), c.heads, longest, c.size), np.float32) for _ in range(2)]
        for row, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for whole, part in zip(both, pair, strict=True):
                whole[row, :, : part.shape[1]] = part
        cache.append(*both, np.array([k.shape[1] for k in self.keys]))
        object.__setattr__(self, "cache", cache)

    def feeds(self) -> dict[str, np.ndarray]:
        """Inputs of the case's model; what lies past a row's length is huge: reading it would show."""
        found = {"q": self.queries, "total_lengths": self.cache.lengths.copy()}
        for name, array in self.cache.state.items():
            found[name] = array.copy()
            for row, length in enumerate(self.cache.lengths):
                found[name][row, :, length:] = 100 if name.endswith("codes") else 1e4
        if self.case.window:
            at = np.arange(self.case.capacity)
            steps = self.queries.shape[2]
            query = (self.cache.lengths - steps)[:, None] + np.arange(steps)
            found["mask"] = (at > query[:, None, :, None] - self.case.window) | np.zeros(1, bool)
        return found

    def exact(self) -> np.ndarray:
        """Attention over the copies, float64 [B,Hq,S,D]."""
        rows = range(len(self.keys))
        return np.stack([self._attend([self._of(f"{s}_copy", r) for s in ("key", "value")], r) for r in rows])

    def held(self) -> np.ndarray:
        """Attention over the codes, float64."""
        rows = range(len(self.keys))
        return np.stack([self._attend([self.cache.stored(s, r) for s in ("key", "value")], r) for r in rows])

    def bounds(self) -> np.ndarray:
        """Those of the definition, float32 [B,Hq,S]."""
        c, found = self.case, []
        for row in range(len(self.keys)):
            held = [self.cache.stored(s, row) for s in ("key", "value")]
            weights = attend(*held, self.queries[row], c.tau, c.softcap, c.window).weights
            found.append(
                bounds(self.cache, row, self.queries[row], weights, c.tau, c.softcap, c.window).output
            )
        return np.stack(found)

    def rounding(self) -> np.ndarray:
        """What float32 may do to attention over the copies, [B,Hq,S]: D products of each logit, exp of it and
        sums over T tokens, each to a few units of 2^-24 (`porter.kv.bounds`)."""
        c, found = self.case, []
        for row, queries in enumerate(self.queries):
            keys, values = (np.repeat(self._of(f"{s}_copy", row), c.shared, 0) for s in ("key", "value"))
            sizes = (np.abs(queries) @ np.abs(keys).swapaxes(-1, -2)).max(-1) * c.tau * (c.size + 4)
            moved = (sizes + keys.shape[1] + 256 + 16 * c.softcap) * 2.0**-24
            found.append(2 * moved * np.linalg.norm(values, axis=-1).max(-1)[:, None])
        return np.stack(found)

    def _of(self, name: str, row: int) -> np.ndarray:
        return self.cache.state[name][row, :, : self.cache.lengths[row]].astype(np.float64)

    def _attend(self, pair: list[np.ndarray], row: int) -> np.ndarray:
        c = self.case
        return attend(*pair, self.queries[row], c.tau, c.softcap, c.window).output


def random(
    case: Case, lengths: tuple[int, ...], steps: int, seed: int, tail: int = 1, loud: float = 1.0
) -> Layer:
    """Normals to the power of `tail`; queries `loud` times as long."""
    rng = np.random.default_rng(seed)

    def drawn(tokens: int) -> np.ndarray:
        return (rng.standard_normal((case.heads, tokens, case.size)) ** tail).astype(np.float32)

    queries = rng.standard_normal((len(lengths), case.heads * case.shared, steps, case.size))
    return Layer(case, [drawn(n) for n in lengths], [drawn(n) for n in lengths],
                 (queries * loud).astype(np.float32))  # fmt: skip


def adversarial(case: Case, lengths: tuple[int, ...], delta: float, steps: int = 1, seed: int = 0) -> Layer:
    """What moves the output most.

    Every key is rounded by almost half a step, with or against the query's sign in every channel but the
    first: an even token's logit is delta higher than its codes say, an odd one's delta lower. The first
    channel makes the step, and the codes' logits of odd tokens 2 delta higher, so that exact weights are
    even. Values of even and odd tokens are opposite, each rounded by almost half a step towards where even
    tokens point. Row by row, `lengths` tokens.
    """
    rng, step = np.random.default_rng(seed), np.float32(2.0**-4)
    signs = rng.choice([-1.0, 1.0], case.size).astype(np.float32)
    scheme = parse(case.text)
    group, (top, largest) = (
        scheme.value.group or case.size,
        (np.float32(2 ** (s.bits - 1) - 1) for s in (scheme.key, scheme.value)),
    )
    keys, values = [], []
    for tokens in lengths:
        even = (np.arange(tokens) % 2 == 0)[:, None]
        key = np.where(even, 1, -1).astype(np.float32) * np.float32(0.4999) * step * signs
        key[:, 0] = np.where(even[:, 0], -top, top) * step
        value = np.where(even, largest - np.float32(0.5001), np.float32(0.4999) - largest)
        value = np.repeat(value.astype(np.float32), case.size, axis=1)
        value[:, ::group] = np.where(even, largest, -largest)
        keys.append(np.broadcast_to(key, (case.heads, tokens, case.size)).copy())
        values.append(np.broadcast_to(value, (case.heads, tokens, case.size)).copy())
    q = signs * np.float32(delta / case.tau / (max(case.size - 1, 1) * step / 2))
    q[0] = delta / case.tau / (top * step)
    shape = (len(lengths), case.heads * case.shared, steps, case.size)
    return Layer(case, keys, values, np.broadcast_to(q, shape).astype(np.float32).copy())


CASES = [
    Case(),
    Case(softcap=3.0),
    Case(window=5),
    Case(heads=3, shared=1, size=5),
    Case(heads=1, shared=4, size=80, scale=0.3),
    Case("certified key=int8-g5 value=int4-g6 copy=fp16", size=13, softcap=20.0, window=9),
    Case("certified key=int4 value=int8", size=32),
]
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def check(layer: Layer, run: Run, rtol: float = 1 / 16) -> np.ndarray:
    """Hold y, bound and flags of a run to the definition in float64; the true errors over their bounds, of
    what was computed from codes (0 elsewhere).

    `rtol` is how near bounds must be to the definition's, which sums in another order: where the variance V
    is a difference of nearly equal numbers, rounding them is (D + T) 2^-24 of those, an eighth of what is
    added for it, and half of that remains of the root.
    """
    case, feeds = layer.case, layer.feeds()
    found = run(feeds)
    y, bound, exact = (found[n] for n in ("y", "bound", "exact"))
    wanted, held, exactly = layer.bounds(), layer.held(), layer.exact()
    bound, wanted = (np.where(np.isnan(b), np.float32(np.inf), b) for b in (bound, wanted))
    np.testing.assert_allclose(bound, wanted, rtol=rtol)
    norm = np.linalg.norm(held, axis=-1)
    edge = case.tolerance * norm
    within = bound <= edge
    clear = np.abs(bound - edge) > 1e-3 * edge  # by rounding of the bound and of the output
    np.testing.assert_array_equal(exact[clear], ~within[clear])
    error = np.where(exact, np.linalg.norm(y - exactly, axis=-1), 0)
    assert (error <= layer.rounding()).all(), "the copy's attention is that of float32"
    missed = np.where(exact, 0, np.linalg.norm(y - exactly, axis=-1))
    assert (missed <= bound).all()
    with np.errstate(invalid="ignore", divide="ignore"):
        promised = case.tolerance / (1 - case.tolerance) * np.linalg.norm(exactly, axis=-1)
    if case.tolerance < 1:
        assert (missed <= promised * (1 + 1e-5)).all()
    return missed / bound

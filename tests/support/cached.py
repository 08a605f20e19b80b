"""A lowered decoder with a quantized cache beside ONNX Runtime, in rows of their own lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import decoder
from porter.kv import bytes_of
from porter.kv.scheme import Scheme
from porter.run.host import HostRunner
from porter.run.reference import ReferenceRunner

VOCABULARY = 61


def beside_onnx_runtime(folder: Path) -> None:
    """Both go on from ONNX Runtime's caches, so that a code that differs does not add up."""
    model = ir.load(folder / "model.onnx")
    known, inputs = decoder.recognise(model), {v.name: v for v in model.graph.inputs}
    live, ours = ReferenceRunner(folder / "model.onnx"), HostRunner(folder)
    back = {c.present: c.past for c in known.caches}
    assert ours.in_place == back
    shapes = {n: list(inputs[n].shape)[1:] for n in back.values()}
    caches = {n: np.zeros((3, *shape), inputs[n].dtype.numpy()) for n, shape in shapes.items()}
    random, lengths = np.random.default_rng(0), np.array([0, 11, known.capacity - 9])
    for row, length in enumerate(lengths):
        if length:
            ids = random.integers(0, VOCABULARY, (1, length))
            fed = {n: a[row : row + 1] for n, a in caches.items()}
            out = live.run({known.tokens: ids, known.lengths: np.zeros(1, np.int64), **fed})
            for present, past in back.items():
                caches[past][row] = out[present][0]
    for count in (1, 1, 3, 1, 1, 2):
        fed = {known.tokens: random.integers(0, VOCABULARY, (3, count)), known.lengths: lengths.copy()}
        want = live.run(fed | caches)
        got = ours.run(fed | {n: a.copy() for n, a in caches.items()})
        _compare(got, want, known.output, back)
        caches = {past: want[present] for present, past in back.items()}
        lengths = lengths + count
    assert lengths[2] == known.capacity


def _compare(got: dict, want: dict, output: str, back: dict[str, str]) -> None:
    assert list(got) == list(want)
    flipped = total = 0
    for name in back:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape)
        if got[name].dtype == np.float32:  # steps of a token, from the same sums in another order
            assert np.abs(got[name] - want[name]).max() <= 2.0**-24 * 500 * np.abs(want[name]).max()
        else:
            flipped += int((got[name].view(np.uint8) != want[name].view(np.uint8)).sum())
            total += got[name].nbytes
    # Keys and values are sums of 64 products at most, which the two add up in another order: fp16 steps and
    # windows differ in their last bits, and a value beside an edge may become the next code.
    assert flipped <= total / 1000
    # Two or three layers of such sums: some hundred roundings of the largest logit. One code in a thousand
    # that is a step off moves it further, by far less than the scheme does (measured: up to 170 roundings,
    # 720 with such a code).
    assert np.abs(got[output] - want[output]).max() <= 2.0**-24 * 2000 * np.abs(want[output]).max()


def planned_bytes(folder: Path, scheme: Scheme) -> tuple[int, float]:
    """Bytes of the model's caches for one row and bits of each number, once they are those of the scheme."""
    model = ir.load(folder / "model.onnx")
    known = decoder.recognise(model)
    caches = {c.past for c in known.caches}
    values = [v for v in model.graph.inputs if v.name in caches]
    held = sum(int(np.prod(list(v.shape)[1:])) * v.dtype.numpy().itemsize for v in values)
    attention = next(n for n in model.graph if n.op_type == "Attention")
    heads, size = int(values[0].shape[1]), int(attention.inputs[1].shape[3])
    layers = 1 + max(c.layer for c in known.caches)
    assert held == sum(bytes_of(scheme.layer(i, layers), size, heads, known.capacity) for i in range(layers))
    return held, 8 * held / (2 * layers * heads * size * known.capacity)

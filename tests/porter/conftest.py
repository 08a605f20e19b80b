"""Small decoders, one for each kind of interface."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

VOCABULARY, HEADS, KV_HEADS, SIZE, POSITIONS = 11, 2, 1, 4, 16
WIDTH = HEADS * SIZE


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ir.Model]:
    """A builder of one-layer decoders with grouped-query attention; see `build`."""
    return build


def build(
    past: tuple[str, str] | None = ("past_key_values.0.key", "past_key_values.0.value"),
    present: tuple[str, str] = ("present.0.key", "present.0.value"),
    tokens: str = "input_ids",
    positions: str = "",
    mask: str = "",
    capacity: int = 0,
    output: str = "logits",
    lengths: str = "past_lengths",
    seed: int = 0,
) -> ir.Model:
    """A decoder with the names given; `capacity` makes its cache static, and `past` None leaves it out."""
    if past is None and capacity:
        raise ValueError("a static cache needs names")
    parts = _Parts([f"int64[batch,sequence] {tokens}"], [], [f"float[batch,sequence,{VOCABULARY}] {output}"])
    _embed(parts, tokens, positions)
    mask_name = _mask(parts, tokens, mask) if mask else ""
    if past:
        _caches(parts, past, present, capacity)
    if capacity:
        _scatter(parts, past, present, lengths, tokens, mask_name)
    elif past:
        caches, made = ", ".join(map(quoted, past)), ", ".join(map(quoted, present))
        parts.body.append(f"a, {made} = Attention<is_causal = 1>(q, k, v, {mask_name}, {caches})")
    else:
        parts.body.append(f"a = Attention<is_causal = 1>(q, k, v{', ' + mask_name if mask else ''})")
    parts.body.extend(["a1 = Transpose<perm = [0, 2, 1, 3]>(a)", "a2 = Reshape(a1, flat)", "y = Add(x, a2)"])
    parts.body.append(f"{output} = MatMul(y, head)")
    text = parts.text()
    tensors = [ir.tensor(a, name=n) for n, a in _arrays(seed).items() if re.search(rf"[(, ]{n}[,)]", text)]
    return ir.from_onnx_text(text, initializers=tensors)


class _Parts(NamedTuple):
    inputs: list[str]
    body: list[str]
    outputs: list[str]

    def text(self) -> str:
        head = f"decoder ({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{"
        lines = ['<ir_version: 11, opset_import: ["" : 24]>', head, *(f"  {line}" for line in self.body), "}"]
        return "\n".join(lines)


def _embed(parts: _Parts, tokens: str, positions: str) -> None:
    parts.body.append(f"x0 = Gather(table, {tokens})")
    if positions:
        parts.inputs.append(f"int64[batch,sequence] {positions}")
        parts.body.extend([f"at = Gather(places, {positions})", "x = Add(x0, at)"])
    else:
        parts.body.append("x = Identity(x0)")
    for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        parts.body.append(f"{name}0 = MatMul(x, w{name})")
        parts.body.append(f"{name}1 = Reshape({name}0, shape{count})")
        parts.body.append(f"{name} = Transpose<perm = [0, 2, 1, 3]>({name}1)")


def _mask(parts: _Parts, tokens: str, mask: str) -> str:
    parts.inputs.append(f"int64[batch,total] {mask}")
    parts.body.extend([f"m0 = Cast<to = 9>({mask})", "m1 = Unsqueeze(m0, axes)"])
    parts.body.append(f"t = Shape<start = 1, end = 2>({tokens})")
    parts.body.extend(["e = Concat<axis = 0>(axes_before, t, axes_after)", "m = Expand(m1, e)"])
    return "m"


def _caches(parts: _Parts, past: tuple[str, str], present: tuple[str, str], capacity: int) -> None:
    before, after = (f"float[batch,{KV_HEADS},{capacity or axis},{SIZE}]" for axis in ("past", "all"))
    parts.inputs.extend(f"{before} {quoted(n)}" for n in past)
    parts.outputs.extend(f"{after} {quoted(n)}" for n in present)


def _scatter(
    parts: _Parts, past: tuple[str, str], present: tuple[str, str], lengths: str, tokens: str, mask: str
) -> None:
    parts.inputs.append(f"int64[batch] {lengths}")
    for new, old, both in zip("kv", past, present, strict=True):
        parts.body.append(f"{quoted(both)} = TensorScatter<axis = 2>({quoted(old)}, {new}, {lengths})")
    parts.body.extend([f"s0 = Shape<start = 1, end = 2>({tokens})", f"valid = Add({lengths}, s0)"])
    heads = ", ".join(map(quoted, present))
    parts.body.append(f"a = Attention<is_causal = 1>(q, {heads}, {mask}, , , valid)")


def _arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = {
        "table": (VOCABULARY, WIDTH),
        "places": (POSITIONS, WIDTH),
        "wq": (WIDTH, HEADS * SIZE),
        "wk": (WIDTH, KV_HEADS * SIZE),
        "wv": (WIDTH, KV_HEADS * SIZE),
        "head": (WIDTH, VOCABULARY),
    }
    shapes = {
        "shape1": [0, 0, KV_HEADS, SIZE],
        "shape2": [0, 0, HEADS, SIZE],
        "flat": [0, 0, WIDTH],
        "axes": [1, 2],
        "axes_before": [1, 1],
        "axes_after": [1],
    }
    drawn = {n: random.standard_normal(shape).astype(np.float32) for n, shape in weights.items()}
    return drawn | {n: np.array(a) for n, a in shapes.items()}


def quoted(name: str) -> str:
    return f'"{name}"' if not name.isidentifier() else name

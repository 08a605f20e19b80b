"""Small decoders, one for each kind of interface."""

import re
from collections.abc import Callable

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
    inputs, body = [f"int64[batch,sequence] {tokens}"], []
    body.append(f"x0 = Gather(table, {tokens})")
    if positions:
        inputs.append(f"int64[batch,sequence] {positions}")
        body += [f"at = Gather(places, {positions})", "x = Add(x0, at)"]
    else:
        body.append("x = Identity(x0)")
    for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        body.append(f"{name}0 = MatMul(x, w{name})")
        body.append(f"{name}1 = Reshape({name}0, shape{count})")
        body.append(f"{name} = Transpose<perm = [0, 2, 1, 3]>({name}1)")
    attn_mask = ""
    if mask:
        inputs.append(f"int64[batch,total] {mask}")
        attn_mask = "m"
        body += [
            f"m0 = Cast<to = 9>({mask})",
            "m1 = Unsqueeze(m0, axes)",
            f"t = Shape<start = 1, end = 2>({tokens})",
        ]
        body += ["e = Concat<axis = 0>(axes_before, t, axes_after)", "m = Expand(m1, e)"]
    outputs = [f"float[batch,sequence,{VOCABULARY}] {output}"]
    if past:
        axis = capacity or "past"
        inputs += [f"float[batch,{KV_HEADS},{axis},{SIZE}] {quoted(n)}" for n in past]
        outputs += [f"float[batch,{KV_HEADS},{capacity or 'all'},{SIZE}] {quoted(n)}" for n in present]
    if capacity:
        inputs.append(f"int64[batch] {lengths}")
        for new, old, both in zip("kv", past, present, strict=True):
            body.append(f"{quoted(both)} = TensorScatter<axis = 2>({quoted(old)}, {new}, {lengths})")
        body += [f"s0 = Shape<start = 1, end = 2>({tokens})", f"valid = Add({lengths}, s0)"]
        heads = ", ".join(map(quoted, present))
        body.append(f"a = Attention<is_causal = 1>(q, {heads}, {attn_mask}, , , valid)")
    elif past:
        caches = ", ".join(map(quoted, past))
        made = ", ".join(map(quoted, present))
        body.append(f"a, {made} = Attention<is_causal = 1>(q, k, v, {attn_mask}, {caches})")
    else:
        body.append(f"a = Attention<is_causal = 1>(q, k, v{', ' + attn_mask if mask else ''})")
    body += ["a1 = Transpose<perm = [0, 2, 1, 3]>(a)", "a2 = Reshape(a1, flat)", "y = Add(x, a2)"]
    body.append(f"{output} = MatMul(y, head)")
    text = "\n".join(
        [
            '<ir_version: 11, opset_import: ["" : 24]>',
            f"decoder ({', '.join(inputs)}) => ({', '.join(outputs)}) {{",
            *(f"  {line}" for line in body),
            "}",
        ]
    )
    random = np.random.default_rng(seed)
    weights = {
        "table": random.standard_normal((VOCABULARY, WIDTH)),
        "places": random.standard_normal((POSITIONS, WIDTH)),
        "wq": random.standard_normal((WIDTH, HEADS * SIZE)),
        "wk": random.standard_normal((WIDTH, KV_HEADS * SIZE)),
        "wv": random.standard_normal((WIDTH, KV_HEADS * SIZE)),
        "head": random.standard_normal((WIDTH, VOCABULARY)),
    }
    shapes = {
        "shape1": [0, 0, KV_HEADS, SIZE],
        "shape2": [0, 0, HEADS, SIZE],
        "flat": [0, 0, WIDTH],
        "axes": [1, 2],
        "axes_before": [1, 1],
        "axes_after": [1],
    }
    arrays = {n: a.astype(np.float32) for n, a in weights.items()} | {
        n: np.array(a) for n, a in shapes.items()
    }
    tensors = [ir.tensor(a, name=n) for n, a in arrays.items() if re.search(rf"[(, ]{n}[,)]", text)]
    return ir.from_onnx_text(text, initializers=tensors)


def quoted(name: str) -> str:
    return f'"{name}"' if not name.isidentifier() else name

"""Quantized caches scheduled into a chip's memories: bytes and attention are those of `porter.kv`, and what
comes out of the outermost memory is the cache as it is stored."""

import numpy as np
import pytest
from coded import BATCH, HEADS, SCHEMES, Layer
from kernels import built
from tiles import CHIPS, assert_annotated, chip
from tvm import tirx

from porter.lower import scheduled as reading
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.kernels.define import tvm
from porter.lower.tile.schedule import scheduled
from porter.simulate import simulate

QUICK = [("trainium2", "innerq-hybrid")]
CASES = [
    pytest.param(c, n, marks=() if (c, n) in QUICK else pytest.mark.long) for c in CHIPS for n in SCHEMES
]
ERROR = {"fp32": 0.0, "bf16": 2.0**-8}
"""How far rounding to a format goes, relative to the number."""


def layer(name: str, scheme: str) -> Layer:
    spec = chip(name)
    error = ERROR[Profile(spec).unit("fp32").x.form]
    found = Layer(SCHEMES[scheme], Chip(Profile(spec)), lambda *_: [], error)
    made = [scheduled(f, "kernel", spec, {"b": BATCH, "s": 64}) for f in found.functions]
    for function in made:
        assert function is not None
        assert_annotated(function, spec)
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        compiled = dict(zip(map(id, found.functions), built(made), strict=True))

    def run(function: tirx.PrimFunc, arguments: list[np.ndarray]) -> list[np.ndarray]:
        given = [tvm.runtime.tensor(a) for a in arguments]
        compiled[id(function)].in_place(*given)
        return [g.numpy() for g in given]

    found.run = run
    return found


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_bytes_and_attention(name: str, scheme: str) -> None:
    layer(name, scheme).check()


@pytest.mark.parametrize("scheme", ["fp8", "kivi2", "turboquant4"])
def test_attention_moves_the_cache_as_it_is_stored(scheme: str) -> None:
    """Every buffer once, the query, and the lengths twice (once for keys, once for values)."""
    spec = chip("trainium2")
    found = Layer(SCHEMES[scheme], Chip(Profile(spec)), lambda *_: [])
    sizes = {"b": BATCH, "s": 1}
    function = scheduled(found.attention, "attention", spec, sizes, sizes)
    result = simulate(reading.read(function, sizes, spec), spec)
    (outer,) = (t for t in result.traffic if t.level == next(iter(spec.memory)))
    cached = sum(b.nbytes for b in found.buffers.values())
    query = 4 * BATCH * HEADS * found.shared * found.size
    beside = sum(s.nbytes for n in ("key", "value") for s in found.static(n))
    few = BATCH * HEADS * (3 * 8 + 2 * beside)  # lengths and static steps, for each task
    assert query + cached <= outer.read <= query + cached + few

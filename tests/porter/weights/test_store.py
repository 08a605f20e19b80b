"""Every format in the graph, run by ONNX Runtime, has the values of formats.decode."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from weights import FORMATS, model_of, noise

from porter import formats, graph
from porter.weights import lazy, select, store

# K = 1, K = 33 (odd, no multiple of any group), N = 1, a whole group, more rows than a block of 128.
SHAPES = [(5, 33), (4, 1), (1, 40), (3, 64), (130, 20), (2, 4, 33), (3, 1, 7), (1, 5, 1)]
PRODUCTS = {2: "t = Transpose<perm=[1,0]>(w)", 3: "t = Transpose<perm=[0,2,1]>(w)"}


def stored(name: str, values: np.ndarray, text: str = "", **others: np.ndarray) -> ir.Model:
    """A model in which `w` was replaced by its codes."""
    k = values.shape[-1]
    text = text or f"g (float[s,{k}] x) => (float y) {{ {PRODUCTS[values.ndim]} y = MatMul(x, t) }}"
    model = model_of(text, w=values, **others)
    form = formats.parse(name)
    (matrix,) = [m for m in select.matrices(model.graph) if m.name == "w"]
    store.replace(model, matrix, form, lambda: formats.encode(form, matrix.read()), lazy.Shelf())
    store.put_parts_together(model.graph)
    graph.verify(model)
    return model


def decoded_by_runtime(model: ir.Model) -> np.ndarray:
    """What ONNX Runtime makes of the value that stands for the weight."""
    value = next(v for n in model.graph for v in n.outputs if v.name == "w.dequantized")
    model.graph.outputs.append(value)
    feeds = {v.name: np.zeros([1, *list(v.shape)[1:]], np.float32) for v in model.graph.inputs}
    return decoders.run(model, feeds)["w.dequantized"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_the_same_bits(name: str, shape: tuple[int, ...]) -> None:
    values = noise(*shape)
    wanted = formats.decode(formats.encode(formats.parse(name), values))
    got = decoded_by_runtime(stored(name, values))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)


def test_the_list_of_formats_has_every_name() -> None:
    tested = {formats.parse(name).element for name in FORMATS} | set(FORMATS)
    aliases = {"fp32", "mxfp8-e4m3", "int4"}  # kept as it is; mxfp8; tested with a suffix
    assert set(formats.names()) - aliases <= tested

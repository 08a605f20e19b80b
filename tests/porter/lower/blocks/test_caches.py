"""Quantized caches by blocks: bytes are those of `porter.kv`, and attention reads what they stand for."""

import numpy as np
import pytest
from coded import SCHEMES, Layer
from kernels import built
from tvm import tirx

from porter import target
from porter.errors import TargetError
from porter.kv import parse
from porter.lower.blocks.define import block, define, scratch, store
from porter.lower.blocks.norm import root_mean_square
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.kernels.define import tvm
from porter.lower.kernels.stored import Stored
from porter.lower.kernels.tagged import Tagged

QUICK = ("turboquant2.5",)
HALF_BF16 = 2.0**-8  # half a unit of its 8 bits


def of_this_cpu(layer: Layer) -> None:
    """Run its kernels compiled for this processor."""
    compiled = dict(zip(map(id, layer.functions), built(layer.functions), strict=True))

    def run(function: tirx.PrimFunc, arguments: list[np.ndarray]) -> list[np.ndarray]:
        given = [tvm.runtime.tensor(a) for a in arguments]
        compiled[id(function)].in_place(*given)
        return [g.numpy() for g in given]

    layer.run = run


def unknown(*_: object) -> list[np.ndarray]:
    raise AssertionError


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in SCHEMES]
)
def test_bytes_and_attention(name: str) -> None:
    layer = Layer(SCHEMES[name], Chip(Profile(target.load("trainium2"))), unknown)
    of_this_cpu(layer)
    layer.check()


def test_operands_are_rounded_to_the_unit_s_format() -> None:
    layer = Layer(SCHEMES["kivi4"], Chip(Profile(target.load("maia-200"))), unknown, HALF_BF16)
    of_this_cpu(layer)
    layer.check()
    layer.error = 0.0
    with pytest.raises(AssertionError):  # so the bound tells rounded operands from others
        layer.check_attention(3)


@pytest.mark.parametrize("text", ["triaxial", "key=lloyd4-rotate-residual value=fp16"])
def test_what_has_no_blocks_is_refused(text: str) -> None:
    chip, scheme = Chip(Profile(target.load("webgpu"))), parse(text)
    side = (Tagged if scheme.tagged else Stored)(scheme, "key", 32, 64)
    for make in (chip.appends, chip.read):
        with pytest.raises(TargetError, match="PORT-0432"):
            make(side, 2)


def norm() -> tirx.PrimFunc:
    def body(x, y, m):
        with block("norm", [m]) as (i,):
            root = root_mean_square(lambda d: x[i, d], 129, lambda n, dtype: scratch("room", [n], dtype))
            store(y, root, i)

    return define("norm", [("x", ("m", 129), "float32"), ("y", ("m",), "float32")], body)


def test_a_root_mean_square_is_rounded_once() -> None:
    (kernel,) = built([norm()])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 129)) * np.exp(rng.uniform(-70, 70, (4000, 1)))
    x = x.astype(np.float32)
    x[0], x[1, 1:] = 0, 0
    wanted = np.sqrt(np.square(x.astype(np.float64)).mean(-1)).astype(np.float32)
    np.testing.assert_array_equal(kernel(x, shape=(4000,)), wanted)

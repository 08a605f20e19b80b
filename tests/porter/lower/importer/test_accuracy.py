"""How far the functions that LLVM and TVM approximate are from float64, over the whole range that matters."""

import math

import numpy as np
import pytest
from lowering import compiled, model

EVERYWHERE = np.concatenate([np.linspace(-20, 20, 40001), np.linspace(-1e-3, 1e-3, 2001)]).astype(np.float32)
POSITIVE = np.exp(np.linspace(-80, 80, 40001)).astype(np.float32)
erf = np.vectorize(math.erf, otypes=[np.float64])

# name: body, inputs, the function in float64, and the bound on the error in units (2^-24) of the result, or
# of `scale` where a result near zero is a difference of larger things.
FUNCTIONS = {
    "Exp": ("y = Exp(x)", EVERYWHERE, np.exp, 2, 0.0),
    "Log": ("y = Log(x)", POSITIVE, np.log, 2, 2.0**-20),
    "Sqrt": ("y = Sqrt(x)", POSITIVE, np.sqrt, 1, 0.0),
    "Sin": ("y = Sin(x)", EVERYWHERE, np.sin, 2, 0.0),
    "Cos": ("y = Cos(x)", EVERYWHERE, np.cos, 2, 0.0),
    "Tanh": ("y = Tanh(x)", EVERYWHERE, np.tanh, 4, 0.0),
    "Erf": ("y = Erf(x)", EVERYWHERE, erf, 4, 0.0),
    "Sigmoid": ("y = Sigmoid(x)", EVERYWHERE, lambda x: 1 / (1 + np.exp(-x)), 4, 0.0),
    "Swish": ("y = Swish(x)", EVERYWHERE, lambda x: x / (1 + np.exp(-x)), 6, 0.0),
    # 1 + erf cancels for negative x: what is left is off by units of x
    "Gelu": ("y = Gelu(x)", EVERYWHERE, lambda x: x * (1 + erf(x / math.sqrt(2))) / 2, 4, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    body, x, function, units, scale = FUNCTIONS[name]
    (got,) = compiled(model(f"g (float[n] x) => (float[n] y) {{ {body} }}"), {"n": 100_000})({"x": x})
    wanted = function(x.astype(np.float64))
    size = np.maximum(np.abs(wanted), scale * np.abs(x)) if scale else np.abs(wanted)
    off = np.abs(got - wanted) / np.maximum(size, np.finfo(np.float32).tiny) * 2**24
    print(name, off.max(), x[off.argmax()])
    assert off.max() <= units

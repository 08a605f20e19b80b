"""Integer tensors made from sizes, and indices made safe."""

import numpy as np
import pytest
from kernels import built

from porter.lower.kernels.integers import counting, scalars, wrapped


def test_integers() -> None:
    scalar, three, count, wrap64, wrap32 = built(
        [scalars(1, 0), scalars(3, 1), counting(), wrapped("int64", 2), wrapped("int32")]
    )
    assert scalar(2**62, shape=(), dtype="int64") == 2**62
    assert three(5, -1, 2**40, shape=(3,), dtype="int64").tolist() == [5, -1, 2**40]
    assert count(7, shape=(4,), dtype="int64").tolist() == [7, 8, 9, 10]
    indices = np.array([[0, 6], [4, -1], [-1, 0], [-5, -7]])
    assert wrap64(indices, 5, 7, shape=(4, 2), dtype="int64").tolist() == [[0, 6], [4, 6], [4, 0], [0, 0]]
    assert wrap32(np.array([[-1]], np.int32), 5, shape=(1, 1), dtype="int64").tolist() == [[4]]
    for wrong in ((5, 0), (-6, 0), (0, 7), (0, -8), (2**62, 0)):
        with pytest.raises(RuntimeError, match="outside"):
            wrap64(np.array([[0, 0], wrong]), 5, 7, shape=(2, 2), dtype="int64")

"""Integer tensors made from sizes, and indices made safe."""

import numpy as np
import pytest
from kernels import built

from porter.lower.kernels.integers import counting, scalars, wrapped


def test_integers() -> None:
    scalar, three, count, wrap64, wrap32 = built(
        [scalars(1, 0), scalars(3, 1), counting(), wrapped("int64"), wrapped("int32")]
    )
    assert scalar(2**62, shape=(), dtype="int64") == 2**62
    assert three(5, -1, 2**40, shape=(3,), dtype="int64").tolist() == [5, -1, 2**40]
    assert count(7, shape=(4,), dtype="int64").tolist() == [7, 8, 9, 10]
    for wrap, dtype in ((wrap64, np.int64), (wrap32, np.int32)):
        indices = np.array([0, 4, -1, -5], dtype)
        assert wrap(indices, 5, shape=(4,), dtype="int64").tolist() == [0, 4, 4, 0]
        for wrong in (5, -6):
            with pytest.raises(RuntimeError, match="outside"):
                wrap(np.array([0, wrong], dtype), 5, shape=(2,), dtype="int64")

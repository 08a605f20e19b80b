"""Parts are computed once for all who read them, from any thread, and let go."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from weights import noise

from porter import formats
from porter.weights import lazy


class Maker:
    """Computes three arrays, slowly enough for others to come; counts, and knows which of them still live."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.count, self.seconds, self._made = 0, seconds, []

    def __call__(self) -> list[np.ndarray]:
        self.count += 1
        time.sleep(self.seconds)
        made = [np.full(4, part) for part in range(3)]
        self._made += map(weakref.ref, made)
        return made

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(made() is not None for made in self._made)


def test_once_for_all_parts_and_again_for_who_asks_again() -> None:
    make = Maker()
    parts = lazy.Parts(make, 3, lazy.Shelf())
    assert [parts.take(i)[0] for i in (1, 0, 2)] == [1, 0, 2]
    assert make.count == 1
    assert [parts.take(i)[0] for i in (0, 1, 2)] == [0, 1, 2]
    assert make.count == 2
    assert [parts.take(i)[0] for i in (0, 0)] == [0, 0]
    assert make.count == 4


def test_nothing_is_kept_when_all_parts_were_read() -> None:
    make = Maker()
    parts = lazy.Parts(make, 3, lazy.Shelf())
    parts.take(0)
    assert make.alive == 2
    for i in (1, 2):
        parts.take(i)
    assert make.alive == 0


def test_threads_wait_for_the_first() -> None:
    make = Maker(0.05)
    parts = lazy.Parts(make, 3, lazy.Shelf())
    with ThreadPoolExecutor(3) as pool:
        assert [a[0] for a in pool.map(parts.take, range(3))] == [0, 1, 2]
    assert make.count == 1


def test_a_shelf_lets_the_longest_untouched_go() -> None:
    shelf, makers = lazy.Shelf(capacity=2), [Maker() for _ in range(4)]
    results = [lazy.Parts(make, 3, shelf) for make in makers]
    for result in results:
        result.take(0)
    assert [m.alive for m in makers] == [0, 0, 2, 2]
    results[0].take(1)
    assert makers[0].count == 2
    results[3].take(1)
    assert makers[3].count == 1


def test_different_results_are_computed_at_the_same_time() -> None:
    """One waiting inside the other's computation would never end if they shared a lock."""
    meet = threading.Barrier(2, timeout=10)
    shelf = lazy.Shelf()
    both = [lazy.Parts(lambda: [meet.wait(), np.zeros(1)], 2, shelf) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda p: p.take(0), both)) == [0, 1]


def test_a_failure_is_told_to_who_asks_and_the_next_tries_again() -> None:
    tries = []

    def compute() -> list[np.ndarray]:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("gone")
        return [np.zeros(1)]

    parts = lazy.Parts(compute, 1, lazy.Shelf())
    with pytest.raises(OSError, match="gone"):
        parts.take(0)
    assert parts.take(0).shape == (1,)


@pytest.mark.parametrize("name", ["int4-g32", "uint3-g7", "nvfp4", "mx9", "bf16", "mxfp8"])
def test_a_spool_gives_back_what_was_kept(name: str) -> None:
    spool = lazy.Spool()
    form = formats.parse(name)
    wanted = [formats.encode(form, noise(*shape)) for shape in ((3, 33), (2, 4, 40), (1, 1))]
    kept = [spool.keep(encoded) for encoded in wanted]
    del spool  # the arrays keep what they need
    for encoded, again in zip(wanted, kept, strict=True):
        got = again()
        assert got.form == form
        assert got.factor == encoded.factor
        for field in ("codes", "scales", "zeros", "shifts"):
            one, two = getattr(got, field), getattr(encoded, field)
            assert (one is None) == (two is None)
            if one is not None:
                assert one.dtype == two.dtype
                assert not one.flags.writeable
                assert one.tobytes() == two.tobytes()


def test_a_spool_takes_empty_and_strange_arrays() -> None:
    spool = lazy.Spool()
    arrays = [
        np.zeros((0, 3), np.int8),
        np.asarray(np.float32(2)),
        noise(4, 6)[:, ::2],
        noise(3).astype(ml_dtypes.bfloat16),
    ]
    read = [spool.append(a) for a in arrays]
    for array, again in zip(arrays, read, strict=True):
        assert again().shape == array.shape
        np.testing.assert_array_equal(again(), array)

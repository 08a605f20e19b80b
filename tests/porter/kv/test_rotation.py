import numpy as np
import pytest

from porter.kv import rotation as r

SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256]


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal(size):
    """To the rounding of float64 sums of `size` products of at most 1."""
    matrix = r.rotation(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=size * 2.0**-52)


@pytest.mark.parametrize("size", [2, 4, 8, 64, 128])
def test_hadamard_is_sylvester_s(size):
    matrix = r.hadamard(size)
    want = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(np.abs(r.rotation(size)), 1 / np.sqrt(size))


@pytest.mark.parametrize("size", SIZES)
def test_no_channel_keeps_more_than_its_share(size):
    """Every channel is spread over all: |R_ij| is at most sqrt(2 / size), and 1 / sqrt(size) where size is a
    power of two."""
    assert np.abs(r.rotation(size)).max() <= np.sqrt(2 / size) * (1 + 1e-12)


@pytest.mark.parametrize("size", [4, 16, 64, 256, 2, 8, 32, 128])
def test_walsh_functions_become_flat(size):
    """Constant vectors too: a plain Hadamard matrix would make one spike of each."""
    turned = np.abs(r.rotation(size) @ r.hadamard(size)) / np.sqrt(size)
    assert turned.max() <= (1 if size.bit_length() % 2 else np.sqrt(2)) / np.sqrt(size) * (1 + 1e-12)


def test_signs_are_rudin_and_shapiro_s():
    assert r.signs(16).tolist() == [1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1]


@pytest.mark.parametrize("sizes", [[8, 24], [2, 6], [3, 9]])
def test_sets_are_turned_by_themselves(sizes):
    first = np.array([[0, 3, 7][: sizes[0]], [1, 2, 5][: sizes[0]]])
    if sizes[0] == 8:
        first = np.array([[0, 3, 7, 9, 12, 20, 30, 31], [1, 2, 5, 6, 8, 10, 11, 13]])
    if sizes[0] == 2:
        first = first[:, :2]
    matrices = r.of_sets(sizes, first)
    x = np.random.default_rng(0).standard_normal((2, 5, sum(sizes)))
    turned = r.turn(x, matrices)
    for head, chosen in enumerate(first):
        rest = [c for c in range(sum(sizes)) if c not in chosen]
        want = [x[head][:, chosen] @ r.rotation(sizes[0]).T, x[head][:, rest] @ r.rotation(sizes[1]).T]
        np.testing.assert_allclose(turned[head], np.concatenate(want, axis=1), atol=1e-13)
    np.testing.assert_allclose(r.turn(turned, matrices.swapaxes(1, 2)), x, atol=1e-13)


def test_turning_does_not_depend_on_how_many_there_are():
    x = np.random.default_rng(0).standard_normal((2, 50, 96)).astype(np.float32)
    matrix = r.rotation(96)[None]
    whole = r.turn(x, matrix)
    for i in range(50):
        np.testing.assert_array_equal(r.turn(x[:, i : i + 1], matrix)[:, 0], whole[:, i])

import numpy as np
import pytest

from porter.kv import tags


def test_bands_are_powers_of_two():
    ends = {
        0: 0,
        3: 0,
        4: 1,
        7: 1,
        8: 2,
        15: 2,
        16: 3,
        255: 6,
        256: 7,
        32767: 13,
        65535: 14,
        65536: 15,
        10**9: 15,
    }
    np.testing.assert_array_equal(tags.default(np.array(list(ends))), list(ends.values()))


@pytest.mark.parametrize(("m", "modality"), list(enumerate(tags.MODALITIES)))
@pytest.mark.parametrize(("r", "role"), list(enumerate(tags.ROLES)))
def test_kinds_do_not_meet(m, modality, r, role):
    found = tags.default(np.array([[0, 9], [100, 10**6]]), modality, role)
    np.testing.assert_array_equal(found, np.array([[0, 2], [5, 15]]) + 16 * (m + 4 * r))
    assert found.dtype == np.int64
    assert found.max() < tags.COUNT
    np.testing.assert_array_equal(tags.band(found), [[0, 2], [5, 15]])


def test_in_words():
    assert tags.describe([0, 1, 3]) == "text 0-7, 16-31"
    assert tags.describe([15]) == "text from 65536"
    assert tags.describe([14, 15]) == "text from 32768"
    assert tags.describe(range(16)) == "text from 0"
    assert tags.describe([]) == ""
    found = tags.describe([2, 16, 17, 128 + 16 + 5])
    assert found == "text 8-15; image 0-7; user image 64-127"
    assert tags.describe(kind * 16 + band for kind in range(16) for band in (0, 2, 3)) == "0-3, 8-31"

"""Feeds from files, from the model itself, at random; and every way a feeds file can be wrong."""

import json

import numpy as np
import pytest
from fake_session import VOCABULARY, Fake, fake

from porter import tokenizer
from porter.drift.feeds import TokenFeeds, from_file, random_tokens, sample, self_generated
from porter.errors import DriftError, OptionError


@pytest.fixture(scope="module")
def stories(models):
    return tokenizer.load(models / "stories260k")


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_text(tmp_path, stories):
    got = from_file(write(tmp_path / "a.txt", "Once upon a time"), stories)
    assert (got.kind, got.source, len(got.sequences)) == ("text", "a.txt", 1)
    assert got.sequences[0].tolist() == [1, 403, 407, 261, 378]  # llama2.c's ids for this prompt


def test_list_of_texts(tmp_path, stories):
    got = from_file(write(tmp_path / "a.json", ["one day", "two"]), stories)
    assert [stories.decode(t) for t in got.sequences] == ["one day", "two"]


def test_object_of_lists(tmp_path, stories, models):
    got = from_file(write(tmp_path / "a.json", {"x": ["one"], "y": ["two", "three"]}), stories)
    assert [stories.decode(t) for t in got.sequences] == ["one", "two", "three"]
    assert len(from_file(models / "eval-text" / "self_generated_t0.8.json", stories).sequences) == 18


@pytest.mark.parametrize(
    ("content", "sequences"),
    [([1, 2, 3], [[1, 2, 3]]), ([[1, 2], [3, 4, 5]], [[1, 2], [3, 4, 5]]), ({"tokens": [[1, 2]]}, [[1, 2]])],
)
def test_ids_from_json(tmp_path, content, sequences):
    got = from_file(write(tmp_path / "a.json", content), None)
    assert got.kind == "tokens"
    assert [t.tolist() for t in got.sequences] == sequences
    assert all(t.dtype == np.int64 for t in got.sequences)


def test_ids_from_numpy(tmp_path, models):
    np.save(tmp_path / "one.npy", np.arange(5, dtype=np.uint16))
    assert [t.tolist() for t in from_file(tmp_path / "one.npy", None).sequences] == [[0, 1, 2, 3, 4]]
    rows = np.load(models / "pycode-5m" / "val_tokens.npy").reshape(48, 512)
    np.save(tmp_path / "rows.npy", rows)
    got = from_file(tmp_path / "rows.npy", None)
    assert np.array_equal(np.stack(got.sequences), rows)
    assert got.to_json()["tokens"] == 24_528  # the count in the model's README


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "3",
        '"text"',
        "[1, 2.5]",
        "[1, true]",
        '["a", 1]',
        '[["a"]]',
        '{"a": 1}',
        "[[1, 99999999999]]",
        "[" * 9999,
    ],
)
def test_json_that_is_no_feeds(tmp_path, content):
    with pytest.raises(OptionError, match="PORT-0804"):
        from_file(write(tmp_path / "a.json", content), None)


def test_files_that_are_no_feeds(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    np.save(tmp_path / "float.npy", np.zeros(4))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2), int))
    np.save(tmp_path / "object.npy", np.array(["a", {}], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    (tmp_path / "bomb.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (tmp_path / "a.bin").write_bytes(b"1")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.txt"]:
        with pytest.raises(OptionError, match="PORT-0804"):
            from_file(path, None)


def test_text_without_tokenizer(tmp_path):
    with pytest.raises(OptionError, match="PORT-0805"):
        from_file(write(tmp_path / "a.txt", "hello"), None)


@pytest.mark.parametrize("content", [[], {}, [[1]], [[1, 2], []], {"a": [], "b": []}])
def test_too_little_to_score(tmp_path, content):
    with pytest.raises(OptionError, match="PORT-0806"):
        from_file(write(tmp_path / "a.json", content), None)


def test_an_empty_text_is_not_dropped_in_silence(tmp_path, stories):
    with pytest.raises(OptionError, match="sequence 1 has 1 token") as error:
        from_file(write(tmp_path / "a.json", ["fine", ""]), stories)
    assert error.value.code == "PORT-0806"


@pytest.mark.parametrize("token", [-1, 10])
def test_tokens_beyond_the_vocabulary(token):
    feeds = TokenFeeds((np.array([1, 2]), np.array([3, token])), "tokens", "here")
    with pytest.raises(OptionError, match=f"sequence 1 holds token {token}") as error:
        feeds.check(10)
    assert error.value.code == "PORT-0807"
    TokenFeeds((np.array([0, 9]),), "tokens", "here").check(10)


def test_self_generated_is_repeatable_and_seeded():
    a, b, c = (self_generated(fake(), bos=1, length=20, count=4, seed=s) for s in (3, 3, 4))
    assert [t.tolist() for t in a.sequences] == [t.tolist() for t in b.sequences]
    assert [t.tolist() for t in a.sequences] != [t.tolist() for t in c.sequences]
    assert all(t[0] == 1 and len(t) == 20 for t in a.sequences)
    assert a.to_json() == {
        "kind": "self-generated",
        "source": "sampled from the reference at temperature 0.8",
        "sequences": 4,
        "tokens": 76,
        "seed": 3,
    }


def test_self_generated_stops_at_an_end():
    texts = self_generated(fake(), bos=0, length=200, count=8, seed=1, eos=[0, 5]).sequences
    assert any(len(t) < 200 for t in texts)
    for t in texts:
        assert t[0] == 0  # the beginning may be an end token too, and ends nothing
        assert not np.isin(t[1:-1], [0, 5]).any()
        assert len(t) == 200 or t[-1] in (0, 5)


def test_self_generated_follows_the_models_probabilities():
    class Uneven(Fake):
        def step(self, tokens, real=None):
            self.length += tokens.shape[1]
            return np.broadcast_to(np.log([0.5, 0.25, 0.25]).astype(np.float32), (*tokens.shape, 3))

    texts = self_generated(Uneven, bos=0, length=1001, count=4, seed=0, temperature=0.5)
    share = np.bincount(np.concatenate([t[1:] for t in texts.sequences]), minlength=3) / 4000
    # Temperature 1/2 squares: 4/6, 1/6, 1/6. Standard deviation of a share of 4000 is 0.0075; four of them.
    assert share == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=0.03)


def test_sampling_never_takes_the_impossible():
    rng = np.random.default_rng(0)
    logits = np.full((500, 6), -np.inf)
    logits[:, [2, 4]] = 700.0
    assert set(sample(logits, 0.8, rng)) == {2, 4}


def test_a_broken_model_cannot_write_its_own_feeds():
    with pytest.raises(DriftError, match="PORT-0602"):
        self_generated(fake(bad=3), bos=0, length=10)


def test_random_is_labelled():
    got = random_tokens(VOCABULARY, count=3, length=9, seed=5, bos=1)
    assert (got.kind, len(got.sequences), got.seed) == ("random", 3, 5)
    assert all(t[0] == 1 and 0 <= t.min() <= t.max() < VOCABULARY for t in got.sequences)

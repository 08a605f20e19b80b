"""The tokenizers of the trained models, against the libraries that made them and against published counts."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from porter import tokenizer, vocabulary
from porter.errors import OptionError


def texts(models, name):
    return json.loads((models / "eval-text" / name).read_text(encoding="utf-8"))


# eval-text/README.md: tokens scored, which is all tokens but BOS.
@pytest.mark.parametrize(
    ("name", "excerpt", "handwritten", "own"),
    [
        ("stories260k", 23494, 754, 2064),
        ("bitllama-3m", 23494, 754, 1926),
        ("babyllama-char-1m", 46271, 1547, 1530),
    ],
)
def test_counts_are_the_published_ones(models, name, excerpt, handwritten, own):
    t = tokenizer.load(models / name)
    assert (t.bos, t.eos, t.size) == (1, (2,), 361 if "char" in name else 512)
    sources = (texts(models, "tinystories_excerpt.json"), texts(models, "handwritten.json"))
    own_texts = texts(models, "self_generated_t0.8.json")[name]
    counts = [sum(len(t.encode(x)) - 1 for x in source) for source in (*sources, own_texts)]
    assert counts == [excerpt, handwritten, own]


@pytest.fixture(scope="module")
def spelled_out(models, tmp_path_factory):
    """The pieces of stories260k, with the whitespace rule of its `.model`, which the list does not hold."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.json"
    vocab = json.loads((models / "stories260k" / "vocab.json").read_text()) | {
        "remove_extra_whitespaces": True
    }
    path.write_text(json.dumps(vocab))
    return tokenizer.load(path)


def test_spelled_out_vocabulary_gives_the_ids_of_sentencepiece(models, spelled_out):
    ours = spelled_out
    plain = tokenizer.load(models / "stories260k" / "vocab.json")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models / "stories260k" / "tokenizer.model"))
    odd = [
        "",
        " ",
        "  two  spaces ",
        "tab\tand\nline",
        "snow ☃ 雪 🎉",
        "\x00",
        "<s>",
        "</s> <unk>",
        "▁",
        "e\u0301",
    ]
    real = [*texts(models, "tinystories_excerpt.json"), *texts(models, "handwritten.json")]
    assert all(plain.encode(text).tolist() == [1, *theirs.encode(text)] for text in real)
    for text in [*real, *odd]:
        assert ours.encode(text).tolist() == [1, *theirs.encode(text)], text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_spelled_out_vocabulary_agrees_on_any_text(models, spelled_out, text):
    ours, theirs = spelled_out, tokenizer.load(models / "stories260k" / "tokenizer.model")
    assert ours.encode(text).tolist() == theirs.encode(text).tolist()


def test_round_trip(models):
    for name in ("stories260k", "babyllama-char-1m"):
        t = tokenizer.load(models / name)
        for text in texts(models, "handwritten.json"):
            assert t.decode(t.encode(text)) == text


def test_a_plain_list_of_pieces_keeps_every_space(models):
    t = tokenizer.load(models / "babyllama-char-1m")
    assert t.decode(t.encode(" two  spaces ")) == " two  spaces "


def test_byte_level_tokenizer(models):
    t = tokenizer.load(models / "pycode-5m")
    source = 'def f(x: int) -> str:\n    return f"{x} – ✓"\n'
    ids = t.encode(source)
    assert t.bos == 0
    assert ids[0] == 0
    assert t.encode(source, special=False).tolist() == ids[1:].tolist()
    assert t.decode(ids) == source


def test_word_pieces_of_an_encoder(models):
    t = tokenizer.load(models / "minilm-l6-v2")
    ids = t.encode("Hello world")
    assert ids.tolist() == [101, 7592, 2088, 102]  # the published ids of bert-base-uncased
    assert t.bos is None
    assert t.encode("Hello world", special=False).tolist() == [7592, 2088]


@pytest.mark.parametrize("name", ["stories260k", "babyllama-char-1m", "pycode-5m"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_stream_says_what_decode_says(models, name, data):
    t = tokenizer.load(models / name)
    ids = data.draw(st.lists(st.integers(0, t.size + 3), max_size=24))
    stream = t.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == t.decode(ids)


def test_stream_holds_half_a_character_back(models):
    t = tokenizer.load(models / "stories260k")
    stream = t.stream()
    ids = t.encode("a🎉b", special=False)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == "a🎉b"
    assert not any("\ufffd" in p for p in parts)
    assert parts.count("") == 3 + (t.decode(ids[:1]) == "")  # three of the four bytes say nothing yet


def test_stream_lets_go_of_broken_bytes_at_the_end(models):
    t = tokenizer.load(models / "stories260k")
    stream = t.stream()
    assert stream.push(3 + 0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_ids_beyond_the_tokenizer_are_shown_not_raised(models):
    t = tokenizer.load(models / "stories260k")
    assert t.decode([t.size, t.size + 1]) == "\ufffd\ufffd"
    assert t.decode(np.array([t.bos, *t.encode("hi", special=False), 9999])) == "hi\ufffd"


def test_overrides_and_config(models, tmp_path):
    shutil.copy(models / "stories260k" / "tokenizer.model", tmp_path)
    assert tokenizer.load(tmp_path).bos == 1  # from the pieces themselves
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7, 99999]}')
    assert (tokenizer.load(tmp_path).bos, tokenizer.load(tmp_path).eos) == (5, (6, 7))
    assert tokenizer.load(tmp_path, bos=9, eos=[8]).bos == 9
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert 5 not in tokenizer.load(tmp_path).encode("hello")


def test_saved_truncation_is_undone(models, tmp_path):
    saved = json.loads((models / "pycode-5m" / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert len(tokenizer.load(tmp_path).encode("import os, sys, json, re")) > 5


def test_files_to_copy(models):
    assert [p.name for p in tokenizer.files(models / "stories260k")] == ["tokenizer.model", "vocab.json"]
    assert tokenizer.files(models / "eval-text") == []


def test_no_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OptionError, match="PORT-0801") as error:
            tokenizer.load(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "some.zip"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage\xff\xfe", b"{}", b"[1]", b'{"pieces": ["a"], "scores": [], "types": []}']
)
def test_damaged_tokenizer(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match="PORT-0802"):
        tokenizer.load(tmp_path / name)


def test_half_a_surrogate_is_refused(models):
    with pytest.raises(OptionError, match="PORT-0803"):
        tokenizer.load(models / "stories260k").encode("a\ud800")


def test_a_panic_of_the_library_is_no_crash(tmp_path):
    class PanicException(BaseException):
        """What a panic in Rust arrives as: no Exception."""

    def fail(error):
        raise error

    with pytest.raises(OptionError, match="PORT-0802"):
        vocabulary.guarded(lambda: fail(PanicException("index out of range")), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        vocabulary.guarded(lambda: fail(KeyboardInterrupt()), tmp_path)


def test_ids_with_gaps_are_all_known(tmp_path):
    made = {"type": "WordLevel", "vocab": {"a": 0, "b": 70}, "unk_token": "a"}
    saved = {"version": "1.0", "added_tokens": [], "model": made}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    t = tokenizer.load(tmp_path)
    assert t.size == 71
    assert t.decode([70]) == "b"
    assert (t.bos, t.eos) == (None, ())

"""Arrays on disk, and models that take turns."""

import errno
import os

import numpy as np
import pytest
from fake_session import VOCABULARY, Fake, fake

from porter.drift import compare as module
from porter.drift.compare import REFERENCE, compare
from porter.drift.feeds import TokenFeeds
from porter.drift.measures import Accumulator
from porter.drift.record import Record
from porter.errors import DriftError, EnvironmentFailure

ALSO = {"lowering": ("passes", "total")}


def feeds(*lengths):
    rng = np.random.default_rng(0)
    return TokenFeeds(tuple(rng.integers(0, VOCABULARY, n) for n in lengths), "tokens", "test")


class Wholly:
    """A model that sees whole texts."""

    def __init__(self, **options):
        self.options, self.calls = options, []

    def whole(self, texts):
        self.calls.append(len(texts))
        return (Fake(len(t), **self.options).step(t) for t in texts)


def lockstep(makers, texts, pairs, batch, decode_steps, window):
    """All models side by side, step by step, and nothing kept."""
    sums = {name: Accumulator() for name in pairs}
    for group in module._groups(module.cut(texts, window), batch):
        sessions = {name: make(len(group)) for name, make in makers.items()}
        for part in module._parts(group, None, decode_steps, ()):
            logits = {name: module._step(session, group, part) for name, session in sessions.items()}
            for name, (a, b) in pairs.items():
                module._add(sums[name], logits[a], logits[b], group, part)
    return {name: s.drift() for name, s in sums.items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("positions", [1, 60, 10**9])
def test_taking_turns_gives_the_bits_of_running_side_by_side(batch, window, positions):
    texts = feeds(40, 7, 23, 31, 2)
    ports = {"passes": fake(noise=0.3), "total": fake(noise=0.4)}
    pairs = {"passes": (REFERENCE, "passes"), "total": (REFERENCE, "total"), **ALSO}
    wanted = lockstep({REFERENCE: fake(), **ports}, texts, pairs, batch, 9, window)
    options = {"batch": batch, "window": window, "positions": positions, "decode_steps": 9}
    got = compare(fake(), ports, texts, also=ALSO, **options)
    assert {name: c.total for name, c in got.items()} == wanted


def test_no_two_models_are_open_at_once():
    """Each is opened when its turn comes, and told to go before the next is."""
    events = []

    def maker(name):
        def make(batch):
            events.append(name)
            return Fake(batch)

        return make

    ports = {n: maker(n) for n in ("passes", "total")}
    done = lambda name: events.append(f"{name} done")  # noqa: E731
    compare(maker(REFERENCE), ports, feeds(20, 20, 20), also=ALSO, positions=40, done=done)
    turn = [[name] * 2 + [f"{name} done"] for name in (REFERENCE, "passes", "total")]
    last = [[name, f"{name} done"] for name in (REFERENCE, "passes", "total")]
    assert events == [event for each in (*turn, *last) for event in each]


def test_whole_texts_are_cut_where_the_others_step():
    texts = feeds(40, 7, 23)
    reference, passes = Wholly(), Wholly(noise=0.3)
    ports = {"passes": passes, "total": fake(noise=0.4)}
    got = compare(reference, ports, texts, also=ALSO, batch=2, decode_steps=9)
    stepped = compare(fake(), {**ports, "passes": fake(noise=0.3)}, texts, also=ALSO, batch=2, decode_steps=9)
    assert got == stepped  # the fake model is causal, and rounds no other way
    assert reference.calls == passes.calls == [2]  # all groups at once
    assert got["total"].decode.tokens > 0


def test_whole_texts_of_another_shape():
    class Last:
        def whole(self, texts):
            return (np.zeros((len(t), 1, VOCABULARY), np.float32) for t in texts)

    with pytest.raises(DriftError, match="PORT-0601"):
        compare(fake(), {"last": Last()}, feeds(9))


def test_a_record_gives_back_what_came(tmp_path):
    arrays = [np.random.default_rng(i).normal(size=s).astype(d) for i, (s, d) in enumerate(
        [((2, 3, 5), np.float32), ((1, 0, 4), np.float32), ((7,), np.float64), ((1, 1), np.float16)]
    )]  # fmt: skip
    record = Record(tmp_path)
    for array in arrays:
        record.append(array[::1])
    for _ in range(2):  # as often as one likes
        for wanted, got in zip(arrays, record, strict=True):
            assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert list(tmp_path.iterdir()) == []  # nameless: nothing is left when the process is killed


def test_a_full_disk(monkeypatch, tmp_path):
    record = Record(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record, "_file", Full())
    with pytest.raises(EnvironmentFailure, match=r"PORT-0901: the disk is full \[") as caught:
        record.append(np.zeros(3))
    assert str(tmp_path) in str(caught.value)

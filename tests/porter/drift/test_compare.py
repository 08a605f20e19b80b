"""Lockstep comparison against a computation that stores everything and takes no shortcut."""

import numpy as np
import pytest
from fake_session import VOCABULARY, Fake, fake
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.drift.compare import compare, cut, encode, perplexity
from porter.drift.feeds import TokenFeeds, random_tokens
from porter.drift.measures import Drift, log_softmax, score, score_hidden, summarize
from porter.errors import DriftError


def feeds(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return TokenFeeds(tuple(rng.integers(0, VOCABULARY, n) for n in lengths), "tokens", "test")


def whole(texts, window=None, **options):
    """All logits of all windows, each run alone and at once, and the window starts."""
    out = []
    for text, tokens in enumerate(texts.sequences):
        step = window or len(tokens)
        for at in range(0, len(tokens) - 1, step):
            part = tokens[at : at + step + 1]
            out.append((text, part, Fake(1, **options).step(part[None, :-1])[0]))
    return out


def expected(texts, window=None, keep=lambda seen: True, **options):
    pairs = zip(whole(texts, window), whole(texts, window, **options), strict=True)
    rows = [
        (text, score(a[i : i + 1], b[i : i + 1], part[i + 1 : i + 2]))
        for (text, part, a), (_, _, b) in pairs
        for i in range(len(a))
        if keep(i + 1)
    ]
    scores = type(rows[0][1]).concatenate([s for _, s in rows])
    return summarize(scores, np.array([t for t, _ in rows]))


def same(a, b):
    """Equal but for the order of float64 sums: 1e-12 is thousands of ulps, a real difference far above."""
    assert a.tokens == b.tokens
    for name in ("kl_mean", "kl_p999", "top1", "rms_dp", "ppl", "ppl_ratio", "max_abs", "sqnr_db"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12, abs=1e-15), name


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=9),
    batch=st.integers(1, 4),
    prefill=st.none() | st.integers(1, 40),
    decode_steps=st.integers(0, 12),
    window=st.none() | st.integers(1, 20),
    at=st.sampled_from([(), (3, 8, 9, 21)]),
)
@settings(max_examples=150, deadline=None)
def test_any_schedule_scores_every_position_once(lengths, batch, prefill, decode_steps, window, at):
    texts = feeds(*lengths)
    got = compare(
        fake(),
        {"moved": fake(noise=0.5)},
        texts,
        prefill=prefill,
        decode_steps=decode_steps,
        window=window,
        at=at,
        batch=batch,
    )["moved"]
    same(got.total, expected(texts, window, noise=0.5))
    assert got.total.tokens == sum(n - 1 for n in lengths)
    assert got.prefill.tokens + got.decode.tokens == got.total.tokens
    assert got.context_phase == ("decode" if at else "all")
    assert sum(d.tokens for _, d in got.context) == (got.decode if at else got.total).tokens


def test_equal_models_do_not_drift():
    got = compare(fake(), {"same": fake()}, feeds(100, 80), decode_steps=64, batch=2)["same"]
    assert (got.total.kl_mean, got.total.top1, got.total.ppl_ratio) == (0, 1, 1)


def test_steps_are_prefill_then_single_tokens():
    log = []
    got = compare(fake(log=log), {"same": fake()}, feeds(101), decode_steps=64)["same"]
    assert log == [36] + [1] * 64
    assert (got.prefill.tokens, got.decode.tokens, got.decode_steps, got.short) == (36, 64, (64, 64), 0)
    log.clear()
    compare(fake(log=log), {}, feeds(101), prefill=10, decode_steps=64)
    assert log == [10] + [1] * 64 + [26]


def test_tokens_before_context_lengths_are_single():
    log = []
    got = compare(fake(log=log), {"same": fake()}, feeds(151), decode_steps=4, at=(64, 128, 256))["same"]
    assert log == [60, 1, 1, 1, 1, 60, 1, 1, 1, 1, 22]
    assert (got.decode.tokens, got.decode_steps, got.short) == (8, (8, 8), 0)
    log.clear()
    got = compare(fake(log=log), {"same": fake()}, feeds(101, 81), decode_steps=128, at=(64, 128))["same"]
    assert log == [1] * 100 + [1] * 80
    assert (got.decode.tokens, got.decode_steps, got.short) == (99 + 79, (79, 99), 1)


def test_drift_by_context_length_is_that_of_single_tokens():
    """What moves only between the single tokens is in no context length; what moves there is in its own."""
    texts = feeds(*[131] * 9)
    got = compare(fake(), {"late": fake(noise=0.5, late=124)}, texts, decode_steps=8, at=(64, 128))["late"]
    rows = dict(got.context)
    assert [rows[n].tokens for n in rows] == [9 * 8, 9 * 8]
    assert rows[64].kl_mean == 0
    same(rows[128], expected(texts, keep=lambda seen: 120 < seen <= 128, noise=0.5, late=124))
    assert [row["phase"] for row in got.context_json()] == ["decode", "decode"]


def test_short_texts_are_said_to_be_short():
    got = compare(fake(), {"same": fake()}, feeds(10, 101), decode_steps=64)["same"]
    assert (got.texts, got.short, got.decode_steps) == (2, 1, (8, 64))
    assert got.decode.tokens == 72


def test_phases_are_kept_apart():
    """Drift that begins at position 40 shows in the decode steps and not in the prefill."""
    texts = feeds(*[105] * 10)
    got = compare(fake(), {"late": fake(noise=0.5, late=40)}, texts, decode_steps=64, batch=4)["late"]
    assert got.prefill.kl_mean == 0
    same(got.decode, expected(texts, keep=lambda seen: seen > 40, noise=0.5, late=40))


def test_buckets_by_context_length():
    texts = feeds(*[200] * 9)
    got = dict(compare(fake(), {"late": fake(noise=0.5, late=64)}, texts)["late"].context)
    assert list(got) == [64, 128, 256]
    assert got[64].kl_mean == 0
    same(got[128], expected(texts, keep=lambda seen: 64 < seen <= 128, noise=0.5, late=64))
    assert got[256].tokens == 9 * (199 - 128)


def test_context_as_json():
    rows = compare(fake(), {"same": fake()}, feeds(100))["same"].context_json()
    assert [(r["tokens"], r["positions"]) for r in rows] == [(64, 64), (128, 35)]


def test_windows_begin_from_an_empty_cache():
    texts = feeds(50)
    got = compare(fake(limit=20), {"moved": fake(noise=0.1, limit=20)}, texts, window=20, decode_steps=4)[
        "moved"
    ]
    same(got.total, expected(texts, window=20, noise=0.1))
    assert [len(w.tokens) for w in cut(texts, 20)] == [21, 21, 10]
    assert [len(w.tokens) for w in cut(feeds(41), 20)] == [21, 21]


def test_pairs_of_candidates():
    texts = feeds(30, 40)
    makers = {"passes": fake(noise=0.3), "total": fake(noise=0.5)}
    got = compare(fake(), makers, texts, also={"lowering": ("passes", "total")})
    direct = compare(fake(noise=0.3), {"x": fake(noise=0.5)}, texts)["x"]
    assert got["lowering"].total == direct.total
    assert list(got) == ["passes", "total", "lowering"]


def test_a_candidate_that_breaks_late_is_infinitely_far():
    got = compare(fake(), {"bad": fake(bad=80)}, feeds(100), decode_steps=64)["bad"]
    assert got.total.kl_mean == np.inf
    assert got.decode.kl_mean == np.inf
    assert got.prefill.kl_mean == 0
    assert got.total.top1 == pytest.approx(98 / 99)


def test_padding_is_never_scored():
    """The candidate is broken from position 20 on, where the short text has only padding."""
    got = compare(fake(), {"bad": fake(bad=25)}, feeds(21, 22, 24), batch=3, decode_steps=2)["bad"]
    assert got.total.kl_mean == 0


def test_a_broken_reference_is_an_error_that_says_where():
    with pytest.raises(DriftError, match="PORT-0602") as error:
        compare(fake(bad=5), {"same": fake()}, feeds(30), decode_steps=4)
    assert "text 0, positions 0 to 24" in str(error.value)


def test_logits_of_another_shape():
    class Last(Fake):
        def step(self, tokens, real=None):
            return super().step(tokens)[:, -1:]

    with pytest.raises(DriftError, match="PORT-0601"):
        compare(fake(), {"last": Last}, feeds(30), decode_steps=4)


def test_progress_reaches_the_end():
    seen = []
    compare(fake(), {"same": fake()}, feeds(5, 6, 7), batch=2, progress=lambda *p: seen.append(p))
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]  # both models' windows
    seen.clear()
    perplexity(fake(), feeds(5, 6, 7), batch=2, progress=lambda *p: seen.append(p))
    assert seen == [(2, 3), (3, 3)]


def test_perplexity_by_the_direct_formula():
    texts = feeds(30, 45, 7)
    for window, batch in ((None, 1), (None, 3), (10, 1), (10, 4)):
        nll = [
            -log_softmax(logits)[i, part[i + 1]]
            for _, part, logits in whole(texts, window)
            for i in range(len(logits))
        ]
        got = perplexity(fake(), texts, window=window, batch=batch)
        assert got.tokens == len(nll) == 79
        assert got.nll == pytest.approx(np.mean(nll), rel=1e-12)
        assert got.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-12)


def test_perplexity_of_a_broken_model_is_infinite():
    assert perplexity(fake(bad=3), feeds(30)).ppl == np.inf


def test_perplexity_agrees_with_the_comparison():
    texts = random_tokens(VOCABULARY, count=3, length=40)
    got = compare(fake(), {"moved": fake(noise=0.5)}, texts)["moved"].total
    assert perplexity(fake(noise=0.5), texts).ppl == pytest.approx(got.ppl, rel=1e-12)
    assert got.ppl / perplexity(fake(), texts).ppl == pytest.approx(got.ppl_ratio, rel=1e-12)


def test_encoders_are_compared_where_there_is_text():
    table = np.random.default_rng(1).normal(size=(VOCABULARY, 6))

    def hidden(scale):
        def run(tokens, mask):
            mixed = (table[tokens] * mask[..., None]).sum(1, keepdims=True)
            out = table[tokens] + mixed * scale
            out[mask == 0] = np.nan  # what a model leaves under the padding is nobody's business
            return out

        return run

    texts = feeds(9, 5, 7)
    got = encode(hidden(1), {"other": hidden(1.1)}, texts, batch=2)["other"].total
    rows = [
        score_hidden(*(run(t[None], np.ones((1, len(t)), int))[0] for run in (hidden(1), hidden(1.1))))
        for t in texts.sequences
    ]
    want = summarize(type(rows[0]).concatenate(rows), np.zeros(21, int))
    assert got.tokens == 21
    assert got.cosine == pytest.approx(want.cosine, rel=1e-12)
    assert got.sqnr_db == pytest.approx(want.sqnr_db, rel=1e-12)
    assert got.kl_mean is None
    assert got != Drift()

"""A small causal 'model' in numpy with a cache, for tests of what runs models."""

import numpy as np

VOCABULARY = 13


class Fake:
    """Logits at a position depend on all tokens seen there, through a decaying sum of random rows.

    `noise` moves the logits, `late` only from that position on; `limit` refuses more tokens than a cache
    would hold.
    """

    def __init__(self, batch, noise=0.0, late=0, limit=10**9, bad=None, log=None):
        rng = np.random.default_rng(0)
        self.table = rng.normal(size=(VOCABULARY, VOCABULARY)) * 2
        self.away = rng.normal(size=(VOCABULARY, VOCABULARY))
        self.state = np.zeros((batch, VOCABULARY))
        self.batch, self.noise, self.late, self.limit, self.bad = batch, noise, late, limit, bad
        self.length = 0
        self.log = [] if log is None else log

    def step(self, tokens, real=None):
        assert tokens.dtype == np.int64
        assert tokens.shape[0] == self.batch
        self.log.append(tokens.shape[1])
        out = np.empty((*tokens.shape, VOCABULARY), np.float32)
        for i in range(tokens.shape[1]):
            self.state = 0.7 * self.state + self.table[tokens[:, i]]
            moved = self.noise * self.away[tokens[:, i]] if self.length >= self.late else 0
            out[:, i] = self.state + moved
            if self.length == self.bad:
                out[:, i] = np.nan
            self.length += 1
        assert self.length <= self.limit
        return out


def fake(**options):
    return lambda batch: Fake(batch, **options)

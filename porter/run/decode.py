"""Decoding: a session that keeps the caches between steps, and ways to choose the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from porter.context import Feeds
from porter.decoder import Decoder
from porter.errors import ModelError, OptionError
from porter.run.feeds import empty_caches, feeds
from porter.run.protocol import Runner
from porter.run.tally import Tally

Sample = Callable[[np.ndarray], int]


class Decode:
    """A decoding session of `batch` rows in step; `length` is the number of tokens that each row has cached.

    `tally` counts, of a cache with an exact copy, how often that was read; others may count in it too.
    Raises ModelError PORT-0144 when the model has inputs that porter cannot fill.
    """

    def __init__(self, runner: Runner, decoder: Decoder, batch: int = 1, tally: Tally | None = None) -> None:
        if decoder.others:
            what = f"the model has inputs porter has no meaning for: {', '.join(decoder.others)}"
            raise ModelError("PORT-0144", what, hint="export it without them")
        self._runner, self._decoder, self._batch = runner, decoder, batch
        self.tally = Tally() if tally is None else tally
        self._limit = min((n for n in (decoder.capacity, decoder.context) if n), default=0)
        self._vocabulary = runner.outputs[decoder.output].shape[-1] if decoder.cache != "none" else ""
        self._steps = (*runner.inputs[decoder.tokens].shape, "", "")[1]  # the name of the sequence's axis
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self.caches: Feeds = empty_caches(self._decoder, self._runner.inputs, self._batch)

    def step(self, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
        """Feed `tokens` int[batch, sequence] and return float32 [batch, sequence, vocabulary].

        `real`, bool [batch, sequence], says which tokens are no padding, None that all are: they are tallied.
        More tokens than the runner takes at once are fed in pieces. An encoder returns its hidden states, and
        remembers nothing. Raises OptionError PORT-0141 for tokens of another batch or outside the vocabulary,
        PORT-0142 when they exceed the cache or the context.
        """
        tokens = np.asarray(tokens)
        self._check(tokens)
        most = self._runner.bounds.get(str(self._steps), 0) if self._decoder.caches else 0
        if not most or tokens.shape[1] <= most:
            return self._feed(tokens, real)
        pieces = [slice(at, at + most) for at in range(0, tokens.shape[1], most)]
        fed = [self._feed(tokens[:, p], None if real is None else real[:, p]) for p in pieces]
        return np.concatenate(fed, axis=1)

    def _feed(self, tokens: np.ndarray, real: np.ndarray | None) -> np.ndarray:
        step = feeds(self._decoder, tokens, self.length, self.caches, self._runner.inputs)
        outputs = self._runner.run(step)
        self.tally.add((outputs[name] for name in self._decoder.exact), real)
        if self._decoder.caches:
            self.caches = {c.past: outputs[c.present] for c in self._decoder.caches}
            self.length += tokens.shape[1]
        return outputs[self._decoder.output].astype(np.float32, copy=False)

    def _check(self, tokens: np.ndarray) -> None:
        if tokens.ndim != 2 or len(tokens) != self._batch or not tokens.size or tokens.dtype.kind not in "iu":
            what = f"a step wants integers [{self._batch}, sequence], not {tokens.dtype} {list(tokens.shape)}"
            raise OptionError("PORT-0141", what, where=self._decoder.tokens)
        top = self._vocabulary if isinstance(self._vocabulary, int) else tokens.max() + 1
        if tokens.min() < 0 or tokens.max() >= top:
            bad = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise OptionError(
                "PORT-0141", f"the token {bad} is not in the vocabulary", where=self._decoder.tokens
            )
        total = self.length + tokens.shape[1]
        if self._limit and total > self._limit:
            full = "cache" if self._limit == self._decoder.capacity else "context"
            what = f"{total} tokens do not fit the model's {full} of {self._limit}"
            raise OptionError("PORT-0142", what, hint="shorten the prompt, or ask for fewer new tokens")


def generate(
    decode: Decode,
    prompt: Sequence[int],
    max_new: int,
    sample: Sample | None = None,
    eos: Collection[int] | None = None,
) -> Iterator[int]:
    """Yield up to `max_new` tokens after `prompt`, which is fed first; ends before a token of `eos`.

    `sample` picks a token from logits float32 [vocabulary] (None: the likeliest); `eos` None means the
    model's own. Raises what `Decode.step` does.
    """
    sample, ends = sample or greedy, decode._decoder.eos if eos is None else eos
    tokens = np.asarray(prompt, np.int64)[None]
    for _ in range(max_new):
        token = sample(decode.step(tokens)[0, -1])
        if token in ends:
            return
        yield token
        tokens = np.array([[token]], np.int64)


def greedy(logits: np.ndarray) -> int:
    """The likeliest token; of equals the first."""
    return int(logits.argmax())


def sampler(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Sample:
    """Random choice by logits / temperature, of the `top_k` likeliest (0: all), cut where `top_p` is reached.

    The same seed gives the same tokens. Temperature 0 is `greedy`. Raises OptionError PORT-0146 for values
    out of range.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        what = f"cannot sample with temperature {temperature}, top-k {top_k}, top-p {top_p}"
        raise OptionError("PORT-0146", what, hint="temperature >= 0, top-k >= 0, 0 < top-p <= 1")
    if temperature == 0:
        return greedy
    generator = np.random.default_rng(seed)

    def sample(logits: np.ndarray) -> int:
        order, p = candidates(logits, temperature, top_k, top_p)
        return int(generator.choice(order, p=p))

    return sample


def candidates(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, likeliest first, and their probabilities, which sum to 1."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1  # the one that reaches top_p is in
    order, p = order[:keep], p[:keep]
    return order, p / p.sum()

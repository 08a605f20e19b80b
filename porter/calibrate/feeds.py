"""Calibration feeds: from a file, by the model itself, or random on demand; never what is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from porter.context import Feeds
from porter.drift import feeds as feeding
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import RANDOM, Runnable
from porter.errors import OptionError
from porter.pipeline import Pipeline
from porter.run.feeds import feeds as step

WINDOW = 512  # tokens of one feed at most; longer texts are cut
TOKENS = 1 << 17  # of a file, the first so many
LENGTH, TEXTS, BATCH = 256, 32, 8  # of texts that the model writes itself, BATCH of them side by side
SEEDS = 1 << 32  # calibration texts are drawn from seeds from here on, measured ones from seeds below


@dataclass(frozen=True)
class Calibration:
    """A step of one row for each text, and what a report says of them; empty when no pass wants any."""

    feeds: tuple[Feeds, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)


def calibration(
    pipeline: Pipeline, model: Runnable, data: str, seed: int, measured: TokenFeeds
) -> Calibration:
    """What the passes that calibrate are fed: the user's text or tokens in the file `data`; else text that
    the model itself writes, from other seeds than what is measured; random tokens when `data` is "random".

    Raises OptionError PORT-0294 when a text is also among `measured`, PORT-0295 for an encoder without data
    (it cannot write), PORT-0296 for data that no pass wants, and what reading a file raises.
    """
    if not any(p.calibrates for p in pipeline.passes):
        if data:
            hint = "leave --calibration out, or choose a method that looks at activations: gptq, awq"
            raise OptionError("PORT-0296", "no pass looks at calibration data", where=data, hint=hint)
        return Calibration()
    texts = _texts(model, data, seed, measured)
    texts.check(model.vocabulary)
    length = min(n for n in (WINDOW, model.decoder.context, model.decoder.capacity) if n)
    rows = _windows(texts, length)
    counts = {"sequences": len(rows), "tokens": sum(len(row) for row in rows)}
    caches = model.session(1).caches  # without tokens, so all rows can share them
    inputs = model.runner.inputs
    fed = tuple(step(model.decoder, row[None], 0, caches, inputs) for row in rows)
    return Calibration(fed, {"kind": texts.kind, "source": texts.source, **counts, "seed": texts.seed})


def _texts(model: Runnable, data: str, seed: int, measured: TokenFeeds) -> TokenFeeds:
    if data and data != RANDOM:
        return _apart(feeding.from_file(Path(data), model.words), measured)
    length = min(LENGTH, model.decoder.context or LENGTH)
    if data == RANDOM:
        return feeding.random_tokens(
            model.vocabulary, count=TEXTS, length=length, seed=seed + SEEDS, bos=model.bos
        )
    if model.decoder.cache == "none":
        raise OptionError("PORT-0295", "an encoder cannot write its own calibration text", where=model.name,
                          hint="give --calibration FILE, or --calibration random")  # fmt: skip
    return _written(model, length, seed, measured)


def _written(model: Runnable, length: int, seed: int, measured: TokenFeeds) -> TokenFeeds:
    """Texts of the model's own, without those that it also wrote to be measured on."""
    known, kept = _known(measured), []
    for i in range(TEXTS // BATCH):
        drawn = (seed * TEXTS + i) + SEEDS
        made = feeding.self_generated(
            model.session,
            bos=model.bos or 0,
            length=length,
            count=BATCH,
            seed=drawn,
            eos=model.decoder.eos,
        )
        kept += [tokens for tokens in made.sequences if tuple(tokens.tolist()) not in known]
    if not kept:
        what = "all text that the model writes for calibration is what drift is measured on"
        raise OptionError("PORT-0294", what, where=model.name, hint="give --calibration FILE or --data FILE")
    return TokenFeeds(tuple(kept), made.kind, made.source, seed + SEEDS)


def _apart(texts: TokenFeeds, measured: TokenFeeds) -> TokenFeeds:
    known = _known(measured)
    shared = sum(tuple(tokens.tolist()) in known for tokens in texts.sequences)
    if shared:
        what = f"{shared} of {len(texts.sequences)} calibration texts are what drift is measured on"
        hint = "the drift would look smaller than it is; measure or calibrate on other text"
        raise OptionError("PORT-0294", what, where=texts.source, hint=hint)
    return texts


def _known(measured: TokenFeeds) -> set[tuple[int, ...]]:
    return {tuple(tokens.tolist()) for tokens in measured.sequences}


def _windows(texts: TokenFeeds, length: int) -> list:
    """Consecutive pieces, int64 [at most `length`], of TOKENS tokens in all."""
    rows, left = [], TOKENS
    for tokens in texts.sequences:
        tokens = tokens[:left]
        left -= len(tokens)
        rows += [tokens[at : at + length] for at in range(0, len(tokens), length)]
    return rows

"""Measure a port: reference, passes' result and lowered result on the same feeds, decoder or encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from porter import decoder as decoders
from porter import graph, tokenizer
from porter.bundle import Bundle
from porter.decoder import Decoder
from porter.drift import feeds as feeding
from porter.drift.compare import CONTEXTS, Comparison, compare, encode
from porter.drift.feeds import TokenFeeds
from porter.errors import OptionError
from porter.run.decode import Decode
from porter.run.feeds import feeds as step_feeds
from porter.run.protocol import Runner
from porter.run.reference import ReferenceRunner
from porter.tokenizer import Tokenizer

Fraction = Callable[[float], None]

BATCH = 8  # windows that run side by side at most: a step reads all weights, however many rows it has
LOGIT_BYTES = (
    256 << 20
)  # of one model's longest step; fewer windows run side by side where they would need more
LENGTH = 129  # tokens of a text that the model writes itself: 64 prefilled, 64 decoded through the cache
FULL = 513  # tokens of one that is to fill a cache: each length up to 512 is then met
TEXTS = 8
SINGLE = 16  # tokens before each context length that go through a quantized cache one at a time
RANDOM = "random"


@dataclass(frozen=True)
class Runnable:
    """A model that can be run: an ONNX file or a bundle. `vocabulary` is how many tokens it knows."""

    name: str
    runner: Runner
    decoder: Decoder
    vocabulary: int
    bos: int | None
    words: Tokenizer | None

    @classmethod
    def of(cls, path: Path) -> Runnable:
        """Open `path`: a folder is a bundle, anything else an ONNX file. Raises what opening them does."""
        if path.is_dir():
            bundle = Bundle.open(path)
            model, runner, words = graph.load(bundle.model), bundle.runner(), bundle.tokenizer()
            return cls.over(path.name, runner, bundle.decoder, model, words)
        model = graph.load(path)
        words = find_tokenizer(path)
        return cls.over(path.name, ReferenceRunner(path), decoders.recognise(model), model, words)

    @classmethod
    def over(
        cls, name: str, runner: Runner, decoder: Decoder, model: ir.Model, words: Tokenizer | None
    ) -> Runnable:
        """A runner of `model`, which says what the runner's interface means."""
        said = model.metadata_props.get("porter.bos", "")
        bos = int(said) if said.isdigit() else words.bos if words else None
        return cls(name, runner, decoder, _vocabulary(model, decoder), bos, words)

    def session(self, batch: int) -> Decode:
        """A decoding session."""
        return Decode(self.runner, self.decoder, batch)

    def encode(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """An encoder's hidden states of tokens and mask, int64 [batch, n]."""
        feeds = step_feeds(self.decoder, tokens, 0, {}, self.runner.inputs)
        if self.decoder.mask:
            feeds[self.decoder.mask] = mask.astype(self.runner.inputs[self.decoder.mask].dtype)
        return self.runner.run(feeds)[self.decoder.output]


def find_tokenizer(model: Path) -> Tokenizer | None:
    """The tokenizer of an ONNX file: in `<stem>.tokenizer/` or `tokenizer/` beside it, or loose beside it."""
    files = tokenizer_files(model)
    return tokenizer.load(files[0].parent) if files else None


def tokenizer_files(model: Path) -> list[Path]:
    """The files of that tokenizer."""
    places = (model.parent / f"{model.stem}.tokenizer", model.parent / "tokenizer", model.parent)
    return next((found for p in places if p.is_dir() and (found := tokenizer.files(p))), [])


def feeds_for(model: Runnable, data: str, seed: int, *, full: bool = False) -> TokenFeeds:
    """The user's text or tokens; else text that the model itself writes; random tokens when `data` is
    "random". `full`: what is not the user's is to fill a cache, and the model writes on where a text ends.

    Raises OptionError PORT-0831 for an encoder without data (it cannot write), and what reading a file
    raises.
    """
    context = model.decoder.context + full  # the last token of a text is not fed
    length = min(FULL if full else LENGTH, context if model.decoder.context else FULL)
    if data == RANDOM:
        return feeding.random_tokens(model.vocabulary, count=TEXTS, length=length, seed=seed, bos=model.bos)
    if data:
        return feeding.from_file(Path(data), model.words)
    if model.decoder.cache == "none":
        raise OptionError("PORT-0831", "an encoder cannot write its own text", where=model.name,
                          hint="give --data FILE, or --data random")  # fmt: skip
    eos = () if full else model.decoder.eos
    return feeding.self_generated(
        model.session, bos=model.bos or 0, length=length, count=TEXTS, seed=seed, eos=eos
    )


def measure(
    reference: Runnable,
    candidates: Mapping[str, Runnable],
    feeds: TokenFeeds,
    progress: Fraction,
    single: int = 0,
) -> dict[str, Comparison]:
    """Compare candidates with the reference; given "passes" and "total", also those two, as "lowering".

    `single` > 0: so many tokens before each context length (64, 128, 256, …) go through the cache one at a
    time, and drift by context length is theirs; 0: 64 at the end of each text.
    """
    feeds.check(reference.vocabulary)
    also = {"lowering": ("passes", "total")} if {"passes", "total"} <= candidates.keys() else {}
    everything = [reference, *candidates.values()]
    window = limit(everything)

    def watch(done: int, total: int) -> None:
        progress(done / total)

    batch = _side_by_side(feeds, window, reference.vocabulary)
    if reference.decoder.cache == "none":
        encoders = {name: r.encode for name, r in candidates.items()}
        return encode(
            reference.encode, encoders, feeds, window=window, batch=batch, also=also, progress=watch
        )
    sessions = {name: r.session for name, r in candidates.items()}
    schedule = {"decode_steps": single, "at": CONTEXTS} if single else {}
    return compare(
        reference.session,
        sessions,
        feeds,
        window=window,
        batch=batch,
        also=also,
        progress=watch,
        **schedule,
    )


def limit(models: Iterable[Runnable]) -> int | None:
    """The most tokens that all of the models can see; None where nothing limits them."""
    return min((n for r in models for n in (r.decoder.capacity, r.decoder.context) if n), default=None)


def _side_by_side(feeds: TokenFeeds, window: int | None, vocabulary: int) -> int:
    """How many windows run in one batch."""
    longest = max(len(tokens) for tokens in feeds.sequences)
    longest = min(longest, window or longest)
    return max(1, min(BATCH, LOGIT_BYTES // (4 * longest * vocabulary)))


def _vocabulary(model: ir.Model, decoder: Decoder) -> int:
    """How many tokens there are: the logits' last axis, or the rows of the table that tokens pick from."""
    if decoder.cache != "none":
        output = next(v for v in model.graph.outputs if v.name == decoder.output)
        if output.shape is not None and isinstance(output.shape[-1], int):
            return output.shape[-1]
    tokens = next(v for v in model.graph.inputs if v.name == decoder.tokens)
    tables = [u.node.inputs[0] for u in tokens.uses() if u.node.op_type == "Gather" and u.idx == 1]
    sizes = [int(t.const_value.shape[0]) for t in tables if t is not None and t.const_value is not None]
    return sizes[0] if sizes else np.iinfo(np.int32).max

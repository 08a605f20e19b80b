"""Measure a port: reference, passes' result and lowered result on the same feeds, decoder or encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from porter import decoder as decoders
from porter import graph, tokenizer
from porter.bundle import Bundle
from porter.decoder import Decoder
from porter.drift import feeds as feeding
from porter.drift.compare import CONTEXTS, REFERENCE, Comparison, Maker, compare, encode
from porter.drift.feeds import TokenFeeds
from porter.drift.streamed import Forward, Streamed
from porter.errors import OptionError
from porter.run.decode import Decode
from porter.run.feeds import feeds as step_feeds
from porter.run.protocol import Runner
from porter.run.reference import ReferenceRunner
from porter.run.tally import Tally
from porter.tokenizer import Tokenizer

Fraction = Callable[[float], None]

BATCH = 8  # windows that run side by side at most: a step reads all weights, however many rows it has
LOGIT_BYTES = (
    256 << 20
)  # of one model's longest step; fewer windows run side by side where they would need more
LENGTH = 129  # tokens of a text that the model writes itself: 64 prefilled, 64 decoded through the cache
FULL = 513  # tokens of one that is to fill a cache: each length up to 512 is then met
STEPS = 64  # tokens of a window that are decoded one at a time
FEW_STEPS = 4  # where memory does not hold the weights: each step reads all of them from the disk
TEXTS = 8
SINGLE = 16  # tokens before each context length that go through a quantized cache one at a time
RANDOM = "random"
WORK = 150e9  # weights times steps that a model may write texts with: a step reads every weight from memory
SHORTEST = 17  # tokens of a text, however large the model
SPOOLED = 4 << 30  # bytes of logits that wait in a file for the models that come after


@dataclass(frozen=True)
class Runnable:
    """A model that can be run: an ONNX file or a bundle, opened when `runner` is asked for.

    `vocabulary` is how many tokens it knows, `size` how many weights it has; `whole`: measured on whole texts
    at once, not stepping through its cache; `streamed`: so, and a piece of the graph at a time. `tally` is
    that of all its sessions.
    """

    name: str
    open: Callable[[], Runner]
    decoder: Decoder
    vocabulary: int
    bos: int | None
    words: Tokenizer | None
    size: int = 0
    whole: bool = False
    streamed: Streamed | None = None
    tally: Tally = field(default_factory=Tally, compare=False)

    @functools.cached_property
    def runner(self) -> Runner:
        """What runs it."""
        return self.open()

    def close(self) -> None:
        """Let go of what runs it; it is opened again when it is needed again."""
        self.__dict__.pop("runner", None)

    @property
    def maker(self) -> Maker:
        """How it is measured."""
        if self.streamed is not None:
            return self.streamed
        return Forward(self.session) if self.whole else self.session

    @classmethod
    def of(cls, path: Path) -> Runnable:
        """Open `path`: a folder is a bundle, anything else an ONNX file. Raises what opening them does."""
        if path.is_dir():
            bundle = Bundle.open(path)
            model = graph.load(bundle.model)
            found = cls.over(path.name, bundle.runner, bundle.decoder, model, bundle.tokenizer())
        else:
            found = cls.of_onnx(path, graph.load(path))
        found.runner  # noqa: B018 (a model that cannot be run is refused here)
        return found

    @classmethod
    def of_onnx(cls, path: Path, model: ir.Model, **way: object) -> Runnable:
        """The ONNX file `path`, which was loaded as `model`; `way` is `whole` or `streamed`."""
        decoder = decoders.recognise(model)
        return cls.over(path.name, lambda: ReferenceRunner(path), decoder, model, find_tokenizer(path), **way)

    @classmethod
    def over(
        cls,
        name: str,
        runner: Callable[[], Runner],
        decoder: Decoder,
        model: ir.Model,
        words: Tokenizer | None,
        **way: object,
    ) -> Runnable:
        """What `runner` opens runs `model`, which says what the runner's interface means."""
        said = model.metadata_props.get("porter.bos", "")
        bos = int(said) if said.isdigit() else words.bos if words else None
        size = graph.float_count(model)
        return cls(name, runner, decoder, vocabulary(model, decoder), bos, words, size, **way)  # type: ignore[arg-type]

    def session(self, batch: int) -> Decode:
        """A decoding session."""
        return Decode(self.runner, self.decoder, batch, self.tally)

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
    "random", and for a model that is too large for memory to write. `full`: what is not the user's is to fill
    a cache, and the model writes on where a text ends.

    Raises OptionError PORT-0831 for an encoder without data (it cannot write), and what reading a file
    raises.
    """
    length, count = length_of(model, full=full), TEXTS
    if data == RANDOM or (not data and model.streamed):
        count = TEXTS if data else 2
        return feeding.random_tokens(model.vocabulary, count=count, length=length, seed=seed, bos=model.bos)
    if data:
        return feeding.from_file(Path(data), model.words)
    if model.decoder.cache == "none":
        raise OptionError("PORT-0831", "an encoder cannot write its own text", where=model.name,
                          hint="give --data FILE, or --data random")  # fmt: skip
    eos = () if full else model.decoder.eos
    return feeding.self_generated(
        model.session, bos=model.bos or 0, length=length, count=count, seed=seed, eos=eos
    )


def length_of(model: Runnable, *, full: bool = False) -> int:
    """Tokens of a text that nobody gave: fewer of a large model, which takes long to write each. `full`: one
    more than the context has, since the last is not fed."""
    longest = FULL if full else LENGTH
    longest = min(longest, model.decoder.context + full if model.decoder.context else longest)
    return min(longest, max(SHORTEST, int(WORK / max(1, model.size))))


def measure(
    reference: Runnable,
    candidates: Mapping[str, Runnable],
    feeds: TokenFeeds,
    progress: Fraction,
    folder: Path | None = None,
    single: int = 0,
    pairs: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> dict[str, Comparison]:
    """Compare candidates with the reference, and with each other as `pairs` asks for; given "passes" and
    "total", also those two, as "lowering".

    The models are open one after the other. Logits of one that others are compared with wait in `folder`.
    `single` > 0: so many tokens before each context length (64, 128, 256, …) go through the cache one at a
    time, and drift by context length is theirs; 0: 64 at the end of each text.
    """
    feeds.check(reference.vocabulary)
    also = dict(pairs)
    if {"passes", "total"} <= candidates.keys():
        also["lowering"] = ("passes", "total")
    everything = [reference, *candidates.values()]
    window = min((n for r in everything for n in (r.decoder.capacity, r.decoder.context) if n), default=None)

    def watch(done: int, total: int) -> None:
        progress(done / total)

    def done(name: str) -> None:
        (reference if name == REFERENCE else candidates[name]).close()

    batch = side_by_side(feeds, window, reference.vocabulary)
    common = {
        "window": window,
        "batch": batch,
        "also": also,
        "folder": folder,
        "done": done,
        "progress": watch,
    }
    if reference.decoder.cache == "none":
        encoders = {name: r.encode for name, r in candidates.items()}
        return encode(reference.encode, encoders, feeds, **common)
    makers = {name: r.maker for name, r in candidates.items()}
    positions = max(1, SPOOLED // (4 * reference.vocabulary))
    steps = FEW_STEPS if reference.streamed else single or STEPS
    schedule = {"decode_steps": steps, "at": CONTEXTS if single else ()}
    return compare(reference.maker, makers, feeds, positions=positions, **common, **schedule)


def side_by_side(feeds: TokenFeeds, window: int | None, vocabulary: int) -> int:
    """How many windows run in one batch."""
    longest = max(len(tokens) for tokens in feeds.sequences)
    longest = min(longest, window or longest)
    pieces = sum(-(-(len(tokens) - 1) // (window or len(tokens))) for tokens in feeds.sequences)
    return max(1, min(BATCH, pieces, LOGIT_BYTES // (4 * longest * vocabulary)))


def vocabulary(model: ir.Model, decoder: Decoder) -> int:
    """How many tokens there are: the logits' last axis, or the rows of the table that tokens pick from."""
    if decoder.cache != "none":
        output = next(v for v in model.graph.outputs if v.name == decoder.output)
        if output.shape is not None and isinstance(output.shape[-1], int):
            return output.shape[-1]
    tokens = next(v for v in model.graph.inputs if v.name == decoder.tokens)
    tables = [u.node.inputs[0] for u in tokens.uses() if u.node.op_type == "Gather" and u.idx == 1]
    sizes = [int(t.const_value.shape[0]) for t in tables if t is not None and t.const_value is not None]
    return sizes[0] if sizes else np.iinfo(np.int32).max

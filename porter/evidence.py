"""Evidence: the reference that a conversion is measured against, and the measuring."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from porter import bundle, decoder, exported, graph, needs
from porter.context import Context
from porter.drift import attention
from porter.drift import measure as measuring
from porter.drift.attribution import EXACT, EXPORT, PASSES, TOTAL, Attribution, Chain, Part, Trail
from porter.drift.depth import depth
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import Runnable, feeds_for, measure
from porter.drift.plain import round_to_bfloat16
from porter.drift.streamed import Interface, Streamed
from porter.options import Options, Progress
from porter.pipeline import Pipeline, Step
from porter.run.opening import executes
from porter.run.reference import ReferenceRunner
from porter.run.tally import Tally

if TYPE_CHECKING:
    from porter.drift.compare import Comparison
    from porter.drift.depth import Level
    from porter.drift.measures import Drift
    from porter.explain import Misses
    from porter.run.protocol import Runner
    from porter.tokenizer import Tokenizer

PLAIN = "bf16"


@dataclass(frozen=True)
class Evidence:
    """What is known before any work: the `reference`, the user's `feeds` where there are any, the memory that
    measuring will take (`plan`), and how many tokens before each context length are decoded one at a time
    (`single`; 0 where no cache is quantized)."""

    reference: Runnable
    feeds: TokenFeeds | None
    plan: needs.Plan
    single: int

    def texts(self, options: Options) -> TokenFeeds:
        """The user's feeds, or what `options.data` asks for: the model's own texts or random tokens."""
        return self.feeds or feeds_for(self.reference, options.data, options.seed, full=bool(self.single))

    @property
    def unattributed(self) -> str:
        """Why prefixes of the pipeline are not measured; "" where they are."""
        if not self.reference.whole and not self.reference.streamed:
            return ""
        size, limit = self.reference.size, int(needs.STEPPED)
        return f"the model has {size:,} weights, and it is run once more for each part up to {limit:,}"


@dataclass(frozen=True)
class Port:
    """What a conversion made of the file `source`: `model`, which is in the bundle's `folder` after its
    passes, its interface, the `trail` of the passes and their `steps`. `exactly` lowers the model into a
    folder for a host that computes in float32; None where that is what the bundle has."""

    source: Path
    model: ir.Model
    decoder: decoder.Decoder
    folder: Path
    trail: Trail
    steps: Sequence[Step]
    exactly: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Measured:
    """Drift of the model after its passes and of the lowered program, what a quantized cache does to each
    head of a model that can be opened, and how often attention was computed from an exact copy. `executed`:
    on a device, by the kernels that were made for it. `plain` is the model as it was, run in bfloat16."""

    drift: Mapping[str, Comparison]
    heads: list[attention.Head]
    recomputed: Mapping[str, Tally]
    executed: bool = False
    attribution: Attribution = field(default_factory=Attribution)
    plain: Drift | None = None
    depth: Sequence[Level] = ()
    near_misses: Sequence[Misses] = ()

    def told(self) -> dict[str, Any]:
        """What a report has by the same names."""
        fields = ("recomputed", "attribution", "plain", "depth", "near_misses")
        return {"attention": self.heads} | {name: getattr(self, name) for name in fields}


def gather(source: Path, model: ir.Model, options: Options, limit: int, single: int) -> Evidence:
    """The evidence of a conversion; `limit` is that of memory in bytes, 0 for none.

    Raises EnvironmentFailure PORT-0905 when measuring takes more than the limit.
    """
    whole = graph.float_count(model) > needs.STEPPED
    reference = Runnable.of_onnx(source, model, whole=whole)
    given = options.data and options.data != measuring.RANDOM
    feeds = feeds_for(reference, options.data, options.seed) if given else None
    longest = max(map(len, feeds.sequences)) if feeds else measuring.length_of(reference, full=bool(single))
    window = reference.decoder.context or longest
    rows = measuring.side_by_side(feeds, window, reference.vocabulary) if feeds else measuring.TEXTS
    sizes = needs.Sizes.of(model, reference.decoder, rows, min(longest, window), reference.vocabulary)
    plan = needs.plan(sizes, limit)
    if plan.piece:
        streamed = Streamed(source, reference.decoder, plan.piece)
        reference = replace(reference, streamed=streamed, open=lambda: Interface(model))
    return Evidence(reference, feeds, plan, single)


def standard(model: ir.Model) -> ir.Model:
    """The model in the standard operators that the lowering reads."""
    if "com.microsoft" in model.opset_imports:
        Pipeline.parse("clean.contrib,clean.dead").run(model, Context())
    return model


def measured(evidence: Evidence, feeds: TokenFeeds, port: Port, progress: Progress) -> Measured:
    """Measure on `feeds` what the port is, and where its drift comes from."""
    reference, folder = evidence.reference, port.folder
    progress("measure", 0.0)
    with _measurable(folder) as path:
        ports = _ports(evidence, port, path)
        chain, more = _traced(evidence, port, path)
        candidates = {name: (ports | more)[name] for name in dict.fromkeys([*chain.steps, *ports, *more])}
        kept = _in_folder(reference, folder)
        told = lambda f: progress("measure", f)  # noqa: E731
        drift = measure(kept, candidates, feeds, told, folder, evidence.single, chain.pairs)
        levels = [] if port.trail.skipped else depth(port.source, path, feeds.sequences[: measuring.TEXTS])
    port.trail.close()
    executed = executes(ports[TOTAL].runner)
    export = exported.read(port.source, graph.digest(port.source))
    exports = [Part(EXPORT, (), export, export)] if export else []
    found = Measured(
        {name: drift[name] for name in (PASSES, TOTAL, "lowering")},
        [],
        {name: p.tally for name, p in ports.items() if p.tally.steps},
        executed,
        Attribution([*exports, *chain.parts(drift, port.steps, executed=executed)], port.trail.skipped),
        drift[PLAIN].total if PLAIN in drift else None,
        levels,
        port.trail.near_misses,
    )
    if not evidence.single or reference.streamed:
        return found
    progress("attention", 0.0)
    opened = standard(graph.load(folder / bundle.MODEL))
    steps = 1 if reference.whole else attention.STEPS  # a step of a large model decodes every weight
    told = lambda f: progress("attention", f)  # noqa: E731
    heads = attention.heads(opened, port.decoder, ports[TOTAL].runner, feeds, steps, told)
    ports[TOTAL].close()
    return replace(found, heads=heads)


def _traced(evidence: Evidence, port: Port, path: Path) -> tuple[Chain, dict[str, Runnable]]:
    """The chain of models from the reference to the port, and those of them that are measured for its sake
    alone, with the reference run in bfloat16."""
    trail, words = port.trail, evidence.reference.words
    if trail.skipped:
        return Chain({}), {}
    prefixes = list(trail.prefixes(port.steps))
    chain = {str(at) if at else PASSES: group for group, at in prefixes}
    more = {str(at): _of_file(str(at), at, words) for _, at in prefixes if at}
    if port.exactly is not None:
        folder = trail.folder / "exact"
        folder.mkdir()
        port.exactly(folder)
        chain[EXACT] = None
        more[EXACT] = Runnable.over(EXACT, lambda: _opened(folder), port.decoder, port.model, words)
    plain = graph.load(trail.fused(port.source, path))
    round_to_bfloat16(plain)
    graph.save(plain, trail.folder / "plain.onnx")
    more[PLAIN] = _of_file(PLAIN, trail.folder / "plain.onnx", words)
    return Chain(chain | {TOTAL: None}), more


def _of_file(name: str, path: Path, words: Tokenizer | None) -> Runnable:
    model = graph.load(path)
    return Runnable.over(name, lambda: ReferenceRunner(path), decoder.recognise(model), model, words)


def _ports(evidence: Evidence, port: Port, path: Path) -> dict[str, Runnable]:
    """The model after its passes in `path`, run as the reference is, and the lowered program."""
    reference, piece, folder = evidence.reference, evidence.plan.piece, port.folder
    way = {
        "whole": reference.whole,
        "streamed": Streamed(path, port.decoder, piece, folder, briefly=True) if piece else None,
    }
    common = port.decoder, port.model, reference.words
    return {
        PASSES: Runnable.over(PASSES, lambda: ReferenceRunner(path, briefly=reference.whole), *common, **way),
        TOTAL: Runnable.over(TOTAL, lambda: _opened(folder), *common),
    }


@contextmanager
def _measurable(folder: Path) -> Iterator[Path]:
    """The model after its passes, in a file that ONNX Runtime's CPU runs as it is to be measured.

    That is the bundle's, but where attention is GroupQueryAttention: its kernels have no 8-bit floats, and
    take one row where several tokens follow cached ones. The same in standard operators then lies beside it
    for as long as it is measured.
    """
    model = graph.load(folder / bundle.MODEL)
    if not any(node.op_type == "GroupQueryAttention" for node in model.graph):
        yield folder / bundle.MODEL
        return
    Pipeline.parse("clean.contrib{only=GroupQueryAttention},clean.dead").run(model, Context())
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        graph.save(model, Path(beside) / bundle.MODEL)
        yield Path(beside) / bundle.MODEL


def _in_folder(model: Runnable, folder: Path) -> Runnable:
    """The same; what it cannot keep in memory lies in `folder`."""
    return replace(model, streamed=replace(model.streamed, folder=folder)) if model.streamed else model


def _opened(folder: Path) -> Runner:
    from porter.run.opening import opened

    return opened(folder)

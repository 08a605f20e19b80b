"""Evidence: the reference that a conversion is measured against, and the measuring."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from porter import bundle, decoder, graph, needs
from porter.context import Context
from porter.drift import attention
from porter.drift import measure as measuring
from porter.drift.feeds import TokenFeeds
from porter.drift.measure import Runnable, feeds_for, measure
from porter.drift.streamed import Interface, Streamed
from porter.options import Options, Progress
from porter.pipeline import Pipeline
from porter.run.opening import executes
from porter.run.reference import ReferenceRunner
from porter.run.tally import Tally

if TYPE_CHECKING:
    from porter.drift.compare import Comparison
    from porter.run.protocol import Runner


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


@dataclass(frozen=True)
class Measured:
    """Drift of the model after its passes and of the lowered program, what a quantized cache does to each
    head of a model that can be opened, and how often attention was computed from an exact copy. `executed`:
    on a device, by the kernels that were made for it."""

    drift: Mapping[str, Comparison]
    heads: list[attention.Head]
    recomputed: Mapping[str, Tally]
    executed: bool = False


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


def measured(
    evidence: Evidence,
    feeds: TokenFeeds,
    model: ir.Model,
    ported: decoder.Decoder,
    folder: Path,
    progress: Progress,
) -> Measured:
    """Measure on `feeds` what is in the bundle's `folder`: `model`, which is there after its passes, and the
    lowered program."""
    reference = evidence.reference
    progress("measure", 0.0)
    with _measurable(folder) as path:
        ports = _ports(evidence, model, ported, folder, path)
        kept = _in_folder(reference, folder)
        drift = measure(kept, ports, feeds, lambda f: progress("measure", f), folder, evidence.single)
    executed = executes(ports["total"].runner)
    port, recomputed = ports["total"], {name: p.tally for name, p in ports.items() if p.tally.steps}
    if not evidence.single or reference.streamed:
        return Measured(drift, [], recomputed, executed)
    progress("attention", 0.0)
    opened = standard(graph.load(folder / bundle.MODEL))
    steps = 1 if reference.whole else attention.STEPS  # a step of a large model decodes every weight
    heads = attention.heads(opened, ported, port.runner, feeds, steps, lambda f: progress("attention", f))
    port.close()
    return Measured(drift, heads, recomputed, executed)


def _ports(
    evidence: Evidence, model: ir.Model, ported: decoder.Decoder, folder: Path, path: Path
) -> dict[str, Runnable]:
    """The model after its passes in `path`, run as the reference is, and the lowered program."""
    reference, piece = evidence.reference, evidence.plan.piece
    way = {
        "whole": reference.whole,
        "streamed": Streamed(path, ported, piece, folder, briefly=True) if piece else None,
    }
    return {
        "passes": Runnable.over(
            "passes",
            lambda: ReferenceRunner(path, briefly=reference.whole),
            ported,
            model,
            reference.words,
            **way,
        ),
        "total": Runnable.over("total", lambda: _opened(folder), ported, model, reference.words),
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

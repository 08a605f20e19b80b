"""Search: formats for the weights and the cache that keep a budget and cost least, then the straight path.

sensitivities  ->  cheapest assignment  ->  passes, measured  ->  lowered, measured
                          ^                      |                       |
                          '---- other limits ----'-----------------------'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from porter import decoder as decoders
from porter import graph, kv, memory, options, target
from porter.context import Context
from porter.drift import budget as budgets
from porter.errors import DriftError, EnvironmentFailure, OptionError
from porter.estimate.needs import cache_bits
from porter.estimate.onnx import of_model
from porter.evidence import gather
from porter.options import AUTO, Options
from porter.pipeline import Pipeline
from porter.report.report import DriftReport
from porter.search import additive, caches, candidates, latency, repair, text, weights
from porter.search.choices import Assignment, Item
from porter.search.costs import MINIMIZE, Costs
from porter.search.probe import Probe
from porter.search.record import Record
from porter.search.repair import Limits, Round
from porter.search.trial import Trials, before_weights, straight
from porter.target import TargetSpec
from porter.weights import select
from porter.weights.base import WeightPass

LOWERED = 3  # conversions that are tried in the end
Straight = Callable[[Path, Path, Options, Mapping[str, Any]], DriftReport]


def convert(source: Path, out: Path, asked: Options, port: Straight) -> DriftReport:
    """Search, and `port` what was found: the report of that, with the search in it.

    Raises OptionError PORT-0630 for a budget that cannot be planned for, PORT-0632 and PORT-0633 for what
    cannot be minimized, PORT-0636 where there is nothing to choose, DriftError PORT-0631 when nothing keeps
    the budget, PORT-0634 when nothing keeps the latency, EnvironmentFailure PORT-0637 for a model that is too
    large, and what a conversion raises.
    """
    found = Search.of(source, asked)
    lowering = np.zeros(len(found.measures))
    for attempt in range(LOWERED):
        chosen = found.chosen(Limits(found.limits.amounts - lowering, found.limits.seconds))
        ready, said = straight(asked, found.text(chosen.assignment)), found.record.to_json(chosen.assignment)
        try:
            return port(source, out, replace(ready, keep=asked.keep and not chosen.holds), said)
        except DriftError as error:
            lowering = found.lowering(error)
            if attempt + 1 < LOWERED and (lowering < found.limits.amounts).all():
                continue
            if not asked.keep:
                raise
        return port(source, out, ready, said)
    raise AssertionError


@dataclass
class Search:
    """One search: what may be chosen, and what was tried."""

    asked: Options
    spec: TargetSpec
    budget: Mapping[str, float]
    measures: tuple[str, ...]
    limits: Limits
    items: list[Item]
    trials: Trials
    record: Record
    casts: Sequence[WeightPass] = ()  # the candidates for weights

    @classmethod
    def of(cls, source: Path, asked: Options) -> Search:
        """Measure what may be chosen."""
        spec, budget = target.load(asked.target), budgets.parse(asked.budget)
        measures = _checked(asked, spec, budget)
        deadline = latency.parse(asked.latency)
        model = graph.load(source)
        single = (asked.decode or 16) if asked.kv not in ("", "fp32") else 0
        evidence = gather(source, model, asked, memory.parse(asked.max_memory), single)
        if evidence.plan.piece:
            what = "the model does not fit in memory, and a search keeps a whole one"
            raise EnvironmentFailure(
                "PORT-0637", what, where=source.name, hint="give formats yourself: --weights FORMAT"
            )
        asked.progress("feeds", 0.0)
        feeds = evidence.texts(asked)
        Pipeline.parse(before_weights(spec)).run(model, Context(spec, (), asked.seed))
        trials = Trials(model, spec, asked, evidence, feeds)
        model = trials.passed(Pipeline.parse(options.filled(spec, asked, "", "")))
        known = decoders.recognise(model)
        timed = asked.minimize in ("time", "dollars") or np.isfinite(deadline)
        costs = Costs(
            spec,
            asked.minimize or "bytes",
            of_model(model, source.name) if timed else None,
            latency.context_of(known),
            activations=spec.flavour(asked.activations) if asked.activations != "fp32" else "",
        )
        probe = Probe(model, feeds, evidence.reference.vocabulary)
        matrices, casts = _candidates(probe, spec, asked)
        items = _items(probe, spec, asked, costs, measures, matrices, casts)
        limits = additive.limits(budget, measures)
        record = Record(costs, measures, items, probe.tokens, np.zeros(len(measures)))
        made = cls(asked, spec, budget, measures, Limits(limits), items, trials, record, casts)
        record.offset = made._fixed()
        seconds = deadline - costs.rest(_bits(asked, costs)) if np.isfinite(deadline) else np.inf
        made.limits = Limits(limits - record.offset, seconds)
        return made

    def chosen(self, limits: Limits) -> Round:
        """The cheapest assignment that holds after its passes; else, with --keep, the closest to it."""
        self.asked.progress("search", 0.0)
        minimize = self.record.costs.minimize
        if (limits.amounts < 0).any() or self._fastest() > limits.seconds:
            raise self._nothing(None)
        rounds = repair.search(self.items, limits, minimize, lambda a: self._verified(a, limits))
        if (found := repair.best(rounds, minimize)) is not None:
            return found
        closest = repair.closest(rounds, limits.amounts)
        if not self.asked.keep:
            raise self._nothing(closest)
        return closest

    def lowering(self, error: DriftError) -> np.ndarray:
        """What the lowering added to the drift of a port that is over budget for it, [measures]; infinite
        where the refusal has another reason."""
        report = getattr(error, "report", None)
        if report is None:
            return np.full(len(self.measures), np.inf)
        total, passes = (additive.amounts(report.drift[n], self.measures) for n in ("total", "passes"))
        return np.maximum(0, total - passes)

    def _fastest(self) -> float:
        """The fewest seconds that the searched can take; 0 where nothing is asked of time."""
        if not np.isfinite(self.limits.seconds):
            return 0.0
        return float(sum(item.costs("time").min() for item in self.items))

    def text(self, chosen: Assignment) -> str:
        """The pipeline that does it."""
        return self.pipeline(text.weights_text(chosen), text.kv_text(chosen))

    def pipeline(self, cast: str, cached: str) -> str:
        """The target's pipeline with what was found in the slots that are searched."""
        asked, spec = self.asked, self.spec
        if asked.weights == AUTO:
            cast = ",".join(filter(None, [cast, *(options.activations_text(spec, asked) if cast else [])]))
        else:
            cast = options.weights_text(spec, asked)
        return options.filled(spec, asked, cast, cached if asked.kv == AUTO else options.kv_text(spec, asked))

    def _verified(self, found: Assignment, limits: Limits) -> Round:
        """What the assignment's passes do to the drift, over what is there anyway."""
        before = next((r for r in self.record.rounds if r.assignment.chosen == found.chosen), None)
        if before is not None:
            return replace(before, holds=bool((before.measured <= limits.amounts).all()))
        drift = self.trials.drift(self.text(found))
        measured = np.maximum(0, additive.amounts(drift, self.measures) - self.record.offset)
        others = {name: limit for name, limit in self.budget.items() if name not in self.measures}
        holds = bool((measured <= limits.amounts).all()) and not budgets.check(others, drift)
        if np.isfinite(limits.seconds):
            holds &= found.cost("time") <= limits.seconds
        self.record.rounds.append(Round(found, measured, holds))
        return self.record.rounds[-1]

    def _fixed(self) -> np.ndarray:
        """The drift of what is not searched for: the user's own cache scheme, format or activations."""
        bare = options.filled(self.spec, self.asked, "", "")
        if (fixed := self.pipeline("", "")) == bare:
            return np.zeros(len(self.measures))
        return additive.amounts(self.trials.drift(fixed), self.measures)

    def _nothing(self, closest: Round | None) -> DriftError:
        """The refusal, which says how close it came."""
        if (fastest := self._fastest()) > self.limits.seconds:
            over = latency.shown_time(fastest - self.limits.seconds)
            what = (
                f"whatever is chosen, a decode step on {self.spec.name} is {over} above {self.asked.latency}"
            )
            hint = "porter estimate shows what a step takes; take a faster target, or a shorter --context"
            return DriftError("PORT-0634", f"{what} (estimated)", where="--latency", hint=hint)
        if closest is None:
            reached = "what is not searched for alone is over it"
        else:
            shown = additive.shown(closest.measured + self.record.offset, self.measures)
            reached = "the closest reached " + ", ".join(f"{n} {v:.4g}" for n, v in shown.items())
        what = f"nothing that {self.spec.name} reads keeps the budget {self.asked.budget}: {reached}"
        return DriftError("PORT-0631", what, hint="allow more drift, or --keep the closest")


def _checked(asked: Options, spec: TargetSpec, budget: Mapping[str, float]) -> tuple[str, ...]:
    """The measures to plan for; what can be refused at once is."""
    measures = additive.planned(budget)
    if not measures:
        what = "a search needs a budget of drift that can be planned for"
        raise OptionError(
            "PORT-0630", what, where="--budget", hint=f"as kl=0.02; of {', '.join(additive.FORMS)}"
        )
    if asked.pipeline:
        options.pipeline_text(spec, asked)  # raises
    if (asked.minimize or "bytes") not in MINIMIZE:
        what = f"there is no {asked.minimize!r} to minimize"
        raise OptionError("PORT-0632", what, where="--minimize", hint=f"one of {', '.join(MINIMIZE)}")
    if asked.weights == AUTO and asked.method:
        options.check_method(asked.method)
    return measures


def _candidates(
    probe: Probe, spec: TargetSpec, asked: Options
) -> tuple[list[select.Matrix], list[WeightPass]]:
    """Every matrix whose name a pipeline can say, and what is worth measuring on them; none where weights are
    not searched for."""
    names = list(probe.model.graph.initializers)
    matrices = [m for m in select.matrices(probe.model.graph) if text.named(m.name, names)]
    if asked.weights != AUTO or not matrices:
        return [], []
    asked.progress("candidates", 0.0)
    return matrices, candidates.worth(candidates.every(spec, asked.method), matrices, spec)


def _items(
    probe: Probe,
    spec: TargetSpec,
    asked: Options,
    costs: Costs,
    measures: tuple[str, ...],
    matrices: list[select.Matrix],
    casts: list[WeightPass],
) -> list[Item]:
    """What is searched, measured: the matrices, and every side of the cache."""
    found: list[Item] = []
    if matrices:
        told = lambda f: asked.progress("weights", f)  # noqa: E731
        found += weights.items(probe, matrices, casts, spec, costs, measures, told)
    if asked.kv == AUTO:
        found += caches.items(probe, spec, costs, measures, lambda f: asked.progress("cache", f))
    if not found:
        what = "there is nothing to choose: no matrix, and no cache, that formats are for"
        raise OptionError("PORT-0636", what, hint="porter inspect shows what the model has")
    return found


def _bits(asked: Options, costs: Costs) -> float | None:
    """Bits of a cached number where the cache is not searched for."""
    if asked.kv == AUTO:
        return None
    assert costs.model is not None
    scheme = kv.parse(asked.kv or "fp32")
    return cache_bits(scheme, costs.model.attention[0], costs.context, costs.model.layers, copy=False)

"""Latency: a budget of time for a decode step, held against the estimate of the model as it was saved."""

from __future__ import annotations

import math

import onnx_ir as ir

from porter.decoder import Decoder
from porter.errors import DriftError, OptionError
from porter.estimate.estimate import Estimate, Options, estimate
from porter.estimate.model import Model
from porter.estimate.onnx import of_model
from porter.options import Options as Asked
from porter.target import TargetSpec
from porter.target.units import Impossible, WrongUnit, quantity, shown

CONTEXT = 4096  # cached tokens of a model that says nothing of them


def parse(text: str) -> float:
    """Seconds of `100ms`, `0.1 s` or `50us`; inf for "". Raises OptionError PORT-0635."""
    if not text:
        return float("inf")
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    try:
        return float(quantity(f"{number} {unit}", "s"))
    except (WrongUnit, Impossible) as error:
        what = f"{text!r} is no length of time"
        raise OptionError("PORT-0635", what, where="--latency", hint="as 100ms, 0.1s or 50us") from error


def context_of(known: Decoder) -> int:
    """Tokens that the cache holds, or may."""
    return known.capacity or known.context or CONTEXT


def estimated(model: Model, spec: TargetSpec, context: int) -> Estimate:
    """A decode step of one row with a full cache. Raises what `estimate` does."""
    return estimate(model, spec, Options(prompt=1, context=context))


def held(model: ir.Model, spec: TargetSpec, pipeline: str, known: Decoder, asked: Asked) -> dict[str, object]:
    """What a report says of `--latency`: `limit_s`, and the estimate; nothing where none is asked.

    Raises OptionError PORT-0635, DriftError PORT-0634 for a step that takes longer (unless `asked.keep`), and
    what an estimate does.
    """
    limit = parse(asked.latency)
    if math.isinf(limit):
        return {}
    found = estimated(of_model(model, "", pipeline), spec, context_of(known))
    if found.decode_s > limit and not asked.keep:
        raise over(found, limit)
    return {"limit_s": limit, **found.to_dict()}


def over(found: Estimate, limit: float) -> DriftError:
    """The refusal: how long a step takes, and what of it takes longest."""
    longest = sorted(found.decode, key=lambda part: -part.seconds)[:3]
    parts = ", ".join(f"{p.work.name} {100 * p.seconds / found.decode_s:.0f} %" for p in longest)
    what = (
        f"a decode step takes {shown_time(found.decode_s)} on {found.target} ({found.kind}), "
        f"above {shown_time(limit)}: bound by {found.bound_by}; {parts}"
    )
    hint = "take fewer bits (--weights auto, --kv auto), a shorter --context, or --keep"
    return DriftError("PORT-0634", what, where="--latency", hint=hint)


def shown_time(seconds: float) -> str:
    """Seconds for people."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return shown(seconds, "s")

"""Estimate a decoder on a target: times of a prefill and of a decode step, memory, chips, price and power."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from porter import kv
from porter.errors import OptionError
from porter.estimate.collectives import collective
from porter.estimate.lowered import CONTEXT, PROMPT, Lowered, parts
from porter.estimate.model import Model
from porter.estimate.needs import Bytes, cache_bits, chips_needed, needed
from porter.estimate.timing import Bound, Kind, Part, bandwidth, roofline
from porter.estimate.work import Step, Stored, Work, kernels
from porter.simulate import KIND
from porter.target import TargetSpec
from porter.target.placing import WIDE, base

PER_HOUR = 3600.0


@dataclass(frozen=True)
class Options:
    """What is asked: `batch` rows with prompts of `prompt` tokens, caches that reach `context` tokens (at
    least the prompt's), over `tp` chips. 0 means 512 and 4,096, or as many as the model takes. `weights`,
    `activations` and `kv` are formats and a scheme as the command line takes them; "" means what the model
    has, else BF16, BF16 and FP16."""

    weights: str = ""
    activations: str = ""
    kv: str = ""
    batch: int = 1
    prompt: int = 0
    context: int = 0
    tp: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a model takes on a target. `bytes` are one chip's. When it does not fit, times are those that
    chips with more memory would take, and `chips` is how many of these would do. `terms`: of the price."""

    target: str
    options: Options
    chips: int
    fits: bool
    bytes: Bytes
    prefill: tuple[Part, ...]
    decode: tuple[Part, ...]
    usd_per_hour: float | None
    terms: str
    watts: float | None
    program: Mapping[str, Any] | None = None  # simulated kernel by kernel, where the bundle's own program was

    @property
    def prefill_s(self) -> float:
        """Seconds of one batch of prompts, up to the first new tokens."""
        return sum(part.seconds for part in self.prefill)

    @property
    def decode_s(self) -> float:
        """Seconds of one step of the whole batch, with the cache at `context` tokens."""
        return sum(part.seconds for part in self.decode)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch in decode steps."""
        return self.options.batch / self.decode_s

    @property
    def usd_per_mtok(self) -> float | None:
        """Dollars for a million of them, on all chips at the listed price."""
        if self.usd_per_hour is None:
            return None
        return self.usd_per_hour * self.options.tp / PER_HOUR / self.tokens_per_s * 1e6

    @property
    def joules_per_token(self) -> float | None:
        """Energy of one of them, on all chips: at what a rack gives them, else at their design power."""
        return None if self.watts is None else self.watts * self.options.tp / self.tokens_per_s

    @property
    def bound_by(self) -> Bound:
        """What a decode step spends most of its time on."""
        spent = split(self.decode)
        return max(get_args(Bound), key=lambda bound: spent[bound])

    @property
    def kind(self) -> Kind:
        """`simulated` where the times are those of a bundle's own program, else `estimated`."""
        return "estimated" if self.program is None else KIND

    @property
    def assumed(self) -> tuple[str, ...]:
        """Names of constants that no source has."""
        return tuple(dict.fromkeys(n for part in (*self.prefill, *self.decode) for n in part.time.assumed))

    def to_dict(self) -> dict[str, Any]:
        """As docs/schemas/estimate.schema.json has it."""
        asked = self.options
        return {
            "target": self.target,
            "chips": self.chips,
            "batch": asked.batch,
            "prompt": asked.prompt,
            "context": asked.context,
            "weights": asked.weights,
            "kv": asked.kv,
            "tp": asked.tp,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_chip": self.tokens_per_s / asked.tp,
            "bytes": {
                "weights": math.ceil(self.bytes.weights),
                "kv": math.ceil(self.bytes.kv),
                "workspace": math.ceil(self.bytes.workspace),
            },
            "fits": self.fits,
            "usd_per_mtok": self.usd_per_mtok,
            "joules_per_token": self.joules_per_token,
            "bound_by": self.bound_by,
            "kind": self.kind,
            "program": self.program,
        }


def estimate(model: Model, spec: TargetSpec, options: Options, lowered: Lowered | None = None) -> Estimate:
    """What the model takes on a target; with `lowered`, by the program that the target's own bundle has.

    Raises OptionError PORT-0333 for a number of chips that does not divide the heads, PORT-0339 for sizes
    that a bundle's program does not take; SpecError PORT-0332 for a target that says too little, PORT-0338
    for weights that it does not multiply; TargetError PORT-0334 when no link joins the chips; and what
    reading a format or scheme raises.
    """
    bandwidth(spec)  # refuses a target that says nothing, before anything else
    asked = _settled(model, spec, options)
    if not model.head.weights:  # casting skips it (`porter.weights.base`)
        kept = asked.weights if base(asked.weights) in WIDE else "bf16"
        model = replace(model, head=replace(model.head, weights=kept))
    scheme = kv.parse(asked.kv)

    def stored(tp: int) -> Stored:
        bits = cache_bits(scheme, model.attention[0], asked.context, model.layers, copy=False)
        return Stored(asked.weights, asked.activations, bits, tp)

    def held(tp: int) -> Bytes:
        return needed(model, stored(tp), scheme, asked.batch, asked.prompt, asked.context)

    def timed(step: Step) -> tuple[Part, ...]:
        return tuple(_timed(kernels(model, spec, step, stored(asked.tp)), spec, asked.tp))

    if lowered is None:
        prefill, decode = (
            timed(Step(asked.batch, asked.prompt, 0)),
            timed(Step(asked.batch, 1, asked.context - 1)),
        )
        program = None
    else:
        steps = (
            lowered.prefill(asked.batch, asked.prompt),
            lowered.decode(asked.batch, asked.context),
        )
        prefill, decode = map(parts, steps)
        program = lowered.told(*steps, asked.batch, asked.prompt, asked.context)
    fits = held(asked.tp).total <= next(iter(spec.memory.values())).size.value
    return Estimate(
        spec.name,
        asked,
        asked.tp if fits else chips_needed(model, spec, held),
        fits,
        held(asked.tp),
        prefill,
        decode,
        float(spec.price.per_hour.value) if spec.price else None,
        spec.price.terms if spec.price else "",
        float((spec.power.provisioned or spec.power.design).value) if spec.power else None,
        program,
    )


def _settled(model: Model, spec: TargetSpec, options: Options) -> Options:
    """The options with the target's own flavours of formats, checked."""
    if model.heads % options.tp:
        fitting = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        what = f"{options.tp} chips do not divide {model.heads} attention heads"
        raise OptionError("PORT-0333", what, where="--tp", hint=f"one of {', '.join(map(str, fitting))}")
    weights = spec.flavour(options.weights or next((w.weights for w in model.linears if w.weights), "bf16"))
    activations = "" if options.activations in ("bf16", "fp16", "fp32") else spec.flavour(options.activations)
    most = model.tokens or CONTEXT
    prompt = options.prompt or min(PROMPT, most)
    context = max(options.context or min(CONTEXT, most), prompt)
    return replace(
        options,
        weights=weights,
        activations=activations,
        kv=options.kv or model.kv or "fp16",
        prompt=prompt,
        context=context,
    )


def _timed(found: Iterable[Work], spec: TargetSpec, tp: int) -> Iterable[Part]:
    for work in found:
        yield Part(
            work, collective(work, spec, tp) if work.kernel.startswith("all-") else roofline(work, spec)
        )


def split(parts: Iterable[Part]) -> dict[Bound, float]:
    """Seconds by what they are spent on: the larger of computing and moving, starting kernels, links."""
    spent: dict[Bound, float] = dict.fromkeys(get_args(Bound), 0.0)
    for part in parts:
        time, rest = part.time, part.time.seconds - part.time.fixed
        spent["overhead" if not part.work.kernel.startswith("all-") else "links"] += (
            part.work.count * time.fixed
        )
        key: Bound = "links" if time.links else "compute" if time.compute > time.memory else "memory"
        spent[key] += part.work.count * rest
    return spent

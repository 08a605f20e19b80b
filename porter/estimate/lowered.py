"""Lowered: what prefill and decode steps of a lowered decoder take, simulated by its scheduled program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter import target
from porter.decoder import Decoder
from porter.errors import OptionError, PorterError, TargetError
from porter.estimate.timing import Part, Time
from porter.estimate.work import Work
from porter.simulate import KIND, KernelTime, Step, StepTime
from porter.target import TargetSpec

KERNELS, TARGET = "lib/program.json", "lib/target.toml"
PROMPT, CONTEXT = 512, 4096  # what is timed unless something is asked for, or as many as the model takes


@dataclass(frozen=True)
class Lowered:
    """What a bundle says of its program: inputs and bounds of `plan` (plan.json), `step` (lib/program.json)
    and the target that it was scheduled for (lib/target.toml)."""

    decoder: Decoder
    spec: TargetSpec
    plan: Mapping[str, Any]
    step: Step

    @classmethod
    def read(cls, folder: Path, decoder: Decoder) -> Lowered:
        """From a bundle's folder. Raises TargetError PORT-0440 when its program cannot be read, and what
        `porter.target.load` does."""
        step = Step.load(folder / KERNELS)
        try:
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            plan = {key: plan[key] for key in ("inputs", "bounds")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"the plan of the bundle cannot be read: {error}"
            raise TargetError("PORT-0440", what, str(folder), "convert the model again") from error
        return cls(decoder, target.load(str(folder / TARGET)), plan, step)

    @property
    def most(self) -> int:
        """Tokens that a row may have, new ones among them; 0: any number."""
        past = {str(self._shapes[c.past][2]) for c in self.decoder.caches if self.decoder.cache == "concat"}
        limits = [self.decoder.capacity, self.decoder.context, *(self.plan["bounds"].get(p, 0) for p in past)]
        return min((n for n in limits if n), default=0)

    @property
    def rows(self) -> int:
        """Rows that the bundle's memory is planned for."""
        size = self._shapes[self.decoder.tokens][0]
        return int(self.plan["bounds"].get(str(size), size))

    def prefill(self, batch: int, prompt: int) -> StepTime:
        """`batch` rows of `prompt` tokens into empty caches, in pieces as a runner feeds them.

        Raises OptionError PORT-0339 for sizes that the program does not take, and what `Step.simulate` does.
        """
        size = self._shapes[self.decoder.tokens][1]
        piece = int(self.plan["bounds"].get(str(size), prompt)) if self.decoder.caches else prompt
        pieces = [(min(piece, prompt - at), at) for at in range(0, prompt, piece)]
        return StepTime.of([self._step(batch, tokens, at) for tokens, at in pieces])

    def decode(self, batch: int, context: int) -> StepTime:
        """One token for each of `batch` rows, with `context` tokens in their caches when it is done. Raises
        what `prefill` does."""
        return self._step(batch, 1, context - 1)

    def report(self) -> dict[str, Any]:
        """One row with a prompt of 512 tokens and a cache of 4,096, or as many as the model takes: as `told`.

        Where they cannot be timed there is `why`, and neither of both.
        """
        prompt = min(PROMPT, self.most or PROMPT)
        context = max(prompt, min(CONTEXT, self.most or CONTEXT))
        try:
            decode = self.decode(1, context) if self.decoder.caches else None
            return self.told(self.prefill(1, prompt), decode, 1, prompt, context)
        except PorterError as error:
            return self._named() | {"why": error.what}

    def told(
        self, prefill: StepTime, decode: StepTime | None, batch: int, prompt: int, context: int
    ) -> dict[str, Any]:
        """Both for JSON (docs/schemas/report.schema.json); a model without a cache has no decode steps."""
        first = _phase(prefill, batch, prompt, prompt)
        return self._named() | {
            "prefill": first,
            "decode": None if decode is None else _phase(decode, batch, 1, context),
        }

    def _named(self) -> dict[str, Any]:
        return {"kind": KIND, "target": self.spec.name, "rows": self.rows, "prefill": None, "decode": None}

    @property
    def _shapes(self) -> dict[str, list[Any]]:
        return {entry["name"]: entry["shape"] for entry in self.plan["inputs"]}

    def _step(self, batch: int, tokens: int, past: int) -> StepTime:
        if self.most and past + tokens > self.most:
            what = f"a row of the bundle's model has {self.most} tokens at most, not {past + tokens}"
            raise OptionError("PORT-0339", what, hint="ask for a shorter --prompt and --context")
        return self.step.simulate(self._dimensions(batch, tokens, past), self.spec)

    def _dimensions(self, batch: int, tokens: int, past: int) -> dict[str, int]:
        """The program's symbols, by the meaning of the inputs that have them."""
        sized = list(zip(self._shapes[self.decoder.tokens], (batch, tokens), strict=False))
        sized += [(self._shapes[c.past][0], batch) for c in self.decoder.caches]
        if self.decoder.cache == "concat":
            sized += [(self._shapes[c.past][2], past) for c in self.decoder.caches]
        if self.decoder.mask:
            sized.append((self._shapes[self.decoder.mask][-1], past + tokens))
        for size, asked in sized:
            if isinstance(size, int) and size != asked:
                what = f"the bundle's program was made for {size} where {asked} is asked"
                raise OptionError("PORT-0339", what, hint="export the model with symbolic dimensions")
        return {size: asked for size, asked in sized if isinstance(size, str) and size.isidentifier()}


def parts(step: StepTime) -> tuple[Part, ...]:
    """The kernels of a step as an estimate has them."""
    return tuple(Part(_work(kernel, calls), _time(kernel)) for kernel, calls in step.calls)


def _phase(step: StepTime, batch: int, tokens: int, context: int) -> dict[str, Any]:
    rate = batch * tokens / float(step.seconds) if step.seconds else None
    return {"batch": batch, "tokens": tokens, "context": context, "tokens_per_s": rate, **step.to_dict()}


def _work(kernel: KernelTime, calls: int) -> Work:
    outer = sum(level.read + level.written for level in kernel.traffic[:1])
    return Work("lowered", kernel.name, calls, outer, kernel.flop)


def _time(kernel: KernelTime) -> Time:
    """All of it is what binds: units compute, levels and engines move, the rest is overhead."""
    seconds, why = float(kernel.seconds), kernel.bound_by
    if why.endswith(" unit"):
        return Time(seconds, compute=seconds, kind=KIND)
    if why.startswith(("bandwidth", "engines", "short runs")):
        return Time(seconds, memory=seconds, kind=KIND)
    return Time(seconds, fixed=seconds, kind=KIND)

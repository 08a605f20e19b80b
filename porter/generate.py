"""Generate: continue a prompt with any runnable model, streaming text as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from porter.drift.measure import Runnable
from porter.errors import OptionError
from porter.report.words import recomputed
from porter.run.decode import Decode, generate, sampler
from porter.run.tally import Tally


@dataclass(frozen=True)
class Generated:
    """What was generated: token ids, their text (None without a tokenizer), and times measured on `machine`.

    `recomputed` says how often attention was computed from the cache's exact copy, None where it has none.
    """

    prompt: list[int]
    tokens: list[int]
    text: str | None
    first_token_s: float
    tokens_per_s: float
    machine: str
    recomputed: Tally | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; both times are measured."""
        return {**asdict(self), "kind": "measured"}

    def summary(self) -> str:
        """One line."""
        rate = f"{self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else "one token"
        first = f"first after {self.first_token_s * 1e3:.0f} ms"
        made = f"{len(self.tokens)} tokens, {first}, then {rate} (measured on {self.machine})"
        if self.recomputed is None:
            return made
        return f"{made}; {recomputed({'': self.recomputed})} (measured)"


def stream(
    model: Runnable,
    prompt: str,
    tokens: Sequence[int] | None,
    max_new: int,
    sampling: dict[str, Any],
    write: Callable[[str], None] | None,
) -> Generated:
    """Continue `prompt` (text) or `tokens`; `write` gets each piece of text, the prompt first.

    Without a tokenizer the ids are written. Raises OptionError PORT-0833 when the model is no decoder,
    PORT-0834 when there is nothing to continue or a prompt without a tokenizer.
    """
    if model.decoder.cache == "none":
        raise OptionError("PORT-0833", "this model has no KV cache, so it cannot generate", where=model.name)
    ids = _prompt(model, prompt, tokens)
    write = write or (lambda text: None)
    words = model.words.stream() if model.words else None
    write(prompt if words and tokens is None else "")
    started = time.perf_counter()
    made, text, first = [], "", 0.0
    decode = Decode(model.runner, model.decoder)
    for token in generate(decode, ids, _room(model, ids, max_new), sampler(**sampling)):
        first = first or time.perf_counter() - started
        made.append(int(token))
        piece = words.push(token) if words else f"{token} "
        text += piece
        write(piece)
    rest = words.flush() if words else ""
    write(rest)
    elapsed = time.perf_counter() - started - first
    rate = (len(made) - 1) / elapsed if len(made) > 1 else 0.0
    tally = decode.tally if model.decoder.exact else None
    whole = text + rest if words else None
    return Generated(list(map(int, ids)), made, whole, first, rate, model.runner.machine, tally)


def _room(model: Runnable, ids: Sequence[int], max_new: int) -> int:
    """No more than the cache holds. The last token is never fed, so it needs no place."""
    limit = min((n for n in (model.decoder.capacity, model.decoder.context) if n), default=0)
    return max(1, min(max_new, limit - len(ids) + 1)) if limit else max_new


def _prompt(model: Runnable, prompt: str, tokens: Sequence[int] | None) -> Sequence[int]:
    if tokens is not None:
        return tokens
    if not prompt:
        if model.bos is None:
            raise OptionError("PORT-0834", "there is nothing to continue", hint="give --prompt or --tokens")
        return [model.bos]
    if model.words is None:
        raise OptionError(
            "PORT-0834", "a text prompt needs a tokenizer, and the model has none", hint="give --tokens"
        )
    return model.words.encode(prompt)

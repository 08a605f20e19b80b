"""What the check of an export feeds to both sides, and what PyTorch computes from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from porter.errors import ExportError
from porter.export.source import first_line

if TYPE_CHECKING:
    from porter.export.source import Source

LONGEST = 256  # tokens of the longest probe: enough to leave every short-sequence path, and cheap
SAMPLED = 24


def cases(flat: Source) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, inputs) of each comparison; caches come from running PyTorch, so that they have a real scale."""
    random = np.random.default_rng(0)
    longest = min(flat.context_length, LONGEST)
    if flat.kind == "encoder":
        yield from _encoder_cases(flat, random, longest)
        return
    story = sampled(flat, min(SAMPLED, longest))
    yield f"sampled text, batch 1, sequence {story.shape[1]}, past 0", feeds(flat, story)
    for batch, sequence, past in (
        (1, 1, 0),
        (3, 5, 0),
        (3, 1, 1),
        (1, 5, 7),
        (3, 4, 7),
        (1, longest, 0),
        (1, 1, longest - 1),
    ):
        if sequence + past > longest:
            continue
        tokens = random.integers(0, flat.vocab_size, (batch, past + sequence))
        caches = computed(flat, feeds(flat, tokens[:, :past]))[1:] if past else None
        name = f"random tokens, batch {batch}, sequence {sequence}, past {past}"
        yield name, feeds(flat, tokens[:, past:], caches)


def _encoder_cases(flat: Source, random: np.random.Generator, longest: int) -> Iterator[tuple[str, dict]]:
    for batch, sequence in ((1, 1), (1, 17), (3, 5), (1, longest)):
        tokens = random.integers(0, flat.vocab_size, (batch, min(sequence, longest)))
        for padded in (False, True):
            mask = np.ones_like(tokens)
            if padded:
                mask[0, tokens.shape[1] // 2 + 1 :] = 0
            types = (np.arange(tokens.shape[1]) >= 2).astype(np.int64) * np.ones_like(tokens)
            known = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
            name = f"random tokens, batch {batch}, sequence {tokens.shape[1]}{', padded' if padded else ''}"
            yield name, {n: known.get(n, np.zeros_like(tokens)) for n in flat.inputs}


def feeds(flat: Source, tokens: np.ndarray, caches: list[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Inputs of a decoder, in the graph's order; without `caches` the past is empty."""
    empty = (np.zeros((len(tokens), heads, 0, size), np.float32) for heads, size in flat.caches)
    kinds = (f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(flat.caches)))
    return {"input_ids": tokens, **dict(zip(kinds, caches or empty, strict=True))}


def sampled(flat: Source, length: int) -> np.ndarray:
    """int64 [1, length] drawn from the model itself at temperature 1, beginning with its first token."""
    random = np.random.default_rng(1)
    tokens = [int(flat.metadata.get("porter.bos", "0").split(",")[0])]
    caches = None
    while len(tokens) < length:
        logits, *caches = computed(flat, feeds(flat, np.array([tokens[-1:]]), caches))
        chances = np.exp(logits[0, -1].astype(np.float64) - logits[0, -1].max())
        tokens.append(int(random.choice(len(chances), p=chances / chances.sum())))
    return np.array([tokens])


def computed(
    flat: Source, inputs: dict[str, np.ndarray], name: str = "", finite: bool = True
) -> list[np.ndarray]:
    """The outputs of the PyTorch module. Raises PORT-0723 (not `finite`), PORT-0724 (it fails)."""
    import torch

    tensors = [torch.from_numpy(a) for a in inputs.values()]
    arguments = (tensors,) if flat.kind == "encoder" else (tensors[0], tensors[1:])
    try:
        with torch.no_grad():
            outputs = [t.numpy() for t in flat.module(*arguments)]
    except Exception as error:
        raise ExportError("PORT-0724", f"the PyTorch model fails: {first_line(error)}", where=name) from error
    if finite and not all(np.isfinite(o).all() for o in outputs):
        raise ExportError("PORT-0723", "the PyTorch model gives NaN or infinity", where=name)
    return outputs

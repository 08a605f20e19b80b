"""Tags: what a token is, in one number, for schemes that give some tokens more bits (`porter.kv.triaxial`).

    tag = band + 16 * (modality + 4 * role)                                     0 to 255

- band: how early the token stands in its row, by powers of two: positions 0-3, 4-7, 8-15, …, from 65536 on.
  This is what recency comes to for a token that is written once: every token is the newest when it comes, and
  the newest tokens are in the recent window whatever their tag. What tells tokens apart later is how long
  they have been there, and so how many queries read them.
- modality: text, image, audio, video.
- role: who speaks: unsaid, system, user, assistant.

Where a caller says nothing, tokens are text of nobody (`default`): their tags follow from their positions
alone, so that they do not depend on how a text was cut into steps. A number that is no tag is allowed, and
wants no more bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

INPUT = "tags"  # of a model: int64 [batch, sequence], the tag of each new token
BANDS = 16
MODALITIES = ("text", "image", "audio", "video")
ROLES = ("unsaid", "system", "user", "assistant")
COUNT = BANDS * len(MODALITIES) * len(ROLES)

_EDGES = 4 << np.arange(BANDS - 1, dtype=np.int64)  # where the bands after the first begin


def default(positions: np.ndarray, modality: str = "text", role: str = "unsaid") -> np.ndarray:
    """The tags of tokens at these positions of their rows, int64 of the same shape."""
    kind = MODALITIES.index(modality) + len(MODALITIES) * ROLES.index(role)
    return np.searchsorted(_EDGES, positions, side="right") + BANDS * kind


def band(tags: np.ndarray) -> np.ndarray:
    """The bands of tags."""
    return tags % BANDS


def describe(tags: Iterable[int]) -> str:
    """Tags in words, as `text 0-7, 16-31; user image 0-3`, the positions alone where they are those of all
    kinds: neighbouring bands are one."""
    kinds: dict[int, list[int]] = {}
    for tag in sorted(tags):
        kinds.setdefault(tag // BANDS, []).append(tag % BANDS)
    spans = {kind: ", ".join(_spans(bands)) for kind, bands in kinds.items()}
    if len(spans) == COUNT // BANDS and len({*spans.values()}) == 1:
        return spans[0]
    return "; ".join(f"{_kind(kind)} {each}" for kind, each in spans.items())


def _kind(kind: int) -> str:
    role, modality = divmod(kind, len(MODALITIES))
    return f"{ROLES[role]} {MODALITIES[modality]}" if role else MODALITIES[modality]


def _spans(bands: list[int]) -> list[str]:
    """Positions of bands, ascending; those side by side together."""
    found: list[list[int]] = []
    for each in bands:
        if found and found[-1][1] == each - 1:
            found[-1][1] = each
        else:
            found.append([each, each])
    ends = [(int(_EDGES[a - 1]) if a else 0, int(_EDGES[b]) - 1 if b < BANDS - 1 else None) for a, b in found]
    return [f"{first}-{last}" if last is not None else f"from {first}" for first, last in ends]

"""Fitting: whether feeds are what a lowered program takes. Its kernels trust their sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from porter.context import Feeds
from porter.errors import OptionError
from porter.run.protocol import TensorSpec


def check(feeds: Feeds, inputs: Mapping[str, TensorSpec], bounds: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the symbols. Raises OptionError PORT-0502 at the first feed that does not fit the
    interface, or exceeds what memory was planned for."""
    for name in feeds:
        if name not in inputs:
            what = f"there is no input {name!r}"
            raise OptionError("PORT-0502", what, hint=f"the inputs are: {', '.join(inputs)}")
    sizes: dict[str, int] = {}
    for name, spec in inputs.items():
        if name not in feeds:
            raise OptionError("PORT-0502", "an input is missing", where=name)
        array = feeds[name]
        array = array if hasattr(array, "dtype") and hasattr(array, "shape") else np.asarray(array)
        if array.dtype != spec.dtype or len(array.shape) != len(spec.shape):
            what = (
                f"wanted {spec.dtype} of rank {len(spec.shape)}, got {array.dtype} of rank {len(array.shape)}"
            )
            raise OptionError("PORT-0502", what, where=name)
        for wanted, got in zip(spec.shape, array.shape, strict=True):
            _check_size(name, wanted, got, sizes, bounds)
        if spec.rows:
            _check_rows(name, np.asarray(array), spec.rows)
    return sizes


def _check_rows(name: str, numbers: np.ndarray, rows: int) -> None:
    """Kernels on a device cannot stop for a number of no row; negative ones count from the end."""
    outside = numbers[(numbers < -rows) | (numbers >= rows)]
    if outside.size:
        what = f"{outside.flat[0]} lies outside of a table of {rows} rows"
        raise OptionError("PORT-0502", what, where=name)


def _check_size(
    name: str, wanted: int | str, got: int, sizes: dict[str, int], bounds: Mapping[str, int]
) -> None:
    if isinstance(wanted, int):
        if got != wanted:
            raise OptionError("PORT-0502", f"wanted a dimension of {wanted}, got {got}", where=name)
        return
    if sizes.setdefault(wanted, got) != got:
        raise OptionError("PORT-0502", f"{wanted} is {sizes[wanted]} elsewhere, {got} here", where=name)
    if got > bounds.get(wanted, got):
        what = f"{wanted} is {got}, but memory was planned for at most {bounds[wanted]}"
        raise OptionError("PORT-0502", what, where=name, hint="convert with a larger limit")


def check_apart(names: Sequence[str], places: Sequence[int | None], written: Collection[str]) -> None:
    """Raise OptionError PORT-0502 when what is written to is another input's array as well; `places` are the
    addresses of the inputs' arrays, None for one of no elements."""
    owners: dict[int, str] = {}
    for name, place in zip(names, places, strict=True):
        other = owners.setdefault(place, name) if written and place is not None else name
        if other != name and (name in written or other in written):
            what = f"the same array is fed to {other!r}, and one of the two is written to"
            raise OptionError("PORT-0502", what, where=name, hint="feed a copy")

"""Turned values: what a pass stores otherwise in every layer, and undoes in what reads it.

AWQ scales a norm's result and divides the next weight; a cache scheme turns or scales queries and keys. Such
a value has its old name and another meaning. It shows as the same kind of node off in most layers, which a
single fault is not; and it goes away when the value is no longer held against the reference's, so that its
node and its readers are judged as one piece. What does not go away then is a fault in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from porter.drift.blame.judge import Judged
from porter.drift.blame.measure import Measured
from porter.drift.blame.sites import Site

MOST = 0.6  # of the layers
LAYERS = 3  # with fewer than so many alike, nothing tells one from all
PLAIN = 60.0  # dB: nodes of float32 are never further off, unless they are something else
LOSSY = 3.0  # dB: of a format of two bits or more no node is further off: noise of half the signal
ROUNDS = 8

Role = tuple[str, str]


def turned(sites: Sequence[Site], measured: Measured, judged: Mapping[str, Judged]) -> set[str]:
    """The values of the first role that is off in most layers, and those made of them up to the next matrix
    product; empty where there is none."""
    roles: dict[Role, list[Site]] = {}
    for site in sites:
        roles.setdefault(_role(site), []).append(site)
    for alike in roles.values():
        off = [s for s in alike if _off(s, measured, judged)]
        if len(alike) >= LAYERS and len(off) >= MOST * len(alike):
            return _until_product({s.value for s in alike}, sites)
    return set()


def _role(site: Site) -> Role:
    return re.sub(r"\d+", "#", site.module), site.op


def _off(site: Site, measured: Measured, judged: Mapping[str, Judged]) -> bool:
    local = measured.local[site.value].db
    return judged[site.value].below_db > 0 or local < (LOSSY if site.storage else PLAIN)


def _until_product(values: set[str], sites: Sequence[Site]) -> set[str]:
    """`values` and all that is made of them before a matrix product reads it."""
    found = {*values}
    for site in sites:  # in order of the graph
        if not site.heavy and found.intersection(site.inputs):
            found.add(site.value)
    return found

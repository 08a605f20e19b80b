"""How chips reach each other and their host."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from porter.target.figure import Bandwidth, Count, Duration, Part, Points

Topology = Literal["mesh", "switch", "ring", "torus-2d", "torus-3d", "network", "host"]
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


class Collective(Part):
    """One way of doing a collective: `latency` plus bytes over `bandwidth`, as on `chips` chips.

    `bandwidth` is the bus bandwidth: bytes that each chip has to send in a ring, over time. `points` are
    measured [bytes, time] of growing size, which say more: straight lines join them.
    """

    chips: Count | None = None
    latency: Duration | None = None
    bandwidth: Bandwidth | None = None
    points: Points | None = None


class Link(Part):
    """A network: `chips` reach each other through it, each with `bandwidth` one way over all its `ports`.

    `latency` is that of a hop. `collectives` holds what was measured, by operation and by name of the way;
    the faster one is what a program would choose. `host` is the way to the host's memory, `network` one
    between machines.
    """

    topology: Topology
    chips: Count | None = None
    ports: Count | None = None
    bandwidth: Bandwidth
    latency: Duration | None = None
    collectives: dict[Operation, dict[str, Collective]] = Field(default_factory=dict)

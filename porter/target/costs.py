"""What is known of a chip's price and power, and of how near kernels come to its peaks."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field

from porter.target.figure import Count, Dollars, Duration, Exponent, Part, Share, Watts

Day = Annotated[date, Field(strict=True)]
Kernel = Literal["gemm", "decode-attention", "prefill-attention", "copy", "quantize"]


class Price(Part):
    """What one chip costs, as of a day; `basis` says what is rented, where."""

    per_hour: Dollars = Field(alias="per-hour")
    terms: Literal["on-demand", "spot", "reserved"]
    basis: str = Field(min_length=1)
    date: Day


class Power(Part):
    """What one chip draws, as of a day: the most by its design, and what a rack gives it if less."""

    design: Watts
    provisioned: Watts | None = None
    date: Day


class Efficiency(Part):
    """Constants of a kernel's time, fitted to measurements of kernels; at least one is there.

    time = fixed + (C^overlap + M^overlap)^(1/overlap), with
    C = operations / (compute * peak) and M = bytes / (memory * bandwidth).

    `overlap` 1: one after the other; the larger it is, the nearer to max(C, M). `half`: tokens at which
    attention over a prompt reaches half of `compute`: C is multiplied by 1 + half / tokens.
    """

    compute: Share | None = None
    memory: Share | None = None
    fixed: Duration | None = None
    overlap: Exponent | None = None
    half: Count | None = None

"""Estimates: how long a decoder takes on a target, what it needs and what that costs, from the spec alone."""

from porter.estimate.estimate import Estimate, Options, estimate
from porter.estimate.model import Model

__all__ = ["Estimate", "Model", "Options", "estimate"]

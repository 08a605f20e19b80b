"""Targets: a chip as its .toml describes it, read into SI units and checked."""

from porter.target.figure import Figure
from porter.target.placing import Placement, placement
from porter.target.reading import load, names, text
from porter.target.spec import TargetSpec, figures

__all__ = [
    "Figure",
    "Placement",
    "TargetSpec",
    "figures",
    "load",
    "names",
    "placement",
    "text",
]

"""What a model's activations look like: feeds, a sweep through the layers, streamed statistics."""

from porter.calibrate.statistics import Gram, MaxMagnitude, MeanMagnitude
from porter.calibrate.sweep import Sweep

__all__ = ["Gram", "MaxMagnitude", "MeanMagnitude", "Sweep"]

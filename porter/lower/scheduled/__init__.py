"""Scheduled: a scheduled kernel of family tile (TIR) as the simulator's plain `Program`."""

from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
from porter.lower.scheduled.reader import Programs, bound, read

__all__ = ["Programs", "bound", "read"]

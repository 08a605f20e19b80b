"""Scheduled: a scheduled kernel of family tile (TIR) as the simulator's plain `Program`."""

from porter.lower import tvm_setup  # noqa: F401  (before all that imports TVM)

# isort: split
from porter.lower.scheduled.calls import step
from porter.lower.scheduled.reader import kernel, read

__all__ = ["kernel", "read", "step"]

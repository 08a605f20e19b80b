"""Simulate: how long a scheduled program of family tile takes on its chip, walked through exactly."""

from porter.simulate.binding import Kernel
from porter.simulate.kernel import simulate
from porter.simulate.kernels import Kernels
from porter.simulate.plan import simulate_plan
from porter.simulate.program import Buffer, Copy, Loop, Matrix, Program, Vector, When
from porter.simulate.result import KIND, KernelTime, StepTime, Traffic, Use
from porter.simulate.trace import trace

__all__ = [
    "KIND",
    "Buffer",
    "Copy",
    "Kernel",
    "KernelTime",
    "Kernels",
    "Loop",
    "Matrix",
    "Program",
    "StepTime",
    "Traffic",
    "Use",
    "Vector",
    "When",
    "simulate",
    "simulate_plan",
    "trace",
]

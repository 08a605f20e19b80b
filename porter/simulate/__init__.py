"""Simulate: how long a scheduled program of family tile takes on its chip, walked through exactly."""

from porter.simulate.binding import Kernel
from porter.simulate.kernel import simulate
from porter.simulate.program import Buffer, Copy, Loop, Matrix, Program, Vector, When
from porter.simulate.result import KIND, KernelTime, StepTime, Traffic, Use
from porter.simulate.step import Call, Step
from porter.simulate.trace import trace

__all__ = [
    "KIND",
    "Buffer",
    "Call",
    "Copy",
    "Kernel",
    "KernelTime",
    "Loop",
    "Matrix",
    "Program",
    "Step",
    "StepTime",
    "Traffic",
    "Use",
    "Vector",
    "When",
    "simulate",
    "trace",
]

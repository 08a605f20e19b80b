"""A WebGPU device, of software where there is no GPU."""

import os

import pytest

from porter import target
from porter.errors import EnvironmentFailure
from porter.run.webgpu import WebGPU
from porter.target import TargetSpec


@pytest.fixture(scope="session")
def machine() -> WebGPU:
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # Mesa complains without one
    try:
        return WebGPU()
    except EnvironmentFailure as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def webgpu() -> TargetSpec:
    return target.load("webgpu")

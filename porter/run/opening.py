"""Opening: a lowered program on what it is for, where that is at hand, else on this machine's CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

from porter.errors import BundleError, EnvironmentFailure
from porter.run.protocol import Runner

DEVICE = "PORTER_DEVICE"  # set to "host", programs for accelerators run on the CPU wherever they can


def opened(folder: Path) -> Runner:
    """What runs a bundle's folder. A device's kernels run on it where there is one; where there is none,
    the bundle's library computes in the device's numerics.

    Raises BundleError PORT-0501 when the program cannot be loaded.
    """
    source = _source(folder)
    if source and os.environ.get(DEVICE) != "host":
        try:
            return on_device(folder)
        except EnvironmentFailure as error:
            if error.code != "PORT-0908":
                raise
    from porter.run.host import HostRunner

    return HostRunner(folder)


def executes(runner: Runner) -> bool:
    """Whether a device's kernels are what runs."""
    from porter.run.device import DeviceRunner

    return isinstance(runner, DeviceRunner)


def on_device(folder: Path) -> Runner:
    """The bundle's kernels on their device. Raises EnvironmentFailure PORT-0908 where there is none."""
    if _source(folder) == "wgsl":
        from porter.run import webgpu

        return webgpu.runner(folder)
    from porter.run import cuda

    return cuda.runner(folder)


def _source(folder: Path) -> str:
    try:
        return str(json.loads((folder / "plan.json").read_text(encoding="utf-8")).get("source", ""))
    except (OSError, ValueError) as error:
        raise BundleError(
            "PORT-0501",
            f"the program cannot be loaded: {error}",
            where=str(folder),
            hint="convert the model again",
        ) from error

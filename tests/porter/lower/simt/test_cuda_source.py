"""Every kernel of a decoder through compilers of CUDA that need no GPU: NVRTC, and nvcc."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest
from decoders import tiny_decoder
from ported import ported

from porter import graph, target
from porter.errors import EnvironmentFailure, TargetError
from porter.lower import build
from porter.run import nvrtc

ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a", "b200": "sm_100"}
WEIGHTS = ("", "bf16", "fp16", "fp8", "int8", "int4", "mxfp4", "nvfp4")
CASES = [
    *((chip, weights, "") for chip in ARCHITECTURES for weights in WEIGHTS),
    *((chip, "int8", "int8") for chip in ARCHITECTURES),
    *((chip, "fp8", "fp8") for chip in ("h100", "b200")),  # the A100 multiplies no 8-bit floats
]
FEW = [("a100", "fp16", ""), ("h100", "fp8", "fp8"), ("b200", "nvfp4", "")]


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for this CPU takes longer than all the rest, and nothing here runs it."""
    monkeypatch.setattr(build, "compiled", lambda module, target: None)
    monkeypatch.setattr(build, "write_library", lambda built, folder: "none")


def nvcc() -> str | None:
    """NVIDIA's compiler, of its Python package or a toolkit, where there is a C++ compiler for it to call."""
    spec = importlib.util.find_spec("nvidia")
    found = (
        [f for p in (spec.submodule_search_locations or []) for f in Path(p).glob("*/bin/nvcc")]
        if spec
        else []
    )
    return next(map(str, found), shutil.which("nvcc")) if shutil.which("g++") else None


def cubins(folder: Path, arch: str) -> dict[str, bytes]:
    """What each compiler there is makes of a bundle's source."""
    source, made = folder / "lib" / "kernels.cu", {}
    try:
        made["NVRTC"] = nvrtc.compiled(source.read_text("utf-8"), arch)
    except EnvironmentFailure as error:
        print(error)
    if (compiler := nvcc()) is not None:
        to = folder / "kernels.cubin"
        command = [compiler, "-cubin", f"-arch={arch}", "-std=c++17", "--fmad=false", source, "-o", to]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made["nvcc"] = to.read_bytes()
    if not made:
        pytest.skip("neither NVRTC nor nvcc is installed")
    return made


def check(model: ir.Model, folder: Path, chip: str, weights: str, activations: str) -> None:
    spec = target.load(chip)
    assert spec.tvm["arch"] == ARCHITECTURES[chip]
    plan, _ = ported(model, spec, folder, weights, activations)
    assert len(plan.kernels) >= 15
    for compiler, cubin in cubins(folder, ARCHITECTURES[chip]).items():
        assert [k for k in plan.kernels if k.encode() not in cubin] == [], compiler


@pytest.mark.parametrize(("chip", "weights", "activations"), FEW)
def test_compilers_take_every_kernel(tmp_path: Path, chip: str, weights: str, activations: str) -> None:
    check(tiny_decoder(layers=1, tied=False), tmp_path, chip, weights, activations)


@pytest.mark.long
@pytest.mark.parametrize(("chip", "weights", "activations"), CASES)
def test_and_those_of_a_trained_decoder(
    stories_onnx: Path, tmp_path: Path, chip: str, weights: str, activations: str
) -> None:
    check(graph.load(stories_onnx), tmp_path, chip, weights, activations)


def test_nvrtc_says_what_is_wrong() -> None:
    try:
        nvrtc.library()
    except EnvironmentFailure as error:
        pytest.skip(str(error))
    with pytest.raises(TargetError, match="undefined_thing") as caught:
        nvrtc.compiled('extern "C" __global__ void f() { undefined_thing(); }', "sm_90a")
    assert caught.value.code == "PORT-0454"


def test_without_headers_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        nvrtc.library()
    except EnvironmentFailure as error:
        pytest.skip(str(error))
    monkeypatch.setattr(nvrtc, "_packages", list)
    monkeypatch.setattr(nvrtc, "USUAL", tmp_path)
    for name in nvrtc.TOOLKITS:
        monkeypatch.delenv(name, raising=False)
    nvrtc.headers.cache_clear()
    with pytest.raises(EnvironmentFailure, match="headers") as caught:
        nvrtc.compiled('extern "C" __global__ void f() {}', "sm_90a")
    assert caught.value.code == "PORT-0908"

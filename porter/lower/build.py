"""From a Relax module to a shared library: legalize, fuse, plan memory, compile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.support import cc

from porter.errors import EnvironmentFailure, TargetError
from porter.lower import sources
from porter.target import TargetSpec

# What every x86-64 server and laptop of the last decade has (AVX2, FMA, F16C). Not the build machine's own
# CPU: the same input must give the same library everywhere, and a bundle must run elsewhere.
BASELINE = {"x86_64": "x86-64-v3", "AMD64": "x86-64-v3"}


def tvm_target(spec: TargetSpec) -> tvm.target.Target:
    """TVM's target for the program that runs here: the spec's own if that is a CPU, else this one."""
    config = dict(spec.tvm) if spec.tvm["kind"] == "llvm" else {"kind": "llvm"}
    mcpu = BASELINE.get(platform.machine())
    if config["kind"] == "llvm" and mcpu:
        config.setdefault("mcpu", mcpu)
    return tvm.target.Target(config)


@dataclass
class Planned:
    """A module whose buffers are views of storages of known size, and the ONNX nodes behind its launches."""

    module: tvm.IRModule
    nodes: list[list[str]]  # of each kernel call of `main`, in order


def planned(module: tvm.IRModule, target: tvm.target.Target, named: dict[str, str]) -> Planned:
    """Legalize, fuse and plan memory. `named` has the ONNX node of each variable of `main`."""
    transform = relax.transform
    legalize = [
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.DeadCodeElimination(),
    ]
    finish = [
        transform.DeadCodeElimination(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
    ]
    with target:
        legal = tvm.transform.Sequential(legalize)(module)
        fused = transform.FuseOps()(legal)
        nodes = sources.of_calls(legal, fused, named)
        merged = tvm.transform.Sequential([transform.FuseTIR(), transform.RewriteDataflowReshape()])(fused)
        launches = [n for n, is_launch in zip(nodes, _is_launch(merged["main"]), strict=True) if is_launch]
        return Planned(tvm.transform.Sequential(finish)(merged), launches)


def _is_launch(function: relax.Function) -> list[bool]:
    """Of the kernel calls that fusing left, which are launched: a reshape is a view by now."""
    values = [binding.value for block in function.body.blocks for binding in block.bindings]
    names = [getattr(v.op, "name", "") for v in values if isinstance(v, relax.Call)]
    return [n != "relax.reshape" for n in names if n in (*sources.KERNEL_CALLS, "relax.reshape")]


def compiled(module: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Executable:
    """Machine code and bytecode of a planned module."""
    passes = [
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        _SizesInOrder(),
        relax.transform.AttachGlobalSymbol(),
    ]
    pipeline = tvm.transform.Sequential(passes)
    # TVM's pass that shares storage wants a constant size of a buffer in a memory of a chip's: a row of
    # scores is as long as the cache.
    chip = {"tirx.disable_storage_rewrite": True} if _has_levels(module) else {}
    try:
        with target, tvm.transform.PassContext(opt_level=2, config=chip):
            return relax.build(module, target=target, relax_pipeline=pipeline)
    except Exception as error:  # TVM raises many kinds: this is where they become ours
        what = f"TVM cannot compile the program: {str(error).strip().splitlines()[-1]}"
        raise TargetError("PORT-0418", what) from error


def _has_levels(module: tvm.IRModule) -> bool:
    """Whether kernels keep buffers in the memories of a chip (family tile)."""
    found: list[tirx.Var] = []

    def buffers(block: s_tir.SBlock) -> None:
        found.extend(b for b in block.alloc_buffers if b.scope().startswith("global."))

    for function in module.functions.values():
        if isinstance(function, tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, (s_tir.SBlock, buffers))
    return bool(found)


@tvm.transform.module_pass(opt_level=0, name="SizesInOrder")
class _SizesInOrder:
    """The functions that compute sizes store them in order of place.

    VMShapeLower takes them from a hash table of addresses, and now and then a process wrote another library.
    """

    def transform_module(self, module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Stores only read what the caller stored, so they may stand in any order."""
        for name, function in module.functions.items():
            if name.name_hint.startswith("shape_func") and isinstance(function.body, tirx.SeqStmt):
                stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
                module.update_func(name, function.with_body(tirx.SeqStmt(stores)))
        return module


def check_linker() -> None:
    """Raise EnvironmentFailure PORT-0902 when there is no C++ compiler, before any work is done."""
    if cc.get_cc() is None:
        what = "there is no C++ compiler to link the library with"
        raise EnvironmentFailure("PORT-0902", what, hint="install g++ or clang++")


def write_library(executable: tvm.runtime.Executable, folder: Path) -> str:
    """Link the library into `folder` and return its name, which its contents make.

    The system's loader gives back what it once loaded by the same path, so another program needs another
    name: else a process that converts again would go on running the old one. Object files and the linker's
    own scratch stand beside the library: if this process is killed they go with the folder that the next
    conversion removes, and nothing stays in the system's temporary folder. Raises EnvironmentFailure
    PORT-0902 when the C++ compiler fails.
    """
    scratch = folder / ".objects"
    scratch.mkdir()
    linked = scratch / "model.so"
    try:
        with _temporary_files_in(scratch):
            executable.export_library(str(linked), workspace_dir=str(scratch))
        name = f"model-{hashlib.sha256(linked.read_bytes()).hexdigest()[:16]}.so"
        linked.replace(folder / name)
    except (RuntimeError, FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
        text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise EnvironmentFailure("PORT-0902", f"the library cannot be linked: {text}",
                                 hint="install a C++ compiler (g++ or clang++)") from error  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return name


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Programs started in this block keep their temporary files in `folder`."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before

"""Languages: what TVM writes kernels in for a target of family simt, and what that language cannot store."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from porter.errors import TargetError
from porter.target import TargetSpec


@dataclass(frozen=True)
class Language:
    """`name` is how TVM asks for its text, `suffix` that of a file of it.

    `words`: only elements of 32 bits are stored, so that others are packed in words or widened to one.
    `apart`: a kernel is a module of its own. `shared`: bytes that a group may declare without asking, 0 for
    what the target says. `instead` is what stands for a word of TVM's that the language does not know, and
    then `head` stands before the module. `options` are TVM's, besides the limits.
    """

    name: str
    suffix: str
    words: bool = False
    apart: bool = False
    shared: int = 0
    instead: tuple[tuple[str, str], ...] = ()
    head: str = ""
    options: tuple[tuple[str, object], ...] = ()


LANGUAGES = {
    # Constant expressions must not be infinite in WGSL; a variable may. Subgroup kernels of TVM assume 32
    # lanes, which an adapter need not have.
    "webgpu": Language(
        "wgsl",
        "wgsl",
        words=True,
        apart=True,
        instead=(("inff", "bitcast<f32>(infinity)"), ("nanf", "bitcast<f32>(infinity + 0x400000u)")),
        head="var<private> infinity : u32 = 0x7f800000u;\n",
        options=(("supports_subgroups", False),),
    ),
    "cuda": Language("cuda", "cu", shared=48 << 10),
}


def language(spec: TargetSpec) -> Language:
    """The language of the target's kernels. Raises TargetError PORT-0450 for one that is not written."""
    kind = str(spec.tvm["kind"])
    if kind not in LANGUAGES:
        what = f"there is no kernel source for TVM's kind {kind!r}"
        raise TargetError("PORT-0450", what, where=spec.name, hint=f"kinds: {', '.join(LANGUAGES)}")
    return LANGUAGES[kind]


def device(spec: TargetSpec) -> tvm.target.Target:
    """TVM's target for the chip, within the spec's limits. Raises what `language` does."""
    chosen, limits = language(spec), spec.limits
    threads, shared = limits.invocations.value, int(limits.shared.value)
    config: dict[str, object] = {
        **spec.tvm,
        "max_num_threads": threads,
        "max_shared_memory_per_block": min(shared, chosen.shared or shared),
        **dict(chosen.options),
    }
    if limits.warp is not None:
        config["thread_warp_size"] = limits.warp.value
    return tvm.target.Target(config, host="llvm")

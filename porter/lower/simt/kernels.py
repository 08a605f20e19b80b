"""Kernels: one function of the program as source, and the launches that compute it.

TVM's own pipeline lowers the function; it is stopped where host and device part, and the launches are read
off the host's part.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Expr, PointerType, StringImm
from tvm.ir.instrument import pass_instrument
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm_ffi import structural_walk

from porter.errors import TargetError
from porter.lower.simt import rebuild, schedule, storage
from porter.lower.simt.language import Language

MOST_SOURCE = (
    64 << 10
)  # characters of a kernel: more is an unrolled mistake, which compilers take minutes for


@dataclass
class Kernel:
    """Device code. `writes` says which of its buffers it writes to, `scalars` are the types of the rest.

    A group is `block` threads in x, y, z and shares `shared` bytes. Parameters whose numbers are in `natural`
    are never negative.
    """

    name: str
    function: tirx.PrimFunc
    writes: list[bool]
    scalars: list[str]
    shared: int
    block: list[int]
    natural: list[int]
    source: str = ""


@dataclass
class Dispatch:
    """One launch. `buffers` are parameters of the function by number, or scratch as -1 - number; sizes and
    scalars are expressions of the function's own symbols."""

    kernel: Kernel
    buffers: list[int]
    scalars: list[Expr]
    grid: list[Expr]


@dataclass
class Compiled:
    """A function's kernels in order; `scratch` are the sizes in bytes and types of buffers between them."""

    function: tirx.PrimFunc
    dispatches: list[Dispatch] = field(default_factory=list)
    scratch: list[tuple[Expr, str]] = field(default_factory=list)


def compiled(
    function: tirx.PrimFunc, target: tvm.target.Target, language: Language, constant: Collection[int] = ()
) -> Compiled:
    """The function's kernels; parameters whose numbers are in `constant` are never written.

    Raises TargetError PORT-0451 when no schedule of it compiles, what `storage.stored` does.
    """
    reason, name = "there is no schedule for it", str(function.attrs["global_symbol"])
    # A kernel cannot stop the program. (What asserts guard is wrapped or clamped where it is read.)
    function = tirx.transform.SkipAssert()(tvm.IRModule({name: function}))[name]
    function = tirx.transform.RemoveNoOp()(tvm.IRModule({name: function}))[name]
    try:
        function = rebuild.of_threads(function)
    except ValueError as error:
        raise TargetError("PORT-0451", f"no kernel can be made of it: {error}", where=name) from error
    for bound in schedule.attempts(function, target):
        try:
            made = _launched(_split(bound, target), name)
            for dispatch in made.dispatches:
                _write(dispatch.kernel, target, language, constant, dispatch)
        except (RuntimeError, ValueError) as error:  # TVM's own, and what stands where none may
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            continue
        longest = max((len(d.kernel.source) for d in made.dispatches), default=0)
        if longest <= MOST_SOURCE:
            return made
        reason = f"its source has {longest} characters"
    what = f"TVM makes no kernel of it: {reason}"
    raise TargetError("PORT-0451", what, where=name)


@pass_instrument
class _Parted:
    """Keeps the module as it is once host and device are parted."""

    def __init__(self) -> None:
        self.module: tvm.IRModule | None = None

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        """TVM calls it."""
        if str(info.name).endswith("SplitHostDevice"):
            self.module = module


def _split(function: tirx.PrimFunc, target: tvm.target.Target) -> tvm.IRModule:
    module = tvm.IRModule({str(function.attrs["global_symbol"]): function})
    module = tirx.transform.BindTarget(target)(module)
    kept, (pipeline, *_) = _Parted(), default_s_tir_pipeline()
    # A thread computes one element after another: vectors of eight are no type of these languages.
    with tvm.transform.PassContext(instruments=[kept], config={"tirx.disable_vectorize": True}):
        pipeline(module)
    assert kept.module is not None
    return kept.module


def _launched(module: tvm.IRModule, name: str) -> Compiled:
    """What the host's part does, as data."""
    functions = {g.name_hint: f for g, f in module.functions.items()}
    host = functions.pop(name)
    return _Host(host, functions).run()


class _Host:
    def __init__(self, host: tirx.PrimFunc, kernels: dict[str, tirx.PrimFunc]) -> None:
        self.made, self.kernels = Compiled(host), kernels
        self.buffers: dict[Any, int] = {p: i for i, p in enumerate(host.params)}
        self.bound: dict[Any, Expr] = {}

    def run(self) -> Compiled:
        self.statement(self.made.function.body)
        return self.made

    def statement(self, node: Any) -> None:
        if isinstance(node, tirx.SeqStmt):
            for part in node.seq:
                self.statement(part)
        elif isinstance(node, tirx.DeclBuffer):
            self.buffers[node.buffer] = self.buffer(node.data)
        elif isinstance(node, tirx.AllocBuffer):
            self.buffers[node.buffer] = -1 - len(self.made.scratch)
            count: Any = tirx.IntImm("int64", 1)
            for size in node.buffer.shape:
                count = count * tirx.Cast("int64", self.value(size))
            self.made.scratch.append((count, str(node.buffer.dtype)))
        elif isinstance(node, tirx.Bind):
            self.bound[node.var] = self.value(node.value)
        elif isinstance(node, tirx.AttrStmt):
            self.statement(node.body)
        elif isinstance(node, tirx.Evaluate) and getattr(node.value, "op", None) is not None:
            self.launch(node.value)
        elif not isinstance(node, tirx.Evaluate):
            raise ValueError(f"{type(node).__name__} stands between launches")

    def _natural(self, scalar: Expr) -> bool:
        """Whether it is never negative: sizes of buffers are not, of scalar parameters nothing is known."""
        if not str(scalar.ty.dtype).startswith("int"):
            return False
        analyzer = tvm.sym.Analyzer()
        for symbol in tirx.analysis.undefined_vars(scalar):
            if symbol not in self.buffers:
                analyzer.bind(symbol, tvm.ir.Range(0, rebuild.FAR))
        return bool(analyzer.can_prove(scalar >= 0))

    def value(self, expression: Expr) -> Expr:
        return rebuild.replaced(expression, self.bound)

    def buffer(self, pointer: Any) -> int:
        """`pointer` is `buffer.data`."""
        return self.buffers[pointer.args[0]]

    def launch(self, call: Any) -> None:
        if call.op.name != "tirx.call_ffi_kernel":
            raise ValueError(f"{call.op.name} stands between launches")
        name, *arguments = call.args
        assert isinstance(name, StringImm)
        axes = [str(a) for a in call.attrs.launch_params]
        if any("shared" in a for a in axes):
            raise ValueError("shared memory of a size known only at run time")
        cut = len(arguments) - len(axes)
        sizes = dict(zip(axes, map(self.value, arguments[cut:]), strict=True))
        block = [int(sizes.get(f"threadIdx.{x}", 1)) for x in "xyz"]
        scalars = [self.value(a) for a in arguments[:cut] if not isinstance(a.ty, PointerType)]
        count = cut - len(scalars)
        natural = [count + i for i, s in enumerate(scalars) if self._natural(s)]
        kernel = _kernel(str(name.value), self.kernels[str(name.value)], block, natural)
        self.made.dispatches.append(
            Dispatch(
                kernel,
                [self.buffer(a) for a in arguments[:count]],
                scalars,
                [sizes.get(f"blockIdx.{x}", tirx.IntImm("int64", 1)) for x in "xyz"],
            )
        )


def _kernel(name: str, function: tirx.PrimFunc, block: list[int], natural: list[int]) -> Kernel:
    pointers = [p for p in function.params if hasattr(p.ty, "element_type")]
    scalars = [str(p.ty.dtype) for p in function.params[len(pointers) :]]
    written: set[Any] = set()
    owner: dict[Any, Any] = {}
    shared = 0

    def declared(node: tirx.DeclBuffer) -> None:
        owner[node.buffer] = node.data

    def allocated(node: tirx.AllocBuffer) -> None:
        nonlocal shared
        if node.buffer.scope() in ("shared", "shared.dyn"):
            size = 1
            for d in node.buffer.shape:
                size *= int(d)
            shared += size * tvm.runtime.DataType(str(node.buffer.dtype)).itemsize

    def stored(node: tirx.BufferStore) -> None:
        written.add(owner.get(node.buffer))

    for kind, callback in (
        (tirx.DeclBuffer, declared),
        (tirx.AllocBuffer, allocated),
        (tirx.BufferStore, stored),
    ):
        structural_walk(function.body, (kind, callback), order="pre")
    return Kernel(name, function, [p in written for p in pointers], scalars, shared, block, natural)


def _write(
    kernel: Kernel,
    target: tvm.target.Target,
    language: Language,
    constant: Collection[int],
    dispatch: Dispatch,
) -> None:
    """Write the kernel's source."""
    function = kernel.function
    if language.words:
        packed = [i for i, b in enumerate(dispatch.buffers) if b in constant]
        kernel.function = storage.in_words(function, packed, kernel.natural)
        kernel.scalars = [storage.wide(s) for s in kernel.scalars]
    else:
        kernel.function = rebuild.Rebuilt(function, kernel.natural).run()
    kernel.source = source(tvm.IRModule({kernel.name: kernel.function}), target, language)


def source(module: tvm.IRModule, target: tvm.target.Target, language: Language) -> str:
    """The text of a module of device functions."""
    # TVM would simplify between these two, and put what has a name back wherever it is used.
    module = tirx.transform.LowerIntrin()(tirx.transform.LowerWarpMemory()(module))
    build = tvm.get_global_func(f"target.build.{target.kind.name}")
    text = str(build(module, target).inspect_source(language.name))
    plain = text
    for word, other in language.instead:
        text = re.sub(rf"\b{word}\b", other, text)
    return text if text == plain else language.head + text

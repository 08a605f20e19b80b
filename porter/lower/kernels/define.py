"""Write a TIR kernel in plain Python: buffers with symbolic dimensions in, a PrimFunc out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Dim = int | str
Spec = tuple[str, tuple[Dim, ...], str]


def define(name: str, buffers: Sequence[Spec], body: Callable[..., None]) -> tirx.PrimFunc:
    """A PrimFunc whose parameters are `buffers`, in order.

    Each buffer is (name, shape, dtype); a string in a shape is a dimension known only at run time, and the
    same string is the same dimension. A dtype of "scalar" makes an int64 argument of the name instead of a
    buffer. `body` is called with the buffers, then with the symbolic dimensions and scalars by keyword, and
    emits the statements. They stand in one opaque block, as Relax demands of what `call_tir` calls.
    """
    symbols: dict[str, tirx.Var] = {}
    for _, shape, _ in buffers:
        for dim in shape:
            if isinstance(dim, str):
                symbols.setdefault(dim, tirx.Var(dim, "int64"))
    with IRBuilder() as builder:
        with T.prim_func(is_private=False, s_tir=True):
            T.func_name(name)
            handles = [
                T.arg(n, symbols.setdefault(n, tirx.Var(n, "int64")) if dtype == "scalar" else T.handle())
                for n, _, dtype in buffers
            ]
            matched = []
            for handle, (n, shape, dtype) in zip(handles, buffers, strict=True):
                if dtype == "scalar":
                    continue
                dims = tuple(symbols[d] if isinstance(d, str) else tirx.IntImm("int64", d) for d in shape)
                matched.append(T.match_buffer(handle, dims, dtype))
                IRBuilder.name(n, matched[-1])
            with T.sblock("root"):
                body(*matched, **symbols)
        func = builder.get()
    assert isinstance(func, tirx.PrimFunc)
    return func.with_attr(
        {"global_symbol": name, "tirx.noalias": True, "op_pattern": 8}
    )  # 8: opaque to fusion


def local(size: int, dtype: str = "float32") -> tirx.Buffer:
    """A private array; below 1024 bytes LLVM keeps it in registers (above, TVM takes it from the heap)."""
    return T.alloc_buffer((size,), dtype)


def loop(extent: Expr | int, kind: str = "serial") -> object:
    """`with loop(n) as i:`, int64; kind is serial, parallel, vectorized or unroll."""
    extent = tirx.IntImm("int64", extent) if isinstance(extent, int) else extent
    return {"serial": T.serial, "parallel": T.parallel, "vectorized": T.vectorized, "unroll": T.unroll}[kind](
        extent
    )


def check(condition: Expr, message: str) -> None:
    """Stop the program with `message` unless `condition` holds. Not inside a parallel loop."""
    with T.Assert(condition, message):
        pass


def store(buffer: tirx.Buffer, value: Expr, *indices: Expr | int) -> None:
    """`buffer[indices] = value`."""
    T.buffer_store(buffer, value, list(indices))


def i64(value: int) -> tirx.IntImm:
    """An int64 constant: index arithmetic must not mix widths."""
    return tirx.IntImm("int64", value)


def exp_below_zero(x: Expr, lanes: int = 1) -> Expr:
    """exp(x) for x <= 0, within a unit in the last place, 0 below -87; unlike a call it stays in vectors.

    Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and 2^n made of its exponent bits.
    Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits; taking it off again as a float is
    what TVM would simplify away.
    """

    def spread(value: Expr) -> Expr:
        return T.broadcast(value, lanes) if lanes > 1 else value

    def whole_number(value: int) -> Expr:
        return spread(tirx.IntImm("int32", value))

    def number(value: float) -> Expr:
        return spread(f32(value))

    kind = f"x{lanes}" if lanes > 1 else ""
    rounded = T.reinterpret(f"int32{kind}", x * number(1.4426950408889634) + number(1.5 * 2**23))
    whole = rounded - whole_number(0x4B400000)
    n = tirx.Cast(f"float32{kind}", whole)
    r = x - n * number(0.693359375) - n * number(-2.12194440e-4)
    polynomial = number(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = polynomial * r + number(coefficient)
    value = polynomial * r * r + r + number(1)
    bits = (whole + whole_number(127)) << whole_number(23)
    return tirx.Select(x < number(-87), number(0), value * T.reinterpret(f"float32{kind}", bits))


def tanh(x: Expr) -> Expr:
    """The C library's; TVM's own, (1 - exp(-2x)) / (1 + exp(-2x)), has no correct digit left near 0."""
    return tirx.call_pure_extern("float32", "tanhf", x)


def f32(value: float) -> tirx.FloatImm:
    """A float32 constant."""
    return tirx.FloatImm("float32", value)


__all__ = [
    "Dim",
    "Expr",
    "Spec",
    "T",
    "check",
    "define",
    "exp_below_zero",
    "f32",
    "i64",
    "local",
    "loop",
    "store",
    "tanh",
    "tirx",
    "tvm",
]

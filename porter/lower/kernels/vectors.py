"""Vectors of 256 bits, with the AVX2 instructions that LLVM does not find by itself.

Vectors are expressions; `held` gives one a name, so that what is used more than once is computed once.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

from porter.lower.kernels.define import Expr, T, f32, i64, local, tirx


def available() -> bool:
    """Is compiled code for a processor that has them? (`porter.lower.build.BASELINE`)"""
    return platform.machine() in ("x86_64", "AMD64")


def held(value: Expr) -> Expr:
    """The value under a name. (TVM's simplifier would write the value of a `bind` into each use again.)"""
    kind, count = _kind(value)
    kept = local(count, kind)
    at = T.ramp(i64(0), 1, count) if count > 1 else i64(0)
    T.buffer_store(kept, value, [at])
    return kept[at]


def scratch(size: int, dtype: str = "float32") -> tirx.Buffer:
    """A private array that stays in memory: LLVM takes apart what it can keep in registers, and where vectors
    and numbers share an array, joins it again lane by lane."""
    bits = int("".join(c for c in dtype if c.isdigit()))
    return local(max(size, 8 * 1024 // bits), dtype)  # TVM takes it from the heap (see `local`)


def ints(values: Sequence[int], dtype: str = "int32") -> Expr:
    """A constant vector."""
    whole = [tirx.IntImm("int32", i) for i in range(len(values))]
    return tirx.Shuffle([tirx.IntImm(dtype, v) for v in values], whole)


def spread(value: Expr | int, lanes: int, dtype: str = "int32") -> Expr:
    """The same number in every lane."""
    return T.broadcast(tirx.IntImm(dtype, value) if isinstance(value, int) else value, lanes)


def picked(vectors: Sequence[Expr], order: Sequence[int]) -> Expr:
    """Lanes of the vectors, counted through all of them."""
    enough = -(-len(order) // sum(_kind(v)[1] for v in vectors))  # TVM wants no more lanes than there are
    return tirx.Shuffle([*vectors] * enough, [tirx.IntImm("int32", i) for i in order])


def _kind(value: Expr) -> tuple[str, int]:
    """The type of a lane, and how many there are."""
    kind, _, lanes = repr(value.ty).removeprefix("T.").partition("x")
    return kind, int(lanes or 1)


def load(buffer: tirx.Buffer, where: Sequence[Expr], first: Expr | int, lanes: int) -> Expr:
    """Neighbours along the last axis."""
    first = i64(first) if isinstance(first, int) else first
    return buffer[(*where, T.ramp(first, 1, lanes))]


def put(buffer: tirx.Buffer, value: Expr, first: Expr | int, lanes: int) -> None:
    """Store neighbours of a buffer with one axis."""
    first = i64(first) if isinstance(first, int) else first
    T.buffer_store(buffer, value, [T.ramp(first, 1, lanes)])


def as_type(value: Expr, dtype: str) -> Expr:
    """The same bits."""
    return T.reinterpret(dtype, value)


def words_of(unsigned: Expr, signed: Expr) -> Expr:
    """uint8x32, int8x32 -> int16x16: products of neighbours, added in pairs; they saturate."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def added_pairs(words: Expr) -> Expr:
    """int16x16 -> int32x8: neighbours added."""
    ones = as_type(spread(0x00010001, 8), "int16x16")
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", words, ones)


def bytes_at(vector: Expr, order: Sequence[int]) -> Expr:
    """uint8x32 -> uint8x32: in each half of 16 bytes those of the order."""
    control = repeated(order)
    return T.call_llvm_pure_intrin("uint8x32", "llvm.x86.avx2.pshuf.b", vector, control)


def looked_up(table: Sequence[float], places: Expr) -> Expr:
    """Eight numbers, int32x8 -> float32x8: those at the places, of which the three lowest bits count."""
    numbers = tirx.Shuffle([f32(x) for x in table], [tirx.IntImm("int32", i) for i in range(8)])
    return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", numbers, places)


def hidden_zero(size: Expr) -> Expr:
    """0 of a size, int64, of which LLVM does not know that it is below 2^62; uint16."""
    return held(tirx.Cast("uint16", size >> i64(62)))


def shifted_up(words: Expr, shifts: Sequence[int], zero: Expr) -> Expr:
    """uint16x16: each word by its own shift. AVX2 has no such shift of words, and LLVM would take three
    instructions for a product with powers of two that it knows; `zero` hides them."""
    return words * (_powers([1 << n for n in shifts]) + T.broadcast(zero, 16))


def shifted_down(words: Expr, shifts: Sequence[int]) -> Expr:
    """uint16x16: each word by its own shift, from 1 on."""
    powers = _powers([1 << (16 - n) for n in shifts])
    return T.call_llvm_pure_intrin("uint16x16", "llvm.x86.avx2.pmulhu.w", words, powers)


def _powers(pattern: Sequence[int]) -> Expr:
    """Of two words a lane, or of two words a lane in each half."""
    half = len(pattern) // 2
    whole = pattern * 8 if half == 1 else [*pattern[:2] * 4, *pattern[2:] * 4]
    return ints(whole, "uint16")


def masked(vector: Expr, mask: int) -> Expr:
    """uint8x32 & a pattern of 32 bits."""
    return as_type(as_type(vector, "uint32x8") & spread(mask, 8, "uint32"), "uint8x32")


def flipped(vector: Expr, bits: Expr) -> Expr:
    """uint8x32: vector ^ bits."""
    return as_type(as_type(vector, "uint32x8") ^ as_type(bits, "uint32x8"), "uint8x32")


def repeated(half: Sequence[int]) -> Expr:
    """uint8x32: 16 constant bytes in each half."""
    whole = [*half, *half]
    words = [sum(b << (8 * i) for i, b in enumerate(whole[n : n + 4])) for n in range(0, 32, 4)]
    return as_type(ints([w - (1 << 32) if w >> 31 else w for w in words]), "uint8x32")


def both(a: Expr, b: Expr) -> Expr:
    """uint8x32: a | b."""
    return as_type(as_type(a, "uint32x8") | as_type(b, "uint32x8"), "uint8x32")


def rounded_bytes(values: Sequence[Expr], signed: bool) -> Expr:
    """Four float32x8 -> the nearest integers, ties to even, as int8x32 or uint8x32; they saturate."""
    whole = [T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx.cvt.ps2dq.256", v) for v in values]
    pack = "llvm.x86.avx2.packssdw"
    words = [T.call_llvm_pure_intrin("int16x16", pack, *whole[i : i + 2]) for i in (0, 2)]
    pack, kind = ("packsswb", "int8x32") if signed else ("packuswb", "uint8x32")
    mixed = T.call_llvm_pure_intrin(kind, f"llvm.x86.avx2.{pack}", *words)  # in each half, of all four
    return as_type(picked([as_type(mixed, "int32x8")], (0, 4, 1, 5, 2, 6, 3, 7)), kind)


def magnitude(value: Expr) -> Expr:
    """float32x8 without signs."""
    return as_type(as_type(value, "uint32x8") & spread(0x7FFFFFFF, 8, "uint32"), "float32x8")


def lifted(value: Expr, step: Expr, steps: int) -> Expr:
    """float32x8: value + steps * step."""
    return step * T.broadcast(f32(float(steps)), 8) + value if steps else value


def largest(values: Sequence[Expr]) -> Expr:
    """The largest of all lanes of float32x8's."""
    return _folded(values, tirx.max)


def total(values: Sequence[Expr]) -> Expr:
    """The sum of all lanes of vectors of 8."""
    return _folded(values, lambda a, b: a + b)


def _folded(values: Sequence[Expr], fold: object) -> Expr:
    one = list(values)
    while len(one) > 1:
        one = [fold(*one[i : i + 2]) if i + 1 < len(one) else one[i] for i in range(0, len(one), 2)]
    vector = held(one[0])
    for far in (4, 2, 1):
        vector = held(fold(vector, picked([vector], [i ^ far for i in range(8)])))
    return picked([vector], [0])


def prefetch(buffer: tirx.Buffer, where: Sequence[Expr], tokens: int) -> None:
    """Ask for so many rows of the last axis from `where` on; what lies beyond the end is no fault."""
    bits = int("".join(c for c in str(buffer.dtype) if c.isdigit()))
    size = tokens * int(buffer.shape[-1]) * bits // 8
    for byte in range(0, size, 64):
        place = T.address_of(buffer[(*where, i64(byte * 8 // bits))])
        flags = [tirx.IntImm("int32", n) for n in (0, 3, 1)]
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", place, *flags))

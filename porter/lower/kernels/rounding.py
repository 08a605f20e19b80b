"""Kernels that round float32 groups to codes, one result a group or an element, as numpy would bit by bit.

Values are [groups, length]; `length` is a number, or None where it is known only at run time (a row). Every
float operation is the one that `porter.formats` makes, in its order. LLVM may join a product and a sum into
one rounding, which numpy does not: `_apart` keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from porter.lower.kernels.define import Expr, T, define, f32, i64, local, loop, store, tirx

LANES = 16
PARTIAL = 8  # sums that numpy keeps side by side
SUMMED = (
    PARTIAL + 1,
    129,
)  # lengths whose squares `errors` adds up as numpy does: one block of its pairwise sum


def extremes(name: str, length: int) -> tirx.PrimFunc:
    """values -> the largest and the smallest of each group."""

    def body(values: tirx.Buffer, high: tirx.Buffer, low: tirx.Buffer, groups: Expr) -> None:
        with loop(groups) as m:
            store(high, _extreme(values, m, length, tirx.max), m)
            store(low, _extreme(values, m, length, tirx.min), m)

    sides = [(n, ("groups",), "float32") for n in ("high", "low")]
    return define(name, [("values", ("groups", length), "float32"), *sides], body)


def better(name: str, length: int, low: int, high: int, kept: tuple[float, ...]) -> tirx.PrimFunc:
    """values -> each group's float32 scale and int8 codes, by the better of two scales.

    The scales are absmax / high, and m / low where m is the value of largest magnitude with its sign, kept to
    kept[0] … kept[1] and kept[0] … kept[2]; 1 for zeros. The sum of ((code * scale - value) / absmax)^2
    decides, a tie for the first; absmax counts as kept[0] at least. The other buffers are room to work in.
    """
    assert SUMMED[0] <= length <= SUMMED[1]
    names = ("scale", "most", "least", "one", "two", "unit", "first", "second")

    def body(values: tirx.Buffer, *rest: tirx.Buffer, groups: Expr) -> None:
        scale, most, least, one, two, unit, first, second, codes = rest
        with loop(groups) as m:  # a loop for each thing, for LLVM makes vectors of groups of some
            store(most, _extreme(values, m, length, tirx.max), m)
            store(least, _extreme(values, m, length, tirx.min), m)
        with loop(groups) as m:
            below = f32(0) - least[m]
            peak = tirx.max(most[m], below)
            store(unit, tirx.max(peak, f32(kept[0])), m)
            up, down = (
                tirx.min(tirx.max(peak / f32(abs(code)), f32(kept[0])), f32(end))
                for code, end in ((high, kept[1]), (low, kept[2]))
            )
            store(one, tirx.Select(peak == f32(0), f32(1), up), m)
            signed = tirx.Select(most[m] >= below, f32(0) - down, down)
            store(two, tirx.Select(peak == f32(0), f32(1), signed), m)
        with loop(groups) as m:
            store(first, _squares(values, m, length, one[m], unit[m], low, high), m)
            store(second, _squares(values, m, length, two[m], unit[m], low, high), m)
        with loop(groups) as m:
            store(scale, tirx.Select(second[m] < first[m], two[m], one[m]), m)
        with loop(groups) as m, loop(length) as i:
            ratio = values[m, i] / scale[m]
            store(codes, _clipped(tirx.nearbyint(ratio), low, high).astype("int8"), m, i)

    shape, room = ("groups", length), [(n, ("groups",), "float32") for n in names]
    return define(name, [("values", shape, "float32"), *room, ("codes", shape, "int8")], body)


def errors(name: str, length: int, low: int, high: int) -> tirx.PrimFunc:
    """values, two scales of each group, its unit -> the sums of ((code * scale - value) / unit)^2."""
    assert SUMMED[0] <= length <= SUMMED[1]

    def body(values: tirx.Buffer, *rest: tirx.Buffer, groups: Expr) -> None:
        one, two, unit, first, second = rest
        with loop(groups) as m:
            store(first, _squares(values, m, length, one[m], unit[m], low, high), m)
            store(second, _squares(values, m, length, two[m], unit[m], low, high), m)

    names = ("one", "two", "unit", "first", "second")
    buffers = [("values", ("groups", length), "float32"), *((n, ("groups",), "float32") for n in names)]
    return define(name, buffers, body)


def _extreme(values: tirx.Buffer, m: Expr, length: int, pick: Callable[[Expr, Expr], Expr]) -> Expr:
    """The largest or smallest of a group."""
    wide = min(LANES, 1 << (length.bit_length() - 1))
    starts = sorted(
        {*range(0, length - wide + 1, wide), length - wide}
    )  # the last may overlap the one before
    best = local(wide)
    with loop(wide, "vectorized") as lane:
        store(best, values[m, lane], lane)
    for start in starts[1:]:
        with loop(wide, "vectorized") as lane:
            store(best, pick(best[lane], values[m, i64(start) + lane]), lane)
    half = wide // 2
    while half:
        with loop(half, "vectorized") as lane:
            store(best, pick(best[lane], best[i64(half) + lane]), lane)
        half //= 2
    return best[i64(0)]


def _squares(values: tirx.Buffer, m: Expr, length: int, scale: Expr, unit: Expr, low: int, high: int) -> Expr:
    """The sum of ((code * scale - value) / unit)^2 over a group, added up in the order of numpy's
    `add.reduceat`: the first square, and to it the pairwise sum of the rest (eight partial sums, those in a
    tree, then what is left over one by one)."""

    def square(at: Expr) -> Expr:
        value = values[m, at]
        code = _clipped(tirx.nearbyint(value / scale), low, high)
        error = (_apart(code * scale) - value) / unit
        return _apart(error * error)

    sums, rest = local(PARTIAL), local(PARTIAL)
    with loop(PARTIAL, "vectorized") as lane:
        store(sums, square(i64(1) + lane), lane)
    for block in range(1, (length - 1) // PARTIAL):
        with loop(PARTIAL, "vectorized") as lane:
            store(sums, sums[lane] + square(i64(1 + block * PARTIAL) + lane), lane)
    with loop(PARTIAL, "vectorized") as lane:
        store(rest, square(i64(length - PARTIAL) + lane), lane)
    s = [sums[i64(i)] for i in range(PARTIAL)]
    added = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    for i in range(PARTIAL - (length - 1) % PARTIAL, PARTIAL):
        added = added + rest[i64(i)]
    return square(i64(0)) + added


def integers(name: str, length: int | None, low: int, high: int, zero: bool) -> tirx.PrimFunc:
    """values, a scale each group[, a zero point] -> int8 codes, or uint8 where none is below 0.

    value / scale to nearest, ties to even, plus the zero point, kept in low to high.
    """

    def code(ratio: Expr, *zeros: Expr) -> Expr:
        whole = tirx.nearbyint(ratio)
        return _clipped(whole + zeros[0] if zeros else whole, low, high).astype(dtype)

    dtype = "int8" if low < 0 else "uint8"
    return _elementwise(name, length, dtype, code, ("zero",) if zero else ())


def floats(
    name: str, length: int | None, mantissa: int, bias: int, bits: int, top: int, zero: bool
) -> tirx.PrimFunc:
    """values, a scale each group -> uint8 codes of a small float: to nearest, ties to even, saturating.

    A float of 1 sign bit, `mantissa` bits and the rest of `bits` for the exponent; `top` is the code of its
    largest value. Without `zero` there is no negative zero.
    """
    drop = 23 - mantissa
    least = tirx.FloatImm("float32", 2.0 ** (1 - bias))  # the smallest that is not subnormal

    def code(ratio: Expr) -> Expr:
        def i32(value: int) -> Expr:
            return tirx.IntImm("int32", value)

        whole = T.reinterpret("int32", ratio)
        size = whole & i32(0x7FFFFFFF)
        magnitude = T.reinterpret("float32", size)
        even = (size >> i32(drop)) & i32(1)
        normal = ((size + i32((1 << (drop - 1)) - 1) + even) >> i32(drop)) - i32((127 - bias) << mantissa)
        small = tirx.Cast(
            "int32", tirx.nearbyint(tirx.min(magnitude, least) * f32(2.0 ** (bias - 1 + mantissa)))
        )
        found = tirx.min(tirx.Select(magnitude < least, small, normal), i32(top))
        sign = (whole >> i32(32 - bits)) & i32(1 << (bits - 1))
        signed = found | (sign if zero else tirx.Select(found == i32(0), i32(0), sign))
        return signed.astype("uint8")

    return _elementwise(name, length, "uint8", code)


def _elementwise(
    name: str, length: int | None, dtype: str, code: Callable[..., Expr], more: tuple[str, ...] = ()
) -> tirx.PrimFunc:
    """code(value / scale, and what else there is `more` of each group) for every value."""

    def body(*buffers: tirx.Buffer, groups: Expr, columns: Expr | None = None) -> None:
        values, scale, *others, codes = buffers

        def at(m: Expr, i: Expr) -> None:
            store(codes, code(values[m, i] / scale[m], *(o[m] for o in others)), m, i)

        size = i64(length) if columns is None else columns
        whole = tirx.floordiv(size, i64(LANES))
        with loop(groups) as m:
            with loop(whole) as i, loop(LANES, "vectorized") as lane:
                at(m, i * i64(LANES) + lane)
            with loop(size - whole * i64(LANES)) as i:
                at(m, whole * i64(LANES) + i)

    shape = ("groups", length or "columns")
    groups = [(n, ("groups",), "float32") for n in ("scale", *more)]
    return define(name, [("values", shape, "float32"), *groups, ("codes", shape, dtype)], body)


def _clipped(x: Expr, low: int, high: int) -> Expr:
    return tirx.min(tirx.max(x, f32(low)), f32(high))


def _apart(product: Expr) -> Expr:
    """The product rounded by itself, and not joined with a sum that it goes into.

    No float is below the least, but LLVM cannot leave the question out, for a NaN would answer otherwise; its
    own `llvm.arithmetic.fence` says the same, one element at a time.
    """
    return tirx.max(product, f32(-3.4028234663852886e38))

"""y = x Wᵀ and row gathering for a constant weight W, read packed and decoded in registers.

Packed layout: W [N, K] is cut into blocks of LANES rows; block, k, lane is the order of the bytes, so SIMD
lanes are output columns, the activation is a broadcast and the weight stream is sequential. N is padded with
zero codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from porter.lower.kernels.codecs import CODECS, Codec, pack_pairs
from porter.lower.kernels.define import Expr, Spec, check, define, f32, i64, local, loop, store, tirx
from porter.lower.kernels.integers import OUTSIDE

LANES = 16  # two AVX2 registers of float32
ROWS = 4  # rows of x that share one decoded weight vector: 4 x 16 accumulators fill half the AVX2 registers
PARALLEL_WORK = 1 << 15  # below this many multiplications starting threads costs more than it saves


@dataclass(frozen=True)
class Layout:
    """How a weight [n, k] is stored: codec, and `group` codes along k that share a scale (0: no scales)."""

    codec_name: str
    n: int
    k: int
    group: int = 0

    @property
    def codec(self) -> Codec:
        """The element codec."""
        return CODECS[self.codec_name]

    @property
    def blocks(self) -> int:
        """Blocks of LANES rows, the last one padded."""
        return -(-self.n // LANES)

    @property
    def groups(self) -> int:
        """Scale groups along k, the last one ragged."""
        return -(-self.k // self.group) if self.group else 0

    @property
    def words(self) -> int:
        """Storage elements along k."""
        return -(-self.k // self.codec.per_word)

    @property
    def name(self) -> str:
        """A name for kernels that read this layout."""
        group = f"_g{self.group}" if self.group not in (0, self.k) else ""
        return f"{self.codec_name.replace('-', '_')}{group}_n{self.n}_k{self.k}"

    def buffers(self) -> list[Spec]:
        """The packed weight's buffers: codes, and scales where there are any."""
        codes: Spec = ("w", (self.blocks, self.words, LANES), self.codec.storage)
        scales: list[Spec] = [("scale", (self.blocks, self.groups, LANES), "float32")] if self.group else []
        return [codes, *scales]

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """codes [n, k] (float32, int8 or raw fp8 bytes) -> the first buffer."""
        if self.codec.per_word == 2:
            codes = pack_pairs(codes, 1)
        return _interleave(codes, self.blocks).astype(self.codec.storage, copy=False)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        """scales [n, groups] -> the second buffer."""
        return _interleave(scales.astype(np.float32, copy=False), self.blocks)


def _interleave(rows: np.ndarray, blocks: int) -> np.ndarray:
    """[n, w] -> [blocks, w, LANES], rows padded with zeros."""
    padded = np.zeros((blocks * LANES, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(blocks, LANES, -1).transpose(0, 2, 1))


def _spans(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(first group, groups, codes in each) of the whole groups, then of the ragged one."""
    if not layout.group:
        yield 0, 1, layout.k
        return
    whole, tail = divmod(layout.k, layout.group)
    if whole:
        yield 0, whole, layout.group
    if tail:
        yield whole, 1, tail


def matmul(layout: Layout) -> tirx.PrimFunc:
    """x [m, k] float32, packed W -> y [m, n] float32, accumulated in float32 in order of k."""
    assert not layout.group or layout.group % layout.codec.per_word == 0 or layout.group == layout.k

    def body(x, *rest, m):
        *weight, y = rest

        def column(block: Expr, width: int) -> None:
            with loop(m // i64(ROWS)) as tile:
                _tile(layout, x, weight, y, block, width, tile * i64(ROWS), ROWS)
            with loop(m % i64(ROWS)) as row:
                _tile(layout, x, weight, y, block, width, m // i64(ROWS) * i64(ROWS) + row, 1)

        whole, tail = divmod(layout.n, LANES)
        if whole:
            with loop(whole, "parallel" if layout.n * layout.k >= PARALLEL_WORK else "serial") as block:
                column(block, LANES)
        if tail:
            column(i64(whole), tail)

    buffers: list[Spec] = [
        ("x", ("m", layout.k), "float32"),
        *layout.buffers(),
        ("y", ("m", layout.n), "float32"),
    ]
    return define(f"matmul_{layout.name}", buffers, body)


def _tile(
    layout: Layout,
    x: tirx.Buffer,
    weight: list[tirx.Buffer],
    y: tirx.Buffer,
    block: Expr,
    width: int,
    row: Expr,
    rows: int,
) -> None:
    """y[row:row+rows, block*LANES:+width]: every weight vector is decoded once for all the rows."""
    acc = local(rows * LANES)
    with loop(rows * LANES, "vectorized") as v:
        store(acc, f32(0), v)
    per_word = layout.codec.per_word
    for first, groups, codes in _spans(layout):
        with loop(groups) as group:
            scale = _load_scale(weight, block, group + i64(first))
            start = (group + i64(first)) * i64(layout.group // per_word)  # words never straddle groups
            with loop(codes // per_word) as word:
                _accumulate(layout, x, weight[0], scale, acc, block, start + word, per_word, row, rows)
            if codes % per_word:  # the pad of the last word is no code: 0 * inf would be NaN
                last = start + i64(codes // per_word)
                _accumulate(layout, x, weight[0], scale, acc, block, last, codes % per_word, row, rows)
    for r in range(rows):
        with loop(width, "vectorized") as v:
            store(y, acc[i64(r * LANES) + v], row + i64(r), block * i64(LANES) + v)


def _load_scale(weight: list[tirx.Buffer], block: Expr, group: Expr) -> tirx.Buffer | None:
    if len(weight) == 1:
        return None
    scale = local(LANES)
    with loop(LANES, "vectorized") as v:
        store(scale, weight[1][block, group, v], v)
    return scale


def _accumulate(
    layout: Layout,
    x: tirx.Buffer,
    codes: tirx.Buffer,
    scale: tirx.Buffer | None,
    acc: tirx.Buffer,
    block: Expr,
    word: Expr,
    codes_used: int,
    row: Expr,
    rows: int,
) -> None:
    """acc[r, :] += x[row + r, k] * decode(W[:, k]) for the first `codes_used` codes of one storage word."""
    for which in range(codes_used):
        decoded = local(LANES)
        with loop(LANES, "vectorized") as v:
            value = layout.codec.decode(codes[block, word, v], tirx.IntImm("int32", which))
            store(decoded, value * scale[v] if scale is not None else value, v)
        k = word * i64(layout.codec.per_word) + i64(which)
        for r in range(rows):
            with loop(LANES, "vectorized") as v:
                at = i64(r * LANES) + v
                store(acc, acc[at] + x[row + i64(r), k] * decoded[v], at)


def gather(layout: Layout) -> tirx.PrimFunc:
    """Row numbers [m] int64 and packed W -> rows [m, k] float32; a negative number counts from the end.

    A number outside of the table stops the program: it must not read what lies beside it.
    """

    def body(rows, *rest, m):
        codes, *scales, out = rest
        with loop(m) as i:
            check(tirx.all(rows[i] >= i64(-layout.n), rows[i] < i64(layout.n)), OUTSIDE)
            row = tirx.Select(rows[i] < i64(0), rows[i] + i64(layout.n), rows[i])
            with loop(layout.k) as k:
                value = layout.codec.decode(*_word(layout, codes, row, k))
                if scales:
                    value = value * scales[0][row // i64(LANES), k // i64(layout.group), row % i64(LANES)]
                store(out, value, i, k)

    buffers: list[Spec] = [("rows", ("m",), "int64"), *layout.buffers(), ("out", ("m", layout.k), "float32")]
    return define(f"gather_{layout.name}", buffers, body)


def _word(layout: Layout, codes: tirx.Buffer, row: Expr, k: Expr) -> tuple[Expr, Expr]:
    per_word = layout.codec.per_word
    word = codes[row // i64(LANES), k // i64(per_word), row % i64(LANES)]
    return word, tirx.Cast("int32", k % i64(per_word))

"""Layout: how kernels keep a constant matrix W [n, k], or a stack of them, packed.

W is cut into blocks of LANES rows; block, word along k, lane is the order of what is stored, so SIMD lanes
are output columns, the activation is a broadcast and the weight stream is sequential. n is padded with zero
codes. Along k every group of codes that share a scale begins at a whole word: one of 33 codes of 4 bits takes
17 bytes. Scales, zero points and micro-exponents are kept as they were stored and decoded in registers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from porter.formats import packing
from porter.lower.kernels.codecs import CODECS, Codec
from porter.lower.kernels.define import Spec

LANES = 16  # two AVX2 registers of float32


@dataclass(frozen=True)
class Layout:
    """A weight [n, k], or [stack, n, k]; it stands for (element - zero) * 2^-shift * (scale * factor).

    `group` codes along k share a scale (0: there are no scales), and so do `rows` rows: 1, a multiple of
    `lanes`, or 0 for all of them. `scale` and `zero` name the codecs of those ("" for no zero points), and
    `micro` neighbours along k share a bit that halves them (0: none). `factor`: all scales share a float32.
    `lanes` rows make a block; with 1 every row of W lies by itself.
    """

    codec_name: str
    n: int
    k: int
    group: int = 0
    scale: str = "fp32"
    zero: str = ""
    rows: int = 1
    micro: int = 0
    factor: bool = False
    stack: int = 1
    lanes: int = LANES

    def __post_init__(self) -> None:
        assert self.rows % self.lanes == 0 or self.rows == 1, self
        assert self.group or not (self.zero or self.factor or self.micro), self

    @property
    def codec(self) -> Codec:
        """The element codec."""
        return CODECS[self.codec_name]

    @property
    def unit(self) -> int:
        """Codes that a kernel unrolls: whole words, and whole bytes of micro-exponents where groups allow."""
        byte = math.lcm(8 * self.micro, self.codec.unit)
        return byte if self.micro and self.group % byte == 0 else self.codec.unit

    @property
    def blocks(self) -> int:
        """Blocks of `lanes` rows of one matrix, the last one padded."""
        return -(-self.n // self.lanes)

    @property
    def groups(self) -> int:
        """Scale groups along k, the last one ragged."""
        return -(-self.k // self.group) if self.group else 0

    @property
    def row_groups(self) -> int:
        """Entries of one matrix's scales along n; with a scale for each row, blocks of them."""
        return self.blocks if self.rows == 1 else -(-self.n // self.rows) if self.rows else 1

    @property
    def words(self) -> int:
        """Storage words along k."""
        return sum(groups * self.codec.words(codes) for _, groups, codes in self.spans())

    @property
    def name(self) -> str:
        """A name for kernels that read this layout."""
        group = f"_g{self.group}" if self.group not in (0, self.k) else ""
        scale = f"_s{self.scale}" if self.group and self.scale != "fp32" else ""
        parts = [group, scale, f"_z{self.zero}" if self.zero else "", f"_r{self.rows}" * (self.rows != 1)]
        stack = f"_e{self.stack}" if self.stack > 1 else ""
        return f"{self.codec_name}{''.join(parts)}{'_f' * self.factor}{stack}_n{self.n}_k{self.k}"

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(first group, groups, codes in each) of the whole groups, then of the ragged one."""
        whole, tail = divmod(self.k, self.group or self.k)
        if whole:
            yield 0, whole, self.group or self.k
        if tail:
            yield whole, 1, tail

    def buffers(self) -> list[Spec]:
        """The packed weight's buffers: `w`, and `scale`, `zero`, `shift` and `factor` where there are any."""
        blocks, lanes = self.stack * self.blocks, self.lanes if self.rows == 1 else 1
        per_group = (self.stack * self.row_groups, self.groups, lanes)
        found: list[Spec] = [("w", (blocks, self.words, self.lanes), self.codec.storage)]
        if self.group:
            found.append(("scale", per_group, CODECS[self.scale].storage))
        if self.zero:
            found.append(("zero", per_group, CODECS[self.zero].storage))
        if self.micro:
            words = CODECS["halving"].words(-(-self.k // self.micro))
            found.append(("shift", (blocks, words, self.lanes), "uint8"))
        if self.factor:
            found.append(("factor", (1,), "float32"))
        return found

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """codes [n, k] or [stack, n, k], a code each (integers, bytes, or wide floats) -> buffer `w`."""
        codes, bits = codes.reshape(self.stack, self.n, self.k), self.codec.bits
        if bits < 8:
            codes = np.concatenate([self._packed(codes, *span) for span in self.spans()], axis=-1)
        return self._interleaved(codes, self.codec.storage)

    def _packed(self, codes: np.ndarray, first: int, groups: int, each: int) -> np.ndarray:
        start = first * self.group
        apart = codes[..., start : start + groups * each].reshape(self.stack, self.n, groups, each)
        return packing.pack(apart, self.codec.bits).reshape(self.stack, self.n, -1)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        """scales [R, groups] or [stack, R, groups] in their stored type -> buffer `scale`."""
        return self._per_group(scales, CODECS[self.scale].storage)

    def pack_zeros(self, zeros: np.ndarray) -> np.ndarray:
        """zero points [R, groups] or [stack, R, groups] -> buffer `zero`."""
        return self._per_group(zeros, CODECS[self.zero].storage)

    def pack_shifts(self, shifts: np.ndarray) -> np.ndarray:
        """bits [n, ceil(k / micro)] or [stack, n, …], uint8, 1 for a halving -> buffer `shift`."""
        return self._interleaved(packing.pack(shifts.reshape(self.stack, self.n, -1), 1), "uint8")

    def _per_group(self, values: np.ndarray, storage: str) -> np.ndarray:
        if self.rows == 1:
            return self._interleaved(values.reshape(self.stack, self.n, self.groups), storage)
        return _stored(values, storage).reshape(self.stack * self.row_groups, self.groups, 1)

    def _interleaved(self, rows: np.ndarray, storage: str) -> np.ndarray:
        """[stack, n, w] -> [stack * blocks, w, lanes], rows padded with zeros."""
        rows = _stored(rows, storage)
        padded = np.zeros((self.stack, self.blocks * self.lanes, rows.shape[-1]), rows.dtype)
        padded[:, : self.n] = rows
        apart = padded.reshape(self.stack * self.blocks, self.lanes, -1)
        return np.ascontiguousarray(apart.transpose(0, 2, 1))


def _stored(values: np.ndarray, storage: str) -> np.ndarray:
    """The same numbers where numpy has the type; else (bfloat16, 8-bit floats) their bits."""
    wanted = np.dtype(storage)
    same_bits = values.dtype.isbuiltin == 2 and values.dtype.itemsize == wanted.itemsize
    return np.ascontiguousarray(values).view(wanted) if same_bits else values.astype(wanted, copy=False)

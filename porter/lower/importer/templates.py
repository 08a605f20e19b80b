"""Templates: the kernels that the importer emits, which is all that it knows of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from tvm import tirx

import porter.lower.kernels.append
import porter.lower.kernels.cache
import porter.lower.kernels.gather
import porter.lower.kernels.matmul
import porter.lower.kernels.norm
import porter.lower.kernels.rotary  # noqa: F401
from porter.lower import kernels
from porter.lower.kernels.attention import Attention
from porter.lower.kernels.define import Dim
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.products import Activation
from porter.lower.kernels.stored import Readable, Stored

Kind = Literal["weights", "cache", "tensors"]


@dataclass(frozen=True)
class Multiplied:
    """A matrix product of the program: `kind` says what stands on its right side, in `format`, as porter
    names it, and `activations` is the format of the left side ("": floats)."""

    kind: Kind
    format: str
    activations: str = ""


@dataclass(frozen=True)
class Append:
    """A kernel, made when it is wanted, that appends to one side of a stored cache: it takes the buffers
    `writes` (by suffix), which it writes in place, those in `reads`, new tokens [b, heads, s, width], starts
    [b], and what else an append is given where `beside`."""

    name: str
    make: Callable[[], tirx.PrimFunc]
    writes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    beside: bool = True


class Templates(Protocol):
    """Makes kernels; each takes what the host's of the same name takes (`porter.lower.kernels`)."""

    keeps_codes: bool
    """Whether products read an x of 8-bit floats as it is; else it is widened before."""
    rare_caches: bool
    """Whether caches with tags, a residual or an exact copy have kernels."""

    def layout(self, layout: Layout) -> Layout:
        """How a matrix lies in memory."""

    def matmul(self, layout: Layout) -> tirx.PrimFunc:
        """x [m, k] float32 times a packed W."""

    def products(self, layout: Layout, x: Activation, out: str = "float32") -> tirx.PrimFunc:
        """x of codes times a packed W."""

    def stacked(self, layout: Layout, *, picked: bool, shared: bool) -> tirx.PrimFunc:
        """x [t, m, k] float32 times matrices of a stack."""

    def gather(self, layout: Layout) -> tirx.PrimFunc:
        """Rows of a packed W."""

    def matrices(self, layout: Layout) -> tirx.PrimFunc:
        """Matrices of a stack."""

    def attention(self, spec: Attention) -> tirx.PrimFunc:
        """Attention over keys and values."""

    def rms_norm(self, width: int, epsilon: float) -> tirx.PrimFunc:
        """RMS normalization."""

    def rotary(
        self,
        heads: int,
        width: int,
        rotated: int,
        *,
        interleaved: bool,
        table: Dim | None,
        cos_batch: Dim = "b",
    ) -> tirx.PrimFunc:
        """Rotary position embedding."""

    def append(
        self, heads: int, capacity: int, width: int, dtype: str, *, circular: bool = False
    ) -> tirx.PrimFunc:
        """Append to a cache in place."""

    def appends(self, spec: Stored, heads: int) -> list[Append]:
        """Append to one side of a stored cache, in order. Raises TargetError PORT-0432 for one that there are
        no kernels for."""

    def read(self, spec: Readable, heads: int) -> tirx.PrimFunc:
        """All tokens of one side of a stored cache, for whoever is no attention."""

    def pairs(self, m: Dim, k: Dim, n: Dim) -> tirx.PrimFunc | None:
        """x [t, m, k] float32 times y [t, k, n] float32; None where TVM's own product does."""


class Host:
    """The kernels of family host (`porter.lower.kernels`). Implements Templates."""

    keeps_codes, rare_caches = False, True
    matmul = staticmethod(kernels.matmul.matmul)
    products = staticmethod(kernels.products.products)
    stacked = staticmethod(kernels.matmul.stacked)
    gather = staticmethod(kernels.gather.gather)
    matrices = staticmethod(kernels.gather.matrices)
    attention = staticmethod(kernels.attention.attention)
    rms_norm = staticmethod(kernels.norm.rms_norm)
    rotary = staticmethod(kernels.rotary.rotary)
    append = staticmethod(kernels.cache.append)
    read = staticmethod(kernels.stored.read_stored)

    def appends(self, spec: Stored, heads: int) -> list[Append]:
        """One kernel for all."""
        writes = tuple(suffix for suffix, _, _ in spec.planned(heads))
        return [Append("append", lambda: kernels.append.append_stored(spec, heads), writes)]

    def layout(self, layout: Layout) -> Layout:
        """In blocks of rows, a SIMD lane each."""
        return layout

    def pairs(self, m: Dim, k: Dim, n: Dim) -> tirx.PrimFunc | None:
        """None."""
        return None

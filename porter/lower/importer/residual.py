"""Attention around caches with a residual (`porter.lower.kernels.residual`): a query goes in with R q behind
it, and what comes out has two halves.
"""

from __future__ import annotations

from tvm import relax

from porter.kv.rotation import rotation
from porter.lower.importer.program import Importer
from porter.lower.importer.values import StoredCache
from porter.lower.kernels.residual import Residual
from porter.lower.kernels.stored import Source, Stored

op = relax.op


def source(cache: StoredCache) -> Stored | Residual:
    """What kernels read a cache as."""
    return Residual(cache.spec) if cache.spec.side.residual else cache.spec


def extended(imp: Importer, query: relax.Expr, keys: Source) -> relax.Expr:
    """[…, D] -> q, and behind it R q where keys have a residual."""
    if not isinstance(keys, Residual):
        return query
    turned = imp.emit(op.matmul(query, _matrix(keys.stored.width, transposed=True)))
    return imp.emit(op.concat([query, turned], axis=-1))


def joined_halves(imp: Importer, y: relax.Expr) -> relax.Expr:
    """[…, 2 D], y and z -> y + Rᵀ z."""
    first, second = _halves(imp, y)
    size = imp.shape(first)[-1]
    return imp.emit(op.add(first, imp.emit(op.matmul(second, _matrix(size, transposed=False)))))


def _halves(imp: Importer, y: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    size = imp.shape(y)[-1] // 2
    return tuple(
        imp.emit(op.strided_slice(y, [len(imp.shape(y)) - 1], [start], [start + size])) for start in (0, size)
    )


def _matrix(size: int, transposed: bool) -> relax.Expr:
    """What rows are multiplied by for R x of each, or Rᵀ x."""
    matrix = rotation(size)
    return relax.const((matrix.T if transposed else matrix).astype("float32"))

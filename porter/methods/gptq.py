"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

For outputs W x with H = E[x x^T], the error of weights W + D is tr(D H D^T). Once column i is rounded with
error d = w_i - q_i, the best that columns F = {i+1, ...} can do is

    w_F -= d / [H_{i..}^-1]_ii * [H_{i..}^-1]_{i,F}          at a cost of d^2 / [H_{i..}^-1]_ii

and with H^-1 = U^T U, U upper triangular, row i of U is all that the step needs:
[H_{i..}^-1]_{i,:} = U_ii U_{i,:}. So no inverse is updated; columns go in blocks, and what a block did to the
columns beyond it is one matrix product (Frantar et al., 2210.17323, algorithm 1).

Scales and zero points are those that `porter.formats.encode` chooses: a group's at the moment its first
column is reached, from weights that already make up for earlier errors, or all of them up front
(`static_groups`). `act_order` rounds the columns of largest H_kk first. A group made of neighbours in that
order would need an index for each column, which DequantizeLinear does not have; a group of neighbours in the
matrix is then reached in pieces: so `act_order` makes the groups static. They also are where a scale is not
of one group of one row alone: whole rows, blocks of rows, NVFP4's factor.

A column whose H_kk is 0 was never seen to be anything but 0: it is rounded to nearest, and no other makes up
for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from porter import formats
from porter.errors import PassError
from porter.formats import Encoded, Format
from porter.formats.format import Scales
from porter.formats.rounding import nearest

ROWS = 1024
"""Rows taken at a time: their float64 copies stay small, and they do not depend on each other."""


def quantize(
    weight: np.ndarray,
    hessian: np.ndarray,
    form: Format,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block: int = 128,
) -> Encoded:
    """Round `weight` [N,K] to `form` under `hessian` [K,K], of any float type and up to any factor.

    A stack [E,N,K] takes a Hessian each, [E,K,K]. `damp` times the mean of the diagonal is added to it.
    Raises PassError PORT-0281 when a Hessian is not finite or, damped, not positive definite.
    """
    weight = np.asarray(weight, np.float32)
    found = formats.encode(form, weight)
    if not form.scale:  # a wide float: nothing to make up for
        return found
    fixed = act_order or static_groups or not form.group or form.rows != 1 or found.factor is not None
    stack = weight.ndim == 3
    for e, values in enumerate(weight if stack else weight[None]):
        one, own = (_expert(found, e), hessian[e]) if stack else (found, hessian)
        diagonal = np.diagonal(own)
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
        upper = inverse_factor(own[np.ix_(order, order)] if act_order else own, damp)
        _matrix(values, upper, order, one, fixed, block)
    return found


def _expert(found: Encoded, e: int) -> Encoded:
    """Views of one matrix of a stack."""
    arrays = {name: getattr(found, name) for name in ("codes", "scales", "zeros", "shifts")}
    own = {name: array if array is None else array[e] for name, array in arrays.items()}
    return dataclasses.replace(found, **own)


def _matrix(
    weight: np.ndarray, upper: np.ndarray, order: np.ndarray, found: Encoded, fixed: bool, block: int
) -> None:
    """Round one matrix into `found`, some rows at a time; a block's rows stay together."""
    size = max(ROWS // (found.form.rows or 1), 1) * (found.form.rows or 1)
    for first in range(0, len(weight), size):
        rest = weight[first : first + size].T.astype(np.float64)[order]
        _round(rest, upper, order, _Part(found, first, len(rest[0]), fixed), block)


def inverse_factor(hessian: np.ndarray, damp: float) -> np.ndarray:
    """The upper triangular U with U^T U = H^-1, float64 [K,K], for H damped as `quantize` says.

    H = R R^T with R upper triangular is the Cholesky factor of H read backwards; U = R^-1, so H itself is
    never inverted.
    """
    damped = np.array(hessian, np.float64)
    diagonal = np.einsum("kk->k", damped)
    live = diagonal > 0
    diagonal += damp * diagonal[live].mean() if live.any() else 0
    diagonal[~live] = 1
    try:
        backwards = np.linalg.cholesky(damped[::-1, ::-1])
    except np.linalg.LinAlgError:
        backwards = np.array([[np.nan]])
    if not np.isfinite(backwards).all():
        what = "the activations' second moments are not finite, or not positive definite"
        raise PassError("PORT-0281", what, hint="more damping (damp=0.1), or more calibration data")
    return _inverse(np.ascontiguousarray(backwards[::-1, ::-1]))


def _inverse(upper: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix: by halves, so that nearly all of it is matrix products."""
    size = len(upper)
    if size <= 64:
        return np.triu(np.linalg.inv(upper))
    half, out = size // 2, np.zeros_like(upper)
    out[:half, :half] = head = _inverse(upper[:half, :half])
    out[half:, half:] = tail = _inverse(upper[half:, half:])
    out[:half, half:] = -head @ (upper[:half, half:] @ tail)
    return out


def _round(rest: np.ndarray, upper: np.ndarray, order: np.ndarray, part: _Part, block: int) -> None:
    """Round some rows, whose columns in `order` are the rows of `rest` [K,n] float64, which is used up."""
    for first, last in _blocks(len(rest), block, part.form.group):
        here, errors = rest[first:last], np.empty_like(rest[first:last])
        for i in range(first, last):
            rounded = part.round(order[i], rest[i:])
            errors[i - first] = error = (rest[i] - rounded) / upper[i, i]
            here[i - first + 1 :] -= upper[i, i + 1 : last, None] * error
        rest[last:] -= upper[first:last, last:].T @ errors


def _blocks(columns: int, block: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `block` columns: whole groups, or pieces of one, so that a group's first column always
    sees all of its group up to date."""
    group = group or columns
    size = max(block // group, 1) * group
    for start in range(0, columns, size):
        end = min(start + size, columns)
        for first in range(start, end, max(block, 1) if group > block else size):
            yield first, min(first + block, end) if group > block else end


class _Part:
    """Some rows of `found`: their codes, and scales that are `fixed` or chosen when a group is reached."""

    def __init__(self, found: Encoded, first: int, rows: int, fixed: bool) -> None:
        self.form, self._fixed, self._codes = found.form, fixed, found.codes[first : first + rows]
        share = (
            slice(first // found.form.rows, -(-(first + rows) // found.form.rows))
            if found.form.rows
            else slice(1)
        )
        self._scales = Scales(
            found.scales[share],
            None if found.zeros is None else found.zeros[share],
            None if found.shifts is None else found.shifts[first : first + rows],
            found.factor,
        )

    def round(self, column: int, rest: np.ndarray) -> np.ndarray:
        """Store the codes of a column, the first of `rest` [..., n], and return what they stand for, [n]."""
        group = self.form.group
        if not self._fixed and column % group == 0:
            self._choose(column, rest[:group].T)
        rounded = nearest(self.form, rest[:1].T.astype(np.float32), self._of(column))
        self._codes[:, column] = rounded.codes[:, 0]
        return formats.decode(rounded)[:, 0]

    def _of(self, column: int) -> Scales:
        """The scales of one column."""
        group = column // self.form.group if self.form.group else 0
        scales, zeros, shifts, factor = self._scales
        shared = (None if each is None else each[:, group : group + 1] for each in (scales, zeros))
        pair = column // self.form.micro if self.form.micro else 0
        return Scales(*shared, None if shifts is None else shifts[:, pair : pair + 1], factor)

    def _choose(self, column: int, values: np.ndarray) -> None:
        """Scale the group that begins at `column` anew, for `values` [n,g]."""
        chosen = formats.encode(self.form, values)
        self._of(column).scales[:] = chosen.scales
        if chosen.zeros is not None:
            self._of(column).zeros[:] = chosen.zeros
        if chosen.shifts is not None:
            first = column // self.form.micro
            self._scales.shifts[:, first : first + chosen.shifts.shape[1]] = chosen.shifts

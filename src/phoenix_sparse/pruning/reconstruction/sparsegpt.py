"""SparseGPT: prune column by column, and let the columns to the right make up for each weight that goes.

Frantar & Alistarh, arXiv 2301.00774, algorithm 1, in the order of work of its published code.
"""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from phoenix_sparse.pruning.reconstruction.lowest import lowest
from phoenix_sparse.pruning.reconstruction.problem import check_problem, check_result, damped, dead_columns, drop_count
from phoenix_sparse.pruning.selection import keep_n_of_m

RETRIES = 4  # with ten times the damping each


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    pattern: Pattern = UNSTRUCTURED,
    *,
    block: int = 128,
    damp: float = 0.01,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Choose a layer's mask and update the weights that stay.

    Unstructured, each block of columns loses its share of the layer's ⌊out · in · sparsity⌋ weights to within one, and
    the layer loses exactly as many. (The published threshold takes ties along and overshoots.)

    Args:
        weight: (out, in), any float dtype; left as it is. All arithmetic is in float32, the factorisation in float64.
        gram: (in, in), float32, as `Gram` gathers it; left as it is.
        sparsity: share to drop; N:M patterns have their own and ignore it.
        pattern: unstructured or N:M.
        block: columns whose weights compete with each other, and that are updated before all others.
        damp: share of the mean diagonal that is added to the diagonal.
        name: the layer's, for errors.

    Returns:
        The new weight, zero off the mask, in the weight's dtype, and the mask, boolean (out, in), True where kept.

    Raises:
        PhoenixError: what `check_problem` refuses, or a matrix that no damping makes positive definite.
    """
    check_problem(weight, gram, sparsity, pattern, name)
    if pattern.kind == "unstructured" and drop_count(weight, sparsity) == 0:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    factor = inverse_factor(gram, damp, name)
    columns = weight.shape[1]
    # Columns lie together in memory, one after the other.
    values = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    values.masked_fill_(dead_columns(gram)[:, None], 0)
    dropped = torch.zeros_like(values, dtype=torch.bool)
    width = max(1, block // pattern.second) * pattern.second
    for start in range(0, columns, width):
        end = min(start + width, columns)
        part, local, chosen = values[start:end], factor[start:end, start:end], dropped[start:end]
        if pattern.kind == "unstructured":
            share = drop_count(values[:end], sparsity) - drop_count(values[:start], sparsity)
            chosen.copy_(lowest(_scores(part, local.diagonal()), share))
        errors = _sweep(part, local, chosen, pattern)
        part.masked_fill_(chosen, 0)
        values[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    new_weight = values.t().to(weight.dtype, memory_format=torch.contiguous_format)
    check_result(new_weight, name)
    return new_weight, dropped.logical_not_().t().contiguous()


def inverse_factor(gram: Tensor, damp: float, name: str = "weight") -> Tensor:
    """The upper triangular R with RᵀR = H⁻¹, H the damped matrix. (in, in) -> (in, in) float32.

    With the order of rows and columns reversed, a Cholesky factor of H is upper triangular in the old order: H = UUᵀ,
    so R = U⁻¹, and the inverse itself is never formed. In float64, since a few large inputs make H ill-conditioned.

    Raises:
        PhoenixError: H isn't positive definite, with a thousand times the damping either.
    """
    for attempt in range(RETRIES):
        reversed_factor, failed = torch.linalg.cholesky_ex(damped(gram, damp * 10**attempt).double().flip(0, 1))
        if int(failed) == 0:
            upper = reversed_factor.flip(0, 1)
            identity = torch.eye(gram.shape[0], dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float()
    raise PhoenixError(
        f"{name}: the second moments of its inputs are not positive definite, even with damping of "
        f"{damp * 10 ** (RETRIES - 1):g}; they must be XᵀX of real inputs"
    )


def _scores(values: Tensor, diagonal: Tensor) -> Tensor:
    """What each weight's loss would cost: w² / R_jj² (eq. 3). (columns, out), (columns,) -> (columns, out)."""
    return (values / diagonal[:, None]).square_()


def _sweep(values: Tensor, local: Tensor, dropped: Tensor, pattern: Pattern) -> Tensor:
    """Go through a block's columns, each passing its errors on to those right of it within the block.

    Args:
        values: (columns, out), updated in place, but for the dropped weights themselves.
        local: (columns, columns), the block's part of R.
        dropped: (columns, out) boolean; for N:M chosen here, group by group, by the weights as updated so far.

    Returns:
        The errors w / R_jj of dropped weights and 0 elsewhere, (columns, out), for the columns right of the block.
    """
    diagonal = local.diagonal()
    errors = dropped / diagonal[:, None]  # 1 / R_jj where a weight goes, until its column is reached
    for column in range(values.shape[0]):
        if pattern.kind == "n:m" and column % pattern.second == 0:
            group = slice(column, column + pattern.second)
            scores = _scores(values[group], diagonal[group])
            dropped[group] = ~keep_n_of_m(scores.t(), pattern.first, pattern.second).t()
            torch.div(dropped[group], diagonal[group, None], out=errors[group])
        error = errors[column].mul_(values[column])
        values[column + 1 :].addr_(local[column, column + 1 :], error, alpha=-1)
    return errors

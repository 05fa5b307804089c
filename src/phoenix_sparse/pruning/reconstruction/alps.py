"""ALPS: find the mask by ADMM over the whole layer, then solve for the weights that stay.

Meng, Behdin, Wang & Mazumder, arXiv 2406.07831. What the paper leaves open is as in its published code.
"""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from phoenix_sparse.pruning.reconstruction.lowest import lowest
from phoenix_sparse.pruning.reconstruction.problem import check_problem, check_result, damped, dead_columns, drop_count
from phoenix_sparse.pruning.selection import keep_n_of_m

RHO = 0.1  # the penalty at the start
EVERY = 3  # steps between two looks at the mask
SETTLED_AFTER, SETTLED = 30, 3e-4  # after so many steps, a change below this share of the kept weights is none
LARGE_CHANGE, CHANGE = 0.1, 0.005  # as shares of the kept weights


@torch.no_grad()
def alps(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    pattern: Pattern = UNSTRUCTURED,
    *,
    damp: float = 0.01,
    max_steps: int = 300,
    refit_steps: int = 10,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Choose a layer's mask and its weights: min ‖X(W − Ŵ)ᵀ‖² with so many weights, all of a layer competing.

    Args:
        weight: (out, in), any float dtype; left as it is. All arithmetic is in float32.
        gram: (in, in), float32, as `Gram` gathers it; left as it is.
        sparsity: share to drop, ⌊out · in · sparsity⌋ weights exactly; N:M patterns have their own and ignore it.
        pattern: unstructured or N:M.
        damp: share of the mean diagonal that is added to the diagonal.
        max_steps: of ADMM; it stops earlier where the mask no longer changes.
        refit_steps: of conjugate gradients.
        name: the layer's, for errors.

    Returns:
        The new weight, zero off the mask, in the weight's dtype, and the mask, boolean (out, in), True where kept.

    Raises:
        PhoenixError: what `check_problem` refuses, or a matrix whose eigenvalues can't be found.
    """
    check_problem(weight, gram, sparsity, pattern, name)
    count = drop_count(weight, sparsity)
    if pattern.kind == "unstructured" and count == 0:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    matrix = damped(gram, damp)
    # Inputs of unit length each (section 3.2): the penalty is alike for all weights, and the diagonal, by which the
    # paper preconditions its conjugate gradients, is 1.
    scale = matrix.diagonal().sqrt()
    matrix.div_(scale[:, None]).div_(scale)
    dense = (weight.float() * scale).masked_fill_(dead_columns(gram), 0)
    target = dense @ matrix
    values, kept = _admm(dense, target, matrix, count, pattern, max_steps, name)
    values = refit(values, kept, dense, target, matrix, refit_steps)
    new_weight = (values / scale).masked_fill_(~kept, 0).to(weight.dtype)
    check_result(new_weight, name)
    return new_weight, kept


def _keep(values: Tensor, count: int, pattern: Pattern) -> Tensor:
    """The mask of the largest values: all but `count` of them, or N of each M."""
    if pattern.kind == "n:m":
        return keep_n_of_m(values.abs(), pattern.first, pattern.second)
    return ~lowest(values.abs(), count)


def _admm(
    dense: Tensor, target: Tensor, matrix: Tensor, count: int, pattern: Pattern, max_steps: int, name: str
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: split W = D, D on the mask, with a penalty ρ that grows until the mask stands still.

    Args:
        dense: (out, in), the weights to come near to, as scaled.
        target: (out, in), dense · H.
        matrix: (in, in), H.
        count: weights to drop, where the pattern is unstructured.

    Returns:
        D, (out, in), zero off the mask, and the mask.
    """
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise PhoenixError(f"{name}: its inputs' second moments have no eigenvalues ({first_line(error)})") from error
    eigenvalues.clamp_min_(0)  # those of a positive definite matrix, but for rounding

    def inverse(rho: float) -> Tensor:
        return (vectors / (eigenvalues + rho)) @ vectors.t()

    rho = RHO
    kept = before = _keep(dense, count, pattern)
    sparse, dual, inverted = dense * kept, torch.zeros_like(dense), inverse(rho)
    whole = int(kept.sum())
    for step in range(1, max_steps + 1):
        # W = (H + ρI)⁻¹(HŴ − V + ρD), D = P(W + V/ρ), V = V + ρ(W − D); the last is ρ(W + V/ρ) off the mask.
        moved = (target - dual).add_(sparse, alpha=rho) @ inverted
        moved.add_(dual, alpha=1 / rho)
        kept = _keep(moved, count, pattern)
        sparse = moved * kept
        dual = moved.sub_(sparse).mul_(rho)
        if step % EVERY:
            continue
        changed = int((kept ^ before).sum())
        if changed == 0 or (step >= SETTLED_AFTER and changed < SETTLED * whole):
            break
        before = kept
        rho *= 1.3 if changed >= LARGE_CHANGE * whole else 1.2 if changed >= CHANGE * whole else 1.1
        inverted = inverse(rho)
    return sparse, kept


def refit(values: Tensor, kept: Tensor, dense: Tensor, target: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """Algorithm 2: conjugate gradients on the weights of the mask, all rows side by side.

    Args:
        values: (out, in), where to begin; zero off the mask.
        kept: (out, in) boolean, the mask.
        dense: (out, in), the weights to come near to.
        target: (out, in), dense · H.
        matrix: (in, in), H, with a diagonal of 1.
        steps: at most so many.

    Returns:
        (out, in), zero off the mask; each row no worse than where it began.
    """
    start, values = values, values.clone()
    residual = (target - values @ matrix).mul_(kept)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        ahead = direction @ matrix
        curvature = (direction * ahead).sum(1, keepdim=True)
        # A row that has arrived has no direction left, and stays.
        length = torch.where(curvature > 0, size / curvature, 0)
        values.addcmul_(direction, length)
        residual.addcmul_(ahead, -length).mul_(kept)
        new_size = residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(size > 0, new_size / size, 0)).add_(residual)
        size = new_size
    better = _row_errors(values, dense, matrix) <= _row_errors(start, dense, matrix)
    return torch.where(better[:, None], values, start)


def _row_errors(values: Tensor, dense: Tensor, matrix: Tensor) -> Tensor:
    change = values - dense
    return (change @ matrix).mul_(change).sum(1)

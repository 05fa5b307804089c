"""The layer-wise problem that all weight updates solve, checked and made well-conditioned."""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import Pattern


def check_problem(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern, name: str) -> None:
    """Refuse what no weight update can work on.

    Raises:
        PhoenixError: the pattern is neither unstructured nor N:M or doesn't divide the weight, the sparsity is out of
            range, the shapes don't fit, a value is NaN or infinite, or a second moment negative.
    """
    if pattern.kind not in ("unstructured", "n:m"):
        raise PhoenixError(
            f"sparsify.pattern: {pattern} can't be pruned with a weight update; use unstructured or N:M, "
            "or no weight update"
        )
    if not 0 <= sparsity < 1:
        raise PhoenixError(f"sparsify.sparsity: {sparsity} is out of range; it must be at least 0 and below 1")
    if weight.dim() != 2 or tuple(gram.shape) != (weight.shape[1], weight.shape[1]):
        raise PhoenixError(
            f"{name}: a weight {tuple(weight.shape)} and second moments {tuple(gram.shape)} don't fit; "
            "they must be (out, in) and (in, in)"
        )
    pattern.check(name, (weight.shape[0], weight.shape[1]))
    for what, tensor in (("the weights", weight), ("the second moments of the inputs", gram)):
        if not torch.isfinite(tensor).all():
            raise PhoenixError(f"{name}: {what} have values that are NaN or infinite; both must be finite")
    if (gram.diagonal() < 0).any():
        raise PhoenixError(f"{name}: the second moments of the inputs are negative; they must be XᵀX of real inputs")


def drop_count(weight: Tensor, sparsity: float) -> int:
    """How many weights of a matrix go: ⌊out · in · sparsity⌋, as for masks by score."""
    return int(weight.numel() * sparsity)


def dead_columns(gram: Tensor) -> Tensor:
    """Input columns that were zero in every token, (in,) boolean: their weights can go at no cost."""
    return gram.diagonal() == 0


def damped(gram: Tensor, damp: float) -> Tensor:
    """The matrix that is worked with: H / h + damp · I, h the mean diagonal, and 1 + damp for dead columns.

    SparseGPT damps by a share of the mean diagonal. It gives dead columns a diagonal of 1 and lets it into that mean;
    here the mean is of the live columns, so that the inputs' scale doesn't matter.

    Args:
        gram: (in, in), float32; left as it is.
        damp: share of the mean diagonal.
    """
    diagonal = gram.diagonal()
    dead = dead_columns(gram)
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    matrix = gram / torch.where(mean > 0, mean, 1)
    matrix.diagonal().add_(dead.to(matrix.dtype) + damp)
    return matrix


def check_result(new_weight: Tensor, name: str) -> None:
    """Refuse a weight that left the range of its dtype.

    Raises:
        PhoenixError: naming the layer.
    """
    if not torch.isfinite(new_weight).all():
        raise PhoenixError(
            f"{name}: the updated weight left the range of {str(new_weight.dtype).removeprefix('torch.')}; "
            "use bfloat16 or float32, or more damping"
        )

"""DSnoT: swap kept weights for pruned ones, so that each output's expected error shrinks; no weight is updated.

Zhang et al., arXiv 2310.08915. An output's expected error is ε = Σ_j W_j · E[X_j] over its pruned weights. While |ε|
is above a threshold, a row grows the pruned weight that takes most of ε away for its input's variance,
sign(ε) · W_j · E[X_j] / Var[X_j], and in exchange prunes a kept weight that takes ε the same way (W_j · E[X_j] of the
other sign), the one of the lowest Wanda score |W_j| · ‖X_j‖₂. A weight moves once at most.
"""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from phoenix_sparse.pruning.reconstruction.moments import Moments


@torch.no_grad()
def dsnot(
    weight: Tensor,
    mask: Tensor,
    moments: Moments,
    *,
    pattern: Pattern = UNSTRUCTURED,
    max_cycles: int = 50,
    threshold: float = 0.1,
    name: str = "weight",
) -> Tensor:
    """Improve a mask by swaps within each row, N:M within each group of M.

    A row stops at the first swap that would not lower its |ε|. (The published code goes on, back and forth around
    zero.)

    Args:
        weight: (out, in), dense, any float dtype.
        mask: (out, in) boolean, True where kept, by any importance; left as it is.
        moments: of the layer's inputs.
        pattern: that of the mask, unstructured or N:M.
        max_cycles: swaps in a row, at most.
        threshold: the |ε| that is good enough, with inputs summed over a sequence, as in the published code.
        name: the layer's, for errors.

    Returns:
        The new mask, boolean (out, in), with as many kept weights in each row (and group) as before.

    Raises:
        PhoenixError: the pattern is neither unstructured nor N:M, shapes don't fit, or a value isn't finite.
    """
    _check(weight, mask, moments, pattern, name)
    part = weight.float() * moments.sum_per_sequence  # what a weight adds to the expected output
    norm = weight.float().abs() * moments.squared_norm.sqrt()
    spread = moments.variance.clamp_min(torch.finfo(torch.float32).tiny)  # a constant input comes first, not NaN
    group = pattern.second if pattern.kind == "n:m" else weight.shape[1]
    # [0]: swaps that lower a positive error; [1]: those that raise a negative one.
    offers = [_offers(part * sign, norm, part * sign / spread, mask, group, max_cycles) for sign in (1, -1)]
    grow, prune = (torch.stack(indices) for indices in zip(*offers, strict=True))
    steps = part.gather(1, prune[0]) - part.gather(1, grow[0]), part.gather(1, prune[1]) - part.gather(1, grow[1])
    taken = _take(part.masked_fill(mask, 0).sum(1), torch.stack(steps), max_cycles, threshold)
    return _swap(mask, grow, prune, taken)


def _check(weight: Tensor, mask: Tensor, moments: Moments, pattern: Pattern, name: str) -> None:
    if pattern.kind not in ("unstructured", "n:m"):
        raise PhoenixError(f"sparsify.pattern: DSnoT has no swaps for {pattern}; use unstructured or N:M")
    if mask.shape != weight.shape or mask.dtype != torch.bool or moments.mean.shape != weight.shape[1:]:
        raise PhoenixError(
            f"{name}: a weight {tuple(weight.shape)}, a mask {tuple(mask.shape)} of {mask.dtype} and inputs of "
            f"{moments.mean.shape[0]} columns don't fit"
        )
    pattern.check(name, (weight.shape[0], weight.shape[1]))
    if not all(torch.isfinite(tensor).all() for tensor in (weight, moments.mean, moments.variance)):
        raise PhoenixError(f"{name}: the weight or its inputs have values that are NaN or infinite")


def _offers(part: Tensor, norm: Tensor, gain: Tensor, mask: Tensor, group: int, most: int) -> tuple[Tensor, Tensor]:
    """The swaps that take from a positive error, best first.

    In a group, the weight to grow of the k-th highest gain goes with the weight to prune of the k-th lowest score;
    the pairs of a row go by gain.

    Returns:
        Columns to grow and columns to prune, (out, swaps) int64 each; where a row has no more offers, the column to
        grow and the one to prune are the same.
    """
    rows, columns = part.shape
    inf = torch.inf
    gain = torch.where(~mask & (part > 0), gain, -inf).reshape(rows, -1, group)
    price = torch.where(mask & (part < 0), norm, inf).reshape(rows, -1, group)
    gain, grow = torch.sort(gain, dim=-1, descending=True, stable=True)
    price, prune = torch.sort(price, dim=-1, stable=True)
    gain = torch.where(price < inf, gain, -inf)[..., :most].flatten(1)
    first = torch.arange(0, columns, group, device=part.device)[:, None]
    grow, prune = ((first + index)[..., :most].flatten(1) for index in (grow, prune))
    if group < columns:
        gain, order = torch.sort(gain, dim=1, descending=True, stable=True)
        grow, prune = grow.gather(1, order), prune.gather(1, order)
    gain, grow, prune = gain[:, :most], grow[:, :most], prune[:, :most]
    return grow, torch.where(gain > -inf, prune, grow)


def _take(error: Tensor, steps: Tensor, max_cycles: int, threshold: float) -> Tensor:
    """Make swaps in order, on the side of the error's sign, while they lower its size.

    Args:
        error: (out,), ε at the beginning.
        steps: (2, out, swaps), what each swap adds to ε; 0 where there is none.

    Returns:
        How many of each side's swaps each row makes, (2, out) int64.
    """
    taken = torch.zeros(2, error.shape[0], dtype=torch.int64, device=error.device)
    steps = torch.nn.functional.pad(steps, (0, 1))  # after the last offer there is none
    active = error.abs() > threshold
    for _ in range(max_cycles):
        side = (error < 0).long()[None]
        place = taken.gather(0, side)
        step = steps.gather(0, side[..., None].expand(1, -1, steps.shape[2]))[0].gather(1, place.t())[:, 0]
        after = error + step
        active = active & (error.abs() > threshold) & (after.abs() < error.abs())
        if not active.any():
            break
        error = torch.where(active, after, error)
        taken.scatter_add_(0, side, active.long()[None])
    return taken


def _swap(mask: Tensor, grow: Tensor, prune: Tensor, taken: Tensor) -> Tensor:
    """The mask after the first `taken` swaps, (2, out), of each side's and row's, (2, out, swaps)."""
    side, row, place = (torch.arange(grow.shape[2], device=mask.device) < taken[..., None]).nonzero(as_tuple=True)
    mask = mask.clone()
    mask[row, grow[side, row, place]] = True
    mask[row, prune[side, row, place]] = False
    return mask

"""What a weight update needs to know of a linear's inputs: their second moments."""

import torch
from torch import Tensor


class Gram:
    """Gather the second moments of a linear's inputs: `matrix` is (2/n) · XᵀX over the n tokens seen so far.

    With this matrix H, a change of the weight by δ costs ½ · tr(δ H δᵀ): the squared change of the layer's outputs,
    summed over outputs and averaged over tokens (SparseGPT, Frantar & Alistarh, arXiv 2301.00774, eq. 1 and 2). The
    factor 2 is that of the published code. Neither it nor the mean over tokens instead of sequences changes what is
    pruned: all that uses the matrix is relative to its own diagonal.

    Attributes:
        matrix: (in, in), float32.
        tokens: tokens seen.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Take in the inputs of one forward pass, (sequences, tokens, in) or (tokens, in), of any float dtype.

        One product of float32 matrices. On CUDA it uses TF32 only where the caller allowed that for all of torch.
        """
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        if flat.shape[0] == 0:
            return
        total = self.tokens + flat.shape[0]
        self.matrix.addmm_(flat.t(), flat, beta=self.tokens / total, alpha=2 / total)
        self.tokens = total


@torch.no_grad()
def relative_error(weight: Tensor, new_weight: Tensor, gram: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²: the share of a layer's output energy that pruning lost.

    Args:
        weight: (out, in), dense.
        new_weight: (out, in), pruned.
        gram: (in, in), XᵀX up to any factor.
    """
    dense = weight.float()
    change = dense - new_weight.float()
    lost, whole = ((part @ gram).mul_(part).sum(dtype=torch.float64).item() for part in (change, dense))
    return lost / whole if whole > 0 else 0.0

"""What the GPU's products take."""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

MOST = 32  # rows of x in one product
FLOATS = (torch.bfloat16, torch.float16)


def check(x: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Whether x can be multiplied with a weight.

    Args:
        x: to be (batch, in), batch at most `MOST`.
        shape: (out, in) of the weight.
        dtype: that products with it are in.
        device: that it is on.

    Raises:
        PhoenixError: it can't.
    """
    if x.dim() != 2 or x.shape[1] != shape[1] or x.dtype != dtype or x.device != device:
        raise PhoenixError(
            f"sparse_linear: x is {x.dtype} {tuple(x.shape)} on {x.device}; the weight takes {dtype} "
            f"(batch, {shape[1]}) on {device}"
        )
    if x.device.type != "cuda":
        raise PhoenixError(f"sparse_linear: this layout is a GPU's, and x is on {x.device}; load the model on the GPU")
    if not 1 <= len(x) <= MOST:
        raise PhoenixError(f"sparse_linear: {len(x)} rows in one product; give 1 to {MOST}")

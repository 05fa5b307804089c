"""The same results again on the same machine, and gradients that can be trusted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from phoenix_sparse.errors import PhoenixError, first_line


def be_deterministic() -> None:
    """Ask torch for the same results again on the same machine; an operation that can't says so in a warning.

    Must come before the first CUDA call. Sums in another order (another number of threads, another GPU) still differ.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


@contextmanager
def sound_gradients(device: torch.device) -> Iterator[None]:
    """Compute gradients within the block without cuDNN's attention, and strictly the same again where asked for.

    cuDNN's backward of masked attention gives NaN on Hopper GPUs at lengths of 64 modulo 128, since torch 2.11
    (pytorch/pytorch#196678). The memory-efficient attention that takes its place is deterministic only where torch
    must not merely warn.

    Raises:
        PhoenixError: determinism was asked for, and the model uses an operation that has none.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic, warn_only=False)
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise PhoenixError(f"deterministic: {first_line(error)}; set deterministic=false in a recipe") from error
        raise
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

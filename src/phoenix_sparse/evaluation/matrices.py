"""The matrices that a token of a decoder-only model is multiplied with: linears, and the experts that it chooses."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import decoder_blocks

EXPERTS = ("gate_up_proj", "down_proj")  # (experts, out, in) in transformers' mixtures


@dataclass(frozen=True)
class Matrix:
    """A weight as FLOPs see it.

    Attributes:
        weight: (out, in), or (experts, out, in).
        chosen: of the experts, how many a token visits; 1 for a linear.
    """

    weight: Tensor
    chosen: int = 1

    @property
    def experts(self) -> int:
        return self.weight.shape[0] if self.weight.dim() == 3 else 1

    def visited(self, weights: int) -> int:
        """Of so many weights, spread evenly over the experts, those that a token is multiplied with."""
        return weights * self.chosen // self.experts


def prunable_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Those inside the decoder blocks, without the routers of a mixture."""
    blocks = tuple(f"{name}." for name in decoder_blocks(model))
    routers = {name for name, module in model.named_modules() if _is_router(module)}
    return {name: matrix for name, matrix in matrices(model).items() if name.startswith(blocks) and name not in routers}


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """All matrices by their full names: a linear's name, `….experts.gate_up_proj`, or `….mlp.gate` (a router).

    Raises:
        PhoenixError: the model holds matrices of another kind (GPT-2), whose products would be missed.
    """
    config: Any = model.config
    found: dict[str, Matrix] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear):
            found[name] = Matrix(module.weight)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and own in EXPERTS and getattr(config, "num_experts_per_tok", None):
                found[f"{name}.{own}"] = Matrix(parameter, int(config.num_experts_per_tok))
            elif parameter.ndim == 2 and _is_router(module):
                found[name] = Matrix(parameter)
            elif parameter.ndim > 1:
                raise PhoenixError(
                    f"{name}.{own}: a matrix of {type(module).__name__}, whose FLOPs can't be counted; models whose "
                    "layers are nn.Linear (Llama, Mistral, Qwen2, OPT), and Mixtral's experts, can be"
                )
    return found


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("TopKRouter")

"""Do the settings fit the model? Told from its shapes, before anything is measured."""

from typing import Any

from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning.allocation.budget import unit
from phoenix_sparse.pruning.allocation.explicit import by_block, by_pattern
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.structured import require_reachable


def require_fit(model: Any, settings: SparsifySettings) -> None:
    """Refuse settings that can't end well with a model of these shapes; it may be on the meta device.

    Raises:
        PhoenixError: the pattern doesn't divide a layer; the model has no channels to take out, or the sparsity would
            leave none; or an allocation that was written down names no layer, has not one value for each block, or
            contradicts the sparsity.
    """
    pattern, chosen, target = settings.parsed_pattern, settings.allocation, settings.sparsity
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in prunable_linears(model).items()}
    for name, shape in shapes.items():
        pattern.check(name, shape)
    if pattern.kind == "structured":
        require_reachable(model, target)
    if isinstance(chosen, str):
        return
    sizes = {name: out * inner for name, (out, inner) in shapes.items()}
    units = dict.fromkeys(sizes, unit(pattern))
    if isinstance(chosen, dict):
        by_pattern(sizes, chosen, target, sizes, units=units)
    else:
        by_block(sizes, chosen, target, sizes, units=units)

"""How sparsity is shared out among layers: an allocation is a `dict` from a layer's name to its sparsity."""

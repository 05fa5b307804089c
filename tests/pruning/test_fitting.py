"""Settings that don't fit a model are told from its shapes alone."""

import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import empty_model, prunable_linears
from phoenix_sparse.pruning import initialise
from phoenix_sparse.pruning.fitting import require_fit
from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.settings import SparsifySettings
from tiny import CONFIGS, make_model

BAD = [
    ({"pattern": "5x7"}, "5x7 does not divide model.layers.0.self_attn.q_proj, 32x32"),
    ({"pattern": "4:9", "sparsity": 1 - 4 / 9}, "4:9 does not divide"),
    ({"pattern": "structured", "sparsity": 0.99}, "structured: a sparsity of 0.99 can't be reached"),
    ({"allocation": [0.5]}, "1 values for 2 decoder blocks"),
    (
        {"allocation": [0.9, 0.9]},
        "the list fixes every layer and gives a sparsity of 0.89.*its values, or spars",
    ),
    ({"allocation": {"*.nope": 0.4}}, "'.*nope' matches no layer"),
    ({"allocation": {"*": 0.4}}, "the table fixes every layer .* or leave layers out of it"),
    ({"allocation": {"*_proj": 0.0, "*.q_proj": 0.1}}, "the table fixes every layer"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_what_does_not_fit_is_refused_before_anything_is_measured(settings, message, llama, monkeypatch):
    for name in ("measure_gradients", "score_blocks", "prune_blocks", "allocate"):
        monkeypatch.setattr(initialise, name, lambda *_args, **_kwargs: pytest.fail("it was begun"))
    chosen = SparsifySettings(importance="taylor", **settings)
    with pytest.raises(PhoenixError, match=message):
        require_fit(empty_model(llama.config), chosen)
    with pytest.raises(PhoenixError, match=message):
        prune(llama, chosen)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pattern": "2:4"},
        {"pattern": "structured", "sparsity": 0.3},
        {"pattern": "8x2", "allocation": "owl"},
        {"allocation": [0.4, 0.6]},
        {"allocation": [0.7, 0.7], "sparsity": 0.7},
        {"allocation": {"*.k_proj": 0.1}},
        {"allocation": "evolutionary"},
    ],
)
def test_what_is_refused_is_what_pruning_would_refuse(kind, settings):
    """What passes on shapes without weights can be pruned."""
    chosen = SparsifySettings(importance="magnitude", **settings)
    model = make_model(kind)
    require_fit(empty_model(model.config), chosen)
    if isinstance(chosen.allocation, str) and chosen.allocation != "uniform":
        return
    assert prune(model, chosen).keys() == prunable_linears(model).keys()

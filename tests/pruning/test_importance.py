"""Each formula against NumPy in float64, and the registry."""

import importlib
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning import importance
from phoenix_sparse.pruning.importance import (
    Seen,
    find_importance,
    gblm_importance,
    gradient_importance,
    importances,
    magnitude_importance,
    random_importance,
    register_importance,
    ria_importance,
    taylor_importance,
    wanda_importance,
)
from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.recipe import check
from tiny import make_model

BUILT_IN = ["gblm", "gradient", "magnitude", "random", "ria", "taylor", "wanda"]


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(importance, "_REGISTRY", dict(importance._REGISTRY))


def absolute(tensor):
    return np.abs(tensor.double().numpy())


def ria(weight, norm, gradient):
    size = absolute(weight)
    with np.errstate(invalid="ignore"):
        relative = np.nan_to_num(size / size.sum(0, keepdims=True)) + np.nan_to_num(size / size.sum(1, keepdims=True))
    return relative * np.sqrt(norm.double().numpy())


REFERENCES = {
    "magnitude": lambda weight, norm, gradient: absolute(weight),
    "wanda": lambda weight, norm, gradient: absolute(weight) * norm.double().numpy(),
    "ria": ria,
    "gradient": lambda weight, norm, gradient: absolute(gradient),
    "taylor": lambda weight, norm, gradient: absolute(weight) * absolute(gradient),
    "gblm": lambda weight, norm, gradient: absolute(weight) * (norm.double().numpy() + 100 * absolute(gradient)),
}
FUNCTIONS = {
    "magnitude": lambda weight, norm, gradient: magnitude_importance(weight),
    "wanda": lambda weight, norm, gradient: wanda_importance(weight, norm),
    "ria": lambda weight, norm, gradient: ria_importance(weight, norm),
    "gradient": lambda weight, norm, gradient: gradient_importance(gradient),
    "taylor": lambda weight, norm, gradient: taylor_importance(weight, gradient),
    "gblm": lambda weight, norm, gradient: gblm_importance(weight, norm, gradient),
}


@pytest.mark.parametrize("name", REFERENCES)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    zeros=st.booleans(),
)
def test_scores_are_those_of_the_formula(name, shape, seed, dtype, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    gradient = torch.randn(shape, generator=generator) * 1e-4
    norm = torch.rand(shape[1], generator=generator) * 50
    if zeros:  # a dead row, a dead column, a dead input
        weight[0], weight[:, -1], norm[0] = 0, 0, 0
    before = weight.clone()
    scores = find_importance(name).score(weight, Seen("layer", 0, norm, gradient))
    assert scores.dtype == torch.float32
    assert scores.shape == weight.shape
    np.testing.assert_allclose(scores.double().numpy(), REFERENCES[name](weight, norm, gradient), rtol=2e-6, atol=0)
    assert torch.equal(scores, FUNCTIONS[name](weight, norm, gradient))
    assert torch.equal(weight, before)


def test_a_layer_may_stand_for_its_weight_and_gradient():
    layer = torch.nn.Linear(5, 3)
    with pytest.raises(PhoenixError, match="Linear has no gradient yet; call loss.backward"):
        taylor_importance(layer)
    with pytest.raises(PhoenixError, match="Linear has no gradient yet"):
        gradient_importance(layer)
    layer(torch.randn(7, 5)).square().sum().backward()
    weight, gradient = absolute(layer.weight.detach()), absolute(layer.weight.grad)
    assert gradient.min() > 0
    np.testing.assert_allclose(magnitude_importance(layer).double().numpy(), weight, rtol=1e-6)
    np.testing.assert_allclose(gradient_importance(layer).double().numpy(), gradient, rtol=1e-6)
    np.testing.assert_allclose(taylor_importance(layer).double().numpy(), weight * gradient, rtol=1e-6)
    with pytest.raises(PhoenixError, match="needs the gradient too"):
        taylor_importance(layer.weight)
    with pytest.raises(PhoenixError, match="ReLU has no weight; give a linear layer"):
        magnitude_importance(torch.nn.ReLU())


def test_random_scores_depend_on_the_seed_and_the_name_alone():
    weight = torch.randn(20, 30)
    scores = random_importance(weight, 1, "layer")
    assert torch.equal(scores, random_importance(weight.bfloat16() * 0, 1, "layer"))
    assert not torch.equal(scores, random_importance(weight, 2, "layer"))
    assert not torch.equal(scores, random_importance(weight, 1, "other"))
    assert 0 <= scores.min() < scores.max() < 1


def test_the_built_in_importances_measure_what_they_need():
    assert set(BUILT_IN) <= set(importances())
    needs = {name: (one.inputs, one.gradients, one.per_row) for name in BUILT_IN for one in [find_importance(name)]}
    assert needs == {
        "magnitude": (False, False, False),
        "random": (False, False, False),
        "wanda": (True, False, True),
        "ria": (True, False, False),
        "gradient": (False, True, False),
        "taylor": (False, True, False),
        "gblm": (True, True, True),
    }


@pytest.mark.usefixtures("registry")
def test_an_importance_of_one_s_own_prunes(llama):
    seen = {}

    @register_importance("last_columns", inputs=True)
    def last_columns(weight, what):
        seen[what.name] = what
        return torch.arange(weight.shape[1]).expand(weight.shape)  # whole numbers will do

    assert find_importance("last_columns").score is last_columns
    settings = SparsifySettings(importance="last_columns", group="row", sparsity=0.25)
    masks = prune(llama, settings, tokens=torch.randint(0, 256, (2, 16)), seed=7)
    assert seen.keys() == masks.keys()
    for name, mask in masks.items():
        drop = mask.shape[1] // 4
        assert not mask[:, :drop].any()
        assert mask[:, drop:].all()
        assert seen[name].seed == 7
        assert seen[name].input_norm.shape == mask.shape[1:]
        assert seen[name].gradient is None


@pytest.mark.usefixtures("registry")
def test_scores_that_are_the_weight_itself_do_not_change_with_it():
    """Allocations compare candidates by the scores while the weights come and go."""
    register_importance("signed")(lambda weight, _seen: weight)
    weight = torch.nn.Linear(4, 4).weight
    scores = Method.of(SparsifySettings(importance="signed"), 0).score("layer", weight, None, None)
    assert torch.equal(scores, weight)
    assert scores.data_ptr() != weight.data_ptr()


@pytest.mark.usefixtures("registry")
def test_a_taken_name_is_refused():
    with pytest.raises(PhoenixError, match="'wanda' is registered already; choose another name"):

        @register_importance("wanda")
        def wanda(weight, seen):
            return weight

    # The built-in ones are lambdas, and so all have one name.
    with pytest.raises(PhoenixError, match="'wanda' is registered already"):
        register_importance("wanda")(lambda weight, seen: weight)

    class Scorer:
        def __call__(self, weight, seen):
            return weight

    register_importance("object")(Scorer())
    with pytest.raises(PhoenixError, match="'object' is registered already"):
        register_importance("object")(Scorer())
    assert find_importance("wanda").inputs


@pytest.mark.usefixtures("registry")
def test_the_same_module_may_be_loaded_again(tmp_path, monkeypatch):
    source = (
        "from phoenix_sparse.pruning.importance import register_importance\n"
        "register_importance('own_lambda')(lambda weight, seen: weight)\n"
        "@register_importance('own_function')\n"
        "def score(weight, seen):\n    return weight\n"
    )
    (tmp_path / "own_scores.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("own_scores")
    first = find_importance("own_function").score
    importlib.reload(module)
    assert find_importance("own_function").score is not first
    del sys.modules["own_scores"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(PhoenixError) as error:
        find_importance("wonda")
    assert str(error.value) == f"importance: 'wonda' is not known; use one of {', '.join(importances())}"
    with pytest.raises(PhoenixError, match="recipe: importance='wonda': 'wonda' is not known; use one of"):
        check(SparsifySettings, {"importance": "wonda"}, "recipe")


@pytest.mark.usefixtures("registry")
def test_installed_packages_offer_importances(tmp_path, monkeypatch):
    (tmp_path / "good_package.py").write_text(
        "from phoenix_sparse.pruning.importance import register_importance\n"
        "@register_importance('theirs', per_row=True)\n"
        "def score(weight, seen):\n    return weight.abs()\n"
    )
    (tmp_path / "bad_package.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "idle_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    asked = []

    def offered(*, group):
        asked.append(group)
        names = {"theirs": "good_package", "broken": "bad_package", "idle": "idle_package"}
        return [EntryPoint(name, module, group) for name, module in names.items()]

    monkeypatch.setattr(importance, "entry_points", offered)
    assert find_importance("theirs").per_row
    assert set(asked) == {"phoenix_sparse.importances"}
    assert SparsifySettings(importance="theirs").comparison_group == "row"
    with pytest.raises(PhoenixError, match="'broken' is offered by bad_package, which can't be loaded .*nobody_has"):
        find_importance("broken")
    with pytest.raises(PhoenixError, match="idle_package offers 'idle' and doesn't register it"):
        find_importance("idle")
    assert {"wanda", "theirs", "broken", "idle"} <= set(importances())
    assert "bad_package" not in sys.modules


LAYER = "model.layers.0.self_attn.q_proj"
BROKEN = [  # methods some of which would see nothing amiss, and some another layer's scores
    {"importance": "magnitude"},
    {"importance": "random"},
    {"importance": "wanda"},
    {"importance": "magnitude", "group": "global"},
    {"importance": "magnitude", "pattern": "structured"},
    {"importance": "magnitude", "allocation": "alphapruning"},
    {"importance": "magnitude", "allocation": "owl"},
    {"update": "sparsegpt"},
]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda weight, seen: weight * torch.nan, f"importance own: .* for {LAYER}, .*1024 of them NaN"),
        (lambda weight, seen: weight.abs().sum(0), rf"importance own: \(32,\) scores for {LAYER}, \(32, 32\)"),
        (lambda weight, seen: weight.abs().tolist(), f"importance own: it gave a list for {LAYER}"),
        (
            lambda weight, seen: weight * seen.input_norm,
            f"importance own: its function fails at {LAYER} .TypeError: .*, "
            r"test_importance.py:\d+.; it was registered without inputs=True and gradients=True: what",
        ),
        (lambda weight, seen: weight.abs_(), f"importance own: it changes the weight of {LAYER} in place"),
    ],
)
@pytest.mark.parametrize("group", ["layer", "global"])
@pytest.mark.usefixtures("registry")
def test_bad_scores_are_refused_by_name(score, message, group):
    register_importance("own")(score)
    with pytest.raises(PhoenixError, match=message):
        prune(make_model(), SparsifySettings(importance="own", group=group))


@pytest.mark.parametrize("settings", BROKEN, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_layer_that_is_not_finite_is_refused_by_name(llama, value, settings):
    layer = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(layer).weight[3, 4] = value
    with pytest.raises(PhoenixError, match=f"model: {layer}.weight has 1 weights that are NaN or infinite"):
        prune(llama, SparsifySettings(**settings), tokens=torch.randint(0, 256, (2, 16)))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
@pytest.mark.usefixtures("registry")
def test_the_gpu_s_trouble_is_not_the_function_s(error):
    def score(weight, seen):
        raise error

    register_importance("own")(score)
    with pytest.raises(type(error), match="full|CUDA error"):
        prune(make_model(), SparsifySettings(importance="own"))

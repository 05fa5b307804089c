"""The functions for people with a program of their own: what is wrong with an argument is said in one line."""

import copy

import pytest
import torch

import phoenix_sparse as phx
from tiny import make_model, pruned

MODEL, MASKS = pruned()
WORDS = {
    # masks in the place of something else, and something else in the place of masks
    "what load_mask gives": (
        lambda _: phx.validate_mask((MASKS, {})),
        "a tuple was given; of what load_mask gives take the first",
    ),
    "a path": (
        lambda _: phx.validate_mask("masks.safetensors"),
        "masks: str given; give boolean tensors by layer name",
    ),
    "a model": (lambda _: phx.compute_sparsity_stats(MODEL), "masks: LlamaForCausalLM given; give boolean tensors"),
    "a list": (lambda path: phx.save_mask([torch.ones(2, 2).bool()], path / "m.pt"), "masks: list given"),
    "arrays": (lambda path: phx.save_mask({"a": torch.ones(2).bool().numpy()}, path / "m.pt"), "a is ndarray; give a"),
    "no masks": (lambda _: phx.validate_sparsity_preserved(MODEL, None), "masks: NoneType given"),
    "no masks to train": (
        lambda _: phx.apply_sparse_lora(copy.deepcopy(MODEL), None, phx.SparseLoRAConfig()),
        "masks: NoneType given",
    ),
    "zeros and ones": (
        lambda _: phx.apply_sparse_lora(make_model(), {n: m.float() for n, m in MASKS.items()}, phx.SparseLoRAConfig()),
        "q_proj is torch.float32, not boolean; give mask.bool()",
    ),
    "bytes": (
        lambda _: phx.validate_sparsity_preserved(MODEL, {n: m.to(torch.uint8) for n, m in MASKS.items()}),
        "q_proj is torch.uint8, not boolean; give mask.bool()",
    ),
    # models
    "tensors for a model": (
        lambda _: phx.compute_unstructured_mask(MODEL.state_dict()),
        "OrderedDict given in the place of a model",
    ),
    "a name for a model": (lambda _: phx.MaskGenerator("demo").generate_masks(), "str given in the place of a model"),
    "a model for tensors": (
        lambda _: phx.compute_masks_for_state_dict(MODEL),
        "state_dict: LlamaForCausalLM given; give tensors by name (compute_unstructured_mask: a model)",
    ),
    "no directory": (lambda path: phx.load_model(path / "none"), "none is not a directory; give a Hugging Face model"),
    # numbers
    "a word for a sparsity": (lambda _: phx.validate_mask(MASKS, "0.6"), "expected_sparsity: '0.6' is no number"),
    "no tolerance": (
        lambda _: phx.validate_sparsity_preserved(make_model(), MASKS, float("nan")),
        "tolerance: nan given; it should be a number from 0 up",
    ),
    "masks for densities": (
        lambda _: phx.count_flops(MODEL, MASKS, prompt_length=8, context_length=8),
        "has Tensor; give the share of its weights that are not zero",
    ),
    "alpha": (lambda _: phx.SparseLoRAConfig(alpha="x"), "alpha is 'x'; it should be a number"),
    "no end of alpha": (lambda _: phx.SparseLoRAConfig(alpha=float("inf")), "alpha is inf; it should be finite"),
    # the rest
    "a number of targets": (lambda _: phx.SparseLoRAConfig(target_modules=5), "target_modules is 5; give last names"),
    "a word for yes or no": (
        lambda _: phx.SparseLoRAConfig(preserve_sparsity_on_merge="no"),
        "preserve_sparsity_on_merge is 'no'; it should be True or False",
    ),
    "no targets": (lambda _: phx.SparseLoRAConfig(target_modules=[]), "target_modules is empty"),
    "no configuration": (
        lambda _: phx.apply_sparse_lora(copy.deepcopy(MODEL), MASKS, {"r": 4}),
        "config is dict; give a SparseLoRAConfig",
    ),
    "no format of a plot": (
        lambda path: phx.plot_sparsity_histogram(MASKS, path / "plot.xyz"),
        "no plot is drawn as xyz; give a path that ends in .png, .svg or .pdf",
    ),
    "a decorator without its name": (
        lambda _: phx.register_importance(lambda weight, seen: weight.abs()),
        "it takes a name first",
    ),
    "no function": (lambda _: phx.register_importance("three")(3), "'three' is int; register a function"),
    "a path for a recipe": (
        lambda _: phx.run("recipes/demo.yaml"),
        "run: str given; give a recipe, such as load_recipe",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_wrong_argument_is_told_in_one_line(tmp_path, case):
    action, words = WORDS[case]
    with pytest.raises(phx.PhoenixError) as caught:
        action(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_target_modules_are_all_of_them():
    every = phx.SparseLoRAConfig(target_modules="Linear").targets
    assert phx.SparseLoRAConfig(target_modules=None).targets == every

"""The roofline against its definition, and the configurations that come with Phoenix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.flops import count_flops
from phoenix_sparse.evaluation.hardware import (
    CONFIGURATIONS,
    SYSTEMS,
    System,
    project,
    project_all,
    shipped_configuration,
)
from phoenix_sparse.evaluation.matrices import prunable_matrices
from phoenix_sparse.models import empty_model, load_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "dtype": "bfloat16",
}
LLAMA = LlamaConfig(**SIZES)
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


def counted(config, sparsity, prompt=8, context=16):
    densities = dict.fromkeys(prunable_matrices(empty_model(config)), 1 - sparsity)
    return count_flops(config, densities, prompt_length=prompt, context_length=context)


def machine(**changes):
    return System(
        **{"name": "m", "flops": 1e12, "bandwidth": 1e12, "memory": 1e12, "skips_zeros": False, "source": ""} | changes
    )


@given(st.floats(0, 0.9), st.integers(1, 40), st.floats(1e6, 1e15), st.floats(1e6, 1e15), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_step_takes_the_longer_of_two_times(sparsity, batch, flops, bandwidth, skips):
    counts = counted(LLAMA, sparsity)
    found = project(counts, machine(flops=flops, bandwidth=bandwidth, skips_zeros=skips), batch=batch)
    assert found["projected"] is True
    matrices = [(entry["shape"][0] * entry["shape"][1], entry["nnz"]) for entry in counts["linears"].values()]
    for kind in ("dense", "packed"):
        way = "sparse" if skips and kind == "packed" else "dense"
        weights = sum(2 * all_ if kind == "dense" or kept == all_ else 2 * kept + all_ / 8 for all_, kept in matrices)
        cache = 16 * 2 * 2 * 2 * 8 * 2  # positions, keys and values, blocks, heads, their width, bytes
        compute, memory = batch * counts["decode"]["total"][way] / flops, (weights + batch * cache) / bandwidth
        assert found[kind]["decode"]["tokens_per_second"] == pytest.approx(batch / max(compute, memory))
        assert found[kind]["decode"]["bound"] == ("compute" if compute > memory else "memory")
        compute, memory = batch * counts["prefill"]["total"][way] / flops, weights / bandwidth
        assert found[kind]["prefill"]["tokens_per_second"] == pytest.approx(8 * batch / max(compute, memory))


def test_what_does_not_fit_is_absent():
    counts = counted(LLAMA, 0.5)
    sizes = counts["bytes"]
    between = (sizes["dense"] + sizes["nonzero_values_and_bitmask"]) / 2 + sizes["kv_cache"]
    found = project(counts, machine(memory=between))
    assert found["dense"] is None
    assert found["packed"] is not None
    assert project(counts, machine(memory=between), batch=10**6)["packed"] is None


def test_of_experts_those_are_read_that_a_token_chooses():
    counts, slow = counted(MIXTRAL, 0.0), machine(flops=1e30)
    experts = 2 * 2 * 4 * (96 * 32 + 32 * 48)  # bytes, blocks, experts
    others = 2 * sum(
        entry["shape"][0] * entry["shape"][1] for entry in counts["linears"].values() if entry["experts"] == 1
    )
    cache = counts["bytes"]["kv_cache"]
    for batch, share in ((1, 1 / 2), (2, 3 / 4), (200, 1.0)):
        rate = project(counts, slow, batch=batch)["dense"]["decode"]["tokens_per_second"]
        assert rate == pytest.approx(batch / ((others + share * experts + batch * cache) / slow.bandwidth))


def test_a_batch_of_none_is_refused():
    with pytest.raises(PhoenixError, match="a batch of 0"):
        project(counted(LLAMA, 0.5), SYSTEMS[0], batch=0)


PUBLISHED = {"llama-3-8b": 8.03e9, "llama-7b": 6.74e9, "mistral-7b-v0.3": 7.25e9, "mixtral-8x7b": 46.7e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_configurations_have_the_published_sizes(name):
    counts = count_flops(load_config(shipped_configuration(name)), None, prompt_length=8, context_length=8)
    assert counts["parameters"]["total"] == pytest.approx(PUBLISHED[name], rel=1e-3)
    if name == "mixtral-8x7b":  # of 46.7 thousand million weights a token sees 12.9, embeddings included
        assert counts["decode"]["linears"]["dense"] / 2 == pytest.approx(12.9e9 - 2 * 32000 * 4096, rel=1e-2)


def test_only_known_names_have_a_configuration():
    assert {path.name for path in CONFIGURATIONS.iterdir()} == set(PUBLISHED)
    assert shipped_configuration("../configs/llama-7b") is None
    assert shipped_configuration("gpt-2") is None


def test_flops_json_keeps_all_systems_and_says_that_it_projects():
    found = project_all(counted(LLAMA, 0.5))
    assert "not measured" in found["note"]
    assert {row["system"] for row in found["rows"]} == {system.name for system in SYSTEMS}
    assert all(row["projected"] for row in found["rows"])
    assert all(entry["source"] for entry in found["systems"])

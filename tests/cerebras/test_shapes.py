"""Configurations: what is put right for the converter, and what is refused."""

import pytest

from phoenix_sparse.cerebras.shapes import conversion_config, model_block, shape_of
from phoenix_sparse.errors import PhoenixError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 257,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def test_the_rope_goes_where_transformers_4_had_it():
    found = conversion_config(CONFIG, "it")
    assert found["rope_theta"] == 500.0
    assert found["rope_scaling"] is None
    assert found["torch_dtype"] == "bfloat16"
    assert "rope_parameters" not in found
    scaled = CONFIG | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}
    found = conversion_config(scaled, "it")
    assert (found["rope_theta"], found["rope_scaling"]) == (5e5, {"rope_type": "llama3", "factor": 8.0})


def test_a_configuration_of_transformers_4_stays_as_it_is():
    old = {key: value for key, value in CONFIG.items() if key != "rope_parameters"} | {"rope_theta": 1e6}
    assert conversion_config(old, "it")["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "of type qwen2"),
        ({"head_dim": 16}, "heads of 16"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope of type dynamic"),
    ],
)
def test_what_the_converter_would_get_wrong_is_refused(change, message):
    with pytest.raises(PhoenixError, match=message):
        shape_of(CONFIG | change, "it")


def test_keys_without_a_head_count_have_that_of_queries():
    assert shape_of(CONFIG, "it").key_heads == 4
    assert shape_of(CONFIG | {"num_key_value_heads": 2}, "it").key_heads == 2


def test_the_emitted_block_loses_its_faults_and_experts_keep_their_names():
    block = model_block({"model": {"norm_first": True, "use_ff_layer1_dropout": False, "moe": {"top_k": 2}}})
    assert not {"norm_first", "use_ff_layer1_dropout"} & set(block)
    assert block["moe"] == {"top_k": 2, "moe_implementation": "optimized"}

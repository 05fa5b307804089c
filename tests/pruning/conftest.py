"""Models on disk in every form, and tokens to calibrate on."""

import pytest
import torch
from transformers import GenerationConfig

from phoenix_sparse.pruning.initialise import Calibration
from tiny import make_model


@pytest.fixture(scope="session")
def calibration():
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    ids = tokens[:, :15].tolist()
    return Calibration(tokens, rows=[{"input_ids": one, "labels": [-100] * 5 + one[5:]} for one in ids])


@pytest.fixture(scope="session")
def directories(tmp_path_factory, tokenizer):
    """Models by kind and form: in one file, in shards, in bfloat16, with tied embeddings or without."""
    made = {}

    def get(kind, form="single"):
        if (kind, form) not in made:
            directory = tmp_path_factory.mktemp("model") / f"{kind}-{form}"
            model = make_model(kind)
            if form == "tied":
                model.config.tie_word_embeddings = True
                model.tie_weights()
            if form == "untied":
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
            if form == "bfloat16":
                model.to(torch.bfloat16)
            model.generation_config = GenerationConfig(max_length=99, top_k=7, do_sample=True)
            model.save_pretrained(directory, **({"max_shard_size": "20KB"} if form == "shards" else {}))
            tokenizer.save_pretrained(directory)
            assert (directory / "model.safetensors.index.json").is_file() == (form == "shards")
            made[kind, form] = directory
        return made[kind, form]

    return get

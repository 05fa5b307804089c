"""Pruning from disk, block by block, gives to the last bit what pruning in memory gives."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from phoenix_sparse.checkpoint import Checkpoint
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import save_mask
from phoenix_sparse.models import load_model
from phoenix_sparse.pruning import sequential
from phoenix_sparse.pruning.initialise import Calibration, initialise
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import FinishedBlocks, StreamedBlocks, open_streamed, write_model
from tiny import CONFIGS, make_model

CPU = torch.device("cpu")
METHODS = {
    "wanda": {"importance": "wanda"},
    "magnitude": {"importance": "magnitude", "sparsity": 0.6},
    "ria": {"importance": "ria"},
    "sparsegpt": {"update": "sparsegpt"},
    "alps": {"update": "alps"},
    "dsnot": {"update": "dsnot"},
    "taylor": {"importance": "taylor", "sparsity": 0.7},
    "gblm": {"importance": "gblm"},
    "2:4": {"importance": "wanda", "pattern": "2:4"},
    "sparsegpt 2:4": {"pattern": "2:4", "update": "sparsegpt"},
    "16x1": {"pattern": "16x1"},
    "global": {"importance": "taylor", "group": "global"},
    "owl": {"importance": "wanda", "allocation": "owl", "sparsity": 0.6},
    "alphapruning": {"importance": "wanda", "allocation": "alphapruning", "sparsity": 0.6},
    "list": {"importance": "wanda", "allocation": (0.4, 0.6)},
    "structured": {"importance": "taylor", "pattern": "structured", "sparsity": 0.3},
}


@pytest.fixture(scope="module")
def calibration():
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    ids = tokens[:, :15].tolist()
    return Calibration(tokens, rows=[{"input_ids": one, "labels": [-100] * 5 + one[5:]} for one in ids])


@pytest.fixture(scope="module")
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


def load(directory, dtype="auto"):
    return load_model(directory, dtype, "cpu")


def prune_both(directory, settings, calibration, tmp_path, tokenizer, dtype="auto"):
    """Masks and models of both ways; the streamed one as it was written and loaded again."""
    from phoenix_sparse.pruning.blocks import Blocks

    memory = load(directory, dtype)
    expected, shares = initialise(Blocks(memory), settings, calibration, seed=2)
    blocks = open_streamed(directory, dtype, CPU)
    assert isinstance(blocks, StreamedBlocks)
    masks, streamed_shares = initialise(blocks, settings, calibration, seed=2, work=tmp_path / "work")
    assert streamed_shares == shares
    write_model(blocks, FinishedBlocks(tmp_path / "work" / "blocks"), tokenizer, tmp_path / "out")
    return expected, memory, masks, tmp_path / "out"


def assert_equal_states(one, other):
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, value in one.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_of_the_model_in_memory(
    kind, method, directories, calibration, tmp_path, tokenizer
):
    settings = SparsifySettings(**METHODS[method])
    expected, memory, masks, out = prune_both(directories(kind), settings, calibration, tmp_path, tokenizer)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert not all(mask.all() for mask in masks.values())
    assert_equal_states(load(out), memory)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["shards", "tied", "untied", "bfloat16"])
def test_every_form_of_a_checkpoint_is_read(kind, form, directories, calibration, tmp_path, tokenizer):
    settings = SparsifySettings(importance="gblm")
    expected, memory, masks, out = prune_both(directories(kind, form), settings, calibration, tmp_path, tokenizer)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    written = load(out)
    assert_equal_states(written, memory)
    tied = written.get_input_embeddings().weight is written.get_output_embeddings().weight
    assert tied == (form == "tied" or (kind == "opt" and form != "untied"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_may_be_asked_for(dtype, directories, calibration, tmp_path, tokenizer):
    form = "bfloat16" if dtype == "float32" else "single"
    settings = SparsifySettings()
    directory = directories("llama", form)
    expected, memory, masks, out = prune_both(directory, settings, calibration, tmp_path, tokenizer, dtype)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert AutoConfig.from_pretrained(out).dtype == getattr(torch, dtype)
    assert_equal_states(load(out), memory)


def test_what_is_no_weight_is_kept(directories, calibration, tmp_path, tokenizer):
    directory = directories("qwen2", "shards")
    _, memory, _, out = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    memory.save_pretrained(tmp_path / "memory")
    tokenizer.save_pretrained(tmp_path / "memory")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_text() == (tmp_path / "memory" / name).read_text()
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.max_length, generation.top_k) == (99, 7)
    assert AutoTokenizer.from_pretrained(out).encode("abc") == tokenizer.encode("abc")


def test_a_model_without_generation_config_gets_its_own_default(directories, calibration, tmp_path, tokenizer):
    directory = shutil.copytree(directories("llama"), tmp_path / "model")
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text()) | {"num_beams": 3}  # as old ones have it
    (directory / "config.json").write_text(json.dumps(config))
    _, memory, _, out = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    memory.save_pretrained(tmp_path / "memory")
    written, expected = (json.loads((d / "generation_config.json").read_text()) for d in (out, tmp_path / "memory"))
    assert written == expected
    assert written["num_beams"] == 3


def on_device(blocks):
    """Blocks with a parameter off the meta device."""
    return [
        name for name, block in blocks.blocks.items() if any(not parameter.is_meta for parameter in block.parameters())
    ]


@pytest.mark.parametrize("method", ["wanda", "taylor", "owl", "global", "structured", "alphapruning"])
def test_one_block_at_a_time_is_in_memory(method, directories, calibration, tmp_path, monkeypatch):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    assert on_device(blocks) == []
    rest = [name for name, parameter in blocks.model.named_parameters() if not parameter.is_meta]
    assert rest == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    open_now, run = [], StreamedBlocks.run

    def watched(self, index, block, hidden):
        open_now.append(on_device(self))
        assert open_now[-1] == [self.names[index]]
        return run(self, index, block, hidden)

    monkeypatch.setattr(StreamedBlocks, "run", watched)
    settings = SparsifySettings(**METHODS[method])
    initialise(
        blocks, settings, calibration, seed=0, work=tmp_path, progress=lambda *_: open_now.append(on_device(blocks))
    )
    assert open_now
    assert max(map(len, open_now)) <= 1
    assert on_device(blocks) == []


def test_blocks_are_closed_after_an_error(directories):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(ZeroDivisionError), blocks.opened("model.layers.1"):
        assert on_device(blocks) == ["model.layers.1"]
        _ = 1 / 0
    assert on_device(blocks) == []


def test_a_block_may_be_opened_within_itself(directories):
    """As happens where the arguments for a new length are made while the first block is open."""
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with torch.no_grad(), blocks.opened("model.layers.0") as block:
        hidden = torch.randn(1, 9, 32)
        output = blocks.run(0, block, hidden)
        assert on_device(blocks) == ["model.layers.0"]
        assert torch.equal(blocks.run(0, block, hidden), output)
    assert on_device(blocks) == []


def test_a_model_on_disk_needs_a_place_for_its_blocks(directories, calibration):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(PhoenixError, match="work: the pruned blocks of a model on disk need a directory"):
        initialise(blocks, SparsifySettings(), calibration, seed=0)


def test_evolution_needs_the_model_in_memory(directories, calibration, tmp_path):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(PhoenixError, match="evolutionary runs the whole model; give one in memory"):
        initialise(blocks, SparsifySettings(allocation="evolutionary"), calibration, seed=0, work=tmp_path)


# Files that are not as they should be.


@pytest.fixture
def copy(directories, tmp_path):
    return lambda kind="llama", form="single": shutil.copytree(directories(kind, form), tmp_path / f"{kind}-{form}")


def change(file, action):
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    action(tensors)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, copy, calibration, tmp_path):
    directory = copy()
    change(directory / "model.safetensors", lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    with pytest.raises(PhoenixError, match=f"{name} has 2 weights that are NaN or infinite; a model must be finite"):
        initialise(
            open_streamed(directory, "auto", CPU), SparsifySettings(), calibration, seed=0, work=tmp_path / "work"
        )


@pytest.mark.parametrize("form", ["single", "shards"])
@pytest.mark.parametrize("left", [0, 100, -40])
def test_a_truncated_file_is_refused(form, left, copy):
    directory = copy(form=form)
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(PhoenixError, match=f"{file.name}: the weights can't be loaded"):
        open_streamed(directory, "auto", CPU)


def test_a_missing_shard_is_refused(copy):
    directory = copy(form="shards")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(PhoenixError, match=f"{file.name}: the weights can't be loaded"):
        open_streamed(directory, "auto", CPU)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "..", "", "a\\b", "sub/model.safetensors", 3, None]
)
def test_an_index_that_points_elsewhere_is_refused(name, copy):
    directory = copy(form="shards")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(PhoenixError, match="is no name of a file in this directory"):
        open_streamed(directory, "auto", CPU)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content, copy):
    directory = copy(form="shards")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PhoenixError, match="it has no weight_map from tensors to files"):
        open_streamed(directory, "auto", CPU)


def test_files_may_be_links_as_in_the_hub_s_cache(copy, tmp_path, calibration, tokenizer):
    directory, blobs = copy(form="shards"), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    expected, _, masks, _ = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_of_a_file_and_shards_the_file_is_read_as_transformers_does(copy, directories):
    directory = copy()
    for file in directories("llama", "shards").glob("model*"):
        shutil.copy(file, directory)
    change(directory / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(7))
    assert set(load(directory).model.norm.weight.tolist()) == {7}
    assert set(open_streamed(directory, "auto", CPU).model.model.norm.weight.tolist()) == {7}


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_in_the_file(equal, copy):
    """transformers ties them where they are equal, and believes the file where they aren't."""
    directory = copy("llama", "tied")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if equal else 2)

    change(directory / "model.safetensors", add)
    blocks, memory = open_streamed(directory, "auto", CPU), load(directory)
    if not equal:
        assert blocks is None
        assert not torch.equal(memory.lm_head.weight, memory.model.embed_tokens.weight)
        return
    assert blocks.model.lm_head.weight is blocks.model.model.embed_tokens.weight
    assert torch.equal(blocks.model.lm_head.weight, memory.lm_head.weight)


@pytest.mark.parametrize("damage", ["renamed", "missing", "beyond", "turned"])
def test_other_tensors_than_the_model_s_are_left_to_loading_as_a_whole(damage, copy):
    directory, name = copy(), "model.layers.1.mlp.up_proj.weight"

    def act(tensors):
        if damage == "turned":
            tensors[name] = tensors[name].t().contiguous()
        elif damage == "beyond":
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
        else:
            value = tensors.pop(name)
            if damage == "renamed":
                tensors[name.replace("up_proj", "w3")] = value

    change(directory / "model.safetensors", act)
    assert open_streamed(directory, "auto", CPU) is None
    with pytest.raises(PhoenixError):
        load(directory)


def test_old_names_are_left_to_loading_as_a_whole(copy):
    """OPT's first files have no `model.` before `decoder`, and transformers adds it."""
    directory = copy("opt")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(directory / "model.safetensors", rename)
    assert open_streamed(directory, "auto", CPU) is None
    assert_equal_states(load(directory), make_model("opt"))


def test_a_damaged_generation_config_is_refused(copy):
    directory = copy()
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(PhoenixError, match="no causal language model .*generation_config.json"):
        open_streamed(directory, "auto", CPU)


def test_tensors_are_read_as_they_are(directories):
    checkpoint, state = Checkpoint(directories("llama", "shards")), make_model().state_dict()
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in state.items()}
    read = checkpoint.tensors({"one": "model.norm.weight", "two": "model.layers.1.mlp.up_proj.weight"})
    assert torch.equal(read["one"], state["model.norm.weight"])
    assert torch.equal(read["two"], state["model.layers.1.mlp.up_proj.weight"])


# Finished blocks: what a stopped pruning goes on from.


def stopped_after(block, what="pruning block"):
    def progress(kind, done, _of):
        if (kind, done) == (what, block):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("wanda", "pruning block"),
        ("sparsegpt", "pruning block"),
        ("taylor", "pruning block"),
        ("owl", "pruning block"),
        ("dsnot", "pruning block"),
        ("owl", "scoring block"),
        ("global", "scoring block"),
        ("taylor", "gradients of block"),
    ],
)
def test_a_stopped_pruning_goes_on(method, what, streamed, directories, calibration, tmp_path, monkeypatch):
    from phoenix_sparse.pruning.blocks import Blocks

    settings, directory = SparsifySettings(**METHODS[method]), directories("mistral")

    def attempt(work, progress=None):
        blocks = open_streamed(directory, "auto", CPU) if streamed else Blocks(load(directory))
        masks, shares = initialise(blocks, settings, calibration, seed=0, work=work, progress=progress)
        finished = FinishedBlocks(work / "blocks")
        return masks, shares, {name: finished.state(name) for name in blocks.names}

    expected, shares, weights = attempt(tmp_path / "undisturbed")
    pruned, prune_linear = [], sequential.prune_linear
    monkeypatch.setattr(
        sequential, "prune_linear", lambda name, *given: (pruned.append(name), prune_linear(name, *given))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "work", stopped_after(1, what))
    assert len(pruned) == (7 if what == "pruning block" else 0)
    masks, again, found = attempt(tmp_path / "work")
    assert len(pruned) == len(set(pruned)) == (0 if method == "global" else 14)  # none twice
    assert again == shares
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    for name, state in weights.items():
        assert all(torch.equal(found[name][key], value) for key, value in state.items())


def test_what_is_finished_is_not_done_again(directories, calibration, tmp_path, monkeypatch):
    """Nor are a finished allocation's and finished gradients' measurements."""
    from phoenix_sparse.pruning import initialise as module

    settings = SparsifySettings(importance="taylor", allocation="owl")
    first = initialise(open_streamed(directories("llama"), "auto", CPU), settings, calibration, seed=0, work=tmp_path)

    def unwanted(*_args, **_kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr(module, "allocate", unwanted)
    monkeypatch.setattr(sequential, "prune_linear", unwanted)
    monkeypatch.setattr("phoenix_sparse.pruning.gradients._forward", unwanted)
    second = initialise(open_streamed(directories("llama"), "auto", CPU), settings, calibration, seed=0, work=tmp_path)
    assert second[1] == first[1]
    assert all(torch.equal(second[0][name], mask) for name, mask in first[0].items())


@pytest.mark.parametrize(
    ("lost", "told"),
    [((), [2]), ((1,), [1, 2]), ((0,), [1, 2]), ((0, 1), [1, 2])],
    ids=["all are there", "the last is missing", "the first is missing", "none is there"],
)
def test_a_finished_block_counts_once(lost, told, directories, calibration, tmp_path):
    def attempt():
        calls = []
        blocks = open_streamed(directories("llama"), "auto", CPU)
        initialise(
            blocks, SparsifySettings(), calibration, seed=0, work=tmp_path, progress=lambda *call: calls.append(call)
        )
        return calls

    assert attempt() == [("pruning block", 1, 2), ("pruning block", 2, 2)]
    for index in lost:
        for file in (tmp_path / "blocks").glob(f"model.layers.{index}.*"):
            file.unlink()
    assert attempt() == [("pruning block", done, 2) for done in told]


@pytest.mark.parametrize("damage", ["bit", "truncated", "bit of the mask", "no mask", "another's mask", "foreign"])
def test_damaged_finished_files_are_refused(damage, directories, calibration, tmp_path, tokenizer):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    masks, _ = initialise(blocks, SparsifySettings(), calibration, seed=0, work=tmp_path)
    weights = tmp_path / "blocks" / "model.layers.0.safetensors"
    mask = tmp_path / "blocks" / "model.layers.0.masks.safetensors"
    changed = mask if "mask" in damage else weights
    content = bytearray(changed.read_bytes())
    content[-11] ^= 1
    if damage.startswith("bit"):
        changed.write_bytes(content)
    elif damage == "truncated":
        changed.write_bytes(content[:-40])
    elif damage == "no mask":
        changed.unlink()
    elif damage == "another's mask":
        save_mask({name: ~one for name, one in masks.items() if name.startswith("model.layers.0.")}, mask)
    else:
        save_file({key: value.clone() for key, value in load_file(weights).items()}, weights)
    with pytest.raises(PhoenixError, match="model.layers.0"):
        initialise(
            open_streamed(directories("llama"), "auto", CPU), SparsifySettings(), calibration, seed=0, work=tmp_path
        )
    if changed is weights:
        with pytest.raises(PhoenixError, match="model.layers.0.safetensors"):
            write_model(blocks, FinishedBlocks(tmp_path / "blocks"), tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_blocks_that_are_not_finished_are_not_written(directories, calibration, tmp_path, tokenizer):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(KeyboardInterrupt):
        initialise(blocks, SparsifySettings(), calibration, seed=0, work=tmp_path, progress=stopped_after(1))
    assert on_device(blocks) == []
    with pytest.raises(PhoenixError, match="model.layers.1.safetensors: the weights can't be loaded"):
        write_model(blocks, FinishedBlocks(tmp_path / "blocks"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""A tiny model, a byte tokenizer and a tiny task, made on the spot."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from phoenix_sparse import cli
from tiny import make_model

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def as_torch_begins():
    """A run in this process asks torch for determinism, which no other test is to inherit."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def llama():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()} | {"<end>": 256}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<end>", eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def task_directory(tmp_path_factory) -> Path:
    """Sums of one digit, a task of its own in a folder."""
    directory = tmp_path_factory.mktemp("tasks") / "sums"
    directory.mkdir()
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    for split, part in {"train": pairs[:70], "validation": pairs[70:80], "test": pairs[80:]}.items():
        rows = [json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) for a, b in part]
        (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "task.yaml").write_text(
        "output_type: generate_until\n"
        'doc_to_text: "{{question}}="\n'
        'doc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}\n'
        "training_split: train\nvalidation_split: validation\ntest_split: test\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return directory


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real model, where they are at hand."""
    if not SHARED.is_dir():
        pytest.skip("real data is not at hand")
    return SHARED


@pytest.fixture
def phx(monkeypatch, capsys):
    """Run a command in this process; give its exit code, what it said, and the lines on stderr."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["phx", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err.splitlines()

    return call


@pytest.fixture(scope="session")
def chain(tmp_path_factory, model_directory, task_directory) -> Path:
    """The steps on files, one after the other."""
    out = tmp_path_factory.mktemp("chain")
    runner = CliRunner()

    def call(*arguments: object) -> None:
        result = runner.invoke(cli.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result
        assert result.exception is None

    task = ("--task", task_directory, "--out", out)
    masks = ("--masks", out / "masks.safetensors")
    few = ("calibration.samples=4", "calibration.length=16")
    call("prune", model_directory, "--sparsity", 0.6, *task, *few)
    tuning = ("ranks=[4, 2]", "max_steps=4", "batch_size=8", "max_length=32", "learning_rate=0.01")
    call("tune", out / "sparse", *masks, *task, *tuning)
    call("search", out / "sparse", *masks, *task, "--adapter", out / "adapter/super", "hill_climb=1")
    call("merge", out / "sparse", *masks, *task, "--adapter", out / "adapter/chosen")
    return out

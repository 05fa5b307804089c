"""Fine-tuning on several GPUs through `accelerate launch`: does it arrive where one process does, and how fast?

    PYTHONPATH=src python benchmarks/several_gpus.py --json several_gpus.json

A random Llama, half of its weights pruned, is written as a model directory with a made-up task, and trained by
`steps.tune` in child processes: by one process, by DDP and by FSDP2, all with the same examples in a step. For each
kind the table says how far its adapter is from one process's, whether the zeros outlived the merge, whether all
processes had the same elastic ranks, and what it took.

In bfloat16 no two ways of adding up agree to the last bit, and Adam makes much of small differences. What is to be
expected is therefore measured: one process trains once more with other micro-batches, which is the same training but
for rounding. A kind may be three times as far away as that. Losses and gradient norms are held against one process's,
too: Adam hides a gradient of the wrong size.

A kind that fails says its last words, and the others go on. Exits with 1 if a kind failed or went astray.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import SCALE, SEED, SPARSITY, facts, llama_config, print_table
from safetensors.torch import load_file

from phoenix_sparse.errors import CheckFailed, PhoenixError
from phoenix_sparse.files import read_json, write_json
from phoenix_sparse.masks import apply_masks, save_mask
from phoenix_sparse.models import prunable_linears

WORKER = Path(__file__).with_name("one_of_several.py")
ONE, OTHER = "one process", "one, other micro-batches"
KINDS = {"ddp": "DDP", "fsdp": "FSDP2", "fsdp_recomputing": "FSDP2, gradient checkpointing"}
PATIENCE = 40.0  # seconds beyond the limit that a launcher has, to end its processes
TIMES_AS_FAR = 3  # as rounding alone takes one process
FLOOR = {"factors": 1e-3, "losses": 2e-3, "norms": 2e-2}  # relative, for where rounding does next to nothing
TASK = """\
output_type: generate_until
doc_to_text: "{{question}}="
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
training_split: train
test_split: test
metric_list: [{metric: exact_match}]
"""


def make_model(directory: Path, layers: int, width: int, device: str, length: int, examples: int) -> int:
    """Write a pruned model, its masks, a tokenizer of bytes and a task of random letters; give the model's weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = llama_config(layers, width)
    config.vocab_size = 32000 if width >= 1024 else 512
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 256
    torch.manual_seed(SEED)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears = prunable_linears(model)
    masks = {name: torch.rand(layer.weight.shape, device=device) >= SPARSITY for name, layer in linears.items()}
    apply_masks(masks, linears)
    model.save_pretrained(directory)
    save_mask({name: mask.cpu() for name, mask in masks.items()}, directory / "masks.safetensors", {})
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()} | {"<end>": 256}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **ends).save_pretrained(directory)
    task = directory / "task"
    task.mkdir()
    (task / "task.yaml").write_text(TASK)
    letters = random.Random(SEED)
    words = ["".join(letters.choices("abcdefgh", k=length - 2)) for _ in range(examples + 1)]
    rows = [json.dumps({"question": word[:8], "answer": word[8:]}) + "\n" for word in words]
    (task / "train.jsonl").write_text("".join(rows[:-1]))
    (task / "test.jsonl").write_text(rows[-1])
    return sum(parameter.numel() for parameter in model.parameters())


def launching(kind: str, processes: int, device: str) -> list[str]:
    """The command that starts a kind's processes, up to the script."""
    if kind in (ONE, OTHER):
        return [sys.executable]
    if device == "cpu":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            *_port("--master-port"),
        ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *_port("--main_process_port"),
    ]
    if kind == "ddp":
        return [*command, "--multi_gpu"]
    # Without the sharding said in so many words, the launcher gives FSDP2 a default that belongs to FSDP 1.
    command += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true"]
    command += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    return [*command, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]


def _port(option: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [option, str(free.getsockname()[1])]


class Child:
    """A kind's processes. Those that hang say so and end by themselves, each in time."""

    def __init__(
        self, kind: str, place: Path, given: argparse.Namespace, settings: dict[str, Any], gpu: int | None
    ) -> None:
        self.kind, self.out, self.limit = kind, place / kind.replace(" ", "_").replace(",", ""), given.limit
        self.out.mkdir()
        command = launching(kind, given.processes, given.device)
        command += [
            str(WORKER),
            str(place / "model"),
            str(self.out),
            given.device,
            str(given.limit),
            json.dumps(settings),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        if gpu is not None:
            ours = environment.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = ours.split(",")[gpu] if ours else str(gpu)
        if given.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.started = time.monotonic()
        with (self.out / "words.txt").open("w") as words:
            self.process = subprocess.Popen(command, env=environment, stdout=words, stderr=words, cwd=WORKER.parent)

    def wait(self) -> dict[str, Any]:
        """What it saw and where it arrived; only `failed`, if it did not."""
        try:
            code: Any = self.process.wait(timeout=self.limit + PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # a launcher ends what it launched, which is in sessions of its own
            try:
                self.process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            code = f"not at its end after {time.monotonic() - self.started:.0f} s"
        if code != 0 or not (self.out / "seen.json").is_file():
            print(f"\n{self.kind} failed ({code}); its last words:", *self.last_words(), sep="\n  ", flush=True)
            return {"failed": str(code)}
        tune = read_json(self.out / "tune.json")
        print(f"{self.kind}: ended after {time.monotonic() - self.started:.0f} s", flush=True)
        return {
            **read_json(self.out / "seen.json"),
            "losses": [entry["loss"] for entry in tune["log"]],
            "norms": [entry["grad_norm"] for entry in tune["log"]],
            "tokens": tune["tokens"] / tune["steps"],
            "of": tune["processes"],
            "factors": load_file(self.out / "adapter" / "super" / "adapter_model.safetensors"),
            "wall": time.monotonic() - self.started,
        }

    def last_words(self) -> list[str]:
        """What the processes said before the launcher had its say about them."""
        words = (self.out / "words.txt").read_text(errors="replace").splitlines()
        ends = [place for place, line in enumerate(words) if "elastic/multiprocessing" in line or "SIGTERM" in line]
        told = words[: ends[0] if ends and ends[0] else None]
        return [line for line in told if line.strip() and "warn" not in line.lower()][-60:]


def distances(found: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """How far a training is from another: B relative to its way from zero, losses and norms relative, A and B at most.

    A's way from its random beginning is short against its size; B is nothing but way.
    """
    ours, theirs = found["factors"], one["factors"]
    if ours.keys() != theirs.keys():
        raise CheckFailed(f"the adapters hold other tensors: {sorted(ours.keys() ^ theirs.keys())[:2]}")
    ups = [name for name in ours if ".lora_B." in name]
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ups)
    way = sum(float(theirs[name].double().square().sum()) for name in ups)
    series = {
        name: max(abs(a - b) / abs(b) for a, b in zip(found[name], one[name], strict=True))
        for name in ("losses", "norms")
    }
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return {"factors": (apart / way) ** 0.5, "largest": largest, **series}


def faults(kind: str, found: dict[str, Any], allowed: dict[str, float], processes: int) -> list[str]:
    """What is wrong with a kind's training."""
    if "failed" in found:
        return [f"{kind}: {found['failed']}"]
    wrong = [
        f"{name} {found['apart'][name]:.2e} from one process's, {allowed[name]:.2e} expected"
        for name in allowed
        if not found["apart"][name] <= allowed[name]
    ]
    if found["zeros"]["total_violations"]:
        wrong.append(f"{found['zeros']['total_violations']} non-zeros off the masks after the merge")
    if len({one["ranks"]["sha256"] for one in found["processes"]}) != 1:
        wrong.append("the processes computed with different ranks")
    if any(len(one["ranks"]["different"]) < 2 for one in found["processes"]):
        wrong.append("only one rank was ever drawn")
    expected = processes if kind in KINDS else 1
    if found["of"] != expected or len(found["processes"]) != expected:
        wrong.append(f"{found['of']} processes trained, {expected} were launched")
    return [f"{kind}: {one}" for one in wrong]


def row(kind: str, found: dict[str, Any]) -> dict[str, str]:
    if "failed" in found:
        return {name: kind if name == "kind" else "failed" for name in COLUMNS}
    pace = statistics.median(b - a for a, b in zip(found["times"][1:], found["times"][2:], strict=False))
    apart, ranks = found["apart"], {one["ranks"]["sha256"] for one in found["processes"]}
    cells = [kind, f"{found['losses'][-1]:.4f}", f"{apart['losses']:.1e}", f"{apart['norms']:.1e}"]
    cells += [f"{apart['factors']:.1e}", f"{apart['largest']:.1e}"]
    cells += ["no" if found["zeros"]["total_violations"] else "yes", "yes" if len(ranks) == 1 else "NO"]
    cells += [f"{found['tokens'] / pace:,.0f}"]
    cells += [" ".join(f"{one['peak_bytes'] / 2**30:.2f}" for one in found["processes"]), f"{found['wall']:.0f}"]
    return dict(zip(COLUMNS, cells, strict=True))


COLUMNS = ["kind", "loss", "Δ losses", "Δ norms", "Δ B", "largest Δ", "zeros kept", "same ranks"]
COLUMNS += ["tokens/s", "peak GiB", "wall s"]


def measure(given: argparse.Namespace, place: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Train all kinds; what they did, and what is wrong."""
    tiny = given.device == "cpu"
    layers, width = given.layers or (2 if tiny else 16), given.width or (128 if tiny else 2048)
    length, micro = given.length or (32 if tiny else 512), given.micro_batch
    batch = 2 * micro * given.processes
    weights = make_model(place / "model", layers, width, "cpu" if tiny else "cuda", length, 4 * batch)
    if not tiny:
        torch.cuda.empty_cache()
    step = f"{batch} examples of {length} tokens, {micro} at once"
    print(
        f"{weights / 1e9:.3f}B weights in bfloat16, {layers} layers of width {width}, {SPARSITY:.0%} masks; {step}",
        flush=True,
    )
    settings: dict[str, Any] = {"ranks": [32, 24, 16], "scale": SCALE, "max_steps": given.steps, "batch_size": batch}
    settings |= {"max_length": length, "log_every": 1, "trackers": [], "checkpoint_every": max(1, given.steps // 2)}

    def start(kind: str, gpu: int | None = None) -> Child:
        more = {"micro_batch_size": 2 * micro if kind == OTHER else micro}
        more |= {"gradient_checkpointing": kind == "fsdp_recomputing"}
        return Child(kind, place, given, settings | more, gpu)

    both = not tiny and torch.cuda.device_count() > 1  # each on a GPU of its own
    first = start(ONE, 0 if not tiny else None)
    second = start(OTHER, 1) if both else None
    found = {ONE: first.wait()}
    found[OTHER] = (second or start(OTHER, 0 if not tiny else None)).wait()
    for kind in given.kinds:
        found[kind] = start(kind).wait()
    if "failed" in found[ONE] or "failed" in found[OTHER]:
        return found, [f"{kind}: {one['failed']}" for kind, one in found.items() if "failed" in one]
    for one in found.values():
        if "failed" not in one:
            one["apart"] = distances(one, found[ONE])
    rounding = found[OTHER]["apart"]
    allowed = {name: max(TIMES_AS_FAR * rounding[name], floor) for name, floor in FLOOR.items()}
    wrong = [fault for kind in (ONE, *given.kinds) for fault in faults(kind, found[kind], allowed, given.processes)]
    names = {"factors": "B", "losses": "losses", "norms": "gradient norms"}
    print("allowed, relative:", ", ".join(f"{names[name]} {value:.1e}" for name, value in allowed.items()))
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: one process and DDP, tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="all unless given; on a CPU ddp alone")
    parser.add_argument("--layers", type=int, help="16 unless given; 2 on a CPU")
    parser.add_argument("--width", type=int, help="2048 unless given; 128 on a CPU")
    parser.add_argument("--length", type=int, help="tokens of an example; 512 unless given, 32 on a CPU")
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="examples on a device at once; a step has two a process"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds until a process counts as hanging")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < given.processes:
        raise PhoenixError(
            f"several_gpus: {torch.cuda.device_count()} GPUs are here and {given.processes} are asked for"
        )
    if given.device == "cpu" and set(given.kinds or ()) - {"ddp"}:
        raise PhoenixError("several_gpus: accelerate shards on GPUs only; on a CPU give --kinds ddp")
    given.kinds = given.kinds or (["ddp"] if given.device == "cpu" else list(KINDS))
    with TemporaryDirectory() as place:
        found, wrong = measure(given, Path(place))
    print_table([row(KINDS.get(kind, kind), one) for kind, one in found.items() if "apart" in one or "failed" in one])
    print(*(f"FAILED {fault}" for fault in wrong), sep="\n")
    if given.json:
        results = {
            kind: {name: value for name, value in one.items() if name != "factors"} for kind, one in found.items()
        }
        write_json(given.json, facts(torch.device(given.device), torch.bfloat16) | {"kinds": results, "wrong": wrong})
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

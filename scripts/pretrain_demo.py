"""Pre-train the demo's model on text that the package generates: one GPU and five minutes, or a CPU and patience.

    PYTHONPATH=src python scripts/pretrain_demo.py --out model --seconds 330

Writes a Hugging Face directory (float32 safetensors, tokenizer) with `training_log.jsonl` in it. Text, order of rows
and initial weights follow from the seed; with `--seconds` the number of steps follows from the machine.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from phoenix_sparse.demo.language import documents
from phoenix_sparse.demo.tokenizer import CONTEXT, END, train_tokenizer
from phoenix_sparse.models import save_model

SHARD = 2_000_000  # tokens made by one call of a worker

_tokenizer: Any = None


def _start_worker(serialized: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_str(serialized)


def _make_shard(job: tuple[str, int]) -> np.ndarray:
    """Tokenize the documents of a key until there are enough: each ends with END. Gives [tokens] int16."""
    key, size = job
    end, texts = _tokenizer.token_to_id(END), documents(key)
    tokens: list[int] = []
    while len(tokens) < size:
        for encoding in _tokenizer.encode_batch([next(texts) for _ in range(2000)]):
            tokens += encoding.ids
            tokens.append(end)
    return np.array(tokens[:size], dtype=np.int16)


def make_rows(tokenizer: Any, name: str, tokens: int, workers: int) -> torch.Tensor:
    """Make packed rows of text: [rows, CONTEXT] int16. The result doesn't depend on the number of workers."""
    jobs = [(f"{name} {start}", min(SHARD, tokens - start)) for start in range(0, tokens, SHARD)]
    serialized = tokenizer.backend_tokenizer.to_str()
    # Processes are spawned, not forked: the parent has threads of torch and of the tokenizer.
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (serialized,)) as pool:
        flat = np.concatenate(pool.map(_make_shard, jobs, chunksize=1))
    rows = len(flat) // CONTEXT
    return torch.from_numpy(flat[: rows * CONTEXT].reshape(rows, CONTEXT))


def make_model(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=arguments.hidden,
        intermediate_size=-(-arguments.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 96,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(config)


def batches(rows: torch.Tensor, size: int, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Endless batches, [size, CONTEXT] int64, in a new order each epoch."""
    if len(rows) < size:
        raise SystemExit(f"--tokens makes {len(rows)} rows, fewer than the batch of {size}; ask for more tokens")
    rows, generator = rows.to(device), torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(device)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]].long()


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(input_ids=batch, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def make_optimizer(model: Any, rate: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays the linears only: neither norms nor the embedding, which is also the output layer."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim == 2 and "embed" not in name].append(parameter)
    decayed = [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(decayed, lr=rate, betas=(0.9, 0.95), fused=fused)


def train(model: Any, stream: Iterator[torch.Tensor], arguments: argparse.Namespace, log: Path, started: float) -> None:
    """Train until the steps or the seconds since `started` are used up; the learning rate falls to zero with them."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, arguments.lr, fused=device.type == "cuda")
    forward = torch.compile(model) if arguments.compile else model
    begun, tokens, done, step = time.monotonic(), 0, 0.0, 0
    with log.open("w", encoding="utf-8") as stream_out:
        while done < 1.0:
            warm = min(1.0, (step + 1) / arguments.warmup)
            rate = arguments.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(stream)
            loss = loss_of(forward, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + batch.numel()
            if step % arguments.log_every == 0:
                # Reading the loss waits for the GPU, so that the clock below is right.
                entry = {"step": step, "loss": round(loss.item(), 5), "lr": rate, "tokens": tokens}
                entry["seconds"] = round(time.monotonic() - started, 2)
                print(json.dumps(entry), file=stream_out, flush=True)
                print(json.dumps(entry), flush=True)
            now = time.monotonic()
            done = max(step / arguments.steps, (now - begun) / max(arguments.seconds - (begun - started), 1e-9))


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor, size: int) -> float:
    device = next(model.parameters()).device
    losses = [loss_of(model, part.to(device).long()).item() * len(part) for part in rows.split(size)]
    return sum(losses) / len(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--seconds", type=float, default=330, help="time limit, the making of the text counted in")
    parser.add_argument(
        "--steps", type=int, default=1_000_000, help="number of steps, where the time doesn't end first"
    )
    parser.add_argument("--batch", type=int, default=256, help=f"rows of {CONTEXT} tokens in a step")
    parser.add_argument("--tokens", type=int, default=300_000_000, help="tokens of text to make; used again when spent")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps over which the learning rate rises")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, a multiple of 96")
    parser.add_argument("--layers", type=int, default=5, help="decoder blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="compile the model: faster on a GPU, a minute to start")
    return parser.parse_args()


def main() -> None:
    arguments, started = parse(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(arguments.seed)
    train_rows = make_rows(tokenizer, f"train {arguments.seed}", arguments.tokens, arguments.workers)
    test_rows = make_rows(tokenizer, f"held out {arguments.seed}", min(arguments.tokens // 20, 500_000), 1)
    model = make_model(tokenizer, arguments).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters, {train_rows.numel()} tokens of text after {time.monotonic() - started:.0f} s, {device}")
    log = arguments.out.with_name(arguments.out.name + ".log.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    train(model, batches(train_rows, arguments.batch, arguments.seed, device), arguments, log, started)
    model.eval()
    loss = held_out_loss(model, test_rows, arguments.batch)
    save_model(model, tokenizer, arguments.out)
    log.rename(arguments.out / "training_log.jsonl")
    with (arguments.out / "training_log.jsonl").open("a", encoding="utf-8") as stream:
        print(json.dumps({"held_out_loss": loss, "held_out_tokens": test_rows.numel()}), file=stream)
    print(f"held-out loss {loss:.4f} nats a token over {test_rows.numel()} tokens; written to {arguments.out}")


if __name__ == "__main__":
    main()

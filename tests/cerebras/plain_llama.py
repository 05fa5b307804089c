"""Started in the environment with cerebras_pytorch: a small Llama in plain torch, trained 20 steps under its masks.

    python plain_llama.py CPU|CSX weights.npz groups.json OUT

The weights have ModelZoo's names and rotary layout, which this model, written down independently, reads as they are.
With CPU it writes logits.npz (before training), losses.json and checkpoint_20.mdl; with CSX it stops where a system
would begin, and has written the CIRH.
"""

import json
import math
import os
import sys
from pathlib import Path

import cerebras.pytorch as cstorch
import numpy as np
import torch
from torch import nn
from torch.nn import functional

HEADS, KEY_HEADS, EPSILON, THETA, STEPS, BATCH, LENGTH = 4, 2, 1e-6, 10000.0, 20, 4, 16


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * self.weight


def rotated(x):
    """Rotate pairs (2i, 2i + 1) of each head's dimensions by the position's angle; x is (batch, heads, length, d)."""
    size, length = x.shape[-1], x.shape[-2]
    angles = torch.arange(length, dtype=torch.float32)[:, None] * THETA ** (
        -torch.arange(0, size, 2, dtype=torch.float32) / size
    )
    cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        keys = size // HEADS * KEY_HEADS
        self.proj_q_dense_layer = nn.Linear(size, size, bias=False)
        self.proj_k_dense_layer = nn.Linear(size, keys, bias=False)
        self.proj_v_dense_layer = nn.Linear(size, keys, bias=False)
        self.proj_output_dense_layer = nn.Linear(size, size, bias=False)

    def forward(self, x):
        batch, length, size = x.shape
        d = size // HEADS
        q = self.proj_q_dense_layer(x).view(batch, length, HEADS, d).transpose(1, 2)
        k = self.proj_k_dense_layer(x).view(batch, length, KEY_HEADS, d).transpose(1, 2)
        v = self.proj_v_dense_layer(x).view(batch, length, KEY_HEADS, d).transpose(1, 2)
        group = HEADS // KEY_HEADS
        k = rotated(k)[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, HEADS, length, d)
        v = v[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, HEADS, length, d)
        scores = rotated(q) @ k.transpose(-1, -2) / math.sqrt(d)
        hidden = torch.ones(length, length).triu(1).to(x.device) * -1e9
        mixed = torch.softmax(scores + hidden, -1) @ v
        return self.proj_output_dense_layer(mixed.transpose(1, 2).reshape(batch, length, size))


class Up(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.linear_layer = nn.Linear(size, inner, bias=False)
        self.linear_layer_for_glu = nn.Linear(size, inner, bias=False)

    def forward(self, x):
        return functional.silu(self.linear_layer_for_glu(x)) * self.linear_layer(x)


class Down(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.linear_layer = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.linear_layer(x)


class Feed(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.ffn = nn.ModuleList([Up(size, inner), Down(size, inner)])

    def forward(self, x):
        return self.ffn[1](self.ffn[0](x))


class Block(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.norm1, self.norm3 = Norm(size), Norm(size)
        self.self_attn, self.ffn = Attention(size), Feed(size, inner)

    def forward(self, x):
        x = x + self.self_attn(self.norm1(x))
        return x + self.ffn(self.norm3(x))


class Decoder(nn.Module):
    def __init__(self, size, inner, count):
        super().__init__()
        self.layers = nn.ModuleList([Block(size, inner) for _ in range(count)])
        self.norm = Norm(size)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Embedding(nn.Module):
    def __init__(self, words, size):
        super().__init__()
        self.word_embeddings = nn.Embedding(words, size)

    def forward(self, ids):
        return self.word_embeddings(ids)


class Llama(nn.Module):
    def __init__(self, words, size, inner, count):
        super().__init__()
        self.embedding_layer = Embedding(words, size)
        self.transformer_decoder = Decoder(size, inner, count)
        self.lm_head = nn.Linear(size, words, bias=False)

    def forward(self, ids):
        return self.lm_head(self.transformer_decoder(self.embedding_layer(ids)))


def batches():
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, LENGTH + 1)))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data[:, :-1].int(), data[:, 1:].long()), batch_size=BATCH, drop_last=True
    )


def main(backend_type, weights, groups, out):
    out.mkdir(parents=True, exist_ok=True)
    with np.load(weights) as loaded:
        tensors = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    inner = tensors["transformer_decoder.layers.0.ffn.ffn.0.linear_layer.weight"].shape[0]
    words, size = tensors["lm_head.weight"].shape
    count = sum(name.endswith("norm1.weight") for name in tensors)
    os.chdir(out)
    csx = backend_type == "CSX"
    backend = cstorch.backend("CSX", compile_only=True) if csx else cstorch.backend("CPU")
    with backend.device:
        model = Llama(words, size, inner, count)
    if not csx:
        model.load_state_dict(tensors)
        ids = torch.arange(LENGTH)[None] * 7 % 251
        with torch.no_grad():
            np.savez("logits.npz", ids=ids.numpy(), logits=model(ids).numpy())
    compiled = cstorch.compile(model, backend)
    sparsity = cstorch.sparse.configure(json.loads(groups.read_text()))
    model.apply(sparsity)
    optimizer = cstorch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.apply(sparsity)
    losses = []

    @cstorch.trace
    def step(batch):
        ids, labels = batch
        logits = compiled(ids)
        loss = functional.cross_entropy(logits.view(-1, words), labels.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    @cstorch.step_closure
    def keep(loss):
        losses.append(float(loss))

    executor = cstorch.utils.data.DataExecutor(cstorch.utils.data.DataLoader(batches), num_steps=STEPS)
    for batch in executor:
        keep(step(batch))
    cstorch.save({"model": model.state_dict()}, f"checkpoint_{STEPS}.mdl")
    Path("losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument).absolute() for argument in sys.argv[2:]))

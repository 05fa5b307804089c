"""The README of an export: what lies there, and the commands."""

from typing import Any

from phoenix_sparse.cerebras.layout import CALLBACK, CHECKPOINT, PARAMS, RECORD, RUNNER

MODES = {
    "static": "Every weight trains; the pruned ones stay zero (static sparsity).",
    "sparse_lora": "A LoRA trains through the mask of each pruned weight; everything else is frozen.",
}


def readme(record: dict[str, Any]) -> str:
    """Write it from the record of an export."""
    shares = sorted(set(record["weights"].values()))
    spread = f"{shares[0]:.4f}" if len(shares) == 1 else f"{shares[0]:.4f} to {shares[-1]:.4f}"
    counts = record["examples"]
    kind, count, length = record["shape"]["kind"], len(record["weights"]), record["length"]
    versions = f"`cerebras_pytorch` {record['cerebras_pytorch']} and ModelZoo {record['modelzoo']}"
    return f"""# A Phoenix model for a Cerebras system

A pruned {kind} with {count} sparse weights (shares of zeros: {spread}), in {len(shares)} groups.
{MODES[record["mode"]]}

| file | what |
|---|---|
| `{CHECKPOINT}` | the pruned model, converted by `cszoo checkpoint convert` and compared with its source |
| `{PARAMS}` | the Trainer's YAML: training (`fit`) and evaluation (`validate`) |
| `data/` | {counts["train"]} examples to train on, {counts["validation"]} to validate: (N, 3, {length}) int32 |
| `{RUNNER}`, `{CALLBACK}` | the runner, and the callbacks that it registers (`cszoo fit` doesn't) |
| `{RECORD}` | what Phoenix needs to take the result back |

Run these here, in the environment with {versions}:

```
python {RUNNER} train {PARAMS} --compile-only      # compile for the system, run nothing
python {RUNNER} train {PARAMS}                     # train on the CS-3; checkpoints in model_dir/
python {RUNNER} eval {PARAMS} --checkpoint model_dir/checkpoint_{record["settings"]["steps"]}.mdl
```

`--device CPU` runs a small model without a system. Then, where Phoenix is:

```
phx cerebras import THIS_DIRECTORY --run RUN --out DIRECTORY
```
"""

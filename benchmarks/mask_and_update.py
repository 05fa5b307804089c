"""Why do two prunings tune differently? The mask and the weights of SparseGPT and Wanda, crossed, on the bundled demo.

    PYTHONPATH=src python benchmarks/mask_and_update.py --out FOLDER [--sparsity 0.6] [--part wanda sparsegpt ...] \
        [--seed 0 1 2] [--damp 0.01] [--set finetune.epochs=2 ...]

Each part is pruned block by block as `phx run` does, tuned by recipes/demo.yaml and evaluated on its 300 test problems
at the median rank, without a search. `results.json` is written after every run; a call made again leaves out what
stands there. The first part is what the others are compared with, paired by seed. Two standard errors: over the seeds,
for these problems; and over the 18 templates that the problems are drawn from, for problems of other templates, since
a model gets nearly all or nearly none of a template's right.

`untuned` and `tuned` are the mean loss of a completion's token on the test problems before and after the training;
`error` is ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the validation problems, X the inputs of the dense model, a mean over all linears.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from measuring import facts, print_table
from torch import Tensor

from phoenix_sparse import demo, steps
from phoenix_sparse.demo.task import make_problems
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation import harness
from phoenix_sparse.files import read_json, write_json
from phoenix_sparse.finetuning import adapter as adapters
from phoenix_sparse.finetuning.batching import Row
from phoenix_sparse.finetuning.elastic import middle, spaces
from phoenix_sparse.finetuning.examples import PadRight, tokenize
from phoenix_sparse.finetuning.memory import AtOnce
from phoenix_sparse.finetuning.stopping import validation_loss
from phoenix_sparse.jsonl import read_jsonl
from phoenix_sparse.models import find_device, linears, prunable_linears, save_model
from phoenix_sparse.pipeline import prepare
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.importance import wanda_importance
from phoenix_sparse.pruning.observing import Observer, observing
from phoenix_sparse.pruning.reconstruction.alps import alps
from phoenix_sparse.pruning.reconstruction.gram import relative_error
from phoenix_sparse.pruning.reconstruction.sparsegpt import inverse_factor, sparsegpt
from phoenix_sparse.pruning.selection import keep
from phoenix_sparse.recipe import Recipe, load_recipe
from phoenix_sparse.steps.machine import Machine
from phoenix_sparse.tasks.definition import load_definition
from phoenix_sparse.tasks.loading import render

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
Pruned = tuple[Tensor, Tensor]  # the new weight and the mask, (out, in) each
Part = Callable[[Tensor, Observer, float, float], Pruned]  # of weight, observer, sparsity, damping


def _gram(observer: Observer) -> Tensor:
    assert observer.gram is not None
    return observer.gram.matrix


def _wanda(weight: Tensor, observer: Observer, sparsity: float, group: Any = "row") -> Tensor:
    return keep(wanda_importance(weight, observer.norms.norm), sparsity, group)


def _plain(weight: Tensor, mask: Tensor) -> Pruned:
    return weight * mask, mask


def _updated(weight: Tensor, mask: Tensor, observer: Observer, damp: float) -> Pruned:
    """SparseGPT's update of the weights (arXiv 2301.00774, eq. 3) for a mask that is given."""
    factor, values = inverse_factor(_gram(observer), damp), weight.t().clone()
    for column, row in enumerate(factor):
        errors = values[column] * ~mask[:, column] / row[column]
        values[column + 1 :].addr_(row[column + 1 :], errors, alpha=-1)
    return _plain(values.t(), mask)


def _by_row(weight: Tensor, observer: Observer, sparsity: float, damp: float) -> Tensor:
    """SparseGPT's scores, the weights of a row competing with each other over all columns."""
    return keep((weight / inverse_factor(_gram(observer), damp).diagonal()).square(), sparsity, "row")


PARTS: dict[str, Part] = {
    "wanda": lambda w, seen, share, _: _plain(w, _wanda(w, seen, share)),
    "sparsegpt": lambda w, seen, share, damp: sparsegpt(w, _gram(seen), share, damp=damp),
    "sparsegpt-mask": lambda w, seen, share, damp: _plain(w, sparsegpt(w, _gram(seen), share, damp=damp)[1]),
    "wanda-mask-updated": lambda w, seen, share, damp: _updated(w, _wanda(w, seen, share), seen, damp),
    "sparsegpt-by-row": lambda w, seen, share, damp: _updated(w, _by_row(w, seen, share, damp), seen, damp),
    "wanda-by-layer": lambda w, seen, share, _: _plain(w, _wanda(w, seen, share, "layer")),
    "alps": lambda w, seen, share, damp: alps(w, _gram(seen), share, damp=damp),
}


@torch.no_grad()
def prune(blocks: Blocks, part: Part, tokens: Tensor, sparsity: float, damp: float) -> dict[str, Tensor]:
    """In place, block by block, the pruned blocks' outputs passed on; gives the masks."""
    hidden = [blocks.embed(row[None]) for row in tokens]
    masks: dict[str, Tensor] = {}
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block:
            layers = linears(block, name)
            with observing(layers, gram=True) as observers:
                for state in hidden:
                    blocks.run(index, block, state)
            for layer, module in layers.items():
                weight, masks[layer] = part(module.weight.detach(), observers[layer], sparsity, damp)
                module.weight.copy_(weight)
            hidden = [blocks.run(index, block, state) for state in hidden]
    return masks


@torch.no_grad()
def unseen_error(dense: Any, pruned: Any, rows: Iterable[Row]) -> float:
    """The mean relative error of all linears on the dense model's inputs for rows that nothing was pruned by."""
    layers = prunable_linears(dense)
    with observing(layers, gram=True) as observers:
        for row in rows:
            dense(torch.tensor([row["input_ids"]]), use_cache=False)
    return statistics.fmean(
        relative_error(layer.weight, pruned.get_submodule(name).weight, _gram(observers[name]))
        for name, layer in layers.items()
    )


def one(recipe: Recipe, part: str, sparsity: float, damp: float) -> dict[str, Any]:
    """Prune, tune and evaluate."""
    source, task = prepare(recipe)
    machine = Machine(recipe.dtype, recipe.device, recipe.seed)
    (dense, tokenizer), model = machine.open(source), machine.load(source)
    bundled = demo.task_directory()
    examples = render(load_definition(str(bundled)), read_jsonl(bundled / "test.jsonl"))
    problems = tokenize(examples, tokenizer, recipe.finetune.max_length)
    collate, at_once = PadRight(tokenizer.pad_token_id), AtOnce(recipe.evaluate.batch_size)
    tokens = steps.calibrate(source, task, recipe.sparsify, tokenizer, machine).tokens
    masks = prune(Blocks(model), PARTS[part], tokens, sparsity, damp)
    row = {
        "error": unseen_error(dense, model, tokenize(task.validation, tokenizer, recipe.finetune.max_length)),
        "untuned": validation_loss(model, problems, collate, at_once, step=0),
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_model(model, tokenizer, work / "sparse")
        steps.tune(work / "sparse", masks, task, recipe.finetune, work, machine, work=work / "work")
        adapted = adapters.load_adapter(machine.load(work / "sparse"), work / "adapter/super", masks)
        adapters.set_ranks(adapted, middle(spaces(list(adapters.elastic_layers(adapted)), recipe.finetune.ranks)))
    with adapters.written_out(adapted):
        row["tuned"] = validation_loss(adapted, problems, collate, at_once, step=0)
        found = harness.evaluate(
            adapted,
            tokenizer,
            task,
            split="test",
            batch_size=recipe.evaluate.batch_size,
            seed=recipe.seed,
            with_predictions=True,
        )
    return row | {"scores": [prediction["score"] for prediction in found["predictions"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS)[:4], metavar="NAME", help=", ".join(PARTS)
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--damp", type=float, default=0.01, help="share of the mean diagonal")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    args = parser.parse_args()
    kept = args.out / "results.json"
    record: dict[str, Any] = read_json(kept) if kept.is_file() else {"rows": []}
    words = {"sparsity": args.sparsity, "damp": args.damp, "set": args.set}
    for seed in args.seed:
        for part in args.part:
            what = {"part": part, "seed": seed, **words}
            if any(row.items() >= what.items() for row in record["rows"]):
                continue
            recipe = load_recipe(RECIPE, [f"sparsify.sparsity={args.sparsity}", f"seed={seed}", *args.set])
            record["rows"].append(what | one(recipe, part, args.sparsity, args.damp))
            record["facts"] = facts(find_device(recipe.device), torch.float32)
            write_json(kept, record)
    table([row for row in record["rows"] if row.items() >= words.items()], args.part, args.seed)


def table(rows: list[dict[str, Any]], parts: list[str], seeds: list[int]) -> None:
    """One line a part: accuracies, and the difference from the first part with its two standard errors."""
    found = {(row["part"], row["seed"]): row for row in rows}
    lines = []
    for part in parts:
        here, first = [found[part, seed] for seed in seeds], [found[parts[0], seed] for seed in seeds]
        gains = [
            [100 * (a - b) for a, b in zip(one["scores"], other["scores"], strict=True)]
            for one, other in zip(here, first, strict=True)
        ]
        mean, over_seeds, over_templates = spread(gains)
        lines.append(
            {
                "part": part,
                "accuracy": " ".join(f"{100 * statistics.fmean(row['scores']):.1f}" for row in here),
                "difference": f"{mean:+.1f}",
                "± seeds": f"{over_seeds:.1f}",
                "± templates": f"{over_templates:.1f}",
            }
            | {key: f"{statistics.fmean(row[key] for row in here):.4f}" for key in ("error", "untuned", "tuned")}
        )
    print_table(lines)


def spread(gains: list[list[float]]) -> tuple[float, float, float]:
    """The mean of a difference, its standard error over seeds, and over templates.

    Args:
        gains: [seeds][problems].
    """
    means = [statistics.fmean(one) for one in gains]
    mean = statistics.fmean(means)
    over_seeds = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    left: dict[str, float] = {}
    for problem, each in zip(make_problems()["test"], zip(*gains, strict=True), strict=True):
        left[problem.template] = left.get(problem.template, 0) + statistics.fmean(each) - mean
    clusters = len(left)
    variance = clusters / (clusters - 1) * sum(value**2 for value in left.values())
    return mean, over_seeds, math.sqrt(variance) / len(gains[0])


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        sys.exit(f"mask_and_update: {error}")

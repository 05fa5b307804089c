"""What closes the gap between a sparse model with adapters and a dense one: every way of fine-tuning, side by side.

    PYTHONPATH=src python benchmarks/closing_the_gap.py --model DIR --task gsm8k --data FOLDER --out FOLDER \
        [--sparsity 0.5 0.6 0.7 0.8] [--method lora full ...] [--seed 0 1 2] [--jobs 4] [--set finetune.epochs=3 ...]

Every cell is a `phx run` of its own, in a process of its own whose words go to a file beside it. The dense LoRA of a
seed is trained once, beside the plain adapter at the first sparsity, and teaches all cells of that seed.
`results.json` is written after every run. A call that was killed, or that failed in part, is made again: finished
cells are taken from there, others go on where they stopped. Accuracies are those of the test split; their standard
errors are those over the seeds (with one seed, over the examples).
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from measuring import facts

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, write_json, write_text
from phoenix_sparse.models import choose_dtype, find_device, load_config
from phoenix_sparse.recipe import Recipe, check, dump_recipe, override

TEACHER = "dense LoRA"  # the run that the dense baselines come from
LOGITS, HIDDEN = {"logits": 1.0, "hidden": 0.0}, {"logits": 0.0, "hidden": 1.0}
BOTH = {"logits": 1.0, "hidden": 1.0}
ELASTIC = {"ranks": [32, 24, 16]}  # the median sub-adapter unless a search picks another
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "elastic": ELASTIC,
    "elastic+search": ELASTIC | {"search": {"bounds": True, "hill_climb": 8}},
    "lora+logits": {"distill": LOGITS},
    "lora+hidden": {"distill": HIDDEN},
    "lora+both": {"distill": BOTH},
    "lora+evolve": {"evolve": {}},
    "lora+logits+evolve": {"distill": LOGITS, "evolve": {}},
    "lora+both+evolve": {"distill": BOTH, "evolve": {}},
    "hira": {"method": "hira"},
    "dense_remasked": {"mode": "sparse_to_dense", "dense_merge": "remask"},
    "full": {"method": "full"},
    "full+logits": {"method": "full", "distill": LOGITS},
    "full+hidden": {"method": "full", "distill": HIDDEN},
    "full+both": {"method": "full", "distill": BOTH},
    "full+evolve": {"method": "full", "evolve": {}},
    "full+logits+evolve": {"method": "full", "distill": LOGITS, "evolve": {}},
    "full+both+evolve": {"method": "full", "distill": BOTH, "evolve": {}},
}
Cell = tuple[str, float, int]  # method, sparsity, seed
Row = dict[str, Any]


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    record: dict[str, Any] = read_json(path) if path.is_file() else {"rows": []}
    config, device = load_config(args.model), find_device("auto")
    record["facts"] = facts(device, choose_dtype(config, "auto", device)) | {"set": args.set, "model": args.model.name}
    rows: dict[Cell, Row] = {(row["method"], row["sparsity"], row["seed"]): row for row in record["rows"]}
    first = [(TEACHER, args.sparsity[0], seed) for seed in args.seed]
    cells = [(method, sparsity, seed) for seed in args.seed for sparsity in args.sparsity for method in args.method]
    recipes = {cell: recipe_of(args, cell) for cell in (*first, *cells)}  # what is wrong with them is told now
    failed = 0
    for phase in (first, cells):  # the teachers have to be there before what learns from them
        left = {
            cell: recipes[cell]
            for cell in phase
            if rows.get(cell, {}).get("recipe") != recipes[cell].model_dump(mode="json") or not _is_there(args, cell)
        }
        say(f"{len(phase) - len(left)} of {len(phase)} runs are done already")
        with ThreadPoolExecutor(args.jobs) as pool:
            running = {pool.submit(run, args, cell, recipe): cell for cell, recipe in left.items()}
            for future in as_completed(running):
                cell, row = running[future], future.result()
                if "error" in row:
                    failed += 1
                    say(f"FAILED {name_of(cell)}: {row['error']}")
                    continue
                rows[cell] = row
                record["rows"] = list(rows.values())
                write_json(path, record)
                say(f"{name_of(cell)}: {row['accuracy']:.4f} ± {row['stderr']:.4f} ({row['seconds']:.0f} s)")
        if failed and phase is first:
            raise PhoenixError("a teacher's run failed; see its .log, and call this again")
    record["table"] = list(table(rows.values(), args.method, args.sparsity))
    write_json(path, record)
    print_table(record["table"])
    sys.exit(1 if failed else 0)


def recipe_of(args: argparse.Namespace, cell: Cell) -> Recipe:
    """The recipe of a cell; the same but for what the method changes."""
    method, sparsity, seed = cell
    changes = {**METHODS.get(method, {})}
    search = changes.pop("search", {})
    full = changes.get("method") == "full"
    finetune = {"ranks": [32], "learning_rate": args.full_learning_rate if full else args.learning_rate}
    if "distill" in changes:
        teacher = args.out / name_of((TEACHER, args.sparsity[0], seed)) / "baselines" / "dense_lora" / "merged"
        changes["distill"] = {"teacher": str(teacher)} | changes["distill"]
    task = {"name": args.task} | ({"data": str(args.data)} if args.data is not None else {})
    values = {
        "name": name_of(cell),
        "model": str(args.model),
        "task": task,
        "seed": seed,
        "sparsify": {"sparsity": sparsity, "importance": "wanda"},
        "finetune": finetune,
        "evaluate": {"baselines": ["dense", "dense_lora", "pruned"] if method == TEACHER else ["pruned"]},
    }
    values = override(values, args.set)
    values["search"] = values.get("search", {}) | search
    for section, given in changes.items():  # evolve and distill keep what --set says of them
        inner = values["finetune"].get(section)
        values["finetune"][section] = {**given, **(inner or {})} if isinstance(given, Mapping) else given
    for section in ("distill", "evolve"):
        if section not in changes:
            values["finetune"].pop(section, None)
    return check(Recipe, values, name_of(cell))


def run(args: argparse.Namespace, cell: Cell, recipe: Recipe) -> Row:
    """Do a cell, or go on with it, and read what came out."""
    started = time.time()
    out = args.out / name_of(home_of(args, cell))
    if out == args.out / name_of(cell):
        error = _run_to_its_end(out, recipe)
        if error is not None:
            return {"error": error}
    method, sparsity, seed = cell
    tune, certificate = read_json(out / "tune.json"), read_json(out / "certificate.json")
    baselines = {name: out / "baselines" / name for name in sorted(recipe.evaluate.baselines)}
    row: Row = {
        **{"method": method, "sparsity": sparsity, "seed": seed, "recipe": recipe.model_dump(mode="json")},
        **accuracy_in(baselines["dense_lora"] if method == TEACHER else out),
        "baselines": {name: accuracy_in(path) for name, path in baselines.items()},
        "seconds": time.time() - started,
        "training_seconds": tune["seconds"],
        "peak_memory_bytes": tune["peak_memory_bytes"],
        "steps": tune["steps"],
        "last_loss": tune["log"][-1]["loss"] if tune["log"] else None,
        "off_mask_nonzeros": certificate["off_mask_nonzeros"],
        "merged_sparsity": certificate["sparsity"],
    }
    if args.light:
        for name in ("sparse", "merged", "adapter"):
            shutil.rmtree(out / name, ignore_errors=True)
    return row


def home_of(args: argparse.Namespace, cell: Cell) -> Cell:
    """The cell whose run a cell is read from: its own, but the first plain adapter of a seed is its teacher's run's.

    Their recipes differ in the baselines alone, of which the teacher's has more.
    """
    method, sparsity, seed = cell
    return (TEACHER, sparsity, seed) if method == "lora" and sparsity == args.sparsity[0] else cell


def _run_to_its_end(out: Path, recipe: Recipe) -> str | None:
    """`phx run`, or the rest of it; what went wrong, if it did."""
    beside = {kind: out.with_name(f"{out.name}.{kind}") for kind in ("yaml", "log")}
    if (out / "recipe.yaml").is_file():
        before = yaml.safe_load((out / "recipe.yaml").read_text())
        if before != recipe.model_dump(mode="json"):
            shutil.rmtree(out)  # of other settings
    write_text(beside["yaml"], dump_recipe(recipe))
    command = [sys.executable, "-m", "phoenix_sparse.cli", "run", str(beside["yaml"]), "--out", str(out)]
    with beside["log"].open("a") as log:
        code = subprocess.run([*command, "--resume"], stdout=log, stderr=log, check=False).returncode
    if code == 0:
        return None
    words = beside["log"].read_text(errors="replace").strip().splitlines()
    return f"status {code}: {words[-1] if words else ''}"


def accuracy_in(directory: Path) -> dict[str, float]:
    found = read_json(directory / "eval.json")["phoenix"]
    return {"accuracy": found["accuracy"], "stderr": found["stderr"] or 0.0}


def table(rows: Iterable[Row], methods: list[str], sparsities: list[float]) -> Iterator[Row]:
    """Means over the seeds, the baselines first; differences are to the plain adapter with the same seeds."""
    rows = list(rows)
    of_seed = [row["baselines"] for row in rows if row["method"] == TEACHER]
    for name in ("dense", "dense_lora"):
        yield {"sparsity": 0.0, "method": name, **mean([found[name] for found in of_seed if name in found])}
    for sparsity in sparsities:
        here = [row for row in rows if row["sparsity"] == sparsity]
        pruned = {row["seed"]: row["baselines"]["pruned"] for row in here if "pruned" in row["baselines"]}
        yield {"sparsity": sparsity, "method": "pruned, untuned", **mean(list(pruned.values()))}
        plain = {row["seed"]: row["accuracy"] for row in here if row["method"] == "lora"}
        for method in methods:
            mine = [row for row in here if row["method"] == method]
            both = [row["accuracy"] - plain[row["seed"]] for row in mine if row["seed"] in plain]
            seconds = statistics.mean(row["training_seconds"] for row in mine) if mine else None
            difference = {} if method == "lora" or not both else {"to_lora": statistics.mean(both)}
            if difference and len(both) > 1:
                difference["to_lora_stderr"] = statistics.stdev(both) / len(both) ** 0.5
            yield {"sparsity": sparsity, "method": method, **mean(mine), **difference, "training_seconds": seconds}


def mean(found: list[Row]) -> Row:
    if not found:
        return {"runs": 0, "accuracy": None, "stderr": None}
    values = [one["accuracy"] for one in found]
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else found[0]["stderr"]
    return {"runs": len(values), "accuracy": statistics.mean(values), "stderr": spread}


def print_table(lines: Iterable[Row]) -> None:
    print(f"\n{'sparsity':>8}  {'method':<22} {'runs':>4}  {'accuracy':>16}  {'against lora':>17}  {'training s':>10}")
    for line in lines:
        if line["accuracy"] is None:
            continue
        value = f"{line['accuracy']:.4f} ± {line['stderr']:.4f}"
        difference = f"{line['to_lora']:+.4f}" if "to_lora" in line else ""
        difference += f" ± {line['to_lora_stderr']:.4f}" if "to_lora_stderr" in line else ""
        seconds = f"{line['training_seconds']:.0f}" if line.get("training_seconds") is not None else ""
        print(
            f"{line['sparsity']:>8.2f}  {line['method']:<22} {line['runs']:>4}  {value:>16}  {difference:>17}  "
            f"{seconds:>10}"
        )
    sys.stdout.flush()


def name_of(cell: Cell) -> str:
    method, sparsity, seed = cell
    return f"{method.replace(' ', '_').replace('+', '_')}-{round(100 * sparsity)}-{seed}"


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def _is_there(args: argparse.Namespace, cell: Cell) -> bool:
    """Of a teacher's run, whether its model still is."""
    return cell[0] != TEACHER or (args.out / name_of(cell) / "baselines" / "dense_lora" / "merged").is_dir()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a dense model's directory")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, help="the task's files, unless they come from the hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of adapters, the teacher's too")
    parser.add_argument("--full-learning-rate", type=float, default=1e-4, help="of the weights themselves")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--light", action="store_true", help="remove a finished run's models, but for the teachers")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, for all runs")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        sys.exit(f"closing_the_gap: {error}")

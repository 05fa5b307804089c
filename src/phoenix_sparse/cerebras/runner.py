"""Starts ModelZoo's Trainer with Phoenix's callbacks registered: `python run.py train params.yaml`.

An export carries a copy of this file, which is why it imports nothing of Phoenix. `cszoo fit` has no way to import a
callback, so a job that was submitted through it would fail over an unknown tag.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import yaml

CALLBACK = "phoenix_masked_lora"


def require_sparsity(params: dict[str, Any], where: str) -> None:
    """Refuse a job whose compiler would see a dense model, or that would take an incomplete checkpoint."""
    init = params["trainer"]["init"]
    callbacks = {name: values or {} for entry in init.get("callbacks") or [] for name, values in entry.items()}
    groups = init.get("sparsity") or callbacks.get("MaskedLora", {}).get("sparsity") or []
    if not groups or not all(0 < float(group.get("sparsity") or 0) < 1 for group in groups):
        raise SystemExit(f"{where}: no sparsity groups, each with its share; the compiler would see a dense model")
    if "Lora" in callbacks:
        raise SystemExit(f"{where}: Lora is ModelZoo's own, whose update fills the zeros; use MaskedLora")
    if "CompleteCheckpoint" not in callbacks:
        raise SystemExit(f"{where}: no CompleteCheckpoint among the callbacks; weights could stay random unnoticed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["train", "eval"])
    parser.add_argument("params", type=Path)
    parser.add_argument("--device", choices=["CSX", "CPU"], help="in place of the file's")
    parser.add_argument("--compile-only", action="store_true", help="compile for the wafer, and run nothing")
    parser.add_argument("--model-dir", help="in place of the file's")
    parser.add_argument("--checkpoint", help="in place of the file's")
    given = parser.parse_args()
    params = yaml.safe_load(given.params.read_text(encoding="utf-8"))
    require_sparsity(params, str(given.params))
    init = params["trainer"]["init"]
    if given.device:
        init["backend"] = {"backend_type": given.device}
    if given.compile_only:
        init["backend"] = {"backend_type": "CSX", "compile_only": True}
    if given.model_dir:
        init["model_dir"] = given.model_dir
    if given.checkpoint:
        section = params["trainer"]["fit" if given.mode == "train" else "validate"]
        section["ckpt_path"] = given.checkpoint
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    importlib.import_module(CALLBACK)
    from cerebras.modelzoo.trainer.utils import run_trainer

    run_trainer(given.mode, params)


if __name__ == "__main__":
    main()

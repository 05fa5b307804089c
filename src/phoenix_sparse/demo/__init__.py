"""The bundled demo: a tiny Llama-like model and a generated task in GSM8K's form.

`scripts/pretrain_demo.py` makes the model; `python -m phoenix_sparse.demo` writes the task's files again.
"""

from pathlib import Path

HERE = Path(__file__).parent


def model_directory() -> Path:
    """The bundled model and its tokenizer, a Hugging Face directory."""
    return HERE / "model"


def task_directory() -> Path:
    """The bundled task: train.jsonl, validation.jsonl, test.jsonl, task.yaml."""
    return HERE / "task"

"""Step 3 on files: an adapter and its base in, the merged model and its certificate out."""

from pathlib import Path

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.masks import Masks
from phoenix_sparse.models import prunable_linears, save_model
from phoenix_sparse.steps.machine import Machine, longest

# Texts on which a merge is compared with its adapter where no task is given.
SAMPLE_TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 17 plus 25?\nAnswer: 17 + 25 = 42.",
    "In the beginning there was a small village by the sea, and everyone in it knew how to count fish.",
]


def merge(
    source: Path,
    masks: Masks,
    adapter: Path,
    out: Path,
    machine: Machine,
    *,
    remask: bool = False,
    texts: list[str],
) -> list[str]:
    """Step 3: merge the adapter and certify the result as it lies on the disk. Writes merged/ and certificate.json.

    Trained weights take the place of the base's; there is no update to add to them.

    Raises:
        PhoenixError: there is no such adapter, it belongs to another model or other masks, or what it was trained
            through is to be masked again.
        CheckFailed: a sparse merge left a non-zero off the mask.
    """
    from phoenix_sparse import merging
    from phoenix_sparse.finetuning import full
    from phoenix_sparse.finetuning.adapter import is_masked, load_adapter
    from phoenix_sparse.masks import require_preserved

    whole = full.is_full(adapter)
    masked = whole or is_masked(adapter)
    if masked and remask:
        raise PhoenixError(f"merge: {adapter} was trained through masks and fills no zero; leave --remask out")
    base, tokenizer = machine.open(source)
    rows = [tokenizer(text).input_ids[: longest(source)] for text in texts]
    if whole:
        adapted = full.load_weights(base, adapter, masks)
    else:
        adapted = load_adapter(base, adapter, masks if masked else None)
    before = merging.sample_logits(adapted, rows, tokenizer.pad_token_id)
    merging.require_finite(before, adapter)
    plain = adapted if whole else merging.merge(adapted, remask=masks if remask else None)
    save_model(plain, tokenizer, out / "merged")
    del adapted, base, plain  # two whole models at once would be the largest need of the run
    merged = machine.load(out / "merged")
    if masked or remask:
        require_preserved(masks, prunable_linears(merged), str(out / "merged"))
    certificate = merging.certify(
        merged,
        masks,
        before=before,
        after=merging.sample_logits(merged, rows, tokenizer.pad_token_id),
        mode="sparse_to_sparse" if masked else "sparse_to_dense",
        adapter=adapter,
        merged=out / "merged",
    )
    write_json(out / "certificate.json", certificate)
    return ["merged", "certificate.json"]


def merge_dense(source: Path, adapter: Path, out: Path, machine: Machine) -> list[str]:
    """Merge an adapter without masks into its dense model. Gives the directory's name."""
    from phoenix_sparse import merging
    from phoenix_sparse.finetuning.adapter import load_adapter

    base, tokenizer = machine.open(source)
    save_model(merging.merge(load_adapter(base, adapter, None)), tokenizer, out)
    return [out.name]

"""What an accuracy is made of: every example with its prompt, what the model answered, and its score."""

from collections.abc import Mapping, Sequence
from typing import Any


def predictions(samples: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """lm-eval's samples of one task as rows, in the order of the split.

    Args:
        samples: one for each example and filter.
        metric: metric and filter of the headline, as in `exact_match,strict-match`; other filters are left out.

    Returns:
        Rows of `example` (its number), `hash` (of its record), `prompt`, `target`, `prediction` and `score`. Generated
        answers have `output`, the text as it came; choices have `choices` and `loglikelihoods`, and `target` and
        `prediction` are numbers of choices.
    """
    name, _, kind = metric.partition(",")
    chosen = [sample for sample in samples if sample["filter"] == kind]
    return [
        {"example": sample["doc_id"], "hash": sample["doc_hash"][:16], "prompt": str(sample["arguments"][0][0])}
        | (_choice(sample, name) if _has_choices(sample) else _text(sample))
        | {"score": float(sample[name])}
        for sample in sorted(chosen, key=lambda sample: int(sample["doc_id"]))
    ]


def _has_choices(sample: Mapping[str, Any]) -> bool:
    first = sample["filtered_resps"][0]
    return isinstance(first, list | tuple)


def _text(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "target": sample["target"],
        "prediction": sample["filtered_resps"][0],
        "output": sample["resps"][0][0],
    }


def _choice(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    choices = [str(argument[1]).strip() for argument in sample["arguments"]]
    likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
    # As lm-eval's acc_norm: by characters, so that long choices aren't at a disadvantage.
    lengths = [max(1, len(choice)) if name == "acc_norm" else 1 for choice in choices]
    weighed = [likelihood / length for likelihood, length in zip(likelihoods, lengths, strict=True)]
    return {
        "target": int(sample["target"]) if str(sample["target"]).isdigit() else sample["target"],
        "prediction": max(range(len(weighed)), key=weighed.__getitem__),
        "choices": choices,
        "loglikelihoods": likelihoods,
    }

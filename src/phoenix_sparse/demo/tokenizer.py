"""The demo's tokenizer: a small byte-level BPE in which every digit stands alone."""

import itertools
from typing import Any

from phoenix_sparse.demo.language import documents
from phoenix_sparse.demo.task import make_problems

END = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256
# A word, a digit, or a run of marks, each with the space before it; else white space.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(seed: int = 0, count: int = 20_000) -> Any:
    """Train the tokenizer on pre-training text and on the words of the task's training split.

    `####` is left out, so that it becomes two of the `##` that head the pre-training text's lists: a token that the
    model never met would have an embedding that LoRA can't teach.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.islice(documents(f"tokenizer {seed}"), count)
    problems = make_problems()["train"]
    prompts = (f"Question: {problem.question}\nAnswer: {problem.answer.split('####')[0]}" for problem in problems)
    tokenizer.train_from_iterator(itertools.chain(texts, prompts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )

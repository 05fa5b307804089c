"""Tasks: data to fine-tune on and to evaluate with, both defined by one lm-eval task YAML.

Built in are gsm8k, mawps and svamp; boolq, hellaswag, openbookqa, piqa, winogrande, arc_easy and arc_challenge; and
math_train, a pool to train on. A task of one's own is a folder:

    my-task/
      task.yaml           lm-eval's keys: doc_to_text, doc_to_target, output_type, metric_list, ...
      train.jsonl         one JSON object a line, with the fields that the templates name
      validation.jsonl    optional: what the search chooses by; without it a part of train is set aside
      test.jsonl          what is reported; without it set task.holdout, or validation.jsonl is reported

A task.yaml of the simplest kind:

    output_type: generate_until
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_target: "{{answer}}"
    generation_kwargs: {until: ["\\n"], max_gen_toks: 32}
    metric_list: [{metric: exact_match}]

and of multiple choice:

    output_type: multiple_choice
    doc_to_text: "{{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: label
    metric_list: [{metric: acc}]

The headline figure is the first metric under the first filter, or the one that `metadata: {phoenix_metric:
"exact_match,strict-match"}` names. A folder's YAML can't run code: `!function` and `include` are refused.
"""

from phoenix_sparse.tasks.definition import BUILT_IN
from phoenix_sparse.tasks.loading import Example, Split, Task, load_task
from phoenix_sparse.tasks.mixtures import mix
from phoenix_sparse.tasks.settings import SourceSettings, TaskSettings

__all__ = ["BUILT_IN", "Example", "SourceSettings", "Split", "Task", "TaskSettings", "load_task", "mix"]

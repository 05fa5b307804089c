"""What a person sees while work goes on: a progress bar on a terminal, plain lines elsewhere."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phoenix_sparse import processes

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_EVERY = 15.0  # seconds between plain lines of one piece of work


class Show:
    """Gives the callbacks that long work tells its progress by."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}
        self._last = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
        elif done >= total or time.monotonic() - self._last > LINE_EVERY:
            self._last = time.monotonic()
            ERR.print(f"  {what} {done}/{total}", markup=False)

    def announce(self, stage: str, state: str) -> None:
        if state == "started":
            ERR.print(f"{stage} ...", markup=False)
            return
        for task in self._tasks.values():
            if self._bars is not None:
                self._bars.remove_task(task)
        self._tasks = {}
        ERR.print(f"{stage}: {'done before, kept' if state == 'kept' else f'done in {state}'}", markup=False)


@contextmanager
def showing() -> Iterator[Show]:
    """Show progress while the block runs; libraries keep their own words to themselves."""
    _quiet()
    if not processes.is_main():  # of several processes of one launch, one talks
        OUT.quiet = ERR.quiet = True
    if not ERR.is_terminal:
        yield Show(None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bars:
        yield Show(bars)


def _quiet() -> None:
    """Silence what libraries say about themselves; their errors still come through as exceptions."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(peft|transformers|torch|lm_eval|accelerate)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "accelerate", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)

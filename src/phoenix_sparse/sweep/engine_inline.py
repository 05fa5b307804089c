"""The engine without Parsl: so many runs at once on this machine, each a process of its own."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from phoenix_sparse.sweep.launching import Job, Stop, run_cell

Ended = Callable[[str, int], None]  # (cell, exit code)


def run_inline(jobs: Sequence[Job], workers: int, stop: Stop, ended: Ended) -> None:
    """Run jobs to their ends.

    Args:
        jobs: in the order in which they begin.
        workers: runs at once.
        stop: set from a signal handler or another thread; runs then end at a checkpoint, and no other begins.
        ended: called in the caller's thread when a cell has ended.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: queue.SimpleQueue[tuple[str, int] | BaseException | None] = queue.SimpleQueue()

    def work(index: int) -> None:
        try:
            while not stop:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                results.put((job.name, run_cell(replace(job, worker=str(index)), stop)))
        except BaseException as error:  # told to the caller, whose thread it isn't
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    failure: BaseException | None = None
    at_work = len(threads)
    while at_work:
        try:
            result = results.get(timeout=0.5)  # in pieces, so that signals are handled meanwhile
        except queue.Empty:
            continue
        if result is None:
            at_work -= 1
        elif isinstance(result, BaseException):
            failure = failure or result
            stop.set()
        else:
            ended(*result)
    for thread in threads:
        thread.join()
    if failure is not None:
        raise failure

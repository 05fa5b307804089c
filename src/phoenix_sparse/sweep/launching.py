"""One cell in a process of its own: its environment, its log, its attempts. Light: a cluster's workers import it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.sweep.places import Places, attempts, is_alive, note

GRACE = 60.0  # seconds that a run has to end after SIGTERM before it is killed
WRONG_INPUT = 2  # exit code of what another attempt wouldn't change
INTERRUPTED = 130
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a cell."""

    name: str
    out: str
    directory: str  # from which relative paths are meant
    retries: int
    share: bool
    threads: int | None = None
    gpus: tuple[str, ...] = ()  # worker i sees GPU i modulo their number; none: what its environment says
    worker: str | None = None
    keep_models: bool = True


class Stop:
    """Tells workers to end their runs, once: those of this process, and through a file those of others."""

    def __init__(self, file: Path | None = None) -> None:
        self._event, self._file = threading.Event(), file

    def __bool__(self) -> bool:
        return self._event.is_set() or (self._file is not None and self._file.exists())

    def set(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)


def run_cell(job: Job, stop: Stop | None = None) -> int:
    """Run a cell to its end, taking it up again when it dies.

    A run that ends by itself with a message about its input (exit code 2) isn't tried again: nothing would change. An
    error of another kind may be its surroundings', such as a GPU whose memory others have filled. All that happened
    stands in attempts.jsonl and log.txt.

    Returns:
        The last attempt's exit code, negative for a signal; 130 for one that was told to stop.
    """
    places = Places(Path(job.out))
    stop = Stop(places.stop) if stop is None else stop
    cell = places.cell(job.name)
    _wait_for_earlier(cell, stop)
    code = INTERRUPTED
    for attempt in range(job.retries + 1):
        if stop:
            return INTERRUPTED
        code = _attempt(job, cell, stop)
        if code in (0, INTERRUPTED, WRONG_INPUT) or stop:
            break
        if attempt < job.retries:
            stop.wait(min(1.0 + attempt, 10.0))
    return INTERRUPTED if stop and code != 0 else code


def _attempt(job: Job, cell: Path, stop: Stop) -> int:
    number = len(attempts(cell)) + 1
    worker = _worker(job)
    cell.mkdir(parents=True, exist_ok=True)
    with (cell / "log.txt").open("ab") as log:
        log.write(f"--- attempt {number}\n".encode())
        log.flush()
        # A session of its own: Ctrl-C in the terminal reaches the sweep, which then tells its runs in order.
        started = time.perf_counter()
        process = subprocess.Popen(
            command(job),
            cwd=job.directory,
            env=environment(job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    facts = {"worker": worker, "gpu": environment(job).get("CUDA_VISIBLE_DEVICES"), "keep_models": job.keep_models}
    note(cell, "begun", attempt=number, pid=process.pid, **facts)
    try:
        code = _wait(process, stop)
    except BaseException:  # this worker is told to end
        end(process.pid, process)
        note(cell, "ended", attempt=number, exit=process.poll(), seconds=time.perf_counter() - started, stopped=True)
        raise
    note(cell, "ended", attempt=number, exit=code, seconds=time.perf_counter() - started, stopped=bool(stop))
    return code


def command(job: Job) -> list[str]:
    """What starts a cell's run in a process of its own."""
    words = [sys.executable, "-m", "phoenix_sparse.cli", "sweep", "one", job.out, job.name]
    words += [] if job.share else ["--no-share"]
    return words if job.keep_models else [*words, "--no-models"]


def _wait(process: subprocess.Popen[bytes], stop: Stop) -> int:
    """Wait for a run; the loop only looks whether to stop, and the process's end is noticed at once."""
    waiter = threading.Thread(target=process.wait, daemon=True)
    waiter.start()
    while waiter.is_alive():
        waiter.join(0.5)
        if stop and waiter.is_alive():
            end(process.pid, process)
    return int(process.returncode)


def environment(job: Job) -> dict[str, str]:
    """The environment of a run: the GPU it is pinned to and its number of CPU threads.

    `PHOENIX_SWEEP_PARENT` lets a run notice that its worker is gone, so that it doesn't go on as an orphan.
    """
    found = dict(os.environ) | {"PHOENIX_SWEEP_PARENT": str(os.getpid())}
    if job.gpus:  # not by Parsl's accelerators: where workers outnumber GPUs, it divides their numbers by its own rule
        found["CUDA_VISIBLE_DEVICES"] = job.gpus[int(_worker(job) or 0) % len(job.gpus)]
    if job.threads is not None:
        found |= dict.fromkeys(THREAD_VARIABLES, str(job.threads))
    return found


def _worker(job: Job) -> str | None:
    """The number of the worker that this is, from 0 on each node."""
    return job.worker or os.environ.get("PARSL_WORKER_RANK")


def end(pid: int, process: subprocess.Popen[bytes] | None = None, grace: float = GRACE) -> None:
    """Ask a run to end, and kill it if it doesn't within `grace` seconds."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)  # it leads a session of its own
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                return
            if process is None and not _there(pid):
                return
            time.sleep(0.05)


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for_earlier(cell: Path, stop: Stop, seconds: float = GRACE) -> None:
    """Give a run whose worker was killed the time to notice it and end.

    Raises:
        PhoenixError: it goes on; two processes must not be at work on one run.
    """
    deadline = time.monotonic() + seconds
    while (known := attempts(cell)) and not stop and _works_here(known[-1]):
        if time.monotonic() > deadline:
            raise PhoenixError(f"{cell.name}: process {known[-1]['pid']} is still at work on it; end it first")
        time.sleep(0.2)


def _works_here(attempt: dict[str, object]) -> bool:
    import platform

    return attempt["host"] == platform.node() and is_alive(attempt)


def end_with(parent: int) -> None:
    """End this process by SIGTERM when the process that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

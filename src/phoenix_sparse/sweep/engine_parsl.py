"""The engine of clusters: Parsl brings cells to workers, on this machine, or in jobs of PBS Pro or Slurm."""

import concurrent.futures
import contextlib
import os
import re
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.sweep.engine_inline import Ended
from phoenix_sparse.sweep.launching import GRACE, Job, Stop, end, end_with, run_cell
from phoenix_sparse.sweep.places import Places, attempts, is_alive, note, running
from phoenix_sparse.sweep.settings import EngineSettings, PbsSettings, SlurmSettings
from phoenix_sparse.sweep.status import reached

LABEL = "phoenix"
PACKAGE = "parsl.executors.high_throughput"


class Charge:
    """What it costs a cell of its retries that its worker is lost: nothing if its run got further than before.

    A job's end by walltime is such a loss; a run may need many jobs, but one that gets nowhere is given up.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.reached: dict[str, tuple[int, int]] = {}

    def __call__(self, error: Exception, task: Any) -> float:
        """Parsl's `retry_handler`, of an error and the record of a task whose first argument is the job."""
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        if not isinstance(error, ManagerLost | WorkerLost):
            return 1.0
        name = task["args"][0].name
        now, before = reached(self.places.run(name)), self.reached.get(name, (0, 0))
        self.reached[name] = max(now, before)
        return 0.0 if now > before else 1.0


def parsl_config(settings: EngineSettings, directory: Path, retries: int, charge: Charge | None = None) -> Any:
    """Parsl's configuration for a sweep.

    One worker is one run at a time. Workers take turns on the GPUs named; the runs' own processes hold the memory and
    the threads, so workers are not bound to cores.

    Args:
        settings: of the sweep.
        directory: for Parsl's own logs.
        retries: how often a cell is given to another worker when its worker is lost.
        charge: which losses count; all unless given.

    Raises:
        PhoenixError: Parsl isn't installed.
    """
    try:
        from parsl.config import Config
        from parsl.executors import HighThroughputExecutor
        from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
    except ImportError as error:
        raise PhoenixError(
            "engine: Parsl is not installed; `pip install 'phoenix-sparse[sweep]'`, or set engine.kind=inline"
        ) from error
    local = settings.provider.kind == "local"
    directory = directory.resolve()  # a batch system's job begins in another directory
    # As modules: Parsl's scripts lie wherever an installation put them, on no path or beside another interpreter.
    pool = shlex.join([sys.executable, "-m", f"{PACKAGE}.process_worker_pool"])
    executor = HighThroughputExecutor(
        label=LABEL,
        provider=make_provider(settings),
        launch_cmd=DEFAULT_LAUNCH_CMD.replace("process_worker_pool.py", pool, 1),
        interchange_launch_cmd=[sys.executable, "-c", f"from {__name__} import interchange as i; i({os.getpid()})"],
        max_workers_per_node=settings.workers,
        cores_per_worker=1e-6,  # the number of workers is the one above, however few cores there are
        address="127.0.0.1" if local else None,
        encrypted=not local,
        heartbeat_period=5,
        heartbeat_threshold=30,
        worker_logdir_root=str(directory / "workers"),
    )
    return Config(
        executors=[executor],
        run_dir=str(directory),
        retries=retries,
        retry_handler=charge,
        strategy="none" if local else "simple",
        usage_tracking=0,
        initialize_logging=False,
    )


def interchange(sweep: int) -> None:
    """Be what Parsl starts between a sweep and its workers, and end with the sweep's process, even if that is killed.

    Workers end when they lose it; a job would otherwise wait for work until its walltime.
    """
    end_with(sweep)
    runpy.run_module(f"{PACKAGE}.interchange", run_name="__main__", alter_sys=True)


def make_provider(settings: EngineSettings) -> Any:
    """The part of the configuration that knows how this machine or this cluster starts jobs."""
    from parsl.launchers import MpiExecLauncher, SimpleLauncher, SingleNodeLauncher, SrunLauncher
    from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider

    place = settings.provider
    if not isinstance(place, SlurmSettings | PbsSettings):
        launcher = SingleNodeLauncher(debug=False)
        return LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1, launcher=launcher)
    common: dict[str, Any] = {
        "account": place.account,
        "walltime": place.walltime,
        "nodes_per_block": place.nodes,
        "init_blocks": 1,
        "min_blocks": 0,
        "max_blocks": place.jobs,
        "scheduler_options": place.scheduler_options,
        "worker_init": place.worker_init,
    }
    if isinstance(place, SlurmSettings):
        return SlurmProvider(
            partition=place.partition,
            qos=place.qos,
            constraint=place.constraint,
            cores_per_node=place.cpus,
            mem_per_node=place.memory,
            gpus_per_node=place.gpus,
            exclusive=place.exclusive,
            launcher=SrunLauncher(),
            **common,
        )
    return PBSProProvider(
        queue=place.queue,
        select_options=place.select_options,
        cpus_per_node=place.cpus or 1,
        launcher=SimpleLauncher() if place.nodes == 1 else MpiExecLauncher(),
        **common,
    )


def require_jobs(error: BaseException | None, places: Places) -> None:
    """Refuse to go on where no worker ever comes: Parsl gives up when all of its jobs failed, or were refused.

    Raises:
        PhoenixError: with what the batch system said, if this is such an error of a run's future.
    """
    from parsl.executors.errors import BadStateException
    from parsl.jobs.errors import TooManyJobFailuresError

    if isinstance(error, BadStateException | TooManyJobFailuresError):
        said = re.search(r"(?:stderr=|STDERR:)\s*(\S.*)", str(error)) or re.search(r"^\t(.+)", str(error), re.MULTILINE)
        reason = said[1].strip() if said else first_line(error)
        raise PhoenixError(
            f"engine: all jobs failed ({reason}); see {places.out / 'parsl'}, and go on with {places.resume} and a "
            "corrected 'engine.provider={kind: …}'"
        )


def run_parsl(jobs: Sequence[Job], settings: EngineSettings, places: Places, stop: Stop, ended: Ended) -> None:
    """Run jobs to their ends, on workers that Parsl starts.

    Raises:
        PhoenixError: Parsl isn't installed, can't start workers, or all of its jobs failed.
    """
    retries = jobs[0].retries if jobs else 0
    config = parsl_config(settings, places.out / "parsl", retries, Charge(places))
    from parsl import DataFlowKernel, python_app

    places.stop.unlink(missing_ok=True)
    try:
        kernel = DataFlowKernel(config)
    except Exception as error:
        raise PhoenixError(
            f"engine: Parsl can't start ({first_line(error)}); see {places.out / 'parsl'}, or set engine.kind=inline"
        ) from error
    try:
        app = python_app(run_cell, data_flow_kernel=kernel, executors=[LABEL])
        futures = {app(job): job for job in jobs}
        waiting = set(futures)
        while waiting and not stop:
            done, waiting = concurrent.futures.wait(
                waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                require_jobs(future.exception(), places)
                ended(futures[future].name, _code(future, places, futures[future]))
        if stop:  # workers see the file, and end their runs in order before they are ended themselves
            places.stop.touch()
            _wait_for_runs(places, jobs)
    finally:
        with contextlib.suppress(Exception) if stop else contextlib.nullcontext():
            kernel.cleanup()
        # A worker's end is noticed by its run within a second; whatever is left here is told by us.
        _end_runs(places, jobs)
        places.stop.unlink(missing_ok=True)


def _wait_for_runs(places: Places, jobs: Sequence[Job]) -> None:
    """Wait until no run is at work: those that haven't begun won't, and whoever ended us may have ended Parsl, too."""
    deadline = time.monotonic() + GRACE + 10
    known = [attempts(places.cell(job.name)) for job in jobs]
    while any(tries and is_alive(tries[-1]) for tries in known) and time.monotonic() < deadline:
        time.sleep(0.5)
        known = [attempts(places.cell(job.name)) for job in jobs]
    time.sleep(0.5)  # in which the last worker notes the end


def _code(future: Any, places: Places, job: Job) -> int:
    """A cell's exit code; one whose worker was lost more often than it is retried has none, and a note instead."""
    error = future.exception()
    if error is None:
        return int(future.result())
    note(places.cell(job.name), "lost", error=f"{type(error).__name__}: {error}"[:400])
    return -1


def _end_runs(places: Places, jobs: Sequence[Job]) -> None:
    for pid in running(places, [job.name for job in jobs]).values():
        end(pid)

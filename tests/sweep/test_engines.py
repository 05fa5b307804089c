"""Engines: runs in processes of their own, retried when they die, ended when told, none left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.sweep import launching
from phoenix_sparse.sweep.engine_inline import run_inline
from phoenix_sparse.sweep.engine_parsl import Charge, make_provider, parsl_config, require_jobs, run_parsl
from phoenix_sparse.sweep.launching import Job, Stop, environment, run_cell
from phoenix_sparse.sweep.places import Places, attempts, is_alive, note, reason
from phoenix_sparse.sweep.settings import EngineSettings

# Stands in for a run: says where it is, then does what the cell's name says.
RUN = """
import os, signal, sys, time
from pathlib import Path
cell = Path(sys.argv[1]) / "cells" / sys.argv[2]
tries = (cell / "log.txt").read_text().count("--- attempt")
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
what = sys.argv[2].partition("-")[0]
if what == "wrong": print("phx: the input is wrong", flush=True); sys.exit(2)
if what == "dies" or (what == "once" and tries == 1): os.kill(os.getpid(), signal.SIGKILL)
if what == "crash": raise RuntimeError("something broke")
if what == "long":
    signal.signal(signal.SIGTERM, lambda *_: (print("ended in order", flush=True), sys.exit(130)))
    time.sleep(60)
"""


ORIGINAL = launching.command


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(launching, "command", lambda job: [sys.executable, str(tmp_path / "run.py"), job.out, job.name])


def job(tmp_path: Path, name: str, **changes: object) -> Job:
    return Job(
        **({"name": name, "out": str(tmp_path), "directory": str(tmp_path), "retries": 1, "share": True} | changes)
    )


def test_every_run_goes_on_whatever_becomes_of_the_others(tmp_path):
    names = ["fine-1", "dies", "once", "wrong", "crash", "fine-2"]
    codes: dict[str, int] = {}
    run_inline([job(tmp_path, name, gpus=("3", "5")) for name in names], 2, Stop(), codes.__setitem__)
    assert codes == {"fine-1": 0, "fine-2": 0, "once": 0, "dies": -signal.SIGKILL, "wrong": 2, "crash": 1}
    known = {name: attempts(tmp_path / "cells" / name) for name in names}
    # A message about the input wouldn't change; all else is tried again, as often as asked for.
    assert {name: len(tries) for name, tries in known.items()} == {
        **dict.fromkeys(names, 1),
        **dict.fromkeys(("dies", "once", "crash"), 2),
    }
    assert reason(tmp_path / "cells" / "wrong", known["wrong"][-1]).endswith("phx: the input is wrong")
    assert "killed by signal 9" in reason(tmp_path / "cells" / "dies", known["dies"][-1])
    assert "RuntimeError: something broke" in reason(tmp_path / "cells" / "crash", known["crash"][-1])
    gpus = {(tmp_path / "cells" / name / "log.txt").read_text().split("gpu ")[1].split()[0] for name in names}
    assert gpus <= {"3", "5"}


def test_a_run_is_told_what_it_may_share_and_keep(tmp_path):
    whole, bare = (ORIGINAL(job(tmp_path, "x", share=one, keep_models=one)) for one in (True, False))
    assert whole[-3:] == ["one", str(tmp_path), "x"]
    assert bare == [*whole, "--no-share", "--no-models"]


def test_threads_and_gpus_are_the_run_s_own(tmp_path, monkeypatch):
    found = environment(job(tmp_path, "x", threads=3, gpus=("1",)))
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("3", "1")
    seen = [
        environment(job(tmp_path, "x", gpus=("4", "6"), worker=str(one)))["CUDA_VISIBLE_DEVICES"] for one in range(5)
    ]
    assert seen == ["4", "6", "4", "6", "4"]
    monkeypatch.setenv("PARSL_WORKER_RANK", "3")  # as Parsl tells its workers, on each node from 0 on
    assert environment(job(tmp_path, "x", gpus=("4", "6")))["CUDA_VISIBLE_DEVICES"] == "6"
    left = environment(job(tmp_path, "x"))
    assert left.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_sweep_that_is_told_to_stop_ends_its_runs_in_order(tmp_path):
    stop, codes = Stop(), {}

    def tell() -> None:
        while not all((tmp_path / "cells" / name / "log.txt").is_file() for name in ("long-1", "long-2")):
            time.sleep(0.05)
        time.sleep(0.5)
        stop.set()

    threading.Thread(target=tell).start()
    names = ["long-1", "long-2", "fine"]
    run_inline([job(tmp_path, name) for name in names], 2, stop, codes.__setitem__)
    assert codes == {"long-1": 130, "long-2": 130}  # the third never began
    for name in ("long-1", "long-2"):
        (only,) = attempts(tmp_path / "cells" / name)
        assert only["stopped"]
        assert not is_alive(only)
        assert "ended in order" in (tmp_path / "cells" / name / "log.txt").read_text()


def test_a_run_without_its_worker_ends(tmp_path):
    code = (
        "import os, time; from phoenix_sparse.sweep.launching import end_with; end_with(os.getppid()); time.sleep(60)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
    )
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    deadline = time.monotonic() + 30
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.05)
    (run,) = map(int, children.read_text().split())
    time.sleep(4)  # it imports
    worker.kill()
    worker.wait()
    while Path(f"/proc/{run}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{run}").exists()


def test_a_run_that_is_still_at_work_is_waited_for(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    note(Places(tmp_path).cell("fine"), "begun", attempt=1, pid=other.pid)
    started = time.monotonic()
    assert run_cell(job(tmp_path, "fine")) == 0
    assert time.monotonic() - started > 1
    other.wait()


def test_a_record_with_a_torn_end_is_read(tmp_path):
    note(tmp_path, "begun", attempt=1, pid=1)
    with (tmp_path / "attempts.jsonl").open("a") as stream:
        stream.write('{"event": "ended", "ex')
    (only,) = attempts(tmp_path)
    assert "exit" not in only


def test_a_lost_worker_costs_a_retry_only_where_the_run_got_no_further(tmp_path):
    errors = pytest.importorskip("parsl.executors.high_throughput.errors")
    places, lost = Places(tmp_path), errors.WorkerLost(0, "node")
    charge, task = Charge(places), {"args": (job(tmp_path, "one"),)}
    run = places.run("one")
    assert charge(lost, task) == 1  # it hasn't begun

    def stages(**found: str) -> None:
        run.mkdir(parents=True, exist_ok=True)
        record = {"inputs": {}, "stages": {name: {"status": status} for name, status in found.items()}}
        (run / "manifest.json").write_text(json.dumps(record))

    stages(prune="done", tune="running")
    assert charge(lost, task) == 0
    assert charge(lost, task) == 1
    (run / "work" / "tune" / "checkpoint-90").mkdir(parents=True)
    assert charge(errors.ManagerLost(b"block", "node"), task) == 0
    (run / "work" / "tune" / "checkpoint-100").mkdir()
    assert charge(lost, task) == 0
    assert charge(RuntimeError("an error of the cell's own"), task) == 1
    assert charge(lost, {"args": (job(tmp_path, "another"),)}) == 1
    (run / "manifest.json").write_text("torn")
    assert charge(lost, task) == 1
    stages(prune="done", tune="done")
    assert charge(lost, task) == 0


def test_parsl_is_configured_for_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("parsl")
    settings = EngineSettings.model_validate({"workers": 4, "gpus": [0, 1]})
    (executor,) = parsl_config(settings, tmp_path, 2).executors
    assert executor.max_workers_per_node == 4
    assert not executor.available_accelerators  # each run is pinned by `environment`
    assert executor.provider.label == "local"
    assert parsl_config(settings, tmp_path, 2).retries == 2
    monkeypatch.chdir(tmp_path)  # a job on a node begins elsewhere
    (executor,) = parsl_config(settings, Path("sweeps/mine/parsl"), 2).executors
    assert executor.worker_logdir_root == str(tmp_path.resolve() / "sweeps/mine/parsl/workers")
    # By this interpreter, and not by scripts, which an installation may have put anywhere.
    pool, interchange = executor.launch_cmd.split(), executor.interchange_launch_cmd
    assert pool[:3] == [sys.executable, "-m", "parsl.executors.high_throughput.process_worker_pool"]
    assert interchange[:2] == [sys.executable, "-c"]


def test_what_brings_work_to_workers_ends_with_the_sweep(tmp_path):
    """Killed with -9, too: a cluster's job would otherwise wait for work until its walltime."""
    pytest.importorskip("parsl")
    code = (
        "import pathlib, subprocess, sys, time\n"
        "from phoenix_sparse.sweep.engine_parsl import parsl_config\n"
        "from phoenix_sparse.sweep.settings import EngineSettings\n"
        f"(executor,) = parsl_config(EngineSettings(), pathlib.Path({str(tmp_path)!r}), 1).executors\n"
        "it = subprocess.Popen(executor.interchange_launch_cmd, stdin=subprocess.PIPE)\n"  # waits for its settings
        "print(it.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    between = int(sweep.stdout.readline())
    words = Path(f"/proc/{between}/cmdline").read_text().split("\0")
    time.sleep(2)
    assert Path(f"/proc/{between}").exists(), words
    holder = os.open(f"/proc/{between}/fd/0", os.O_WRONLY)  # so that its input doesn't end
    sweep.kill()
    sweep.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{between}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.close(holder)
    assert not Path(f"/proc/{between}").exists()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            {"kind": "slurm", "partition": "gpu", "account": "a", "gpus": 4, "qos": "q", "memory": 64, "cpus": 32},
            {
                "partition": "gpu",
                "account": "a",
                "gpus_per_node": 4,
                "qos": "q",
                "mem_per_node": 64,
                "cores_per_node": 32,
            },
        ),
        (
            {"kind": "pbs", "queue": "prod", "account": "a", "select_options": "ngpus=4", "cpus": 32},
            {"queue": "prod", "account": "a", "select_options": "ngpus=4", "cpus_per_node": 32},
        ),
    ],
)
def test_clusters_are_configured_from_the_sweep_file(place, expected):
    pytest.importorskip("parsl")
    common = {"walltime": "12:00:00", "nodes": 2, "jobs": 3, "worker_init": "module load x", "scheduler_options": "#X"}
    provider = make_provider(EngineSettings.model_validate({"provider": place | common}))
    for name, value in expected.items():
        assert getattr(provider, name) == value, name
    assert (provider.walltime, provider.nodes_per_block, provider.max_blocks) == ("12:00:00", 2, 3)
    assert provider.worker_init.strip() == "module load x"
    assert "#X" in provider.scheduler_options


def test_without_parsl_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "parsl.config", None)
    with pytest.raises(PhoenixError, match=r"phoenix-sparse\[sweep\].*engine.kind=inline"):
        parsl_config(EngineSettings(), tmp_path, 1)


def test_a_parsl_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    parsl = pytest.importorskip("parsl")

    def start(config):
        raise RuntimeError("Interchange failed to start")

    monkeypatch.setattr(parsl, "DataFlowKernel", start)
    (tmp_path / "parsl").mkdir()
    with pytest.raises(PhoenixError, match=r"Interchange failed to start.*engine\.kind=inline"):
        run_parsl([job(tmp_path, "fine")], EngineSettings(), Places(tmp_path), Stop(), lambda name, code: None)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Error 1:\n\tFailed to start block 0: Cannot launch job a.b-0: Could not read job ID; recode=1, stdout=, "
            "stderr=sbatch: error: invalid partition specified: nowhere\nsbatch: error: Submission failed\n\n",
            "sbatch: error: invalid partition specified: nowhere",
        ),
        ("Error 1:\n\tEXIT CODE: 3\n\tSTDERR: line 13: module: not found\n\n", "line 13: module: not found"),
        ("Error 1:\n\tEXIT CODE: 3\n", "EXIT CODE: 3"),
        ("No error messages received", "No error messages received"),
    ],
)
def test_a_cluster_that_refuses_every_job_is_one_line(tmp_path, said, reason):
    """In Parsl's words, with Slurm's in them."""
    pytest.importorskip("parsl")
    from parsl.executors.errors import BadStateException
    from parsl.jobs.errors import TooManyJobFailuresError

    errors = [
        TooManyJobFailuresError(said),
        BadStateException(SimpleNamespace(label="phoenix"), TooManyJobFailuresError(said)),
    ]
    for error in errors:
        with pytest.raises(PhoenixError) as caught:
            require_jobs(error, Places(tmp_path))
        assert str(caught.value).startswith("engine: all jobs failed (")
        assert f"{reason}); see {tmp_path}" in str(caught.value)
        assert f"phx sweep resume {tmp_path}" in str(caught.value)
        assert "\n" not in str(caught.value)
    for error in (None, RuntimeError("a run's own")):
        require_jobs(error, Places(tmp_path))


def test_attempts_are_plain_json_lines(tmp_path):
    assert run_cell(job(tmp_path, "fine")) == 0
    lines = [json.loads(line) for line in (tmp_path / "cells/fine/attempts.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begun", "ended"]
    assert lines[1]["exit"] == 0
    assert lines[1]["seconds"] > 0

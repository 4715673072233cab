"""Several workers, here or on a Dask cluster: whatever is killed, nothing is left running, lost or done twice."""

import contextlib
import importlib
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from guidance_interval import cli
from guidance_interval.errors import UserError
from guidance_interval.lab import sweep, workers

ARGS = dict(sigma_los=[0.0, 0.1], sigma_his=[2.5, math.inf], weights=[1.5], samples=20, sampler="euler_ancestral")
ARGS |= dict(steps=4, seed=0)
CELLS = 5
COMMAND = ["--sigma-lo", "0", "0.1", "--sigma-hi", "2.5", "inf", "--weight", "1.5", "--samples", "20"]
COMMAND += ["--sampler", "euler_ancestral", "--steps", "4"]
SLOW = """
import os, pathlib, time
from guidance_interval.toy import model

def load(device):
    lab = model.load(device=device)

    def slow(_, args):  # As a network that is worth several machines; the file tells who is at work.
        if len(args[0]) > 2:  # No trial of the lab.
            pathlib.Path(os.environ["AT_WORK"], str(os.getpid())).touch()
            time.sleep(float(os.environ.get("SECONDS", 0.2)))

    lab.denoiser.register_forward_pre_hook(slow)
    return lab
"""


def eventually(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.05)
    return value


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def libraries(pid):
    with contextlib.suppress(psutil.Error):
        return [loaded.path for loaded in psutil.Process(pid).memory_maps()]
    return []


def command_of(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The table and `{cell: (scores, rows)}` of this process alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    results = sweep.run(folder, **ARGS)
    torch.set_num_threads(threads)
    return (folder / "sweep.md").read_text(), numbers(results)


def numbers(results):
    """Everything but the seconds."""
    return {cell: (r.scores, r.rows) for cell, r in results.items()}


class Site:
    """A folder to work in, and the processes that were started there."""

    def __init__(self, folder):
        self.folder, self.out, self.started = folder, folder / "out", []
        (folder / "slow_model.py").write_text(SLOW)
        (folder / "at_work").mkdir()
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.env = os.environ | dict(PYTHONPATH=path, AT_WORK=str(folder / "at_work"), OMP_NUM_THREADS="1")

    def start(self, log, *command):
        with open(self.folder / log, "w") as stream:
            process = subprocess.Popen(
                [sys.executable, *command], env=self.env, stdout=stream, stderr=stream, cwd=self.folder,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def sweep(self, *args):
        command = ["-m", "guidance_interval", "sweep", "--out", str(self.out), "--model", "slow_model:load", *COMMAND]
        return self.start("sweep.log", *command, *args)

    def log(self, name="sweep.log"):
        return (self.folder / name).read_text()

    def at_work(self, count, cells=1):
        """Wait until as many processes sample and cells are done; return their ids."""

        def found():
            pids = [int(p.name) for p in (self.folder / "at_work").iterdir()]
            done = max(map(int, re.findall(rf"(\d+) of {CELLS} cells\b", self.log())), default=0)
            return pids if len(pids) >= count and done >= cells else None

        return eventually(found)

    def results(self):
        with sweep.Store(self.out / "sweep.sqlite", {}) as store:
            return store.results()

    def finished_as(self, expected):
        table, cells = expected
        assert (self.out / "sweep.md").read_text() == table and numbers(self.results()) == cells


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AT_WORK", site.env["AT_WORK"])
    yield site
    for process in site.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # And what a failing test's process has left.
        process.wait()


# ----------------------------------------------------------------------------
# This machine.


def test_a_killed_sweep_leaves_nothing_running_and_goes_on(site, expected):
    process = site.sweep("--device", "cpu", "cpu")
    workers = site.at_work(2)
    family = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert {*workers} <= {*family} and process.pid not in workers
    process.kill()
    process.wait()
    eventually(lambda: not any(map(alive, family)), 10)
    before = site.results()
    assert 0 < len(before) < CELLS
    sweep.run(site.out, **ARGS, source="slow_model:load")
    site.finished_as(expected)
    assert before.items() <= site.results().items()  # Seconds too: not measured again.


def test_a_killed_worker_s_cells_are_done_by_another(site, expected):
    process = site.sweep("--device", "cpu", "cpu")
    victim, *_ = site.at_work(2)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(120) == 0
    assert "a worker died (killed, or out of memory)" in site.log() and "Traceback" not in site.log()
    site.finished_as(expected)


@pytest.mark.parametrize("when", ["starting", "at work"])
def test_ctrl_c_ends_all_in_one_sentence(site, when):
    site.env["SECONDS"] = "60"  # For each evaluation: nobody waits for it.
    process = site.sweep("--device", "cpu", "cpu")
    if when == "starting":
        children = psutil.Process(process.pid).children
        family = eventually(lambda: [p.pid for p in children() if "spawn_main" in command_of(p)])
        eventually(lambda: any("libtorch" in loaded for pid in family for loaded in libraries(pid)))  # In the imports.
    else:
        family = site.at_work(2, cells=0)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: every process of the command gets it.
    assert process.wait(30) == 130
    eventually(lambda: not any(map(alive, family)), 10)
    assert "guidance-interval: interrupted; what is done is kept, run the same command to go on" in site.log()
    assert "Traceback" not in site.log() and "leaked" not in site.log()


def test_workers_that_always_die_end_the_run_with_what_was_done():
    tasks = {"good": (("", ""), pow, 2, 3), "bad": (("", ""), os._exit, 1)}
    done = {}
    with pytest.raises(UserError, match="workers died 3 times in a row and nothing got done"):
        for key, value in workers.run(tasks, ["cpu"]):
            done[key] = value
    assert done == {"good": 8}


def test_each_worker_has_a_device_of_its_own_and_an_error_comes_back(tmp_path, monkeypatch):
    (tmp_path / "met_device.py").write_text(
        "from guidance_interval.lab import workers\n"
        "def met_device(both):\n    both.wait(60)\n    return workers.device()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    met_device = importlib.import_module("met_device").met_device
    with multiprocessing.get_context("spawn").Manager() as manager:
        both = manager.Barrier(2)  # No task ends before the other worker is at one too.
        tasks = {i: (("", ""), met_device, both) for i in range(4)}
        devices = [device for _, device in workers.run(tasks, ["cpu", "meta"])]
    assert sorted(devices) == ["cpu", "cpu", "meta", "meta"]
    with pytest.raises(ZeroDivisionError):
        list(workers.run({0: (("", ""), divmod, 1, 0)}, ["cpu"]))


# ----------------------------------------------------------------------------
# Dask.


@pytest.fixture
def cluster(site):
    """The address of a scheduler, and a function that starts a worker, without waiting for it."""
    common = ["--no-dashboard", "--host", "127.0.0.1"]
    scheduler = site.start("scheduler.log", "-m", "distributed.cli.dask_scheduler", *common, "--port", "0")
    found = eventually(lambda: re.search(r"Scheduler at: +(tcp://127\.0\.0\.1:\d+)", site.log("scheduler.log")))
    address, count = found.group(1), iter(range(9))

    def worker(threads):
        name = f"worker{next(count)}"
        options = ["--name", name, "--nthreads", str(threads), "--no-nanny", *common]
        return site.start(f"{name}.log", "-m", "distributed.cli.dask_worker", address, *options)

    return address, scheduler, worker


def test_a_killed_dask_worker_s_cells_are_done_by_another(site, cluster, expected):
    """The workers have two threads each: seeds belong to a process, and its cells must not mix them."""
    address, _, worker = cluster
    workers = [worker(2), worker(2)]
    process = site.sweep("--cluster", address)
    pids = site.at_work(2)
    assert {*pids} == {w.pid for w in workers}
    workers[0].kill()
    assert process.wait(120) == 0
    site.finished_as(expected)
    assert "Traceback" not in site.log()


def test_a_scheduler_that_goes_away_is_told_and_its_cells_are_kept(site, cluster):
    address, scheduler, worker = cluster
    process = site.sweep("--cluster", address)
    eventually(lambda: "no worker has joined yet; start some with `dask worker" in site.log())
    worker(1)
    site.at_work(1)
    scheduler.kill()
    assert process.wait(60) == 2
    assert f"the Dask scheduler at '{address}' has gone away; what is done is kept" in site.log()
    assert "Traceback" not in site.log() and 0 < len(site.results()) < CELLS


def test_an_address_where_nobody_answers_is_told(tmp_path, capsys):
    assert cli.main(["sweep", "--out", str(tmp_path), "--samples", "20", "--cluster", "nowhere"]) == 2
    assert "no Dask scheduler answers at 'nowhere' (missing port number" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "results"])
def test_without_dask_the_extra_is_named(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main([command, "--out", str(tmp_path / "out"), "--cluster", "tcp://a:1"]) == 2
    error = capsys.readouterr().err
    assert "--cluster needs Dask's package distributed" in error and "pip install -e '.[cluster]'" in error
    assert not (tmp_path / "out").exists()

"""Where tasks run: in processes of this machine, or on the workers of a Dask cluster.

Both are executors of `concurrent.futures`, and `run` is the one way to use them. What it runs is not its business.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, as_completed

import torch
from tqdm.auto import tqdm

from ..errors import UserError

TRIES = 3  # Rounds in a row in which workers die and no task is done.


def check(devices, cluster):
    """Raise before any work: UserError for devices that make no sense, ModuleNotFoundError without Dask."""
    if cluster and devices and len(devices) > 1:
        raise UserError(f"--cluster takes one --device for all its workers, or none, got {' '.join(devices)}")
    if cluster:
        try:
            import distributed  # noqa: F401
        except ImportError as e:
            raise ModuleNotFoundError("--cluster needs Dask's package distributed", name="distributed") from e


def run(tasks, devices, cluster=None):
    """Yield `(key, value)` of each task as it is done; the tasks of a worker that died are done by another.

    tasks: `{key: (name, function, *args)}`, which pickle; a name is a tuple of two strings, what the task belongs to
    and which one it is. devices: one process for each, which `device()` tells it; not used with `cluster`, the
    address of a Dask scheduler.

    Raises UserError when no scheduler answers or it goes away, or when workers die and nothing gets done; an exception
    of a task ends the run.
    """
    left, tries = dict(tasks), 0
    while left:
        before = len(left)
        with _cluster(cluster) if cluster else _processes(devices) as (submit, lost):
            futures = {}
            with contextlib.suppress(lost):  # They may die before all is handed out.
                for key, task in left.items():
                    futures[submit(*task)] = key
            for future in as_completed(futures):
                try:
                    value = future.result()
                except lost:
                    continue
                del left[futures[future]]
                yield futures[future], value
        if left:
            tqdm.write("a worker died (killed, or out of memory): what it was at is done again", file=sys.stderr)
        tries = 0 if len(left) < before else tries + 1
        if tries == TRIES:
            raise UserError(
                f"workers died {TRIES} times in a row and nothing got done (out of memory?); what was done before is "
                "kept: run the command again with fewer workers"
            )


# ----------------------------------------------------------------------------
# This machine.

_device = None


def device():
    """The device of this worker: the one it was started for or, on a Dask worker, a GPU if there is one."""
    return _device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _processes(devices):
    context = multiprocessing.get_context("spawn")
    of_each = context.SimpleQueue()
    for name in devices:
        of_each.put(name)
    theirs, ours = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(len(devices), context, _start, (theirs, of_each))

    def submit(_, function, *args):
        with _uninterrupted():
            return executor.submit(function, *args)

    try:
        yield submit, BrokenExecutor
    finally:
        ours.close()  # Whatever they are at.
        executor.shutdown(cancel_futures=True)


def _start(parent, of_each):
    """Begin a worker: it ends when the other end of `parent` closes, as it does when that process is killed."""

    def follow():
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    global _device
    _device = of_each.get()
    torch.set_num_threads(1)  # The processes share the cores.
    tqdm.set_lock(threading.RLock())  # Its own is a semaphore, which would outlive a killed process.


@contextlib.contextmanager
def _uninterrupted():
    """Processes that are started here never see Ctrl-C, which a terminal sends to all: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# ----------------------------------------------------------------------------
# Dask.


@contextlib.contextmanager
def _cluster(address):
    from distributed import Client
    from distributed.scheduler import KilledWorker

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # Below a lost scheduler is told in a sentence.
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as e:
        raise UserError(f"no Dask scheduler answers at {address!r} ({e}); start one with `dask scheduler`") from e
    executor = client.get_executor(pure=False)
    if not client.nthreads():
        print(f"no worker has joined yet; start some with `dask worker {address} --nthreads 1`", file=sys.stderr)

    def submit(name, function, *args):
        return executor.submit(function, *args, key=(*name, uuid.uuid4().hex))  # As the dashboard shows it.

    try:
        yield submit, KilledWorker
    except CancelledError as e:
        raise UserError(
            f"the Dask scheduler at {address!r} has gone away; what is done is kept: start it and its workers, and run "
            "the command again"
        ) from e
    finally:
        executor.shutdown(wait=False)  # Cancels what has not begun.
        client.close()

"""A grid over intervals and weights, measured cell by cell and resumed wherever it was cut off.

Each finished cell is one row of `sweep.sqlite`, committed before the next begins: whatever stops a sweep, the
same command goes on from there and ends with the same table. The pictures and the table are drawn from the
file alone.
"""

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import queue
import sqlite3
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..sampler_patch import GuidanceInterval
from . import model, plots
from .files import atomic_path, output_folder
from .metrics import Scores, score
from .sampling import Setting, check_weight, evaluation_sigmas, get_sampler, karras_sigmas, sample, schedule_args

# ----------------------------------------------------------------------------
# Cells.


@dataclass(frozen=True, order=True)
class Cell:
    """One setting: guidance of `weight` in (sigma_lo, sigma_hi]; a weight of 1 is no guidance."""

    weight: float
    sigma_lo: float
    sigma_hi: float

    @property
    def everywhere(self):
        return self.sigma_lo == 0 and self.sigma_hi == math.inf

    @property
    def interval(self):
        return GuidanceInterval(self.sigma_lo, self.sigma_hi)


@dataclass(frozen=True)
class Result:
    """A finished cell: its Scores, rows per sample and seconds."""

    scores: Scores
    rows: float
    seconds: float


def grid(sigma_los, sigma_his, weights):
    """Every cell of the grid with sigma_lo < sigma_hi, and for comparison CFG everywhere at each weight, and none.

    Raises ValueError when a bound or a weight makes no sense, or no pair of bounds is an interval.
    """
    for weight in weights:
        check_weight(weight)
    for lo, hi in [*itertools.product(sigma_los, [math.inf]), *itertools.product([0.0], sigma_his)]:
        GuidanceInterval(lo, hi)  # Refuses what is no bound at all.
    pairs = [(lo, hi) for lo, hi in itertools.product(sigma_los, sigma_his) if lo < hi]
    if not pairs:
        raise ValueError(f"no sigma_lo of {sigma_los} lies below a sigma_hi of {sigma_his}")
    cells = {Cell(w, lo, hi) for w in weights for lo, hi in [*pairs, (0.0, math.inf)]}
    return sorted(cells | {Cell(1.0, 0.0, math.inf)})


# ----------------------------------------------------------------------------
# The file.

COLUMNS = [f.name for f in fields(Cell)]
VALUES = [f.name for f in fields(Scores)] + ["rows", "seconds"]


class Store:
    """The cells that are done, in an SQLite file; `identity` is what all of them have in common.

    Raises ValueError when the file holds a sweep of another identity, or is no such file.
    """

    def __init__(self, path, identity):
        self.db = sqlite3.connect(path)
        try:
            with self.db:
                self.db.execute("CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT)")
                self.db.execute(
                    f"CREATE TABLE IF NOT EXISTS cell ({', '.join(f'{c} REAL' for c in COLUMNS + VALUES)}, "
                    f"PRIMARY KEY ({', '.join(COLUMNS)}))"
                )
                known = {k: json.loads(v) for k, v in self.db.execute("SELECT key, value FROM identity")}
                if not known:
                    rows = [(k, json.dumps(v)) for k, v in identity.items()]
                    self.db.executemany("INSERT INTO identity VALUES (?, ?)", rows)
        except sqlite3.DatabaseError as e:
            self.db.close()
            raise ValueError(f"{str(path)!r} is not a sweep's file ({e}); choose another --out") from e
        differing = [f"{k} {known.get(k)!r}, not {v!r}" for k, v in identity.items() if known and known.get(k) != v]
        if differing:
            self.db.close()
            raise ValueError(f"{str(path)!r} holds a sweep with {'; '.join(differing)}: choose another --out")

    def add(self, cell, result):
        values = {**asdict(cell), **asdict(result.scores), "rows": result.rows, "seconds": result.seconds}
        with self.db:  # One transaction: the cell is there or not.
            self.db.execute(
                f"INSERT OR REPLACE INTO cell ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                list(values.values()),
            )

    def results(self):
        """`{Cell: Result}` of all finished cells."""
        found = {}
        for row in self.db.execute(f"SELECT {', '.join(COLUMNS + VALUES)} FROM cell"):
            cell, (*scores, rows, seconds) = Cell(*row[: len(COLUMNS)]), row[len(COLUMNS) :]
            found[cell] = Result(Scores(*scores), rows, seconds)
        return found


# ----------------------------------------------------------------------------
# The work.


@dataclass(frozen=True)
class Job:
    """What the cells of a sweep have in common. source: whose model, see `load_lab`."""

    samples: int
    sampler: str
    steps: int
    seed: int
    source: str | None = None

    def identity(self, lab):
        """What a Store of this job is known by."""
        name = "shipped" if self.source is None else Path(self.source).name
        common = dict(samples=self.samples, sampler=self.sampler, steps=self.steps, seed=self.seed)
        return dict(**common, model=name, weights=fingerprint(lab))


def load_lab(source, device):
    """Return the `model.Lab` of a source: the shipped model for None, a model file, or what a function gives.

    source: None, the path of a .safetensors file that `lab/train.py` wrote, or `module:function`, which is
    called with the device. Raises ValueError or FileNotFoundError, with the source, when there is none.
    """
    if source is None:
        return model.load(device=device)
    if source.endswith(".safetensors"):
        return model.load(source, device)
    module, _, function = source.partition(":")
    if not function:
        raise ValueError(f"model must be given as module:function or a .safetensors file, got {source!r}")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"model {source!r} cannot be loaded ({e}); is its folder on PYTHONPATH?") from e
    return make(device)


def fingerprint(lab):
    """A hash of the weights that sample and that judge."""
    digest = hashlib.sha256()
    for module in (lab.denoiser, lab.classifier):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def _evaluations(sampler, steps):
    sample_fn = get_sampler(sampler)
    return evaluation_sigmas(sample_fn, *schedule_args(sample_fn, karras_sigmas(steps)))


def rows_per_sample(job, cell):
    """The network rows that a sample of this cell takes (an adaptive sampler takes a few more or less)."""
    sigmas = _evaluations(job.sampler, job.steps)
    return len(sigmas) + (cell.interval.mask(sigmas).sum().item() if cell.weight != 1 else 0)


def measure(lab, job, cell, progress=None):
    """Sample and score one cell; return its Result."""
    setting = Setting("", cell.weight, cell.interval)
    drawn = sample(lab, setting, job.samples, job.sampler, job.steps, job.seed, progress)
    return Result(score(lab, drawn.x, drawn.labels), drawn.rows, drawn.seconds)


def _worker(todo, done, device):
    """Take cells until there are none; runs in a process of its own, one for each device."""
    torch.set_num_threads(1)  # The processes share the cores.
    load = functools.cache(load_lab)
    for job, cell in iter(todo.get, None):
        done.put((job, cell, measure(load(job.source, device), job, cell)))


def _results(todo, devices, progress):
    """Yield `(job, cell, Result)` as they are done: here on one device, or in a process for each of several."""
    if len(devices) == 1:
        load = functools.cache(load_lab)
        for job, cell in todo:
            lab = load(job.source, devices[0])
            yield job, cell, measure(lab, job, cell, lambda n, job=job, cell=cell: progress(job, cell, n))
        return
    context = multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    for task in [*todo, *[None] * len(devices)]:
        tasks.put(task)
    workers = [context.Process(target=_worker, args=(tasks, done, d), daemon=True) for d in devices]
    for worker in workers:
        worker.start()
    try:
        for _ in todo:
            while True:
                with contextlib.suppress(queue.Empty):
                    job, cell, result = done.get(timeout=5)
                    break
                if any(w.exitcode for w in workers):
                    raise ChildProcessError("a worker died; the cells that are done are kept, run the command again")
            progress(job, cell, job.samples)
            yield job, cell, result
    finally:
        for worker in workers:
            worker.terminate()


def complete(stores, cells, devices=("cpu",)):
    """Measure the cells that their stores do not hold yet; return `{job: {Cell: Result}}` of all of them.

    stores: `{job: Store}`; cells: `{job: [Cell]}`. A progress bar on stderr tells the time that is left.
    """
    held = {job: store.results() for job, store in stores.items()}
    todo = [(job, cell) for job in cells for cell in cells[job] if cell not in held[job]]
    total = sum(map(len, cells.values()))
    if len(todo) < total:
        print(f"{total - len(todo)} of {total} cells are done already", file=sys.stderr)
    work = sum(job.samples * rows_per_sample(job, cell) for job, cell in todo)
    with tqdm(total=work, unit="row", unit_scale=True, mininterval=0.5) as bar:

        def progress(job, cell, images):
            bar.set_description(f"{job.sampler} w={cell.weight:g} {cell.interval}", refresh=False)
            bar.update(images * rows_per_sample(job, cell))

        for count, (job, cell, result) in enumerate(_results(todo, devices, progress), total - len(todo) + 1):
            stores[job].add(cell, result)
            held[job][cell] = result
            bar.set_postfix_str(f"{count} of {total} cells")
    return {job: {cell: held[job][cell] for cell in sorted(cells[job])} for job in cells}


def run(out, sigma_los, sigma_his, weights, samples, sampler, steps, seed, devices=("cpu",), source=None):
    """Measure what is not done yet of a grid, print the table and write the pictures; return `{Cell: Result}`.

    Raises ValueError or OSError, as `lab.demo.run` does, before anything is sampled.
    """
    cells = grid(sigma_los, sigma_his, weights)
    get_sampler(sampler)
    out = output_folder(out)
    job = Job(samples, sampler, steps, seed, source)
    store = Store(out / "sweep.sqlite", job.identity(load_lab(source, devices[0])))
    results = complete({job: store}, {job: cells}, devices)[job]
    write(out, results)
    return results


# ----------------------------------------------------------------------------
# What a person sees.


def frontier(results):
    """The cells that no other cell beats in both accuracy and distance, from the least accurate on."""
    best, cells = math.inf, []
    for cell in sorted(results, key=lambda c: (-results[c].scores.accuracy, results[c].scores.fd)):
        if results[cell].scores.fd < best:
            best = results[cell].scores.fd
            cells.append(cell)
    return cells[::-1]


def table(results):
    """The cells as a Markdown table, by weight and interval; `*` marks those of the frontier."""
    lines = ["| weight | interval | 1000 FD [95 % interval] | accuracy | variety | rows | frontier |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: | :---: |")
    best = set(frontier(results))
    for cell in sorted(results):
        s = results[cell].scores
        where = "none" if cell.weight == 1 else "everywhere" if cell.everywhere else str(cell.interval)
        fd = f"{1000 * s.fd:.2f} [{1000 * s.fd_low:.2f}, {1000 * s.fd_high:.2f}]"
        star = "*" if cell in best else ""
        cost = f"{results[cell].rows:.1f}"
        lines.append(f"| {cell.weight:g} | {where} | {fd} | {s.accuracy:.1%} | {s.variety:.3f} | {cost} | {star} |")
    return "\n".join(lines)


def write(out, results):
    """Print the table; write sweep.md, heatmaps.png and frontier.png to the folder `out`."""
    text = table(results)
    print(text)
    with atomic_path(out / "sweep.md") as tmp:
        tmp.write_text(text + "\n")
    plots.heatmaps(out / "heatmaps.png", results)
    plots.frontier(out / "frontier.png", results, frontier(results))
    print(f"\nwrote sweep.md, heatmaps.png and frontier.png to {out}; sweep.sqlite there holds every cell")

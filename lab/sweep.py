"""A grid over intervals and weights, measured cell by cell and resumed wherever it was cut off.

Each finished cell is one row of `sweep.sqlite`, committed before the next begins: whatever stops a sweep, the
same command goes on from there and ends with the same table. The pictures and the table are drawn from the
file alone.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import socket
import sqlite3
import sys
import threading
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import UserError, user_input
from ..files import aligned, atomic_path, output_folder, printed
from ..sampler_patch import GuidanceInterval
from ..toy import model
from ..toy.sampling import Guidance, check_seed, check_weight, evaluations, get_sampler, sample
from . import compare, plots, workers
from .scores import SCORES_VERSION, Scores, judge_samples

# ----------------------------------------------------------------------------
# Cells.


@dataclass(frozen=True, order=True)
class Cell:
    """One setting: guidance of `weight` in (sigma_lo, sigma_hi]; a weight of 1 is conditional only."""

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
class Measured:
    """What a cell gave: its Scores, rows per sample, seconds, and influence [3, N] as `judge_samples` gives it."""

    scores: Scores
    rows: float
    seconds: float
    influence: torch.Tensor = field(default_factory=lambda: torch.zeros(3, 0), compare=False, repr=False)

    @property
    def judged(self):
        return self.scores, self.influence


def grid(sigma_los, sigma_his, weights):
    """Every cell of the grid with sigma_lo < sigma_hi, and for comparison CFG everywhere at each weight, and none.

    Raises UserError when a bound or a weight makes no sense, or no pair of bounds is an interval.
    """
    for weight in weights:
        check_weight(weight)
    for lo, hi in [*itertools.product(sigma_los, [math.inf]), *itertools.product([0.0], sigma_his)]:
        with user_input():
            GuidanceInterval(lo, hi)  # Refuses what is no bound at all.
    pairs = [(lo, hi) for lo, hi in itertools.product(sigma_los, sigma_his) if lo < hi]
    if not pairs:
        raise UserError(f"no sigma_lo of {sigma_los} lies below a sigma_hi of {sigma_his}")
    cells = {Cell(w, lo, hi) for w in weights for lo, hi in [*pairs, (0.0, math.inf)]}
    return sorted(cells | {Cell(1.0, 0.0, math.inf)})


# ----------------------------------------------------------------------------
# The file.

COLUMNS = [f.name for f in fields(Cell)]
VALUES = [f.name for f in fields(Scores)] + ["rows", "seconds"]


class Store:
    """The cells that are done, in an SQLite file; `identity` is what all of them have in common.

    The file is this process's alone until `close`, or until it dies. Raises UserError when another process has it, when
    it cannot be written to, when it holds a sweep of another identity, or when it is no such file.
    """

    def __init__(self, path, identity):
        self.path, self.identity, self.db = str(path), identity, None
        with self._told():
            self.db = sqlite3.connect(path, timeout=2, isolation_level=None)
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            with self._transaction():
                self.db.execute("CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT)")
                self.db.execute(
                    f"CREATE TABLE IF NOT EXISTS cell ({', '.join(f'{c} REAL' for c in COLUMNS + VALUES)}, "
                    f"influence BLOB, "
                    f"PRIMARY KEY ({', '.join(COLUMNS)}))"
                )
                known = {k: json.loads(v) for k, v in self.db.execute("SELECT key, value FROM identity")}
                if not known:
                    rows = [(k, json.dumps(v)) for k, v in identity.items()]
                    self.db.executemany("INSERT INTO identity VALUES (?, ?)", rows)
        differing = [f"{k} {known.get(k)!r}, not {v!r}" for k, v in identity.items() if known and known.get(k) != v]
        if differing:
            self.close()
            raise UserError(f"{self.path!r} holds a sweep with {'; '.join(differing)}: choose another --out")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.db is not None:
            self.db.close()

    def add(self, cells, measured):
        """Keep what cells gave that all are the same, all or none of them."""
        moved = measured.influence.numpy().astype("<f4").tobytes()
        rows = [
            (*astuple(cell), *astuple(measured.scores), measured.rows, measured.seconds, moved) for cell in cells
        ]  # SQLite has no NaN: it is stored as NULL.
        with self._told(), self._transaction():
            self.db.executemany(f"INSERT INTO cell VALUES ({', '.join('?' * len(COLUMNS + VALUES))}, ?)", rows)

    def results(self):
        """`{Cell: Measured}` of all finished cells."""
        with self._told():
            table = self.db.execute(f"SELECT {', '.join(COLUMNS + VALUES)}, influence FROM cell").fetchall()
        found = {}
        for *row, moved in table:
            values = [math.nan if v is None else v for v in row]
            cell, (*scores, rows, seconds) = Cell(*values[: len(COLUMNS)]), values[len(COLUMNS) :]
            influence = torch.from_numpy(np.frombuffer(moved, "<f4").astype(np.float32).reshape(3, -1))
            found[cell] = Measured(Scores(*scores), rows, seconds, influence)
        return found

    @contextlib.contextmanager
    def _transaction(self):
        self.db.execute("BEGIN EXCLUSIVE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # A full disk has ended it already.
                self.db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _told(self):
        """SQLite's errors, and what to do about them."""
        try:
            yield
        except (sqlite3.DatabaseError, json.JSONDecodeError) as e:
            self.close()
            if "locked" in str(e):
                raise UserError(
                    f"{self.path!r} is in use by another process, probably a sweep with the same --out: wait for it to "
                    "end, or choose another --out"
                ) from e
            if any(words in str(e) for words in ("full", "I/O", "readonly", "unable to open")):
                raise UserError(
                    f"{self.path!r} cannot be written to ({e}): make room or set its permissions and run the command "
                    "again, which goes on from the last finished cell, or choose another --out"
                ) from e
            raise UserError(f"{self.path!r} is not a sweep's file ({e}); choose another --out") from e


# ----------------------------------------------------------------------------
# The work.


@dataclass(frozen=True)
class Sampling:
    """What the cells of a sweep have in common. source: whose model, see `load_lab`."""

    samples: int
    sampler: str
    steps: int
    seed: int
    source: str | None = None

    @property
    def name(self):
        return "digits" if self.source is None else Path(self.source).stem

    def identity(self, lab):
        """What a Store of this job is known by."""
        name = "shipped" if self.source is None else Path(self.source).name
        common = dict(samples=self.samples, sampler=self.sampler, steps=self.steps, seed=self.seed)
        return dict(**common, model=name, **measured_by(lab))


# The models that the experiments alone need. They are in the repository, not in what is installed.
EXPERIMENTS = ("clips", "digits-seed1", "digits-seed2", "emoji-seed1", "emoji-seed2", "optdigits")


def experiment(name):
    """The path of one of EXPERIMENTS' model files; raises UserError where the package came without them."""
    path = Path(__file__).parent / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"model {name!r} is not in the installed package; run this in a clone of the repository")
    return path


def load_lab(source, device):
    """Return the `model.Lab` of a source: the shipped digits for None, a model file, or what a function gives.

    source: None, the name of a model that ships (`emoji`) or of an experiment (`clips`), the path of a .safetensors
    file that `lab/train.py` wrote, or `module:function`, which is called with the device. Raises UserError, with the
    source, when there is none or it is no lab; what the function itself raises is passed on.
    """
    if source is None:
        return model.load(device=device)
    if source in EXPERIMENTS:
        return model.load(experiment(source), device)
    if source in model.shipped():
        return model.load(model.shipped()[source], device)
    if source.endswith(".safetensors"):
        return model.load(source, device)
    module, _, function = source.partition(":")
    if not module or not function:
        known = sorted({*EXPERIMENTS, *model.shipped()})
        raise UserError(
            f"model must be given as module:function, a .safetensors file or one of {', '.join(known)}, got {source!r}"
        )
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError) as e:  # A relative name is a TypeError.
        raise UserError(f"model {source!r} cannot be loaded ({e}); is its folder on PYTHONPATH?") from e
    if not callable(make) or not _takes_a_device(make):
        raise UserError(
            f"model {source!r} is not a function of one's own: it is called with a device and returns a lab.model.Lab"
        )
    try:
        return model.check_lab(make(device), source)
    except SystemExit as e:
        raise UserError(f"model {source!r} ends the command; it is to return a lab.model.Lab") from e


def _takes_a_device(function):
    """Whether it is one of Python that can be called so; of those that are built in none gives a lab."""
    try:
        inspect.signature(function).bind("cpu")
    except (TypeError, ValueError):
        return False
    return not inspect.isbuiltin(function)


def measured_by(lab):
    """What moves the numbers of a cell beside its settings: the weights that sample and judge, and the scores' code."""
    return dict(weights=model.fingerprint(lab), scores=SCORES_VERSION)


def decisions(job, cell):
    """What tells the cell from others: two with equal decisions guide the same steps alike, and give the same."""
    if cell.weight == 1:
        return None
    sigmas, fixed = evaluations(job.sampler, job.steps)
    if not fixed:
        return cell
    guided = tuple(cell.interval.mask(sigmas).tolist())
    return (cell.weight, guided) if any(guided) else None


def rows_per_sample(job, cell):
    """The network evaluations that a sample of this cell takes (an adaptive sampler takes a few more or less)."""
    sigmas, _ = evaluations(job.sampler, job.steps)
    return len(sigmas) + (cell.interval.mask(sigmas).sum().item() if cell.weight != 1 else 0)


def measure_cell(lab, job, cell, progress=None):
    """Sample and score one cell; return what it gave."""
    setting = Guidance("", cell.weight, cell.interval)
    drawn = sample(lab, setting, job.samples, job.sampler, job.steps, job.seed, progress)
    scores, influence = judge_samples(lab, drawn.x, drawn.labels)
    return Measured(scores, drawn.rows, drawn.seconds, influence)


_one_at_a_time = threading.Lock()  # A Dask worker may have threads; torch's random numbers belong to the process.


def _task(job, cell, identity, device=None, progress=None):
    """`measure_cell` wherever it may run."""
    with _one_at_a_time:
        lab = _lab(job.source, device or workers.device(), identity["weights"], identity["scores"])
        return measure_cell(lab, job, cell, progress)


@functools.lru_cache(maxsize=8)
def _lab(source, device, weights, scores):
    """The `Lab` of a source, once in a process; raises UserError unless it measures as the sweep began to."""
    lab = load_lab(source, device)
    here, expected = measured_by(lab), dict(weights=weights, scores=scores)
    if here != expected:
        raise UserError(
            f"the worker on {socket.gethostname()} would measure something else: its model {source or 'digits'!r} has "
            f"{here}, the sweep {expected}; install the same version and copy the same model file to each machine, and "
            "start the workers again"
        )
    return lab


def _measured(todo, stores, devices, cluster, progress):
    """Yield `(job, cell, Measured)` as they are done: here on one device, or wherever the workers are."""
    if cluster is None and len(devices) == 1:
        for job, cell in todo:
            identity, batch_done = stores[job].identity, functools.partial(progress, job, cell)
            yield job, cell, _task(job, cell, identity, devices[0], batch_done)
        return
    device = devices[0] if cluster and devices else None
    tasks = {
        (job, cell): (
            (f"{job.name} {job.sampler} {job.steps} steps", f"w={cell.weight:g} {cell.interval}"),
            _task, job, cell, stores[job].identity, device,
        )
        for job, cell in todo
    }  # fmt: skip
    for (job, cell), measured in workers.run(tasks, devices, cluster):
        progress(job, cell, job.samples)
        yield job, cell, measured


def complete(stores, cells, devices=("cpu",), cluster=None):
    """Measure the cells that their stores do not hold yet; return `{job: {Cell: Measured}}` of all of them.

    stores: `{job: Store}`; cells: `{job: [Cell]}`; devices, cluster: see `workers.run`. Cells of equal `decisions`
    are measured once. A progress bar on stderr tells the time that is left.
    """
    held = {job: store.results() for job, store in stores.items()}
    total = sum(map(len, cells.values()))
    done = sum(cell in held[job] for job in cells for cell in cells[job])
    if done:
        print(f"{done} of {total} cells are done already", file=sys.stderr)
    alike = {}  # {(job, decisions): the cells to be measured as one}
    for job in cells:
        known = {decisions(job, cell): cell for cell in held[job]}
        for cell in cells[job]:
            if cell not in held[job]:
                same = decisions(job, cell)
                if same in known:
                    measured = held[job][cell] = held[job][known[same]]
                    stores[job].add([cell], measured)
                else:
                    alike.setdefault((job, same), []).append(cell)
    _tell_alike(cells)
    done = total - sum(map(len, alike.values()))
    todo = {(job, same[0]): same for (job, _), same in alike.items()}
    if cluster or len(devices) > 1:  # The longest first, so that no worker is left with one while the others are done.
        longest = sorted(todo, key=lambda at: at[0].samples * rows_per_sample(*at), reverse=True)
        todo = {at: todo[at] for at in longest}
    work = sum(job.samples * rows_per_sample(job, cell) for job, cell in todo)
    with tqdm(total=work, unit="row", unit_scale=True, mininterval=0.5) as bar:

        def progress(job, cell, images):
            bar.set_description(f"{job.sampler} w={cell.weight:g} {cell.interval}", refresh=False)
            bar.update(images * rows_per_sample(job, cell))

        with contextlib.closing(_measured(todo, stores, devices, cluster, progress)) as found:
            for job, cell, measured in found:
                stores[job].add(todo[job, cell], measured)
                held[job] |= dict.fromkeys(todo[job, cell], measured)
                done += len(todo[job, cell])
                bar.set_postfix_str(f"{done} of {total} cells")
    return {job: {cell: held[job][cell] for cell in sorted(cells[job])} for job in cells}


def _tell_alike(cells):
    """Say which intervals guide no step, and how many cells take the numbers of another."""
    total = sum(map(len, cells.values()))
    repeated = total - len({(job, decisions(job, cell)) for job in cells for cell in cells[job]})
    for job in cells:
        idle = {cell.interval for cell in cells[job] if cell.weight != 1 and decisions(job, cell) is None}
        if idle:
            sigmas, _ = evaluations(job.sampler, job.steps)
            some = ", ".join(map(str, sorted(idle, key=str)[:5])) + (", ..." if len(idle) > 5 else "")
            print(
                f"no step lies in {some}: {job.sampler} with {job.steps} steps goes from sigma {sigmas.max():.4g} to "
                f"{sigmas.min():.4g}; the numbers there are those without guidance",
                file=sys.stderr,
            )
    if repeated:
        print(f"{repeated} of {total} cells guide the same steps as another one: measured once", file=sys.stderr)


def run(out, sigma_los, sigma_his, weights, samples, sampler, steps, seed, devices=None, source=None, cluster=None):
    """Measure what is not done yet of a grid, print the table and write the pictures; return `{Cell: Measured}`.

    devices: the CPU if none are given; several share the cells. cluster: the address of a Dask scheduler, whose workers
    share them. Raises UserError, before anything is sampled if it can be known.
    """
    cells = grid(sigma_los, sigma_his, weights)
    get_sampler(sampler)
    check_seed(seed)
    workers.check(devices, cluster)
    devices = devices or ([] if cluster else ["cpu"])
    job = Sampling(samples, sampler, steps, seed, source)
    lab = load_lab(source, "cpu" if cluster else devices[0])
    out = output_folder(out)
    with Store(out / "sweep.sqlite", job.identity(lab)) as store:
        results = complete({job: store}, {job: cells}, devices, cluster)[job]
        write(out, results)
    return results


# ----------------------------------------------------------------------------
# What a person sees.


def frontier(results):
    """The cells that no other cell beats in both accuracy and distance, from the least accurate on."""
    return compare.front({cell: (r.scores.accuracy, r.scores.fd) for cell, r in results.items()})


def table(results, form=aligned):
    """The cells as a table, by weight and interval; `*` marks those of the frontier. form: as for `demo.table`."""
    best, body = set(frontier(results)), []
    for cell in sorted(results):
        s = results[cell].scores
        where = "none" if cell.weight == 1 else "everywhere" if cell.everywhere else str(cell.interval)
        fd = f"{1000 * s.fd:.2f} [{1000 * s.fd_low:.2f}, {1000 * s.fd_high:.2f}]"
        star = "*" if cell in best else ""
        cost = f"{results[cell].rows:.1f}"
        variety = "n/a" if math.isnan(s.variety) else f"{s.variety:.3f}"  # A class has fewer than two samples.
        body.append([where, f"{cell.weight:g}", fd, f"{s.accuracy:.1%}", variety, cost, star])
    head = ["interval", "weight", "1000 FD [95 % CI]", "accuracy", "variety", "NFE", "frontier"]
    return form(head, body)


def write(out, results):
    """Print the table; write sweep.md, heatmaps.png and frontier.png to the folder `out`."""
    print(table(results, printed))
    with atomic_path(out / "sweep.md") as tmp:
        tmp.write_text(table(results) + "\n")
    plots.heatmaps(out / "heatmaps.png", results)
    plots.frontier(out / "frontier.png", results, frontier(results))
    print(f"\nwrote sweep.md, heatmaps.png and frontier.png to {out}; sweep.sqlite there holds every cell")

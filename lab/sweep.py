"""A grid over intervals and weights, measured cell by cell and resumed wherever it was cut off.

Each finished cell is one row of `sweep.sqlite`, committed before the next begins: whatever stops a sweep, the
same command goes on from there and ends with the same table. The pictures and the table are drawn from the
file alone.
"""

import contextlib
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

from tqdm.auto import tqdm

from ..sampler_patch import GuidanceInterval
from . import model, plots
from .files import atomic_path, output_folder
from .metrics import Scores, score
from .sampling import Setting, check_weight, get_sampler, karras_sigmas, sample

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


def load_lab(source, device):
    """The shipped model for None, else what the function `module:function` returns for a device: a `model.Lab`."""
    if source is None:
        return model.load(device=device)
    module, _, function = source.partition(":")
    if not function:
        raise ValueError(f"model must be given as module:function, got {source!r}")
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


def measure(lab, cell, samples, sampler, steps, seed, progress=None):
    """Sample and score one cell; return its Result."""
    setting = Setting("", cell.weight, cell.interval)
    drawn = sample(lab, setting, samples, sampler, steps, seed, progress)
    return Result(score(lab, drawn.x, drawn.labels), drawn.rows, drawn.seconds)


def _worker(todo, done, source, device, job):
    """Take cells until there are none; runs in a process of its own, one for each device."""
    lab = load_lab(source, device)
    for cell in iter(todo.get, None):
        done.put((cell, measure(lab, cell, **job)))


def _results(lab, cells, source, devices, job, progress):
    """Yield `(cell, Result)` as they are done: here on one device, or in a process for each of several."""
    if len(devices) == 1:
        for cell in cells:
            yield cell, measure(lab, cell, **job, progress=lambda n, cell=cell: progress(cell, n))
        return
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for cell in [*cells, *[None] * len(devices)]:
        todo.put(cell)
    workers = [context.Process(target=_worker, args=(todo, done, source, d, job), daemon=True) for d in devices]
    for worker in workers:
        worker.start()
    try:
        for _ in cells:
            while True:
                with contextlib.suppress(queue.Empty):
                    cell, result = done.get(timeout=5)
                    break
                if any(w.exitcode for w in workers):
                    raise ChildProcessError("a worker died; the cells that are done are kept, run the command again")
            progress(cell, job["samples"])
            yield cell, result
    finally:
        for worker in workers:
            worker.terminate()


def run(out, sigma_los, sigma_his, weights, samples, sampler, steps, seed, devices=("cpu",), source=None):
    """Measure what is not done yet of a grid, print the table and write the pictures; return `{Cell: Result}`.

    Raises ValueError or OSError, as `lab.demo.run` does, before anything is sampled.
    """
    cells = grid(sigma_los, sigma_his, weights)
    get_sampler(sampler)
    out = output_folder(out)
    lab = load_lab(source, devices[0])
    job = dict(samples=samples, sampler=sampler, steps=steps, seed=seed)
    store = Store(out / "sweep.sqlite", dict(**job, model=source or "shipped", weights=fingerprint(lab)))
    done = store.results()
    todo = [cell for cell in cells if cell not in done]
    sigmas = karras_sigmas(steps)[:-1]

    def cost(cell):  # In rows of one evaluation per step, which is all that the bar's estimate needs.
        return len(sigmas) + (cell.interval.mask(sigmas).sum().item() if cell.weight != 1 else 0)

    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are done already", file=sys.stderr)
    with tqdm(total=samples * sum(map(cost, todo)), unit="row", unit_scale=True) as bar:

        def progress(cell, images):
            bar.set_description(f"w={cell.weight:g} {cell.interval}")
            bar.update(images * cost(cell))

        for count, (cell, result) in enumerate(_results(lab, todo, source, devices, job, progress), 1):
            store.add(cell, result)
            bar.set_postfix_str(f"{len(cells) - len(todo) + count} of {len(cells)} cells")

    results = {cell: result for cell, result in store.results().items() if cell in set(cells)}
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

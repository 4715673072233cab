"""The sweep: nothing is lost when it is killed, and it ends with the same table."""

import math
import multiprocessing
import random
import sqlite3

import pytest
import torch
from guidance_interval import cli
from guidance_interval.lab import model, sweep
from guidance_interval.lab.scores import Scores
from PIL import Image

ARGS = dict(sigma_los=[0.0, 0.1], sigma_his=[2.5, math.inf], weights=[1.5, 2.0, 4.0], samples=20, sampler="euler")
ARGS |= dict(steps=5, seed=0)


def child(folder):
    torch.set_num_threads(1)
    sweep.run(folder, **ARGS)


def numbers(results):
    """Everything but the seconds."""
    return {cell: (r.scores, r.rows) for cell, r in results.items()}


def stored(folder):
    path = folder / "sweep.sqlite"
    if not path.exists():
        return {}
    with sqlite3.connect(path) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'cell'").fetchall():
            return {}
        return {row[:3]: row[3:] for row in db.execute("SELECT * FROM cell")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing interrupts: its folder and results."""
    folder = tmp_path_factory.mktemp("whole")
    context = multiprocessing.get_context("forkserver")  # As the killed ones run, with one thread.
    context.set_forkserver_preload(["guidance_interval.lab.sweep", "k_diffusion.sampling"])
    process = context.Process(target=child, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder, context


def test_ten_kills_lose_no_finished_cell_and_end_with_the_same_table(whole, tmp_path):
    expected, context = whole
    rng, before, kills = random.Random(0), {}, 0
    while kills < 10:
        process = context.Process(target=child, args=(tmp_path,))
        process.start()
        process.join(rng.uniform(0.2, 1.2))
        kills += process.is_alive()
        process.kill()
        process.join()
        now = stored(tmp_path)
        assert before.items() <= now.items()  # Neither lost nor measured again: seconds too are the same.
        if len(now) == len(stored(expected)):  # Done too soon: the kills go on in a sweep with one cell to do.
            with sqlite3.connect(tmp_path / "sweep.sqlite") as db:
                db.execute("DELETE FROM cell WHERE weight = 4 AND sigma_lo = 0.1 AND sigma_hi = 2.5")
            now = stored(tmp_path)
        before = now
    process = context.Process(target=child, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "sweep.md").read_text() == (expected / "sweep.md").read_text()
    assert not list(tmp_path.glob(".*tmp*"))


def test_a_finished_sweep_measures_nothing_and_draws_again(whole, monkeypatch, capsys):
    folder, _ = whole
    monkeypatch.setattr(sweep, "measure", lambda *_, **__: pytest.fail("measured again"))
    results = sweep.run(folder, **ARGS)
    assert len(results) == 13 and "13 of 13 cells are done already" in capsys.readouterr().err
    for name in ("heatmaps.png", "frontier.png"):
        with Image.open(folder / name) as image:
            assert image.width > 600


def test_several_devices_share_the_cells(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = sweep.run(tmp_path, **{**ARGS, "weights": [1.5]}, devices=("cpu", "cpu"))
    expected, _ = whole
    alone = {c: r for c, r in sweep.Store(expected / "sweep.sqlite", {}).results().items() if c in shared}
    assert numbers(shared) == numbers(alone) and len(shared) == 5


def test_the_grid_holds_cfg_everywhere_and_no_guidance():
    cells = sweep.grid([0.1, 3.0], [2.5, 5.0], [2.0])
    assert sweep.Cell(1.0, 0.0, math.inf) in cells and sweep.Cell(2.0, 0.0, math.inf) in cells
    assert [c for c in cells if not c.everywhere] == [
        sweep.Cell(2.0, 0.1, 2.5), sweep.Cell(2.0, 0.1, 5.0), sweep.Cell(2.0, 3.0, 5.0)
    ]  # fmt: skip


def test_the_frontier_is_what_nothing_beats():
    def result(accuracy, fd):
        return sweep.Result(Scores(fd, fd, fd, accuracy, 1.0), 20.0, 1.0)

    a, b, c, d = (sweep.Cell(2.0, 0.1, hi) for hi in (1.0, 2.0, 3.0, 4.0))
    results = {a: result(0.9, 1.0), b: result(0.95, 1.5), c: result(0.94, 1.6), d: result(0.99, 4.0)}
    assert sweep.frontier(results) == [a, b, d]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--weight", "1"], "weight must be a number above 1"),
        (["--sigma-lo", "3", "--sigma-hi", "2"], "no sigma_lo of [3.0] lies below a sigma_hi of [2.0]"),
        (["--sigma-lo", "-1"], "sigma_lo must not be negative, got -1.0"),
        (["--sampler", "eular"], "unknown sampler 'eular'"),
        (["--model", "nowhere"], "model must be given as module:function or a .safetensors file, got 'nowhere'"),
        (["--model", "nowhere.safetensors"], "model file 'nowhere.safetensors' does not exist"),
        (["--model", "nowhere:load"], "model 'nowhere:load' cannot be loaded (No module named 'nowhere')"),
    ],
)
def test_bad_arguments_are_told_in_one_line(tmp_path, capsys, args, says):
    assert cli.main(["sweep", "--out", str(tmp_path), *args]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_sweep_is_refused(whole, capsys):
    folder, _ = whole
    before = (folder / "sweep.sqlite").read_bytes()
    assert cli.main(["sweep", "--out", str(folder), "--samples", "20", "--sampler", "euler", "--steps", "6"]) == 2
    assert "holds a sweep with steps 5, not 6: choose another --out" in capsys.readouterr().err
    assert (folder / "sweep.sqlite").read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path, capsys):
    (tmp_path / "sweep.sqlite").write_text("not a database, by far" * 100)
    assert cli.main(["sweep", "--out", str(tmp_path), "--samples", "20"]) == 2
    assert "is not a sweep's file" in capsys.readouterr().err


def test_a_model_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from guidance_interval.lab import model\nload = lambda d: model.load(device=d)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lab = sweep.load_lab("my_model:load", "cpu")
    assert sweep.fingerprint(lab) == sweep.fingerprint(model.load())

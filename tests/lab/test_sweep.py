"""The sweep: nothing is lost when it is killed, and it ends with the same table."""

import math
import multiprocessing
import random
import re
import sqlite3
import sys

import pytest
import torch
from guidance_interval import cli
from guidance_interval.errors import UserError
from guidance_interval.lab import sweep
from guidance_interval.lab.scores import SCORES_VERSION, Scores
from guidance_interval.toy import model, sampling
from PIL import Image

ARGS = dict(sigma_los=[0.0, 0.1], sigma_his=[2.5, math.inf], weights=[1.5, 2.0, 4.0], samples=20, sampler="euler")
ARGS |= dict(steps=5, seed=0)


def child(folder):
    torch.set_num_threads(1)
    sweep.run(folder, **ARGS)


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
    monkeypatch.setattr(sweep, "measure_cell", lambda *_, **__: pytest.fail("measured again"))
    results = sweep.run(folder, **ARGS)
    assert len(results) == 13 and "13 of 13 cells are done already" in capsys.readouterr().err
    for name in ("heatmaps.png", "frontier.png"):
        with Image.open(folder / name) as image:
            assert image.width > 600


def test_the_grid_holds_cfg_everywhere_and_no_guidance():
    cells = sweep.grid([0.1, 3.0], [2.5, 5.0], [2.0])
    assert sweep.Cell(1.0, 0.0, math.inf) in cells and sweep.Cell(2.0, 0.0, math.inf) in cells
    assert [c for c in cells if not c.everywhere] == [
        sweep.Cell(2.0, 0.1, 2.5), sweep.Cell(2.0, 0.1, 5.0), sweep.Cell(2.0, 3.0, 5.0)
    ]  # fmt: skip


def test_the_frontier_is_what_nothing_beats():
    def result(accuracy, fd):
        return sweep.Measured(Scores(fd, fd, fd, accuracy, 1.0), 20.0, 1.0)

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
        (["--model", "nowhere"], "model must be given as module:function, a .safetensors file or one of clips, "),
        (["--cluster", "a:1", "--device", "cpu", "cpu"], "--cluster takes one --device for all its workers, or none"),
        (["--model", "nowhere.safetensors"], "model file 'nowhere.safetensors' does not exist"),
        (["--model", "nowhere:load"], "model 'nowhere:load' cannot be loaded (No module named 'nowhere')"),
    ],
)
def test_bad_arguments_are_told_in_one_line(tmp_path, capsys, args, says):
    assert cli.main(["sweep", "--out", str(tmp_path), *args]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------
# The file.


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(samples=30), "samples 20, not 30"),
        (dict(sampler="heun"), "sampler 'euler', not 'heun'"),
        (dict(steps=6), "steps 5, not 6"),
        (dict(seed=1), "seed 0, not 1"),
        (dict(source="digits-seed1"), "model 'shipped', not 'digits-seed1'; weights '"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(whole, other, says):
    folder, _ = whole
    before = (folder / "sweep.sqlite").read_bytes()
    with pytest.raises(UserError, match=f"holds a sweep with {re.escape(says)}.*: choose another --out"):
        sweep.run(folder, **{**ARGS, **other})
    assert (folder / "sweep.sqlite").read_bytes() == before


def test_scores_of_another_version_are_not_mixed(whole, monkeypatch, capsys):
    folder, _ = whole
    monkeypatch.setattr(sweep, "SCORES_VERSION", 99)
    args = ["--samples", "20", "--sampler", "euler", "--steps", "5"]
    assert cli.main(["sweep", "--out", str(folder), *args]) == 2
    assert f"holds a sweep with scores {SCORES_VERSION}, not 99: choose another --out" in capsys.readouterr().err


def test_a_file_that_is_no_database_is_refused(tmp_path, capsys):
    (tmp_path / "sweep.sqlite").write_text("not a database, by far" * 100)
    assert cli.main(["sweep", "--out", str(tmp_path), "--samples", "20"]) == 2
    assert "is not a sweep's file" in capsys.readouterr().err


def test_a_folder_that_another_process_uses_is_refused_and_free_again_after_it(tmp_path, capsys):
    args = ["sweep", "--out", str(tmp_path), "--samples", "20", "--sampler", "euler", "--steps", "5"]
    with sweep.Store(tmp_path / "sweep.sqlite", {}) as store:
        assert cli.main(args) == 2
        assert "sweep.sqlite' is in use by another process, probably a sweep with" in capsys.readouterr().err
        store.add([sweep.Cell(2.0, 0.1, 2.5)], sweep.Measured(Scores(1, 1, 1, 1, 1), 1, 1))
    with sweep.Store(tmp_path / "sweep.sqlite", {}) as store:
        assert len(store.results()) == 1


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    measured, added = sweep.Measured(Scores(1.0, 1.0, 1.0, 1.0, 1.0), 1.0, 1.0), 0
    store = sweep.Store(tmp_path / "sweep.sqlite", {})
    store.db.execute("PRAGMA max_page_count = 10")  # SQLite's own "database or disk is full".
    with pytest.raises(UserError, match=r"sweep\.sqlite' cannot be written to \(database or disk is full\): make room"):
        for added in range(10_000):
            store.add([sweep.Cell(2.0, 0.0, 1.0 + added)], measured)
    with sweep.Store(tmp_path / "sweep.sqlite", {}) as store:
        assert len(store.results()) == added > 10


def test_a_folder_in_the_file_s_place_is_told(tmp_path, capsys):
    (tmp_path / "sweep.sqlite").mkdir()
    assert cli.main(["sweep", "--out", str(tmp_path), "--samples", "20"]) == 2
    assert "sweep.sqlite' cannot be written to (unable to open database file)" in capsys.readouterr().err


def test_a_variety_that_is_not_defined_stays_so(tmp_path):
    """One sample of each class has no distance to another; SQLite knows no NaN."""
    args = dict(ARGS, samples=10, sigma_los=[0.1], sigma_his=[2.5], weights=[2.0], steps=2)
    measured = sweep.run(tmp_path, **args)
    text = (tmp_path / "sweep.md").read_text()
    assert all(math.isnan(r.scores.variety) and r.scores.fd > 0 for r in measured.values()) and text.count("n/a") == 3
    again = sweep.run(tmp_path, **args)
    assert [math.isnan(r.scores.variety) for r in again.values()] == [True] * 3
    assert (tmp_path / "sweep.md").read_text() == text


# ----------------------------------------------------------------------------
# Cells that are the same.


def counted(monkeypatch):
    """The cells that are measured from here on."""
    seen, measure = [], sweep.measure_cell
    monkeypatch.setattr(
        sweep, "measure_cell", lambda lab, job, cell, *a: [seen.append(cell), measure(lab, job, cell, *a)][1]
    )
    return seen


def test_intervals_above_the_schedule_are_told_and_not_measured(tmp_path, monkeypatch, capsys):
    seen = counted(monkeypatch)
    args = dict(ARGS, sigma_los=[50.0], sigma_his=[60.0, 80.0], weights=[2.0, 4.0], steps=2)
    results = sweep.run(tmp_path, **args)
    error = capsys.readouterr().err
    assert "no step lies in (50, 60], (50, 80]: euler with 2 steps goes from sigma 40 to 0.01" in error
    assert "4 of 7 cells guide the same steps as another one: measured once" in error
    assert len(results) == 7 and len(seen) == 3
    none = results[sweep.Cell(1.0, 0.0, math.inf)]
    assert {results[c] for c in results if not c.everywhere} == {none}
    assert results[sweep.Cell(2.0, 0.0, math.inf)] != none


def test_cells_that_guide_the_same_steps_are_measured_once_and_are_the_same(tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    sigmas, _ = sampling.evaluations("euler", 5)
    between = float(sigmas[1] + sigmas[2]) / 2
    args = dict(ARGS, sigma_los=[0.0], sigma_his=[between, between * 1.01], weights=[2.0])
    first, second = (sweep.Cell(2.0, 0.0, hi) for hi in args["sigma_his"])
    results = sweep.run(tmp_path, **args)
    assert results[first] == results[second] and {first, second} & {*seen} == {first}
    job = sweep.Sampling(20, "euler", 5, 0)
    alone = sweep.measure_cell(model.load(), job, second)
    assert (alone.scores, alone.rows) == (results[second].scores, results[second].rows)
    del seen[:]
    third = sweep.Cell(2.0, 0.0, between * 1.02)  # Later, from the file.
    assert sweep.run(tmp_path, **{**args, "sigma_his": [between * 1.02]})[third] == results[first] and not seen


def test_an_adaptive_sampler_s_cells_are_never_taken_for_one():
    job = sweep.Sampling(20, "dpm_adaptive", 5, 0)
    a, b = sweep.Cell(2.0, 0.1, 2.5), sweep.Cell(2.0, 0.1, 2.5001)
    assert sweep.decisions(job, a) != sweep.decisions(job, b)
    fixed = sweep.Sampling(20, "dpm_fast", 5, 0)
    assert sweep.decisions(fixed, a) == sweep.decisions(fixed, b) != sweep.decisions(fixed, sweep.Cell(3.0, 0.1, 2.5))


# ----------------------------------------------------------------------------
# The model.


def test_a_model_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from guidance_interval.toy import model\nload = lambda d: model.load(device=d)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)  # The documentation's, which other tests run.
    lab = sweep.load_lab("my_model:load", "cpu")
    assert sweep.measured_by(lab) == sweep.measured_by(model.load())


def test_the_models_that_ship_have_names():
    clips = sweep.load_lab("clips", "cpu")
    assert clips.config["image_channels"] == 6
    with pytest.raises(UserError, match=r"a \.safetensors file or one of clips, .*, optdigits, got 'clip'"):
        sweep.load_lab("clip", "cpu")


def test_a_worker_with_another_model_is_refused():
    with pytest.raises(UserError, match=r"the worker on .* would measure something else: its model 'digits' has"):
        sweep._lab(None, "cpu", "0123456789abcdef", SCORES_VERSION)

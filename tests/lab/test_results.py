"""The results page: the quick run draws and writes everything, and what it concludes follows from the cells."""

import dataclasses
import math
import re

import pytest
import torch
from guidance_interval import cli
from guidance_interval.lab import results, sweep
from guidance_interval.lab.compare import Ratio
from guidance_interval.lab.scores import Scores
from guidance_interval.toy import sampling
from PIL import Image


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    cli.main(["results", "--quick", "--out", str(out), "--device", "cpu"])
    return out


def test_the_page_shows_every_figure_with_its_command(quick):
    text = (quick / "results.md").read_text()
    pictures = re.findall(r"\]\((results/\w+\.png)\)", text)
    assert len(pictures) == 8 and {p.name for p in (quick / "results").iterdir()} == {p[8:] for p in pictures}
    for name in pictures:
        with Image.open(quick / name) as image:
            assert image.width > 600 and len(image.convert("L").getcolors()) > 20
    for figure in results.FIGURES:
        assert f'$ make results ARGS="--quick --only {figure}"' in text
    assert not re.search(r"\bnan\b", text)


def test_a_second_run_measures_nothing_and_writes_the_same_page(quick, monkeypatch):
    before = (quick / "results.md").read_text()
    monkeypatch.setattr(sweep, "measure_cell", lambda *_, **__: pytest.fail("measured again"))
    cli.main(["results", "--quick", "--out", str(quick), "--device", "cpu"])
    assert (quick / "results.md").read_text() == before


def test_one_figure_alone_prints_what_the_page_says_of_it(quick, capsys):
    cli.main(["results", "--quick", "--out", str(quick), "--device", "cpu", "--only", "cost"])
    assert capsys.readouterr().out.strip() in (quick / "results.md").read_text()


def test_the_numbers_of_the_page_are_those_of_the_cells(quick):
    path = quick / "emoji-dpmpp_2m-16-seed0.sqlite"
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep.Store(path, {"samples": 7})
    with sweep.Store(path, {}) as store:
        held = store.results()
    cell = held[sweep.Cell(4.0, 0.1, 5.5)].scores
    text = (quick / "results.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| interval (0.1, 5.5] | ") and "%" in x)
    assert line.endswith(f"{1000 * cell.fd:.1f}, {cell.accuracy:.1%} |")


def test_the_headline_is_told_of_samples_that_the_search_never_saw(quick):
    """Each side's best of the search, sampled again from another seed; the table has the numbers of the latter."""
    scale = results.QUICK
    text = (quick / "results.md").read_text()
    for label, job in results.headline_jobs(scale).items():
        stores = [
            sweep.Store(quick / f"{j.name}-{j.sampler}-{j.steps}-seed{j.seed}.sqlite", {})
            for j in (job, results.confirming(scale, job))
        ]
        searched, confirmed = (store.results() for store in stores)
        for store in stores:
            store.close()
        cfg, limited = results.chosen(scale, searched)
        tried = [c for cells in results.headline_cells(scale)[1].values() for c in cells]
        assert searched[limited].scores.fd == min(searched[c].scores.fd for c in tried)
        assert cfg.everywhere and cfg != results.NONE
        assert set(confirmed) == {results.NONE, cfg, limited}
        assert confirmed[cfg].influence.shape[1] == scale.confirmed > scale.samples
        line = next(x for x in text.splitlines() if x.startswith(f"| {label} ") and "→" in x)
        for cell in (cfg, limited):
            s = confirmed[cell].scores
            assert f"{1000 * s.fd:.1f}, {s.accuracy:.1%}" in line


def test_a_figure_of_the_heatmap_is_stated_only_of_bounds_that_were_measured(tmp_path):
    def text(*sigma_los):
        scale = dataclasses.replace(results.QUICK, heat_weights=(2.0,), sigma_los=sigma_los, sigma_his=(1.0, math.inf))
        measured = {}
        for cell in sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights):
            value = 0.001 * (2 + cell.sigma_lo) * (3 if cell.sigma_hi == math.inf else 1)
            measured[cell] = sweep.Measured(Scores(value, value, value, 0.9, 1.0), 20.0, 1.0, torch.zeros(3, 20))
        return results.draw_heatmap(scale, {results.main_job(scale): measured}, tmp_path, "cpu")

    assert "lowest in (0, 1], 2.0. Guiding above 1 as well: +200 % [+200, +200]." in text(0.0, 0.05)
    assert "Guiding below 0.05 as well: -2 % [-2, -2]." in text(0.0, 0.05, 0.25)
    assert "below" not in text(0.0, 0.25)


def test_the_thirds_are_all_steps_and_each_once():
    sigmas = sampling.karras_sigmas(results.STEPS)[:-1]
    masks = torch.stack([interval.mask(sigmas) for interval in results.thirds().values()])
    assert masks.sum(0).tolist() == [1] * results.STEPS
    assert masks.sum(1).tolist() == [5, 6, 5]


def test_the_headline_claims_nothing_that_was_not_measured():
    lower, higher, unclear = (Ratio(v, v - 0.1, v + 0.1) for v in (0.7, 1.3, 1.0))
    verdict = results.headline_verdict
    assert verdict(False, [lower, lower], 0.0) == "yes"
    assert verdict(False, [lower, lower], -0.01) == verdict(False, [lower, unclear], 0.1) == "unclear"
    assert verdict(False, [lower, higher], 0.1) == "no"
    assert verdict(True, [lower, lower], 0.1) == "open"  # CFG at a higher weight may be better still.

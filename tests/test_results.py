"""The results page: the quick run draws and writes everything, and what it concludes follows from the cells."""

import math
import re

import pytest
import torch
from guidance_interval import cli
from guidance_interval.lab import results, sampling, sweep
from guidance_interval.lab.compare import Ratio
from guidance_interval.lab.scores import Scores
from PIL import Image


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    cli.main(["results", "--quick", "--out", str(out), "--device", "cpu"])
    return out


def test_the_page_shows_every_figure_with_its_command(quick):
    text = (quick / "results.md").read_text()
    pictures = re.findall(r"\]\((results/\w+\.png)\)", text)
    assert len(pictures) == 10 and {p.name for p in (quick / "results").iterdir()} == {p[8:] for p in pictures}
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
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep.Store(quick / "digits-dpmpp_2m-16.sqlite", {"samples": 7})
    with sweep.Store(quick / "digits-dpmpp_2m-16.sqlite", {}) as store:
        held = store.results()
    cell = held[sweep.Cell(4.0, 0.1, 2.5)].scores
    text = (quick / "results.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| interval (0.1, 2.5] | "))
    assert line.endswith(f"{1000 * cell.fd:.2f}, {cell.accuracy:.1%} |")


def test_a_figure_of_the_heatmap_is_stated_only_of_bounds_that_were_measured(tmp_path):
    fd = {(0.0, 1.0): 1.0, (0.05, 1.0): 1.02, (0.25, 1.0): 1.5, (0.0, 2.5): 2.0, (0.05, 2.5): 2.1, (0.25, 2.5): 3.0}

    def text(*sigma_los):
        scale = results.Scale(samples=20, heat_weights=(2.0,), sigma_los=sigma_los, sigma_his=(1.0, 2.5))
        measured = {}
        for cell in sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights):
            value = fd.get((cell.sigma_lo, cell.sigma_hi), 9.0) / 1000
            measured[cell] = sweep.Measured(Scores(value, value, value, 0.9, 1.0), 20.0, 1.0)
        return results.draw_heatmap(scale, {results.main_job(scale): measured}, tmp_path)

    assert "multiplies the distance by 2; raising `sigma_lo` from 0 up to 0.05 moves it by 5.0% at most" in text(
        0.0, 0.05, 0.25
    )
    assert "multiplies the distance by 2. Lowest: 1.00 in (0, 1]." in text(0.0, 0.25)  # As in the quick run.


def test_the_thirds_are_all_steps_and_each_once():
    sigmas = sampling.karras_sigmas(results.STEPS)[:-1]
    masks = torch.stack([interval.mask(sigmas) for interval in results.thirds().values()])
    assert masks.sum(0).tolist() == [1] * results.STEPS
    assert masks.sum(1).tolist() == [5, 6, 5]


def curve(*points):
    return [(float(w), a, fd, 32.0) for w, (a, fd) in enumerate(points, 1)]


def test_a_curve_reaches_an_accuracy_at_its_lowest_distance_from_there_on():
    line = curve((0.9, 1.0), (0.95, 4.0), (0.99, 2.0))
    assert results.reached(line, 0.9) == pytest.approx(1)
    assert results.reached(line, 0.925) == pytest.approx(2)  # Exponential between 1 and 4, half way.
    assert results.reached(line, 0.95) == pytest.approx(2)  # The next weight has more, for less.
    assert results.reached(line, 0.995) == math.inf


def test_a_comparison_tells_where_the_interval_loses():
    cfg = curve((0.9, 1.0), (0.95, 2.0), (0.99, 8.0))
    better, crossing = curve((0.9, 1.0), (0.95, 1.5), (0.98, 2.0)), curve((0.9, 1.0), (0.95, 3.0), (0.99, 4.0))
    won, lost = results.compare(cfg, better), results.compare(cfg, crossing)
    assert won.dominates and won.worst < 1 and won.best == (0.99, 0.98)
    assert not lost.dominates and lost.at == 0.95 and lost.worst == pytest.approx(1.5)


def test_the_headline_claims_nothing_that_was_not_measured():
    lower, higher, unclear = (Ratio(v, v - 0.1, v + 0.1) for v in (0.7, 1.3, 1.0))
    verdict = results.headline_verdict
    assert verdict(False, [lower, lower], 0.0) == "yes"
    assert verdict(False, [lower, lower], -0.01) == verdict(False, [lower, unclear], 0.1) == "unclear"
    assert verdict(False, [lower, higher], 0.1) == "no"
    assert verdict(True, [lower, lower], 0.1) == "open"  # CFG at a higher weight may be better still.

"""The main job, small; and the command line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from guidance_interval import cli
from guidance_interval.lab import demo, plots
from guidance_interval.lab.scores import Scores, judge_samples
from guidance_interval.toy import model
from guidance_interval.toy.sampling import Guidance, Samples, class_labels, sample
from PIL import Image

FAST = ["--samples", "60", "--steps", "8", "--sampler", "euler"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Two runs with the same seed."""
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    for folder in folders:
        assert cli.main(["demo", "--out", str(folder), *FAST]) == 0
    return folders, [json.loads((folder / "report.json").read_text()) for folder in folders]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert cli.main(["demo", "--out", str(folder), "--model", "digits", *FAST]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_the_demo_leaves_its_pictures_and_nothing_else(reports, digits):
    for folder in (reports[0][0], digits[0]):
        assert {p.name for p in folder.iterdir()} == {"grid.png", "tradeoff.png", "schedule.png", "report.json"}
        for name in ("grid.png", "tradeoff.png", "schedule.png"):
            with Image.open(folder / name) as image:
                image.load()
                assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_emoji_are_in_colour_and_the_digits_are_not(reports, digits):
    def saturated(folder):
        with Image.open(folder / "grid.png") as image:
            return (torch.tensor(list(image.convert("HSV").getdata()))[:, 1] > 100).float().mean()

    assert saturated(reports[0][0]) > 0.05 and saturated(digits[0]) == 0


def test_the_same_seed_gives_the_same_numbers(reports):
    _, (a, b) = reports
    for report in (a, b):
        for setting in report["settings"]:
            setting.pop("seconds")
    assert a == b


def test_the_report_holds_every_setting_and_its_cost(reports, digits):
    for report in (reports[1][0], digits[1]):
        none, cfg, strong, limited, low_on, high_on = report["settings"]
        assert none["rows_per_sample"] == 8 and none["interval"] is None
        assert all(s["rows_per_sample"] == 16 and s["interval"] is None for s in (cfg, strong))
        sigmas = report["sigmas"][:-1]
        for setting in (limited, low_on, high_on):
            lo, hi = setting["interval"]
            assert setting["rows_per_sample"] == 8 + sum(lo < s <= (hi or 1e9) for s in sigmas)
        assert high_on["interval"][1] is None  # JSON has no infinity.
        assert report["versions"].keys() == {"guidance_interval", "python", "torch", "k_diffusion"}
        assert report["arguments"]["seed"] == 0 and len(report["findings"]) == 4
    assert digits[1]["real"]["variety"] == pytest.approx(1, abs=0.2)
    assert digits[1]["settings"][0]["class_fd"] is None and reports[1][0]["settings"][0]["class_fd"] > 0


def test_the_two_that_compete_have_more_images_and_the_same_first_ones():
    lab = model.load(model.shipped()["emoji"])
    settings = {k: Guidance(k, w) for k, w in (("none", 1.0), ("cfg", 1.5), ("limited", 2.0))}
    index = demo.shown(lab, ("animal-mammal",))
    few, many = demo.measure_all(lab, settings, index, 120, "euler", 2, 0)
    assert [r.drawn.num for r in few.values()] == [100] * 3
    assert {k: r.drawn.num for k, r in many.items()} == {"cfg": 120, "limited": 120}
    drawn = sample(lab, settings["cfg"], 100, "euler", 2, 0)
    assert few["cfg"].scores == judge_samples(lab, drawn.x, drawn.labels)[0]
    labels = class_labels(lab, 100)
    assert torch.equal(few["cfg"].drawn.x, drawn.x[index(labels)])
    chosen = labels[index(labels)]
    assert len(chosen) == plots.COLUMNS and (chosen == lab.config["classes"].index("animal-mammal")).all()


def judged(fd, influence, accuracy=0.8, rows=24.0, class_fd=math.nan):
    num = influence.shape[1]
    drawn = Samples(None, torch.arange(num) % 10, rows, 1.0)
    return demo.Result(Guidance("", 2.0), drawn, Scores(fd, fd, fd, accuracy, 1.0, class_fd), influence)


def test_findings_say_what_the_numbers_say(lab):
    still = torch.zeros(3, 50)
    noisy = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 20
    cfg, limited = judged(0.02, still), judged(0.014, still, 0.85, 17.0)
    few = dict(none=judged(0.01, still), limited=limited, low=judged(0.0141, noisy, rows=19.0), high=judged(0.1, still))
    against, none, low, high = demo.findings(lab, few, dict(cfg=cfg, limited=limited))
    assert against == (
        "Interval against CFG, 50 images of the same seeds: the distance is -30 % [-30, -30] (lower). "
        "Accuracy +5.0 points, rows 29.2% lower."
    )
    assert "conditional only, 50 images: the distance is +40 % [+40, +40] (higher)" in none
    assert "low part as well, 50 images: the distance is +1 % [" in low and "(unclear), rows 11.8% higher" in low
    assert "high part as well, 50 images: the distance is +614 %" in high and "(higher)" in high


def test_each_judge_speaks(lab):
    still = torch.zeros(3, 50)
    a, b = judged(0.01, still, class_fd=0.03), judged(0.02, still, class_fd=0.02)
    assert demo._ratios(lab, a, b) == (
        "-50 % [-50, -50] by the ruler (lower), +50 % [+50, +50] by the classifier (higher)"
    )


# ----------------------------------------------------------------------------
# The command line.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sigma-lo", "3", "--sigma-hi", "1"], "sigma_lo=3.0 and sigma_hi=1.0; swap"),
        (["--sigma-lo", "-1"], "sigma_lo must not be negative, got -1.0"),
        (["--sigma-hi", "nan"], "sigma_hi is NaN"),
        (["--weight", "1"], "weight must be a number above 1 (1 is conditional only) and at most 1000, got 1.0"),
        (["--weight", "inf"], "weight must be a number above 1"),
        (["--weight", "0"], "weight must be a number above 1"),
        (["--cfg-weight", "0.5"], "cfg_weight must be a number above 1"),
        (["--sampler", "eular"], "unknown sampler 'eular'; k-diffusion has"),
    ],
)
def test_bad_arguments_of_the_demo_are_told_in_one_line(tmp_path, capsys, args, says):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("guidance-interval: error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interval_that_no_step_falls_into_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"sigma 40 to 0.01, lies in the guidance interval \(100, 200\]"):
        code = cli.main(["demo", "--out", str(tmp_path), "--sigma-lo", "100", "--sigma-hi", "200", *FAST])
    assert code == 0 and (tmp_path / "report.json").exists()


def test_info_shows_presets_and_what_they_guide(capsys):
    assert cli.main(["info", "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert (
        "[.....ggggggggg......]\n  9 of 20 steps are guided (5 to 13): 29 network evaluations per image instead of 40"
        in out
    )
    assert "edm2-xxl-fid" in out and "arXiv 2404.07724" in out and "weight 2 (1.2 without the interval)" in out
    assert "weight 16; chosen by visual inspection" in out and "section 4.3" in out


def test_info_of_an_interval_of_one_s_own(capsys):
    assert cli.main(["info", "--scheduler", "flow", "--sigma-max", "1000", "--sigma-hi", "0.001"]) == 0
    out = capsys.readouterr().out
    assert (
        "yours: sigma in (0, 0.001]" in out
        and "None of the 20 steps is guided: 20 network evaluations per image instead of 40, 50% saved" in out
    )


def test_info_of_a_bad_schedule(capsys):
    assert cli.main(["info", "--sigma-min", "20", "--sigma-max", "10"]) == 2
    assert "sigma_min=20.0, sigma_max=10.0" in capsys.readouterr().err


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "guidance_interval", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "0.1.0"


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m guidance_interval info --steps 5000 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("karras schedule, 5000 steps") and not done.stderr

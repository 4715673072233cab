"""The main job, small; and the command line."""

import json
import subprocess
import sys

import pytest
from guidance_interval import cli
from guidance_interval.lab import demo
from guidance_interval.lab.sampling import Samples, Setting
from guidance_interval.lab.scores import Scores
from PIL import Image

FAST = ["--samples", "60", "--steps", "8", "--sampler", "euler"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Two runs with the same seed."""
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    for folder in folders:
        assert cli.main(["demo", "--out", str(folder), *FAST]) == 0
    return folders, [json.loads((folder / "report.json").read_text()) for folder in folders]


def test_the_demo_leaves_its_pictures_and_nothing_else(reports):
    folders, _ = reports
    assert {p.name for p in folders[0].iterdir()} == {"grid.png", "tradeoff.png", "schedule.png", "report.json"}
    for name in ("grid.png", "tradeoff.png", "schedule.png"):
        with Image.open(folders[0] / name) as image:
            image.load()
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_same_seed_gives_the_same_numbers(reports):
    _, (a, b) = reports
    for report in (a, b):
        for setting in report["settings"]:
            setting.pop("seconds")
    assert a == b


def test_the_report_holds_every_setting_and_its_cost(reports):
    _, (report, _) = reports
    none, *cfg, limited, low_on, high_on = report["settings"]
    assert none["rows_per_sample"] == 8 and none["interval"] is None
    assert len(cfg) >= 1 and all(s["rows_per_sample"] == 16 and s["interval"] is None for s in cfg)
    sigmas = report["sigmas"][:-1]
    for setting in (limited, low_on, high_on):
        lo, hi = setting["interval"]
        assert setting["rows_per_sample"] == 8 + sum(lo < s <= (hi or 1e9) for s in sigmas)
    assert high_on["interval"][1] is None  # JSON has no infinity.
    assert report["versions"].keys() == {"guidance_interval", "python", "torch", "k_diffusion"}
    assert report["real"]["variety"] == pytest.approx(1, abs=0.2)
    assert report["arguments"]["seed"] == 0 and len(report["findings"]) == 3


def run(weight, accuracy, fd, rows=32.0, margin=0.1):
    scores = Scores(fd=fd, fd_low=fd - margin, fd_high=fd + margin, accuracy=accuracy, variety=1.0)
    return Setting(f"CFG everywhere, w={weight:g}", weight), Samples(None, None, rows, 1.0), scores


@pytest.mark.parametrize(("target", "expected"), [(0.95, [1.5, 2.0]), (0.72, [1.125]), (0.999, [1.5, 2.0, 3.0])])
def test_cfg_weights_bracket_the_accuracy(target, expected):
    def measure(setting):
        return run(setting.weight, 1 - 0.3 / (1 + 4 * (setting.weight - 1)) ** 2, 1.0)

    limited = (Setting("interval", 4.0), None, run(4.0, target, 1.0)[2])
    extended = []
    runs = demo.bracket(measure, limited, lambda: extended.append(1))
    weights = [r[0].weight for r in runs]
    assert len(extended) == max(len(weights) - 2, 0)
    accuracies = [r[2].accuracy for r in runs]
    assert min(accuracies) <= target and (max(accuracies) >= target or len(runs) == demo.MAX_CFG_RUNS)
    assert set(expected) & set(weights)


def test_findings_say_what_the_numbers_say():
    limited = (Setting("interval", 4.0), Samples(None, None, 21.0, 1.0), run(4, 0.998, 1.0)[2])
    cfg = [run(1.5, 0.996, 2.0), run(2.0, 0.999, 4.0)]
    same, worse = run(4.0, 0.998, 1.0, 24.0), run(4.0, 1.0, 10.0, 29.0)
    better, low, high = demo.findings(cfg, limited, [("low", same), ("high", worse)])
    assert "At equal accuracy, 99.8%, which CFG everywhere has between w=1.5 and w=2" in better
    # Two thirds of the way from 2 to 4 on a logarithmic scale: 2^(1 + 2/3) = 3.175.
    assert "68.5% lower (95 % intervals do not overlap), rows are 34.4% lower" in better
    assert "low part as well: the distance is the same, accuracy +0.0 points, rows are 14.3% higher" in low
    assert "10.0 times as much, accuracy +0.2 points, rows are 38.1% higher" in high
    # Where several places have that accuracy, the lowest distance; and an interval that loses is said to lose.
    several = [run(1.25, 0.997, 0.5), run(1.5, 0.998, 0.5), run(2.0, 0.998, 0.6), run(4.0, 0.997, 0.4)]
    (worse,) = demo.findings(several, limited, [])
    assert "w=1.5: the distance is 2.0 times as much (95 % intervals do not overlap)" in worse


def test_no_equal_accuracy_is_claimed_where_there_is_none():
    limited = (Setting("interval", 4.0), Samples(None, None, 21.0, 1.0), run(4, 0.713, 5.0)[2])
    cfg = [run(1.01, 0.977, 2.0), run(2.0, 0.999, 4.0)]
    (sentence,) = demo.findings(cfg, limited, [])
    assert sentence == (
        "No comparison at equal accuracy: none of the weights of CFG everywhere that were tried comes to 71.3%. "
        "The nearest is CFG everywhere, w=1.01, with 97.7%: against it the distance is 2.5 times as much, "
        "rows are 34.4% lower."
    )


# ----------------------------------------------------------------------------
# The command line.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sigma-lo", "3", "--sigma-hi", "1"], "sigma_lo=3.0 and sigma_hi=1.0; swap"),
        (["--sigma-lo", "-1"], "sigma_lo must not be negative, got -1.0"),
        (["--sigma-hi", "nan"], "sigma_hi is NaN"),
        (["--weight", "1"], "weight must be a number above 1 (1 is no guidance) and at most 1000, got 1.0"),
        (["--weight", "inf"], "weight must be a number above 1"),
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
        "[.....ggggggggg......]\n  9 of 20 steps are guided (5 to 13): 29 network rows per image instead of 40" in out
    )
    assert "edm2-xxl-fid" in out and "arXiv 2404.07724" in out and "weight 2 (1.2 without the interval)" in out
    assert "weight 16; chosen by visual inspection" in out and "section 4.3" in out


def test_info_of_an_interval_of_one_s_own(capsys):
    assert cli.main(["info", "--scheduler", "flow", "--sigma-max", "1000", "--sigma-hi", "0.001"]) == 0
    out = capsys.readouterr().out
    assert (
        "yours: sigma in (0, 0.001]" in out
        and "None of the 20 steps is guided: 20 network rows per image instead of 40, 50% saved" in out
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

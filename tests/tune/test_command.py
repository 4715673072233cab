"""The command `tune`: the confirmation, killed processes, presets that are saved, and what is refused."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
from guidance_interval import cli, presets
from guidance_interval.errors import UserError
from guidance_interval.tune import command, confirm
from guidance_interval.tune.servers.backend import CONDITIONAL, Setting, everywhere
from optuna.trial import TrialState
from PIL import Image
from tune_harness import PROMPTS, Eye, Painter, make_search


@pytest.fixture(autouse=True)
def _own_presets(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "presets.toml"))


# ----------------------------------------------------------------------------
# The confirmation.


def test_the_confirmation_is_of_fresh_images_and_keeps_both_numbers(tmp_path):
    search = make_search(tmp_path, trials=12)
    search.run()
    before = len(search.backend.jobs)
    out = tmp_path / "out"
    found = confirm.report(search, out, confirm.confirm(search, out))
    assert found == json.loads((out / "confirmed.json").read_text())
    jobs = search.backend.jobs[before:]
    assert not {j.seed for j in jobs} & {j.seed for j in search.backend.jobs[:before]}
    baseline, *rest = found["settings"]
    assert baseline["id"] == "baseline" and 1 <= len(rest) <= 3
    for setting in found["settings"]:
        assert len(setting["images"]) == len(found["prompts"]) * len(found["seeds"]) == len(found["image_seeds"])
        for name, seed in zip(setting["images"], found["image_seeds"], strict=True):
            told = json.loads(Image.open(out / name).text["guidance_interval_tune"])
            assert told["of"][2] == seed
    for setting in rest:
        numbers = setting["confirmed"]
        for key in ("rows", "adherence", "variety", "drift"):
            value, low, high = numbers[key]["difference"]
            assert low <= value <= high
            assert math.isclose(numbers[key]["value"][0] - baseline["confirmed"][key]["value"][0], value, abs_tol=1e-9)
        assert setting["search"]["variety"] != numbers["variety"]["value"]
        assert numbers["rows"]["verdict"] == "lower"
    count = len(search.backend.jobs)
    confirm.confirm(search, out)
    assert len(search.backend.jobs) == count  # All is there.
    text = "\n".join([command.table(found), *command.findings(found)])
    assert "best-1" in text and "in the search" in text


def test_a_dry_run_with_more_servers_than_images_tells_the_time(tmp_path, capsys):
    class Slow(Painter):
        workers = 9

    for images, workers in ((4, 9), (4, 100), (64, 9), (64, 0)):
        Slow.workers = workers
        command.tune(Slow(), Eye(), PROMPTS, tmp_path / "out", images=images, trials=4, dry_run=True)
        assert re.search(r"at most [\d,]+ images, about .* a second", capsys.readouterr().out)


def test_what_is_refused_where_nothing_goes_on_without_it_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the host refuses to render .CUDA out of memory.; what is done is kept"):
        command.tune(Painter(refuses=lambda s: True), Eye(), PROMPTS, tmp_path / "out", trials=4, dry_run=True)
    confirming = []
    monkeypatch.setattr(confirm, "choose", lambda search, real=confirm.choose: confirming.append(1) or real(search))
    painter = Painter(refuses=lambda s: bool(confirming))
    with pytest.raises(UserError, match="the host refuses to render"):
        command.tune(painter, Eye(), PROMPTS, tmp_path / "out", trials=4, images=8)


# ----------------------------------------------------------------------------
# Killed: the command itself, on the emoji model.


def tune(out, *more, trials=6):
    args = ["tune", "--model", "emoji", "--trials", str(trials), "--images", "16", "--out", str(out), *more]
    return [sys.executable, "-m", "guidance_interval", *args]


def trials_of(url):
    try:
        return optuna.load_study(study_name="emoji", storage=url).get_trials()
    except Exception:  # Not there yet.
        return []


def test_killed_and_joined_by_a_second_process_nothing_is_lost_or_doubled(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = subprocess.Popen(tune(tmp_path / "a", "--storage", url), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a").glob("images/*/*.png"))) < 20:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert any(t.state == TrialState.RUNNING for t in trials_of(url))
    both = [
        subprocess.Popen(tune(tmp_path / name, "--storage", url), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    told = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    found = trials_of(url)
    complete = [t for t in found if t.state == TrialState.COMPLETE and "again" not in t.user_attrs]
    assert len(complete) == len({tuple(t.user_attrs["setting"]) for t in complete}) == 6
    lost = {t.number for t in found if t.state == TrialState.FAIL and not t.user_attrs.get("error")}
    again = [n for t in found for n in t.system_attrs.get("retry_history", [])]
    assert lost and sorted(again) == sorted(lost)
    # The one that rendered the baseline confirms; the other one says so.
    confirmed = [(tmp_path / name / "confirmed.json").is_file() for name in "ab"]
    assert sorted(confirmed) == [False, True]
    assert [b"confirms the best settings" in err for _, err in told] == [not c for c in confirmed]


# ----------------------------------------------------------------------------
# A preset of what was found.


def confirmed(*settings):
    """What confirmed.json holds of these settings, the first being the baseline."""
    told = {"rows": {"value": [1.0] * 3, "difference": [-1.0] * 3, "verdict": "lower"}}
    bound = {"metric": "adherence", "margin": 5.0}
    return {
        "source": "w.json", "name": "w", "created": "2026-01-02",
        "objective": {"minimize": ["rows"], "maximize": [], "bound": bound},
        "settings": [{"id": "baseline" if i == 0 else f"best-{i}", **confirm._bounds(s), "confirmed": told}
                     for i, s in enumerate(settings)],
    }  # fmt: skip


def test_conditional_only_is_no_preset_which_would_be_cfg_everywhere(capsys):
    found = confirmed(everywhere(7.0), CONDITIONAL, Setting(0.5, 4.0, 9.0))
    with pytest.raises(UserError, match=r"^--save mine: best-1 is conditional only.*cfg to 1.*--save mine=best-2$"):
        command._save(found, "mine", "best-1")
    assert not presets.my_file().exists()
    command._save(found, "mine", "best-2")
    assert presets.get_preset("mine").interval() == Setting(0.5, 4.0, 9.0).interval
    with pytest.raises(UserError, match="unknown ID: 'best-3'; the study confirmed best-1, best-2"):
        command._save(found, "mine", "best-3")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("mine=best-9", r"--save 'mine=best-9': unknown ID: 'best-9'; a study confirms best-1, best-2, best-3"),
        ("mine=baseline", "unknown ID: 'baseline'"),
        ("mine", r"FILE' cannot be written to .it is a file.; set GUIDANCE_INTERVAL_PRESETS"),
        ("mine", r"FOLDER' cannot be read .it is no file"),
        ("mine", r"BROKEN' cannot be read .*fix it"),
    ],
)
def test_what_could_not_be_saved_is_told_before_the_work(save, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BROKEN").write_text("[mine")
    for name in ("FILE", "FOLDER", "BROKEN"):
        if name in message:
            file = tmp_path / name / "presets.toml" if name == "FILE" else tmp_path / name
            monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(file))
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], []):
        assert cli.main(["tune", "--model", "emoji", "--save", save, *more]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and (tmp_path / "BROKEN").read_text() == "[mine"


# ----------------------------------------------------------------------------
# Refused.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of a workflow, --a1111 URL and --model emoji, got none of them"),
        (["w.json", "--model", "emoji"], "got 'w.json' and 'emoji'"),
        (["--model", "emoji", "--server", "http://x"], "--server is for a workflow"),
        (["--model", "emoji", "--prompts", "EMPTY"], "holds no prompt; write one on each line"),
        (["--model", "emoji", "--prompts", "NONE"], "cannot be read .No such file"),
        (["--model", "emoji", "--prompts", "BINARY"], "is not text in UTF-8"),
        (["--model", "emoji", "--prompts", "CATS"], "unknown prompt: 'a cat'; the emoji model has"),
        (["--model", "emoji", "--save", "sdxl"], "--save 'sdxl' is a published one"),
        (["--model", "emoji", "--reference", "x"], "--reference 'x': with --model emoji it is `emoji`"),
        (["--model", "emoji", "--storage", "nonsense"], "storage 'nonsense' cannot be used"),
        (["--model", "emoji", "--storage", "sqlite:////no/where/s.db"], "cannot be used"),
        (["--model", "emoji", "--out", "FILE"], "it is a file"),
        (["w.json"], "--prompts is missing"),
        (["w.json", "--prompts", "CATS"], "workflow 'w.json' cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text(" \n\n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "CATS").write_text("a cat\n")
    (tmp_path / "FILE").write_text("")
    code = cli.main(["tune", "--trials", "4", "--images", "4", "--out", "out", *args] if "--out" not in args else
                    ["tune", *args])  # fmt: skip
    told = capsys.readouterr().err
    assert code == 2 and re.search(message, told) and told.count("\n") == 1
    assert not list(tmp_path.glob("out/*/*.png"))


def test_the_emoji_need_no_network_and_dry_run_renders_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--model", "emoji", "--dry-run", "--reference", "emoji"]) == 0
    out = capsys.readouterr().out
    assert "minimize NFE and distance" in out and re.search(r"at most 3,200 images, about [\d.]+ (s|min|h) at", out)
    assert not list(tmp_path.iterdir())

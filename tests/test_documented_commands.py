"""Every command that the README and docs/ show: those that run offline do, a little smaller, as they stand there."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import guidance_interval
import pytest
from guidance_interval import cli
from guidance_interval.lab import results

ROOT = Path(guidance_interval.__file__).parent
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]
FAST = ["--samples", "20", "--steps", "4", "--sampler", "euler"]
GRID = ["--weight", "2", "--sigma-lo", "0.1", "--sigma-hi", "2.5"]

# {the beginning of a command: why the tests do not run it}
NOT_RUN = {
    "make test": "it is these tests",
    "git clone ": "it needs a network",
    "pip install ": "it needs a network",
    "python -m venv .venv": "it makes an environment, as `make` does before all tests",
    "python3 -m venv .venv": "it makes an environment, as `make` does before all tests",
    "source .venv/bin/activate": "it changes the shell",
    "guidance-interval sweep --device cuda:0 cuda:1": "it needs two GPUs; test_workers.py has two processes of the CPU",
    "guidance-interval measure --reference photos --images cfg interval --features clip dinov2": "it fetches weights",
    "guidance-interval tune workflow.json --prompts prompts.txt --server ": "it needs ComfyUI: comfy/test_tune.py",
    "guidance-interval tune image.png --a1111 ": "it needs a web UI; webui/ has one",
    'make results ARGS="--only ': "it takes hours; test_results.py runs all of them with --quick",
    "COMFYUI_PATH=": "it needs a checkout of the host",
    "A1111_PATH=": "it needs a checkout of the host",
    "FORGE_PATH=": "it needs a checkout of the host",
    "dask scheduler": "the cluster below has one",
    "CUDA_VISIBLE_DEVICES=": "it needs a GPU; the cluster below has two workers",
}
# {a command: what makes it small}
RUN = {
    "make demo": FAST,
    "guidance-interval info": [],
    "guidance-interval sweep --cluster tcp://10.0.0.1:8786": [*FAST, *GRID, "--out", "swept"],
    'make results ARGS="--cluster tcp://10.0.0.1:8786"': ["--quick", "--only", "parts", "--out", "there"],
    "PYTHONPATH=. guidance-interval sweep --model my_model:load --out out/mine --samples 100": [
        *FAST[2:],
        *GRID,
    ],
    "guidance-interval tune --model emoji --out out/tune --save mine": ["--dry-run"],
    "python benchmarks/measure_folders.py --samples 500 --write-only": ["--samples", "20"],
    "guidance-interval measure --features digits --reference out/digits/real --images out/digits/cfg "
    "out/digits/interval": [],
}


def documented():
    """The commands of all pages, without what follows a #."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", "").splitlines():
                if line.strip().startswith("$ "):
                    found.append(re.sub(r"\s+", " ", re.sub(r"\s#.*", "", line.strip()[2:])).strip())
    return list(dict.fromkeys(found))


COMMANDS = documented()


def arguments(command):
    """What a command hands to `cli.main`, also through `make`; None for another program."""
    if command.startswith("make "):
        command = command.replace("make ", f"make --no-print-directory -n -C {shlex.quote(str(ROOT))} ", 1)
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
        command = next(x for x in done.stdout.splitlines() if " -m guidance_interval " in x)
    words = [w for w in shlex.split(command) if not re.match(r"[A-Z]+=", w)]
    if words[0] == "guidance-interval":
        return words[1:]
    return words[3:] if words[1:3] == ["-m", "guidance_interval"] else None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "presets.toml"))
    return tmp_path


def run(command, *but):
    """Run a command with what makes it small, and with another scheduler's address if one is given."""
    args = [*arguments(command), *RUN[command]]
    assert cli.main([arg.replace("tcp://10.0.0.1:8786", *but) if but else arg for arg in args]) == 0


def test_every_command_is_run_or_there_is_a_reason():
    assert len(COMMANDS) > 25
    for command in COMMANDS:
        assert (command in RUN) + sum(map(command.startswith, NOT_RUN)) == 1, command
    for known in RUN.keys() | NOT_RUN.keys():
        assert any(command.startswith(known) for command in COMMANDS), f"no page has {known!r} any more"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("guidance-interval ", "PYTHONPATH="))])
def test_every_command_has_options_that_there_are(command):
    cli.parser().parse_args([re.sub(r"^cuda:\d$", "cpu", word) for word in arguments(command)])


def test_the_demo_and_info(folder, capsys):
    run("make demo")
    run("guidance-interval info")
    assert (
        folder / "out" / "demo" / "report.json"
    ).is_file() and "sdxl: sigma in (0.28, 5.42]" in capsys.readouterr().out


def test_a_model_of_one_s_own(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "command-line.md").read_text(), re.S)
    (folder / "my_model.py").write_text(code)
    run("PYTHONPATH=. guidance-interval sweep --model my_model:load --out out/mine --samples 100")
    assert (folder / "out" / "mine" / "sweep.md").is_file()


def test_folders_are_written_and_measured(folder, capsys):
    write, measure = (c for c in RUN if "measure" in c)
    program, script, *args = shlex.split(write)
    command = [sys.executable, str(ROOT / script), *args, *RUN[write]]
    assert program == "python"
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    run(measure)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:4] == ["cfg", "interval"] and rows[6:9] == ["real", "cfg", "interval"]
    assert {path.name for path in (folder / "out" / "measure").iterdir()} == {"report.json", "measure.png"}


def test_the_tuner_of_the_emoji_can_begin(folder, capsys):
    run("guidance-interval tune --model emoji --out out/tune --save mine")
    assert "confirmation: the best three" in capsys.readouterr().out


@pytest.fixture
def workers():
    """The address of a Dask scheduler that two workers have joined, all in this process."""
    from distributed import LocalCluster

    options = dict(n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=None)
    with LocalCluster(**options) as cluster:
        yield cluster.scheduler_address


def test_a_cluster_gives_what_this_process_gives(folder, workers, capsys, monkeypatch):
    monkeypatch.setattr(results, "QUICK", dataclasses.replace(results.QUICK, samples=20, part_weights=(2.0,)))
    sweep, page = (c for c in RUN if "10.0.0.1" in c)
    for command, alone in ((sweep, "out/sweep"), (page, "out/results-quick")):
        run(command, workers)
        there = capsys.readouterr().out
        args = [*arguments(command), *RUN[command]]
        at = args.index("--cluster")
        assert cli.main([*args[:at], *args[at + 2 : -1], alone]) == 0
        assert capsys.readouterr().out.replace(alone, args[-1]) == there

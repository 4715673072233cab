"""The command line: what it refuses and in which words, what it leaves behind, and that bugs are not hidden."""

import builtins
import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from guidance_interval import cli, errors, files, noise_level
from guidance_interval.lab import demo, plots, sweep
from guidance_interval.toy import model, sampling
from PIL import Image
from safetensors.torch import save_file

COMMAND = [sys.executable, "-m", "guidance_interval"]
FAST = ["--samples", "20", "--steps", "4", "--sampler", "euler"]
HUGE = "9" * 30


def command(capsys, *args):
    """(exit code, what stderr says) of a command, whether the parser refuses it or the work does."""
    try:
        code = cli.main(list(map(str, args)))
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


def refused(capsys, *args):
    """What a refused command says: one line, after the parser's usage if it is the parser that refuses."""
    code, err = command(capsys, *args)
    *usage, line = err.splitlines()
    assert code == 2 and line.startswith("guidance-interval") and ": error: " in line, err
    assert not usage or usage[0].startswith("usage: "), err
    return line


@pytest.fixture(autouse=True)
def _a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nothing_is_sampled(monkeypatch):
    for module in (demo, sweep):
        monkeypatch.setattr(module, "sample", lambda *_, **__: pytest.fail("sampled"))


# ----------------------------------------------------------------------------
# What each option refuses. {values: what the error says}, for each option of each command.

WHOLE = ["", "x", "1.5", "1e3", "nan", "inf", "-1", HUGE]
SAMPLES = {v: f"{v!r} is not a whole number from 20 to 100000" for v in [*WHOLE, "0", "19", "100001"]}
STEPS = {v: f"{v!r} is not a whole number from 2 to 10000" for v in [*WHOLE, "0", "1", "10001"]}
SEED = {v: f"{v!r} is not a whole number from 0 to 4294967295" for v in [*WHOLE, "4294967296"]}
SAMPLER = {v: f"unknown sampler {v!r}; k-diffusion has dpm_2" for v in ("", "eular", "EULER", "euler ", "../euler")}
DEVICE = {
    "": "Device string must not be empty",
    "meta": "'meta' cannot be used here (it holds no data); try cpu",
    "tpu9": "'tpu9' cannot be used here (Invalid device string: 'tpu9'); try cpu",
    "cpu:-1": "Invalid device string",
    "mkldnn": "'mkldnn' cannot be used here",
    "lazy": "'lazy' cannot be used here (Could not run 'aten::",
    "hpu": "'hpu' cannot be used here (No module named 'torch.hpu'); try cpu",
}
NUMBER = {v: f"invalid float value: {v!r}" for v in ("", "x", "1,5", "2 3")}
WEIGHT = NUMBER | {
    v: f"weight must be a number above 1 (1 is conditional only) and at most 1000, got {float(v)!r}"
    for v in ("nan", "inf", "1e999", "1", "0", "-2", "1001")
}
SIGMA_LO = NUMBER | {
    "nan": "sigma_lo is NaN",
    "-1": "sigma_lo must not be negative, got -1.0",
    "inf": "sigma_lo must be below sigma_hi, got sigma_lo=inf",
}
SIGMA_HI = NUMBER | {"nan": "sigma_hi is NaN", "-1": "sigma_hi must not be negative"}
EMPTY = {"": "it is empty", " ": "it is empty"}
FOLDER = EMPTY | {
    "file": "output folder 'file' cannot be written to (it is a file); choose another one",
    "file/below": "output folder 'file/below' cannot be written to (Not a directory)",
    "fifo": "output folder 'fifo' cannot be written to (it is a file)",
    "/proc/none": "output folder '/proc/none' cannot be written to",
    "n" * 300: "cannot be written to (File name too long)",
}
MODEL_FILE = {
    "none.safetensors": "model file 'none.safetensors' does not exist",
    "folder.safetensors": "model file 'folder.safetensors' is a folder or a device, not a file",
    "fifo.safetensors": "model file 'fifo.safetensors' is a folder or a device, not a file",
    "text.safetensors": "model file 'text.safetensors' is not a readable safetensors file",
    "empty.safetensors": "model file 'empty.safetensors' is not a readable safetensors file",
    "n" * 300 + ".safetensors": "does not exist",
}
TABLE = {
    "demo": {
        "--out": FOLDER,
        "--samples": SAMPLES,
        "--steps": STEPS,
        "--seed": SEED,
        "--sampler": SAMPLER,
        "--device": DEVICE,
        "--weight": WEIGHT,
        "--cfg-weight": WEIGHT,
        "--model": {"emojis": "invalid choice: 'emojis'", "": "invalid choice: ''"},
        "--sigma-lo": SIGMA_LO | {"3.5": "sigma_lo must be below sigma_hi, got sigma_lo=3.5 and sigma_hi=3.5; swap"},
        "--sigma-hi": SIGMA_HI | {"0": "sigma_lo must be below sigma_hi", "0.1": "sigma_lo must be below sigma_hi"},
    },
    "sweep": {
        "--out": FOLDER,
        "--samples": SAMPLES,
        "--steps": STEPS,
        "--seed": SEED,
        "--sampler": SAMPLER,
        "--device": DEVICE,
        "--weight": WEIGHT,
        "--sigma-lo": SIGMA_LO,
        "--sigma-hi": SIGMA_HI | {"0": "sigma_lo must be below sigma_hi"},
        "--model": EMPTY
        | MODEL_FILE
        | {
            "nowhere": "emoji, emoji-seed1, emoji-seed2, optdigits, got 'nowhere'",
            ":load": "model must be given as module:function",
            "math:": "model must be given as module:function",
            "nowhere:load": "model 'nowhere:load' cannot be loaded (No module named 'nowhere')",
            ".math:load": "model '.math:load' cannot be loaded",
            "math:nothing": "model 'math:nothing' cannot be loaded (module 'math' has no attribute 'nothing')",
            "math:pi": "model 'math:pi' is not a function",
        },
    },
    "train": {
        "--out": EMPTY
        | {
            "folder": "'folder' is a folder or a device; name the file to write",
            "file/model.safetensors": "output folder 'file' cannot be written to (it is a file)",
            "/proc/none/model.safetensors": "output folder '/proc/none' cannot be written to",
        },
        "--data": {v: "invalid choice" for v in ("", "mnist", "Digits")},
        "--device": DEVICE,
        "--steps": {v: f"{v!r} is not a whole number from 1 to" for v in [*WHOLE, "0"]},
        "--batch": {v: f"{v!r} is not a whole number from 1 to 100000" for v in [*WHOLE, "0"]},
        "--classifier-steps": {v: f"{v!r} is not a whole number from 1 to" for v in [*WHOLE, "0"]},
        "--seed": SEED,
        "--lr": {v: f"{v!r} is not a number above 0" for v in ("", "x", "nan", "inf", "0", "-1e-3")},
        "--classifier": EMPTY | MODEL_FILE,
    },
    "report": {"--language": {v: "invalid choice" for v in ("", "fr", "EN")}},
    "info": {
        "--steps": STEPS,
        "--scheduler": {v: "invalid choice" for v in ("", "Karras", "linear")},
        "--sigma-min": NUMBER
        | {v: "0 < sigma_min < sigma_max must hold" for v in ("nan", "inf", "0", "-1", "20", "14.6146")},
        "--sigma-max": NUMBER | {v: "0 < sigma_min < sigma_max must hold" for v in ("nan", "inf", "0", "-1", "0.01")},
        "--sigma-lo": SIGMA_LO,
        "--sigma-hi": SIGMA_HI | {"0": "sigma_lo must be below sigma_hi"},
    },
}
ROWS = [
    (name, option, value, says)
    for name, options in TABLE.items()
    for option, values in options.items()
    for value, says in values.items()
]


@pytest.fixture
def paths(tmp_path):
    """Paths of the wrong kind, in the working folder."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.safetensors").write_text("not a model")
    (tmp_path / "empty.safetensors").touch()
    for name in ("folder", "folder.safetensors"):
        (tmp_path / name).mkdir()
    for name in ("fifo", "fifo.safetensors"):
        os.mkfifo(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("name", "option", "value", "says"), ROWS, ids=[" ".join(r[:3])[:50] for r in ROWS])
def test_a_bad_value_is_refused_in_one_line_before_any_work(
    capsys, paths, nothing_is_sampled, name, option, value, says
):
    before = sorted(paths.rglob("*"))
    assert says in refused(capsys, name, f"{option}={value}")
    after = sorted(paths.rglob("*"))
    # A model is looked at once the folder is known to be one that can be written to.
    assert after == before or (
        option in ("--model", "--classifier") and not any(p.is_file() for p in {*after} - {*before})
    )


# What somebody might type, or a page might have them paste, whatever the option.
ODD = [
    "", "nan", "9" * 400, "x" * 5000, "\x1b[31mred", "\udcff", "--", "/dev/null", "/dev/zero", "fifo", "folder", "loop",
    "file", "file.npz", "deep.json", "x.safetensors", "os:getcwd", "builtins:exit", "http://[::1",
    "http://user:pass/word@127.0.0.1:9/", "sqlite://",
]  # fmt: skip
# What makes each command begin at once: with it, nothing but the odd value is in the way.
BEGUN = {
    "demo": FAST,
    "sweep": [*FAST, "--weight=2"],
    "results": ["--quick", "--out=results"],
    "measure": ["--images=images", "--reference=reference", "--features=digits"],
    "tune": ["--model=emoji"],
    "report": [],
    "train": ["--device=cpu"],
    "emoji": [],
    "memorization": [],
    "info": [],
}
ALSO = {
    "tune ": ["--prompts=words.txt"],
    "report --language": ["folder"],
    "tune --server": ["w.json", "--prompts=words.txt"],
    "tune --a1111": ["images/0.png", "--prompts=words.txt"],
    "train --images": ["--data=emoji"],
}


def odd_commands():
    (commands,) = (a.choices for a in cli.parser()._actions if a.dest == "==SUPPRESS==" and a.choices)
    return [(name, *action.option_strings[-1:]) for name, command in commands.items()
            for action in command._actions if action.nargs != 0]  # fmt: skip


@pytest.fixture
def odd_things(paths):
    for name in ("images", "reference"):
        (paths / name).mkdir()
        for i in range(8):
            Image.new("RGB", (28, 28), (i, 2 * i, 3 * i)).save(paths / name / f"{i}.png")
    (paths / "loop").symlink_to("loop")
    (paths / "file.npz").write_bytes(b"PK\x03\x04 no archive")
    (paths / "deep.json").write_text("[" * 100_000)
    (paths / "words.txt").write_text("heart\n")
    (paths / "w.json").write_text("{}")
    return paths


@pytest.mark.parametrize("command_and_option", odd_commands(), ids=" ".join)
def test_an_odd_value_ends_in_one_line_or_the_work_begins(capsys, odd_things, monkeypatch, command_and_option):
    from guidance_interval.lab import emoji, results, train, train_emoji
    from guidance_interval.measure import folder
    from guidance_interval.tune import command as tune

    name, option = (*command_and_option, "")[:2]

    def begun(*_, **__):
        raise errors.UserError("begun")

    for module, does in ((demo, "measure_all"), (sweep, "complete"), (results, "measured"), (train, "train_classifier"),
                         (train_emoji, "train_classifier"), (emoji, "draw"), (folder.Folder, "compute"),
                         (tune, "tune")):  # fmt: skip
        monkeypatch.setattr(module, does, begun)
    base = [a for a in BEGUN[name] if a.partition("=")[0] != option]
    also = ALSO.get(f"{name} {option}", [])
    if any("words" in a for a in also):
        base = []
    if option in FAST:
        base = [a for pair in zip(base[::2], base[1::2], strict=False) if pair[0] != option for a in pair]
    monkeypatch.setattr(train.data, "DATA", dict.fromkeys(train.data.DATA, begun))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    for value in ODD if option else [v for v in ODD if v != "deep.json"]:  # A workflow: see tune/.
        signal.alarm(60)
        code, err = command(capsys, name, *base, *also, *([f"{option}={value}"] if option else ["--", value]))
        signal.alarm(0)
        line = err.splitlines()[-1] if err else ""
        assert code == 0 or (code == 2 and ": error: " in line), (value[:80], err)
        assert "pass/word" not in err and "\x1b" not in err and len(line) < 1200, value[:80]
        assert not max((len(word) for word in line.split()), default=0) > 200, value[:80]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "args",
    [(name, option) for name, options in TABLE.items() for option in options]
    + [("demo", "--quiet"), ("demo", "more"), ("dmeo",), (), ("info", "--step", "3"), ("demo", "--out")],
    ids=" ".join,
)
def test_an_option_without_a_value_and_what_is_none(capsys, args):
    line = refused(capsys, *args)
    assert any(s in line for s in ("expected", "unrecognized arguments", "invalid choice", "are required"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["demo", "--seed", "1", "--seed", "1"], "argument --seed: given twice"),
        (["info", "--steps", "9", "--steps", "8"], "argument --steps: given twice"),
        (["sweep", "--weight", "2", "--weight", "4"], "argument --weight: given twice; list its values after one"),
        (["measure", "--images", "a", "--images", "b"], "argument --images: given twice; list its values after one"),
    ],
)
def test_an_option_given_twice_loses_nothing_in_silence(capsys, nothing_is_sampled, args, says):
    assert says in refused(capsys, *args)


def test_the_parser_starts_anew_each_time(capsys):
    for _ in range(2):
        assert command(capsys, "info", "--steps", "5") == (0, "")


# ----------------------------------------------------------------------------
# What is meant for users and what is not.


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError, BrokenPipeError])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(demo, "measure_all", lambda *_: (_ for _ in ()).throw(error("deep inside")))
    with pytest.raises(error, match="deep inside"):
        cli.main(["demo", *FAST])


def test_a_module_of_ours_that_is_missing_is_a_bug_and_another_s_is_not(monkeypatch, capsys):
    for name, known in (("mlxtend", True), ("guidance_interval.lab.nothing", False)):
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        monkeypatch.setattr(demo, "run", lambda error=error, **_: (_ for _ in ()).throw(error))
        if known:
            line = refused(capsys, "demo")
            assert line.endswith("in the folder of this repository, run: pip install -e '.[lab]'")
        else:
            with pytest.raises(ModuleNotFoundError):
                cli.main(["demo"])


@pytest.mark.parametrize(
    ("error", "given", "told"),
    [
        ("--out 'a' is a file", ["--out", "a"], "--out 'a' is a file"),
        ("'http://me:se/cr@t@host:1' fails", ["http://me:se/cr@t@host:1"], "'http://host:1' fails"),
        ("http://me:pw@host/x?y fails", ["--server=http://me:pw@host"], "http://host/x?y fails"),
        ("give postgresql://user:password@host/name", ["x"], "give postgresql://user:password@host/name"),
        (f"no {'x' * 500!r}", ["--a", "x" * 500], f"no '{'x' * 37}...{'x' * 38}'"),
        (f"no {'x' * 500} there", [f"--a={'x' * 500}"], f"no {'x' * 37}...{'x' * 38} there"),
        ("red \x1b[31m\nline\u202e", [], r"red \x1b[31m\nline\u202e"),
        ("a" * 999 + "z", [], "a" * 999 + "z"),
        ("a" * 1000 + "z", [], "a" * 800 + " ... " + "a" * 194 + "z"),
    ],
)
def test_errors_repeat_no_password_and_nothing_at_length(error, given, told):
    assert errors.told(error, given) == told


def test_the_library_s_errors_stay_what_they_are_and_are_told_where_input_is_judged():
    with pytest.raises(errors.UserError, match="sigma_lo must be a number, got 'a'"), errors.user_input():
        demo.GuidanceInterval("a")
    given = errors.UserError("as it is")
    with pytest.raises(errors.UserError) as caught, errors.user_input():
        raise given
    assert caught.value is given
    with pytest.raises(KeyError), errors.user_input():
        raise KeyError("not about input")


# ----------------------------------------------------------------------------
# Disks, folders and other processes.


class FullDisk:
    """Let files be written up to a number of bytes; then there is no space left."""

    def __init__(self, monkeypatch, room):
        self.room, opened = room, builtins.open

        def open_(file, mode="r", *args, **kwargs):
            f = opened(file, mode, *args, **kwargs)
            if "w" in mode:
                f = self.limit(f)
            return f

        monkeypatch.setattr(builtins, "open", open_)
        monkeypatch.setattr(io, "open", open_)

    def limit(self, f):
        disk, write = self, f.write

        class Limited:
            def __getattr__(self, name):
                return getattr(f, name)

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                f.close()

            def write(self, data):
                disk.room -= len(data)
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

        return Limited()


def test_a_full_disk_is_told_before_the_work(monkeypatch, capsys, tmp_path):
    FullDisk(monkeypatch, 1000)
    line = refused(capsys, "demo", "--out", "out", *FAST)
    assert line.endswith("output folder 'out' cannot be written to (No space left on device); choose another one")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """{name: size} of what a demo writes."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(["demo", "--out", str(out), *FAST]) == 0
    return {p.name: p.stat().st_size for p in out.iterdir()}


@pytest.mark.parametrize("room", [0, 100_000, 250_000])
def test_a_disk_that_fills_up_leaves_whole_files_only(monkeypatch, capsys, tmp_path, sizes, room):
    FullDisk(monkeypatch, 2**20 + room)
    code, err = command(capsys, "demo", "--out", "out", *FAST)
    assert code == 2 and err.endswith("cannot be written (No space left on device)\n")
    found = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert found.keys() < sizes.keys() and all(abs(found[name] - sizes[name]) < 100 for name in found)


def test_a_model_file_that_finds_no_room(tmp_path):
    """The kernel refuses the write itself: safetensors does not write through Python."""
    code = """
        import resource
        from guidance_interval import errors
        from guidance_interval.toy import model
        lab = model.load()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            model.save("m.safetensors", lab.denoiser, lab.classifier, lab.reference, lab.config, lab.record)
        except errors.UserError as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.startswith("'m.safetensors' cannot be written (") and "too large" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_the_machine_is_told_wherever_it_shows(monkeypatch, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    monkeypatch.setattr(demo, "run", lambda **_: (_ for _ in ()).throw(full))
    assert "No space left on device: 'somewhere'" in refused(capsys, "demo")


def test_a_folder_in_use_is_refused(capsys, tmp_path):
    code = "import sys, time; from guidance_interval import files\n"
    code += "with files.sole_use('out'): print('held', flush=True); sys.stdin.read()"
    (tmp_path / "out").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        line = refused(capsys, "demo", "--out", "out", *FAST)
        assert line.endswith("output folder 'out' is in use by another run; wait for it, or choose another one")
        other.kill()
    with files.sole_use("out"):  # A run that was killed holds nothing.
        pass


def _write(letter):
    for _ in range(50):
        with files.atomic_path("file") as tmp, open(tmp, "w") as f:
            for _ in range(20):
                f.write(letter * 1000)
                f.flush()


def test_writers_of_one_file_take_turns(tmp_path):
    """Four processes write one file fifty times each: none fails, and what is there is whole."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(letter,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        with contextlib.suppress(FileNotFoundError):
            text = (tmp_path / "file").read_text()
            assert len(text) == 20_000 and len(set(text)) == 1
    assert [w.exitcode for w in writers] == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_moved_into_the_place_of_a_device(paths):
    for write in (files.output_file, lambda path: files.atomic_path(path).__enter__()):
        for name in ("fifo", "folder", "/dev/null"):
            with pytest.raises(errors.UserError, match=f"'{name}' is a folder or a device; name the file to write"):
                write(name)
    assert stat.S_ISFIFO(os.stat("fifo").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert files.output_file("new/file") == Path("new/file") and Path("new").is_dir()


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / ".file.tmp").write_text("half of something longer than what is next")
    with files.atomic_path(tmp_path / "file") as tmp:
        tmp.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_what_ctrl_c_stops_in_the_middle_of_a_file_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "file") as tmp:
        tmp.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_pictures_are_there_before_the_table_is_printed(monkeypatch, capsys, tmp_path, sizes):
    """A reader that leaves, or a standard output that is full, takes none of a minute's work away."""
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, err = command(capsys, "demo", "--out", "out", *FAST)
    assert code == 2 and err.endswith("error: standard output cannot be written to (No space left on device)\n")
    assert {p.name for p in (tmp_path / "out").iterdir()} == sizes.keys()


# ----------------------------------------------------------------------------
# Output and interruption.


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 100, 198])
def test_a_table_fits_the_terminal_and_is_markdown_elsewhere(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    head = ["setting", *(f"measure {i} [95 % interval]" for i in range(6))]
    body = [[f"best-{i}: (0.1, 5.42] w=3", *(f"{i}.{j} (+0.10 [-0.20, +0.40])" for j in range(6))] for i in range(3)]
    markdown = files.aligned(head, body)
    assert files.printed(head, body) == markdown and len(markdown.splitlines()[0]) > 190
    monkeypatch.setattr(sys, "stdout", Terminal())
    narrow = files.printed(head, body)
    monkeypatch.undo()
    assert max(map(len, narrow.splitlines())) <= columns
    for word in ["best-2:", "w=3", "0.0", "2.5", "(+0.10", "[-0.20,", "+0.40])", "interval]"]:
        assert word in narrow
    assert (narrow == markdown) == (columns >= len(markdown.splitlines()[0]))


FULL = "guidance-interval: error: standard output cannot be written to (No space left on device)"


@pytest.mark.parametrize(
    ("steps", "redirection", "code", "says"),  # 20 steps are less than a buffer holds, 9000 are more.
    [
        (20, "> /dev/full", 2, FULL),
        (9000, "> /dev/full", 2, FULL),
        (9000, "| head -n 1", 0, ""),
        (20, ">&-", 0, ""),
        (20, "2>&- > /dev/null", 0, ""),
    ],
)
def test_standard_output_may_be_full_closed_or_left(steps, redirection, code, says):
    line = f"set -o pipefail; {' '.join(COMMAND)} info --steps {steps} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (code, says)


def test_a_broken_pipe_that_is_not_standard_output_is_a_bug(monkeypatch):
    monkeypatch.setattr(cli, "_run_info", lambda **_: (_ for _ in ()).throw(BrokenPipeError("a worker's")))
    with pytest.raises(BrokenPipeError):
        cli.main(["info"])


def test_a_terminal_that_lacks_a_character():
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from guidance_interval import cli; cli._run_info = lambda **_: print('… low part'); cli.main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2026 low part\n", "")


def test_a_warning_of_ours_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert command(capsys, "info")[0] == 0
    assert warnings.formatwarning("text", UserWarning, demo.__file__, 1) == "guidance-interval: warning: text\n"
    assert warnings.formatwarning("text", UserWarning, os.__file__, 1) == f"{os.__file__}:1: UserWarning: text\n"


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    command = [*COMMAND, "demo", "--out", "out", "--samples", "20000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=0) as process:
        seen = ""
        while "image/s" not in seen:  # It is sampling.
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "guidance-interval: interrupted; nothing is written"
    assert not list((tmp_path / "out").iterdir())


# ----------------------------------------------------------------------------
# Model files and labs of one's own.


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 2000, 20_000, 1_000_000, -1])
def test_a_model_file_that_ends_too_soon(capsys, tmp_path, size):
    (tmp_path / "m.safetensors").write_bytes(model.SHIPPED.read_bytes()[:size])
    assert "'m.safetensors' is not a readable safetensors file" in refused(capsys, "sweep", "--model", "m.safetensors")


def test_a_model_file_with_a_wild_header(capsys, tmp_path):
    (tmp_path / "m.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}" * 50)
    assert "is not a readable safetensors file" in refused(capsys, "sweep", "--model", "m.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors", {"format": model.FORMAT, "config": "{"})
    assert "its contents do not fit" in refused(capsys, "sweep", "--model", "m.safetensors")


BROKEN = {
    "None": "returned 'NoneType', which has no denoiser, classifier, reference, config: return a",
    "torch.nn.Linear(2, 2)": "returned 'Linear', which has no denoiser, classifier, reference, config",
    "but(denoiser=None)": "whose denoiser is no torch.nn.Module with parameters",
    "but(classifier=torch.nn.Flatten())": "whose classifier is no torch.nn.Module with parameters",
    "but(denoiser=lab.classifier)": "whose denoiser has no null_class, the label that means no class",
    "but(config={})": "whose config has no image_size, num_classes",
    "but(config=dict(image_size=28))": "whose config has no num_classes;",
    "but(reference={})": "whose reference has no mean, cov, spread",
    "but(reference=dict(lab.reference, mean=lab.reference['cov']))": "whose reference mean has the shape [64, 64], not",
    "but(reference=dict(lab.reference, spread=lab.reference['mean']))": "spread has the shape [64], not [10]",
    "but(classifier=torch.nn.Conv2d(1, 1, 1))": "whose classifier does not give (features [B, D], logits [B, classes])",
    "but(classifier=model.Classifier(num_classes=7))": "whose classifier knows 7 classes, not 10",
    "but(config=dict(lab.config, num_classes=11))": "whose reference spread has the shape [10], not [11]",
}


@pytest.mark.parametrize("what", BROKEN, ids=lambda w: w[:40])
def test_a_lab_of_one_s_own_is_looked_at_first(capsys, tmp_path, monkeypatch, nothing_is_sampled, what):
    name = f"own_{abs(hash(what))}"
    (tmp_path / f"{name}.py").write_text(
        "import dataclasses, torch\nfrom guidance_interval.toy import model\n"
        "def load(device):\n    lab = model.load(device=device)\n"
        f"    but = lambda **changed: dataclasses.replace(lab, **changed)\n    return {what}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, "sweep", "--model", f"{name}:load")
    assert f"model '{name}:load' returned" in line and BROKEN[what] in line and "docs/command-line.md" in line


def test_what_a_function_of_one_s_own_raises_is_shown_whole(tmp_path, monkeypatch):
    (tmp_path / "own_bug.py").write_text("def load(device):\n    return {}['weights']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyError, match="weights"):
        cli.main(["sweep", "--model", "own_bug:load"])


def test_training_judges_its_files_first_and_keeps_the_model_that_ships(capsys, tmp_path, monkeypatch):
    before = model.SHIPPED.stat().st_mtime_ns
    other = sweep.experiment("clips")
    line = refused(capsys, "train", "--classifier", other, "--out", "m.safetensors")
    assert "of another data set" in line
    args = ["--device", "cpu", "--steps", "3", "--batch", "8", "--classifier", model.SHIPPED]
    code, err = command(capsys, "train", *args, "--lr", "1e30")
    assert code == 2 and "error: training with a learning rate of 1e+30 diverged" in err
    assert not list((tmp_path / "out" / "train").iterdir())
    assert command(capsys, "train", *args)[0] == 0
    assert [p.name for p in (tmp_path / "out" / "train").iterdir()] == ["digits.safetensors"]
    assert model.SHIPPED.stat().st_mtime_ns == before


# ----------------------------------------------------------------------------
# The page about it.

PAGE = Path(cli.__file__).parent / "docs" / "command-line.md"


def test_the_page_s_model_of_one_s_own_is_sampled(capsys, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "own_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    grid = ["--weight", "2", "--sigma-lo", "0.1", "--sigma-hi", "2.5"]
    assert command(capsys, "sweep", "--model", "own_page:load", "--out", "out", *grid, *FAST)[0] == 0
    assert (tmp_path / "out" / "sweep.md").read_text().count("\n") == 5  # Two lines of head and three cells.


def test_the_help_has_examples_that_can_be_typed(capsys):
    for name in ("tune", "sweep", "demo"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        examples = re.findall(r"^  guidance-interval (.+)$", text, re.M)
        assert bool(examples) == (name == "tune")
        for example in examples:
            cli.parser().parse_args(example.split())
    assert "guidance ends at this noise level" in text.split("--sigma-lo SIGMA_LO")[-1].split("--sigma-hi")[0]
    assert "guidance begins at this noise level" in text.split("--sigma-hi SIGMA_HI")[-1]


def test_a_study_s_database_is_no_memory(capsys):
    for url in (
        "sqlite://",
        "sqlite:///",
        "sqlite+pysqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=1",
    ):
        assert f"argument --storage: {url!r} is in memory and would be lost" in refused(
            capsys, "tune", "--storage", url
        )
    for url in ("sqlite:///x.db", "sqlite:////x/y.db", "postgresql://u:p@h/n", "grpc://h:1"):
        assert cli.parser().parse_args(["tune", "--storage", url]).storage == url


def test_the_page_names_every_command_and_the_limits_that_hold():
    text = PAGE.read_text()
    commands = next(a for a in cli.parser()._actions if a.dest == "==SUPPRESS==" and a.choices).choices
    for name in commands:
        assert f"| `{name}` |" in text
    assert f"20 to {cli.MAX_SAMPLES:,} " in text and f"2 to {cli.MAX_STEPS:,} " in text
    assert f"0 to {cli.MAX_SEED:,} " in text and f"up to {sampling.MAX_WEIGHT};" in text


# ----------------------------------------------------------------------------
# The words of the demo and of `info`.


@pytest.mark.parametrize(
    ("guided", "more", "says"),
    [
        ("..gg.", {}, "2 of 5 steps are guided (2 to 3): 7 {each} instead of 10, 30% saved"),
        (
            ".g...",
            dict(first=1),
            "1 of 5 steps is guided (2): 6 {each} instead of 10, 40% saved",
        ),
        (
            "g.gg",
            {},
            "3 of 4 steps are guided (0 to 3, with gaps): 7 {each} instead of 8, 12% saved",
        ),
        ("...", {}, "None of the 3 steps is guided: 3 {each} instead of 6, 50% saved"),
        (
            "gg",
            dict(rows=4),
            "2 of 2 steps are guided (0 to 1): 4 {each} instead of 4, 0% saved",
        ),
        (
            "gg",
            dict(rows=168, rows_everywhere=160, unit="evaluation"),
            "2 of 2 evaluations are guided (0 to 1): 168 {each} instead of 160, 5% more",
        ),
    ],
)
def test_the_sentence_on_cost(guided, more, says):
    assert noise_level.describe_cost([g == "g" for g in guided], **more) == says.format(
        each="network evaluations per image"
    )


def test_the_demo_s_report_is_json_for_any_reader_and_any_bound(capsys, tmp_path):
    assert command(capsys, "demo", "--sigma-hi", "inf", "--weight", "1000", *FAST)[0] == 0
    text = (tmp_path / "out" / "demo" / "report.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["arguments"]["sigma_hi"] is None
    assert all(math.isfinite(s["fd"]) for s in report["settings"])


def test_only_the_images_that_are_shown_are_kept(lab):
    drawn = demo.real_images(lab, 60, 0).drawn
    assert len(drawn.x) == plots.COLUMNS and drawn.x.untyped_storage().nbytes() == drawn.x.numel() * 4

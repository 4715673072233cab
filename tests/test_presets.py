"""The published intervals, and the user's own: what of their file is read, and that saving loses nothing."""

import logging
import math
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from guidance_interval import PRESETS, GuidanceInterval, cli, get_preset, noise_level, presets
from guidance_interval.errors import UserError
from k_diffusion.sampling import get_sigmas_karras


def test_every_preset_has_a_source_and_a_valid_interval():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert "arXiv 2404.07724" in preset.source
        assert preset.interval().sigma_lo < preset.interval().sigma_hi
        assert preset.weight > (preset.weight_everywhere or 1) >= 1


def guided(interval, schedule):
    return interval.mask(schedule[:-1]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("name", "first", "last"), [("edm2-xxl-fid", 17, 22), ("edm2-xxl-fd-dinov2", 13, 19)])
def test_edm2_intervals_guide_the_authors_steps(name, first, last):
    schedule = noise_level.schedule("karras", 32, 0.002, 80.0)
    interval = get_preset(name).interval(sigma_data=0.5)
    assert guided(interval, schedule) == list(range(first, last + 1))
    exact = noise_level.steps_to_interval(schedule, first, last)
    assert (interval.sigma_lo, interval.sigma_hi) == pytest.approx((exact.sigma_lo, exact.sigma_hi), abs=0.005)


def test_the_sdxl_interval_is_half_of_the_paper_s_steps():
    """Section 4.3: guidance at 50 % of 32 steps, (0.28, 5.42], weight 16; appendix A: rho 3, from 14.61 to 0.03."""
    preset, schedule = get_preset("sdxl"), get_sigmas_karras(32, 0.03, 14.61, rho=3.0)
    assert (preset.weight, preset.weight_everywhere, preset.metric) == (16, None, "visual inspection")
    assert "section 4.3" in preset.source
    first, *_, last = guided(preset.interval(), schedule)
    half = noise_level.steps_to_interval(schedule, first, first + 15)
    assert (round(half.sigma_lo, 2), round(half.sigma_hi, 2)) == (preset.sigma_lo, preset.sigma_hi)
    assert last == first + 16  # Rounding 0.2809 down to 0.28 lets the next step in.


def test_units_follow_the_scale_of_the_data():
    fid = get_preset("edm2-xxl-fid")
    assert (fid.sigma_lo, fid.sigma_hi) == (0.19, 1.61)
    assert fid.interval().sigma_hi == pytest.approx(2 * fid.sigma_hi)
    assert get_preset("sdxl").interval().sigma_hi == 5.42


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown preset 'sd9'; there are sdxl, edm2"):
        get_preset("sd9")


# ----------------------------------------------------------------------------
# The user's own.

ENTRY = dict(model="my.json", sigma_lo=0.5, sigma_hi=4.0, weight=9.0, weight_everywhere=7.0)
GOOD = """
[good]
model = "my.json"
sigma_lo = 0.5
sigma_hi = 4
weight = 9.0
weight_everywhere = 7
"""
SHOWN = "good (measured by you)"


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "presets.toml"))
    monkeypatch.setattr(presets, "_told", set())
    return tmp_path / "presets.toml"


def bad(name="bad", **changed):
    """An entry as text, with some of its values as they are given."""
    values = dict(model='"m"', sigma_lo=0.5, sigma_hi=4, weight=9, weight_everywhere=7) | changed
    return f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in values.items() if v is not None)


BAD = {  # {text of an entry: (its name, why it is left out)}
    bad(weight="nan"): ("bad", "weight must be a number above 0, got nan"),
    bad(weight=-3): ("bad", "weight must be a number above 0, got -3"),
    bad(weight_everywhere="inf"): ("bad", "weight_everywhere must be a number above 0, got inf"),
    bad(weight="9" * 400): ("bad", "weight must be a number, got 99999999"),
    bad(sigma_hi="9" * 400): ("bad", "sigma_hi must be a number, got 99999999"),
    bad(sigma_lo="9" * 5000): ("bad", "Exceeds the limit"),
    bad(sigma_lo="nan"): ("bad", "sigma_lo is NaN"),
    bad(sigma_lo=-1): ("bad", "sigma_lo must not be negative"),
    bad(sigma_lo=5): ("bad", "sigma_lo must be below sigma_hi"),
    bad(sigma_lo="true"): ("bad", "sigma_lo must be a number, got True"),
    bad(sigma_lo="'0.5'"): ("bad", "sigma_lo must be a number, got '0.5'"),
    bad(sigma_lo="0,28"): ("bad", "(at line 3, column 13"),
    bad(weight=None): ("bad", "(it lacks weight); "),
    bad(model="7"): ("bad", "model must be text"),
    bad(model="''"): ("bad", "model must be text"),
    bad(model='"\\u001b[31mred"'): ("bad", "model must be text of at most 1000 characters on one line, got '\\x1b[31m"),
    bad(said=f'"{"x" * 2000}"'): ("bad", "said must be text of at most 1000 characters"),
    bad(study="[1]"): ("bad", "study must be text"),
    bad(model="[" * 50_000 + "]" * 50_000): ("bad", "nested too deeply"),
    bad(model="{a=" * 5_000 + "1" + "}" * 5_000): ("bad", "nested too deeply"),
    "bad = 5\n": ("bad", "it must be a table of model, sigma_lo, "),
    "[[bad]]\nmodel = 'm'\n": ("bad", "it must be a table of model, sigma_lo, "),
    bad() + bad(): ("bad", "Cannot declare ('bad',) twice"),
    bad("SDXL"): ("SDXL", "'SDXL' is a published one"),
    bad("GOOD"): ("GOOD", "has that name already"),
    bad('""'): ("", "'' is no name for a preset"),
    bad('" "'): (" ", "' ' is no name for a preset"),
    bad('"a/b"'): ("a/b", "'a/b' is no name for a preset"),
    bad('"\\u001b[31m"'): ("\x1b[31m", "'\\x1b[31m' is no name for a preset"),
    bad("x" * 61): ("x" * 61, "is no name for a preset; take letters"),
    "[" * 50_000: ("[" * 50_000, "Invalid initial character"),
    "[bad\nmodel = 1\n": ("[bad", "Expected ']'"),
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: f"{BAD[text][0][:9]!a} {BAD[text][1][:30]!a}")
def test_an_invalid_entry_hides_no_other_and_is_told_once(file, caplog, text):
    name, why = BAD[text]
    file.write_text(GOOD + text if text.startswith("[") else text + GOOD)  # What is no table comes before any.
    assert list(presets.all_presets()) == [*PRESETS, SHOWN] == list(presets.all_presets())
    assert get_preset("good").interval().sigma_hi == 4
    (record,) = caplog.records
    told = record.getMessage()
    assert record.levelno == logging.WARNING and why in told and len(told) < 500 + len(str(file))
    assert f"in {str(file)!r} is skipped (" in told and told.endswith("; fix it, or remove it")
    assert told.isprintable()
    if name.casefold() not in ("sdxl", "good"):
        with pytest.raises(ValueError, match="unknown preset") as e:
            get_preset(name)
        assert why in str(e.value)


@pytest.mark.parametrize(
    "kind", ["latin", "huge", "folder", "fifo", "zero", "below a file", "name too long", "no text"]
)
def test_a_file_that_cannot_be_read_is_told_and_stops_no_host(file, caplog, monkeypatch, kind):
    if kind == "latin":
        file.write_bytes(GOOD.encode() + "# \xe9".encode("latin-1"))
    elif kind == "huge":
        file.write_text(GOOD + "#" * presets.MAX_FILE)
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "no text":
        file.write_bytes(bytes(100))
    else:
        places = {"zero": "/dev/zero", "below a file": f"{__file__}/presets.toml", "name too long": "n" * 300}
        monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", places[kind])
    assert presets.all_presets() == PRESETS
    (record,) = caplog.records
    assert repr(str(presets.my_file())) in record.getMessage() and len(record.getMessage()) < 1000
    with pytest.raises(ValueError, match="unknown preset 'sd9'"):
        get_preset("sd9")
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(UserError, match=r"presets|n{300}"):
        presets.save_mine("mine", ENTRY)
    assert before is None or file.read_bytes() == before


def test_the_page_s_file_is_read(file):
    page = Path(presets.__file__).parent / "docs" / "command-line.md"
    (text,) = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    file.write_text(text)
    found = get_preset("Portraits")
    assert (found.sigma_lo, found.sigma_hi, found.weight, found.weight_everywhere) == (0.3, 4.5, 9.0, 7.0)
    assert found.source == "measured by you"


def test_a_byte_order_mark_and_windows_lines_are_read(file):
    file.write_bytes(GOOD.lstrip().replace("\n", "\r\n").encode("utf-8-sig"))  # The mark right before the table.
    assert SHOWN in presets.all_presets()


def test_names_are_one_name_in_any_case():
    presets.save_mine("Mine", ENTRY)
    for name in ("mine", "MINE", "mine (Measured by you)"):
        assert get_preset(name).name == "Mine"
    presets.save_mine("MINE", ENTRY | {"weight": 8.0})
    assert list(presets.my_presets()) == ["MINE (measured by you)"] and get_preset("Mine").weight == 8
    for name in ("SDXL", "sdXL", "EDM2-xxl-fid"):
        with pytest.raises(UserError, match=f"--save '{name}' is a published one"):
            presets.check_name(name)
        with pytest.raises(UserError, match="published"):
            presets.save_mine(name, ENTRY)
    assert get_preset("SDXL") is PRESETS["sdxl"]


@pytest.mark.parametrize(
    "name",
    ["", " ", " a", "a/b", "a=b", "[x]", "x" * 61, "\x1b[31m", "a\n", "\u202eevil", "a  b", "mine (measured by you)"],
)
def test_names_that_cannot_be(name):
    with pytest.raises(UserError, match=r"^--save .* is no name for a preset") as e:
        presets.check_name(name)
    assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_saving_keeps_what_else_is_in_the_file(file):
    theirs = (
        "# What I found.\n[other]   # By hand.\nmodel = 'no numbers yet'\n"
        + GOOD
        + "[good.difference]\nrows = [1, 2]\n"
    )
    file.write_text(theirs + bad("MINE") + "[MINE.difference]\nrows = [3, 4]\n")
    hours = {"study": 'a "study"', "said": "fewer\x1b[31m rows", "difference": {"rows": [-7.0, 1e-9, math.inf]}}
    assert presets.save_mine("mine", ENTRY | hours) == file
    assert file.read_text().startswith(theirs)
    assert presets.tomllib.loads(file.read_text())["mine"] == ENTRY | hours | {"said": "fewer?[31m rows"}
    assert "MINE" not in file.read_text()
    assert get_preset("mine").source == "measured by you: study 'a \"study\"', fewer?[31m rows"


def test_a_linked_file_is_written_where_it_lies(file, tmp_path):
    there = tmp_path / "dotfiles" / "presets.toml"
    there.parent.mkdir()
    file.symlink_to(there)
    presets.save_mine("mine", ENTRY)
    assert file.is_symlink() and "[mine]" in there.read_text()


@pytest.mark.parametrize("changed", [{"weight": math.nan}, {"sigma_hi": 0.1}, {"weight_everywhere": None}])
def test_an_entry_that_could_not_be_read_again_is_not_saved(file, changed):
    with pytest.raises(UserError, match="the preset 'mine' cannot be saved: "):
        presets.save_mine("mine", ENTRY | changed)
    assert not file.exists()


def save_five(name, begin):
    begin.wait()
    for i in range(5):
        presets.save_mine(f"{name}{i}", ENTRY)


def test_processes_that_save_at_once_all_end_in_the_file(file):
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    saving = [context.Process(target=save_five, args=(name, begin)) for name in "abc"]
    for process in saving:
        process.start()
    for process in saving:
        process.join(timeout=60)
    assert [process.exitcode for process in saving] == [0, 0, 0]
    assert {p.name for p in presets.my_presets().values()} == {f"{name}{i}" for name in "abc" for i in range(5)}


def test_whether_a_preset_can_be_saved_is_asked_before(file, tmp_path, monkeypatch):
    presets.check_writable()
    assert not file.exists()
    monkeypatch.setattr(presets, "WAIT", 0)
    with (
        filelock.FileLock(tmp_path / ".presets.toml.lock"),
        pytest.raises(UserError, match="another process writes it"),
    ):
        presets.check_writable()
    for content in ("[good", "a = [" + "[" * 5000):
        file.write_text(content)
        with pytest.raises(UserError, match=r"presets.toml' cannot be read \(.*fix it"):
            presets.check_writable()
        assert file.read_text() == content
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(file / "presets.toml"))
    with pytest.raises(UserError, match=r"folder of presets .* cannot be written to \(.*set GUIDANCE_INTERVAL_PRESETS"):
        presets.check_writable()


def test_reading_needs_no_package_beside_torch_and_numpy():
    presets.save_mine("mine", ENTRY)
    code = (
        "import sys, torch\nfor name in ('tomlkit', 'filelock'): sys.modules[name] = None\n"
        "from guidance_interval import get_preset\nassert get_preset('mine').weight == 9\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ----------------------------------------------------------------------------
# What the tuner has saved.

MEASURED = {"model": 'my "XL".json', "sigma_lo": 0.5, "sigma_hi": math.inf, "weight": 9.0, "weight_everywhere": 7.0,
         "study": "s", "date": "2026-01-02", "objective": "minimize NFE", "said": "NFE lower (-7)",
         "difference": {"rows": [-7.0, -7.0, -7.0]}}  # fmt: skip


def test_presets_of_ones_own_come_after_the_published_ones_and_are_marked():
    assert presets.all_presets() == presets.PRESETS
    file = presets.save_mine("mine", MEASURED)
    presets.save_mine("été 2", MEASURED | {"sigma_hi": 4.0})
    assert list(presets.all_presets()) == [*presets.PRESETS, "mine (measured by you)", "été 2 (measured by you)"]
    mine = presets.get_preset("mine")
    assert mine == presets.get_preset("MINE (measured by you)")
    assert mine.interval() == GuidanceInterval(0.5, math.inf) and (mine.weight, mine.model) == (
        9.0,
        'my "XL".json',
    )
    assert mine.source == "measured by you: study 's', 2026-01-02, NFE lower (-7)"
    presets.save_mine("mine", MEASURED | {"weight": 8.0})
    assert presets.get_preset("mine").weight == 8.0 and presets.get_preset("été 2").sigma_hi == 4.0
    assert "rows = [-7.0, -7.0, -7.0]" in file.read_text(encoding="utf-8")


def test_a_presets_file_that_is_broken_stops_no_host_and_is_not_overwritten(caplog, tmp_path):
    file = presets.my_file()
    for content in (
        "[mine",
        '["mine"]\n"sigma_lo" = 1.0\n',
        '["mine"]\n"model" = "a"\n"sigma_lo" = 5\n"sigma_hi" = 1\n',
    ):
        file.write_text(content)
        assert presets.all_presets() == presets.PRESETS
        assert str(file) in caplog.text
    file.write_text("[mine")
    with pytest.raises(UserError, match=r"presets.toml' cannot be read .*fix it"):
        presets.save_mine("other", MEASURED)
    assert file.read_text() == "[mine"


def test_without_a_reader_of_toml_the_published_ones_are_there(monkeypatch):
    presets.save_mine("mine", MEASURED)
    monkeypatch.setattr(presets, "tomllib", None)
    assert presets.all_presets() == presets.PRESETS
    with pytest.raises(UserError, match="pip install tomli"):
        presets.check_name("mine")


def test_looking_whether_a_preset_can_be_saved_leaves_the_file_as_it_is():
    presets.check_writable()
    assert not presets.my_file().exists()
    file = presets.save_mine("mine", MEASURED)
    before = file.read_bytes()
    presets.check_writable()
    assert file.read_bytes() == before


def test_the_accordion_lists_them():
    presets.save_mine("mine", MEASURED)
    code = (
        "from guidance_interval.a1111 import settings as st\n"
        "assert st.PRESET_NAMES[-3] == 'mine (measured by you)', st.PRESET_NAMES\n"
        "for name in ('mine', 'mine (measured by you)'):\n"
        "    interval = st.from_controls(name, 0, 1, 'Both passes').interval\n"
        "    assert (interval.sigma_lo, interval.sigma_hi) == (0.5, float('inf'))\n"
        "assert st.apply_axes({'preset': 'Mine (measured by you)'}, st.Settings(None)).interval == interval\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_info_tells_the_file(capsys):
    presets.save_mine("mine", MEASURED)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert str(presets.my_file()) in out and "measured by you: study 's'" in out

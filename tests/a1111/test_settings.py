"""What the user asks for, with no web UI: controls, infotext, axes."""

import math
import re
from pathlib import Path

import guidance_interval
import pytest
import torch
from guidance_interval import GuidanceInterval, get_preset
from guidance_interval.a1111 import settings as st
from guidance_interval.interval_text import LARGEST, SMALLEST
from hypothesis import given
from hypothesis import strategies as some

ROOT = Path(guidance_interval.__file__).parent
positive = some.just(0.0) | some.floats(SMALLEST, LARGEST)


@pytest.fixture
def settings():
    return st.from_controls("custom", 0.28, 5.42, st.BOTH_PASSES)


# ----------------------------------------------------------------------------
# Controls.


def test_a_preset_wins_over_the_numbers_and_custom_takes_them():
    assert st.from_controls("sdxl", 1.0, 2.0, st.BOTH_PASSES).interval == get_preset("sdxl").interval()
    assert st.from_controls("custom", 1.0, 2.0, st.BOTH_PASSES).interval == GuidanceInterval(1.0, 2.0)


@pytest.mark.parametrize(
    "controls, said",
    [
        (("sd9", 0, 1, st.BOTH_PASSES), "preset must be one of sdxl.*got 'sd9'"),
        (("custom", 5, 1, st.BOTH_PASSES), "swap them"),
        (("custom", None, 1, st.BOTH_PASSES), "sigma_lo must be a number, got None"),
        (("custom", "1", 2, st.BOTH_PASSES), "sigma_lo must be a number, got '1'"),
        (("custom", 0, None, st.BOTH_PASSES), 'sigma_hi must be a number, or 0 or "inf" for no upper limit, got None'),
        (("custom", 0, "6", st.BOTH_PASSES), "sigma_hi must be a number, or 0.*got '6'"),
        (("custom", 0, False, st.BOTH_PASSES), "sigma_hi must be a number, or 0.*got False"),
        (("custom", 0, math.nan, st.BOTH_PASSES), "sigma_hi is NaN"),
        (("custom", -1, 2, st.BOTH_PASSES), "sigma_lo must not be negative"),
        (("sdxl", 0, 1, "third pass"), "First pass only"),
    ],
)
def test_what_cannot_be_is_refused_in_plain_words(controls, said):
    with pytest.raises(ValueError, match=said):
        st.from_controls(*controls)


@pytest.mark.parametrize("hi", [0, 0.0, "inf", " INF ", math.inf])
def test_an_upper_bound_can_be_open(hi):
    assert st.from_controls("custom", 0.28, hi, st.BOTH_PASSES).interval == GuidanceInterval(0.28, math.inf)


def test_conditional_only_is_a_preset_without_an_interval():
    assert st.from_controls("conditional only", 5, 1, st.FIRST_PASS) == st.Settings(None, st.FIRST_PASS)


def test_guides_half_open_and_by_any_row(settings):
    assert [settings.guides_any(torch.tensor([s])) for s in (0.28, 0.281, 5.42, 5.43)] == [False, True, True, False]
    assert settings.guides_any(torch.tensor([9.0, 1.0]))
    assert not st.Settings(None).guides_any(torch.tensor([1.0]))


def test_first_pass_only_leaves_hires_alone():
    first = st.from_controls("sdxl", 0, 1, st.FIRST_PASS)
    assert first.covers(False) and not first.covers(True)
    assert st.from_controls("sdxl", 0, 1, st.BOTH_PASSES).covers(True)


# ----------------------------------------------------------------------------
# Infotext.


def test_infotext_is_what_the_issue_shows(settings):
    assert settings.infotext(hires=True) == {"Guidance interval": "0.28-5.42"}
    first = st.Settings(settings.interval, st.FIRST_PASS)
    assert first.infotext(hires=False) == {"Guidance interval": "0.28-5.42"}
    assert first.infotext(hires=True) == {"Guidance interval": "0.28-5.42", "Guidance interval passes": st.FIRST_PASS}


@given(positive, positive)
def test_every_interval_survives_the_infotext(a, b):
    if a == b:
        return
    interval = GuidanceInterval(min(a, b), max(a, b))
    text = st.format_interval(interval)
    assert st.parse_interval(text) == interval
    assert set(text) <= set("0123456789.-") and text.count("-") == 1


def test_what_the_host_does_anyway_is_not_written():
    assert st.Settings(GuidanceInterval()).infotext(hires=True) == {}


def test_conditional_only_survives_the_infotext():
    for passes in st.PASSES:
        text = st.Settings(None, passes).infotext(hires=True)
        assert text["Guidance interval"] == "conditional only"
        assert st.paste(text) == st.Pasted(True, "conditional only", None, None, passes)


def test_open_ends_and_small_numbers_survive():
    for interval in (GuidanceInterval(), GuidanceInterval(1e-7, 80), GuidanceInterval(0.28)):
        assert st.parse_interval(st.format_interval(interval)) == interval
    assert st.format_interval(GuidanceInterval(1e-7, 80)) == "0.0000001-80"
    assert st.format_interval(GuidanceInterval(10, 1e16)) == "10-10000000000000000"
    for text in (" (0.28-5.42] ", "0.28 - 5.42", "0.28\N{EN DASH}5.42"):
        assert st.parse_interval(text) == GuidanceInterval(0.28, 5.42)
    assert st.parse_interval("0.28-INF") == GuidanceInterval(0.28)
    assert st.parse_interval(" Conditional Only") is None


def test_paste_restores_every_control_and_switches_off_without_our_key(settings):
    first = st.from_controls("sdxl", 0, 1, st.FIRST_PASS)
    assert st.paste(first.infotext(hires=True)) == st.Pasted(True, "sdxl", 0.28, 5.42, st.FIRST_PASS)
    other = st.from_controls("custom", 0.3, 5, st.BOTH_PASSES)
    assert st.paste(other.infotext(hires=True)) == st.Pasted(True, "custom", 0.3, 5.0, st.BOTH_PASSES)
    opened = st.from_controls("custom", 0.28, "inf", st.BOTH_PASSES)
    pasted = st.paste(opened.infotext(hires=True))
    assert pasted == st.Pasted(True, "custom", 0.28, 0.0, st.BOTH_PASSES)
    assert st.from_controls(pasted.preset, pasted.sigma_lo, pasted.sigma_hi, pasted.passes) == opened
    assert st.paste({"Steps": "20"}) == st.Pasted(enabled=False)


def pasted(value):
    """What a pasted text calls for whose last line has this value."""
    line = f"Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Guidance interval: {value}, Version: v1.9"
    return st.paste(st.entries(f"a cat, Guidance interval: 9-10, seen: once\nNegative prompt: a dog\n{line}"))


@pytest.mark.parametrize(
    ("value", "lo", "hi"),
    [
        ("0,28-5,42", 0.28, 5.42),
        ("0.28-5,42", 0.28, 5.42),
        ("(0.28, 5.42]", 0.28, 5.42),
        ("(0.28,5.42]", 0.28, 5.42),
        ("[0,28; 5,42]", 0.28, 5.42),
        ('0.28-5.42"', 0.28, 5.42),
        ('"0.28-5.42', 0.28, 5.42),
        ('"0.28-5.42"', 0.28, 5.42),
        ("\N{LEFT DOUBLE QUOTATION MARK}0.28-5.42\N{RIGHT DOUBLE QUOTATION MARK}", 0.28, 5.42),
        ("0.28 to 5.42", 0.28, 5.42),
        ("0.28 TO 5.42", 0.28, 5.42),
        ("0.28..5.42", 0.28, 5.42),
        ("0.28 \N{EM DASH} 5.42", 0.28, 5.42),
        ("0.28\N{MINUS SIGN}5.42", 0.28, 5.42),
        ("0.28~5.42", 0.28, 5.42),
        ("\N{FULLWIDTH DIGIT ZERO}.28\N{FULLWIDTH TILDE}5.42", 0.28, 5.42),
        (".28-5.42", 0.28, 5.42),
        ("0.28-5.42, a word", 0.28, 5.42),
        ("0, 5", 0.0, 5.0),
        ("1e-3-5", 0.001, 5.0),
        ("1E-3-1E+1", 0.001, 10.0),
        ("0.28-80.8", 0.28, 80.8),
        ("0.28-\N{INFINITY}", 0.28, 0.0),
        ("0.28-Infinity", 0.28, 0.0),
    ],
)
def test_an_odd_interval_is_read(value, lo, hi):
    preset = "sdxl" if (lo, hi) == (0.28, 5.42) else "custom"
    assert pasted(value) == st.Pasted(True, preset, lo, hi, st.BOTH_PASSES)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("5.42-0.28", "swap them"),
        ("0.28--1", "sigma_hi must not be negative, got -1.0"),
        ("0,5", "'0,5' is not an interval; write it as sigma_lo-sigma_hi"),
        ("0.28-", "is not an interval"),
        ("0.28", "is not an interval"),
        ("1-2-3", "is not an interval"),
        ("1-2,x", "is not an interval"),
        ("much", "'much' is not an interval"),
        ("much, more", "'much, more' is not an interval"),
        ("", "is not an interval"),
        ("nan-5", "is not an interval"),
        ("1e300-1e308", "sigma_lo must be between 1e-09 and 1e+06, or 0"),
    ],
)
def test_an_interval_that_cannot_be_read_changes_nothing_and_is_told(value, why):
    found = pasted(value)
    assert why in found.said and "nothing was changed" in found.said
    assert found == st.Pasted(said=found.said), "neither off nor another interval"


def test_a_pasted_text_that_names_two_intervals_says_which_was_taken():
    found = pasted("0.28-5.42, Guidance interval: 1-2")
    assert found == st.Pasted(True, "custom", 1.0, 2.0, st.BOTH_PASSES, found.said)
    assert "more than one 'Guidance interval'; the last one, 1-2, was taken" in found.said
    assert pasted("1-2, Guidance interval: 1-2").said == ""


def test_a_pasted_text_may_end_in_a_new_line():
    assert st.entries("a cat\nSteps: 20, Guidance interval: 0,28-5,42\n") == {"Guidance interval": "0,28-5,42"}


def test_an_interval_is_read_beside_a_quote_that_is_never_closed():
    shuffled = (
        'Steps: 20, VAE: x.ckpt, NGMS: 2, A: 88f5cd34154c", Guidance interval: 0.28-5.42, Seed: 1, "B: e2973254e1ad", '
        'Size: 512x704, "C: 20524fad3455'
    )
    assert st.paste(st.entries(shuffled)).preset == "sdxl"
    assert st.paste(st.entries('Steps: 20, "A: 1", Guidance interval: 1-2')).sigma_hi == 2


def test_passes_that_cannot_be_read_are_told():
    found = pasted("0.28-5.42, Guidance interval passes: First pass only")
    assert found == st.Pasted(True, "sdxl", 0.28, 5.42, st.FIRST_PASS)
    found = pasted("0.28-5.42, Guidance interval passes: third")
    assert found.passes == st.BOTH_PASSES and "got 'third'; Both passes was taken" in found.said


@pytest.mark.parametrize("name", ["sigma_lo", "sigma_hi"])
@pytest.mark.parametrize("value", [1e-300, LARGEST * 1.01, 1e300])
def test_a_bound_that_no_noise_reaches_is_refused(name, value):
    lo, hi = (value, 1e308) if name == "sigma_lo" else (0.0, value)
    with pytest.raises(ValueError, match=f"{name} must be between 1e-09 and 1e[+]06.*got {re.escape(repr(value))}"):
        st.from_controls("custom", lo, hi, st.BOTH_PASSES)


@pytest.fixture
def mine(monkeypatch):
    """A preset of the user's own whose upper end is open."""
    import dataclasses

    own = dataclasses.replace(get_preset("sdxl"), name="mine", sigma_lo=0.5, sigma_hi=math.inf)
    monkeypatch.setitem(st.PRESETS, "mine", own)
    known = st.get_preset
    monkeypatch.setattr(st, "get_preset", lambda name: own if name == "mine" else known(name))


def test_a_preset_with_an_open_end_is_known_by_its_box(mine):
    assert st.preset_of(0.5, 0) == st.preset_of(0.5, math.inf) == "mine"
    assert st.number_box(math.inf) == 0 and st.preset_of(0.5, 1e6) == "custom"
    assert pasted("0.5-inf") == st.Pasted(True, "mine", 0.5, 0.0, st.BOTH_PASSES)


# ----------------------------------------------------------------------------
# X/Y/Z axes.


def test_axes_override_what_they_name(settings):
    assert st.apply_axes({"sigma_lo": 1.0}, settings).interval == GuidanceInterval(1.0, 5.42)
    assert st.apply_axes({"sigma_lo": 1.0, "sigma_hi": 2.0}, settings).interval == GuidanceInterval(1, 2)
    assert st.apply_axes({"interval": "1-2"}, settings).interval == GuidanceInterval(1, 2)
    assert st.apply_axes({"preset": "edm2-xxl-fid"}, settings).interval == get_preset("edm2-xxl-fid").interval()
    assert st.apply_axes({"preset": "sdxl", "sigma_hi": 9.0}, settings).interval == GuidanceInterval(0.28, 9)
    assert st.apply_axes({"preset": "off"}, settings) is None
    assert st.apply_axes({"interval": " OFF "}, settings) is None
    assert st.apply_axes({"preset": "SDXL"}, settings).interval == GuidanceInterval(0.28, 5.42)
    for axis in ("preset", "interval"):
        assert st.apply_axes({axis: "Conditional only"}, settings) == st.Settings(None)
    assert st.apply_axes({"sigma_hi": math.inf}, settings).interval == GuidanceInterval(0.28)
    assert st.apply_axes({"sigma_hi": 0.0}, settings).interval == GuidanceInterval(0.28)
    assert st.apply_axes({"sigma_lo": 1.0}, st.Settings(None)).interval == GuidanceInterval(1.0)


@pytest.mark.parametrize("axis, value", [("interval", "5-1"), ("interval", "x"), ("preset", "sd9"), ("sigma_lo", -1.0)])
def test_an_axis_is_checked_before_anything_is_rendered(axis, value):
    with pytest.raises(ValueError):
        st.check_axis(axis, [value])


@pytest.mark.parametrize(
    "grid, said",
    [
        ({"sigma_lo": [0.28, 6.0]}, r"below sigma_hi: sigma_lo 6.0 \(the accordion has \(0.28, 5.42\]\)"),
        (
            {"sigma_lo": [0, 3, 6], "sigma_hi": [2, 6]},
            "lo 3 with sigma_hi 2; sigma_lo 6 with sigma_hi 2; .* sigma_hi 6. L",
        ),
        ({"sigma_lo": [5, 6, 7, 8], "sigma_hi": [1]}, "sigma_lo 7 with sigma_hi 1 and 1 more. Leave"),
        ({"preset": ["sdxl", "edm2-xxl-fid"], "sigma_lo": [4]}, "preset edm2-xxl-fid with sigma_lo 4"),
    ],
)
def test_a_grid_with_impossible_cells_is_refused(settings, grid, said):
    with pytest.raises(ValueError, match=said):
        st.check_grid(grid, settings)


@pytest.mark.parametrize(
    "grid",
    [{}, {"sigma_lo": [0, 3], "sigma_hi": [5, 0, math.inf]}, {"preset": ["sdxl", "off"], "sigma_lo": [0, 5]}],
)
def test_a_grid_whose_every_cell_has_an_interval_is_not(settings, grid):
    st.check_grid(grid, settings)

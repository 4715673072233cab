"""What of the A1111 extension needs no web UI: interval logic, infotext, control order, axes, rows, picture."""

import functools
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import guidance_interval
import pytest
import torch
from guidance_interval import GuidanceInterval, get_preset
from guidance_interval.a1111 import patch, picture
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


# ----------------------------------------------------------------------------
# Rows: a host's pattern of calls to its inner model, on real tensors and a real module.


class Inner(torch.nn.Module):
    """A denoiser of cond dicts that counts its rows."""

    rows = 0

    def forward(self, x, sigma, cond):
        self.rows += len(x)
        assert all(len(t) == len(x) for t in (sigma, cond["c_crossattn"][0], cond["c_concat"][0]))
        return x * cond["c_crossattn"][0].mean((1, 2))[:, None] + cond["c_concat"][0] + sigma[:, None]


def combine_denoised(x_out, conds_list, uncond, cond_scale):
    """Automatic1111's."""
    denoised = x_out[-uncond.shape[0] :].clone()
    for i, conds in enumerate(conds_list):
        for row, weight in conds:
            denoised[i] += (x_out[row] - x_out[-uncond.shape[0] :][i]) * (weight * cond_scale)
    return denoised


def announce(weights, uncond_rows, guided):
    """`(inner, params, generation)` as A1111 has them at a call whose images join prompts of these weights."""
    prompts = sum(map(len, weights))
    inner = Inner()
    batch = [[types.SimpleNamespace(weight=w) for w in image] for image in weights]
    cond = types.SimpleNamespace(batch=batch)
    sampler = types.SimpleNamespace(sampler_extra_args={"cond": cond})
    interval = GuidanceInterval() if guided else None
    run = patch.Generation(st.Settings(interval))
    denoiser = types.SimpleNamespace(
        inner_model=inner,
        sampler=sampler,
        combine_denoised=combine_denoised,
        p=types.SimpleNamespace(guidance_interval=run, is_hr_pass=False),
    )
    inner.sigmas = torch.tensor([0.03, 14.6])
    rows = prompts + uncond_rows
    params = types.SimpleNamespace(
        denoiser=denoiser,
        x=torch.randn(rows, 3),
        sigma=torch.full((rows,), 2.0),
        text_cond=torch.randn(prompts, 2, 5),
        text_uncond=torch.randn(len(weights), 2, 5),
        image_cond=torch.randn(rows, 3),
    )
    return inner, params, run


def host_asks(inner, params, splits):
    """The host's calls for these chunks of rows: [rows, 3]."""
    cond = torch.cat([params.text_cond, *[params.text_uncond] * 2])[: len(params.x)]
    out, start = [], 0
    for size in splits:
        s = slice(start, start + size)
        cond_in = {"c_crossattn": [cond[s]], "c_concat": [params.image_cond[s]]}
        out.append(inner(params.x[s], params.sigma[s], cond=cond_in))
        start += size
    return torch.cat(out)


@pytest.mark.parametrize(
    "weights, uncond_rows, splits",
    [
        ([[1.0]], 1, [2]),  # One batch.
        ([[1.0], [1.0]], 2, [2, 2]),  # "Batch cond/uncond" off, or unequal prompts.
        ([[1.2, 0.6], [1.0, 1.0]], 2, [6]),  # AND.
        ([[1.2, 0.6], [1.0, 1.0]], 2, [2, 2, 2]),
        ([[1.2, 0.6, 0.3]], 1, [2, 1, 1]),
        ([[1.0], [1.0]], 4, [6]),  # InstructPix2Pix: 3 rows an image.
    ],
)
def test_outside_only_cond_rows_are_evaluated(weights, uncond_rows, splits):
    inner, params, run = announce(weights, uncond_rows, guided=False)
    reference = host_asks(inner, params, splits)
    prompts = len(params.text_cond)
    inner.rows = 0
    patch.on_cfg_denoiser(params)
    out = host_asks(inner, params, splits)
    assert inner.rows == run.rows == prompts
    assert torch.equal(out[:prompts], reference[:prompts])
    start = 0
    for image, w in enumerate(weights):
        preds = reference[start : start + len(w)]
        mean = (preds * torch.tensor(w)[:, None]).sum(0) / sum(w)
        for row in range(prompts + image, len(out), len(weights)):
            torch.testing.assert_close(out[row], mean)
            assert len(w) > 1 or torch.equal(out[row], preds[0])
        start += len(w)
    assert "forward" not in vars(inner), "what was put in place lasts for one call"
    assert torch.equal(host_asks(inner, params, splits), reference)


def test_inside_the_host_evaluates_what_it_would():
    inner, params, run = announce([[1.0], [1.0]], 2, guided=True)
    reference = host_asks(inner, params, [4])
    patch.on_cfg_denoiser(params)
    assert torch.equal(host_asks(inner, params, [4]), reference)
    assert run.rows == 4 and "forward" not in vars(inner)


def test_a_wrapper_that_another_extension_put_there_stays():
    inner, params, _ = announce([[1.0]], 1, guided=False)
    inner.forward = other = types.MethodType(lambda self, x, sigma, cond: Inner.forward(self, x, sigma, cond), inner)
    patch.on_cfg_denoiser(params)
    host_asks(inner, params, [2])
    assert inner.forward is other


def test_an_interrupted_call_leaves_nothing_for_the_next():
    inner, params, run = announce([[1.0], [1.0]], 2, guided=False)
    reference = host_asks(inner, params, [2, 2])
    patch.on_cfg_denoiser(params)
    host_asks(inner, params, [2])  # And no more.
    patch.on_cfg_denoiser(params)
    out = host_asks(inner, params, [2, 2])
    assert torch.equal(out, reference[:2].repeat(2, 1)) and run.rows == 4
    assert "forward" not in vars(inner)


# ----------------------------------------------------------------------------
# What extensions make of the predictions, which they recombine in `combine_denoised`.


def rows_of(weights):
    """The host's conds_list: `[[(row, weight), ...] of each image]`."""
    numbered = iter(range(sum(map(len, weights))))
    return [[(next(numbered), weight) for weight in image] for image in weights]


def combined(guided, weights=((1.0,),), hook=None, scale=7.0):
    """`(denoised, cond rows, denoiser)` of one call, with the hook that an extension has set on the denoiser."""
    inner, params, _ = announce([list(image) for image in weights], len(weights), guided)
    denoiser = params.denoiser
    if hook is not None:
        denoiser.combine_denoised = functools.partial(hook, original_function=denoiser.combine_denoised)
    patch.on_cfg_denoiser(params)
    x_out = host_asks(inner, params, [len(params.x)])
    out = denoiser.combine_denoised(x_out, rows_of(weights), params.text_uncond, scale)
    return out, x_out[: len(params.text_cond)], denoiser


def by_region(x_out, conds_list, uncond, cond_scale, original_function):
    """As Regional Prompter in Latent mode: a prompt moves away from uncond in its own half alone."""
    x_out = x_out.clone()
    for conds in conds_list:
        for i, (row, _) in enumerate(conds):
            others = [0] if i else [1, 2]
            x_out[row, others] = x_out[-1, others]
    return original_function(x_out, conds_list, uncond, cond_scale)


def perpendicular(x_out, conds_list, uncond, cond_scale, original_function):
    """As Neutral Prompt's AND_PERP: what of the second prompt is perpendicular to the first is added."""
    first, second = (x_out[row] - x_out[-1] for row, _ in conds_list[0])
    denoised = original_function(x_out, [conds_list[0][:1]], uncond, cond_scale)
    across = second - first * (second @ first) / (first @ first)
    return denoised + across * 0.5 * cond_scale


def salt(x_out, conds_list, uncond, cond_scale, original_function):
    """As Neutral Prompt's AND_SALT: the second prompt acts where it moves further than the first."""
    first, second = (x_out[row] - x_out[-1] for row, _ in conds_list[0])
    denoised = original_function(x_out, [conds_list[0][:1]], uncond, cond_scale)
    return denoised + torch.where(second.abs() > first.abs(), second - first, 0) * 0.5 * cond_scale


TWO = ((1.0, 1.0),)


def test_regions_outside_are_the_conditional_predictions_of_each():
    out, cond, _ = combined(False, TWO, by_region)
    expected = torch.cat([cond[0, :1], cond[1, 1:]])
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-6)


def test_perpendicular_prompts_outside_are_the_first_ones_prediction():
    out, cond, _ = combined(False, TWO, perpendicular)
    torch.testing.assert_close(out[0], cond[0], rtol=1e-5, atol=1e-5)


def test_salient_prompts_outside_do_not_grow_with_the_weight():
    torch.manual_seed(0)
    out, *_ = combined(False, TWO, salt)
    torch.manual_seed(0)
    again, cond, _ = combined(False, TWO, salt, scale=100.0)
    assert torch.equal(out, again)
    low, high = cond.amin(0), cond.amax(0)
    assert ((out[0] >= low - 1e-5) & (out[0] <= high + 1e-5)).all(), "between the two predictions"


def test_and_outside_is_the_mean_to_the_last_bits():
    out, cond, _ = combined(False, ((1.2, 0.6, 0.3),), scale=30.0)
    expected = (cond * torch.tensor([1.2, 0.6, 0.3])[:, None]).sum(0) / 2.1
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("hook", [None, by_region, perpendicular])
def test_a_hook_of_another_extension_survives(hook):
    _, _, denoiser = combined(False, TWO, hook)
    after = denoiser.combine_denoised
    assert after is combine_denoised if hook is None else after.func is hook
    inside, _, denoiser = combined(True, TWO, hook)
    assert denoiser.combine_denoised is combine_denoised if hook is None else denoiser.combine_denoised.func is hook
    assert not torch.equal(inside, combined(True, TWO, hook, scale=1.0)[0]), "guided: the user's weight"


def test_a_class_keeps_its_method_and_no_attribute_stays():
    class Host(torch.nn.Module):
        def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
            return cond_scale

    host = Host()
    host.combine_denoised = patch._CombinedAtScale1(host)
    assert [host.combine_denoised(None, None, None, 7.0) for _ in range(2)] == [1.0, 7.0]
    assert "combine_denoised" not in vars(host)


def test_a_hook_set_over_ours_keeps_working():
    denoiser = types.SimpleNamespace(combine_denoised=lambda x_out, conds_list, uncond, cond_scale: cond_scale)
    denoiser.combine_denoised = ours = patch._CombinedAtScale1(denoiser)
    denoiser.combine_denoised = theirs = lambda *args: ours(*args) + 100
    assert [denoiser.combine_denoised(None, None, None, 7.0) for _ in range(2)] == [101.0, 107.0]
    assert denoiser.combine_denoised is theirs


def test_a_call_that_never_combined_leaves_no_weight_of_1_to_the_next():
    """Interrupted, or InstructPix2Pix, which combines in another place."""
    _, params, run = announce([[1.0]], 1, guided=False)
    patch.on_cfg_denoiser(params)
    run.settings = st.Settings(GuidanceInterval())
    patch.on_cfg_denoiser(params)
    x_out = torch.tensor([[2.0], [1.0]])
    assert params.denoiser.combine_denoised(x_out, [[(0, 1.0)]], params.text_uncond, 7.0).item() == 8
    assert params.denoiser.combine_denoised is combine_denoised


def test_without_a_run_nothing_is_touched():
    inner, params, _ = announce([[1.0]], 1, guided=False)
    del params.denoiser.p.guidance_interval
    patch.on_cfg_denoiser(params)
    assert "forward" not in vars(inner)
    patch.on_cfg_denoiser(types.SimpleNamespace())  # A web UI that says less.


def test_an_unknown_host_is_noted_and_left_alone():
    inner, params, run = announce([[1.0]], 1, guided=False)
    del params.denoiser.combine_denoised
    patch.on_cfg_denoiser(params)
    assert run.unknown and run.calls == 0 and "forward" not in vars(inner)


def test_take_rows_cuts_nested_conds():
    cond = {"crossattn": torch.ones(6, 2), "c_concat": [torch.ones(6, 1)], "n": 6, "other": torch.ones(1, 6)}
    cut = patch.take_rows({"cond": cond}, 2, 6)["cond"]
    assert [len(cut["crossattn"]), len(cut["c_concat"][0]), cut["n"], len(cut["other"])] == [2, 2, 6, 1]


def test_weights_without_a_mean_have_a_documented_answer():
    preds = torch.tensor([[1.0], [3.0]])
    assert patch.weighted_mean(preds, [1.0, 1.0]).item() == 2
    assert patch.weighted_mean(preds, [1.0, -0.5]).item() == pytest.approx(-1)
    assert patch.weighted_mean(preds, [1.0, -1.0]).item() == 1
    assert patch.weighted_mean(preds, [-1.0, 1.0]).item() == 3
    assert patch.weighted_mean(preds, [-1.0, -1.0]).item() == 1


def forge(**sampling):
    """A denoiser's inner model as Forge has it, with a unet of this kind."""
    sampling = {"sigmas": torch.linspace(0.03, 14.6, 10), **sampling}
    unet = types.SimpleNamespace(
        model=types.SimpleNamespace(predictor=types.SimpleNamespace(**sampling)), model_options={}
    )
    return types.SimpleNamespace(inner_model=types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet)))


def test_timesteps_become_noise_levels():
    alphas = torch.tensor([0.9, 0.5, 0.1])
    inner = types.SimpleNamespace(inner_model=types.SimpleNamespace(alphas_cumprod=alphas))
    levels = patch.noise_levels_of(inner)(torch.tensor([1.0, 1.5, 2.0]))
    assert levels.tolist() == pytest.approx([1.0, 3**0.5, 3.0])


def test_flow_times_become_noise_levels():
    inner = types.SimpleNamespace(sigmas=torch.linspace(0.001, 1, 1000))
    for model in (inner, forge(sigmas=inner.sigmas, sigma_data=1.0)):
        assert patch.noise_levels_of(model)(torch.tensor([0.5, 1.0])).tolist() == [1.0, math.inf]


@pytest.mark.parametrize("last", [0.999, 1.0, 1.0000001, 1.001])
def test_a_flow_model_is_one_whatever_its_shift_rounds_to(last):
    sigmas = torch.linspace(0.001, last, 1000)
    assert patch.noise_levels_of(forge(sigmas=sigmas))(torch.tensor([0.5, last]))[0] == 1.0
    assert patch.noise_levels_of(forge(sigmas=sigmas))(torch.tensor([1.0000001])).item() == math.inf


def test_a_model_of_low_noise_is_no_flow_model():
    sigma = torch.tensor([0.5])
    assert patch.noise_levels_of(forge(sigmas=torch.linspace(0.002, 2.5, 10)))(sigma) is sigma


def test_noise_levels_are_relative_to_the_scale_of_the_models_data():
    sigma = torch.tensor([0.5, 2.71])
    assert patch.noise_levels_of(forge(sigma_data=0.5))(sigma).tolist() == pytest.approx([1.0, 5.42])
    assert patch.noise_levels_of(forge(sigma_data=1.0))(sigma) is sigma
    assert patch.noise_levels_of(forge())(sigma) is sigma


def test_what_the_model_is_like_is_looked_up_again_when_it_changes():
    """By the refiner, in mid-run; and once otherwise, at 1,000 timesteps for each call."""
    reads = []

    class Model:
        @property
        def alphas_cumprod(self):
            reads.append(self)
            return torch.tensor([0.9, 0.5])

    run = patch.Generation(st.Settings(GuidanceInterval()))
    first, second = (types.SimpleNamespace(inner_model=Model()) for _ in range(2))
    for inner in (first, first, second, second):
        run.noise_levels(inner, torch.tensor([1.0]))
    assert reads == [first.inner_model, second.inner_model]


def test_noise_levels_that_cannot_be_read_are_told():
    inner, params, run = announce([[1.0]], 1, guided=False)
    run.settings = st.Settings(GuidanceInterval(1, 2))
    del inner.sigmas
    patch.on_cfg_denoiser(params)
    assert "noise levels cannot be read: AttributeError" in run.unknown and "forward" not in vars(inner)


# ----------------------------------------------------------------------------
# The picture, and the folder.


def drawn(sigmas, interval, *args, **rows):
    return picture.draw([picture.Pass(sigmas, [s in interval for s in sigmas], **rows)], *args)


def test_the_picture_tells_steps_and_saving():
    sigmas = [14.6, 5.0, 1.0, 0.3, 0.1]
    html = drawn(sigmas, GuidanceInterval(0.28, 5.42), 5)
    assert html.count(f'fill="{picture.GUIDED}"') == 3 and html.count("<rect") == 5
    assert "3 of 5 steps are guided (2 to 4): 8 network evaluations per image instead of 10, 20% saved" in html
    assert "None of the 5 steps is guided" in drawn(sigmas, GuidanceInterval(50, 80), 5)
    assert "1 of 1 steps is guided (1)" in drawn([1.0], GuidanceInterval(), 1)


def test_the_picture_counts_evaluations_where_they_are_not_the_steps():
    heun = [14.6, 5.0, 5.0, 1.0, 1.0]
    assert "4 of 5 evaluations are guided (2 to 5)" in drawn(heun, GuidanceInterval(0.28, 5.42), 3)
    restart = [5.0, 0.1, 5.0, 0.1]
    html = drawn(restart, GuidanceInterval(0.28, 5.42), 3)
    assert "2 of 4 evaluations are guided (1 to 3, with gaps)" in html


def test_the_picture_counts_and_prompts_and_passes():
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, cond=2)
    assert "5 network evaluations per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=2)
    assert "4 network evaluations per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=0)
    assert "2 network evaluations per image instead of 2, 0% saved" in html
    both = [picture.Pass([5.0, 0.1], [True, False]), picture.Pass([1.0], [True], cond=2)]
    assert "2 of 3 evaluations are guided (1 to 3, with gaps): 6 network evaluations" in picture.draw(both, 2)


def test_the_picture_of_a_flow_model_starts_at_infinity():
    html = drawn([math.inf, 3.0, 1.0, 0.2], GuidanceInterval(0.5, math.inf), 4)
    assert "nan" not in html and html.count("<rect") == 4 and "3 of 4 steps" in html
    heights = [float(part.split('"')[0]) for part in html.split(' height="')[1:]]
    assert heights[0] == heights[1] == picture.HEIGHT and heights[3] < heights[2] < heights[1]
    assert "nan" not in drawn([math.inf], GuidanceInterval(), 1)


def test_scripts_holds_one_file_because_the_web_ui_runs_all():
    assert [p.name for p in (ROOT / "scripts").glob("*.py")] == ["guidance_interval.py"]


def test_host_free_modules_need_no_web_ui():
    code = (
        "from guidance_interval.a1111 import settings, patch, picture; import sys; assert 'gradio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")

"""What of the A1111 extension needs no web UI: interval logic, infotext, control order, axes, rows, picture."""

import math
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
from hypothesis import given
from hypothesis import strategies as some

ROOT = Path(guidance_interval.__file__).parent
positive = some.floats(0, 1e6, allow_nan=False)


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
        assert st.paste(text) == (True, "conditional only", None, None, passes)


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
    assert st.paste(first.infotext(hires=True)) == (True, "sdxl", 0.28, 5.42, st.FIRST_PASS)
    other = st.from_controls("custom", 0.3, 5, st.BOTH_PASSES)
    assert st.paste(other.infotext(hires=True)) == (True, "custom", 0.3, 5.0, st.BOTH_PASSES)
    opened = st.from_controls("custom", 0.28, "inf", st.BOTH_PASSES)
    assert st.paste(opened.infotext(hires=True)) == (True, "custom", 0.28, 0.0, st.BOTH_PASSES)
    assert st.from_controls(*st.paste(opened.infotext(hires=True))[1:]) == opened
    assert st.paste({"Steps": "20"})[0] is False
    assert st.paste({"Guidance interval": "much"})[0] is False


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
        combine_denoised=None,
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
    assert "3 of 5 steps are guided (2 to 4): 8 network rows per image instead of 10, 20% saved" in html
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
    assert "5 network rows per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=2)
    assert "4 network rows per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=0)
    assert "2 network rows per image instead of 2, 0% saved" in html
    both = [picture.Pass([5.0, 0.1], [True, False]), picture.Pass([1.0], [True], cond=2)]
    assert "2 of 3 evaluations are guided (1 to 3, with gaps): 6 network rows" in picture.draw(both, 2)


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

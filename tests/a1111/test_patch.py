"""One denoiser call, with no web UI: its rows, and what extensions make of the predictions."""

import functools
import math
import types

import pytest
import torch
from guidance_interval import GuidanceInterval
from guidance_interval.a1111 import patch
from guidance_interval.a1111 import settings as st

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

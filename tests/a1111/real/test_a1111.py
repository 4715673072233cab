"""In the real Automatic1111: every denoiser call judged against the unpatched host, sampler by feature."""

import pytest

pytestmark = pytest.mark.a1111

INTERVAL = ["custom", 0.28, 5.42, "Both passes"]
FEATURES = {
    "plain": {},
    "batch 2 x 2": {"batch_size": 2, "n_iter": 2},
    "AND": {"prompt": "a cat :1.2 AND a dog :0.6", "batch_size": 2},
    "unequal": {"prompt": "a cat, " * 60},
    "unbatched": {"opts": {"batch_cond_uncond": False}},
    "unequal AND unbatched": {"prompt": "a cat, " * 60 + " AND a dog", "opts": {"batch_cond_uncond": False}},
}


SAMPLERS = [
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler",
    "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC",
    "LCM",
]  # fmt: skip


@pytest.fixture
def ours(webui):
    from guidance_interval.a1111 import settings

    return settings


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call(judge, generate, ours, monkeypatch, report, sampler, feature):
    from modules import shared

    kwargs = dict(FEATURES[feature])
    for name, value in kwargs.pop("opts", {}).items():
        monkeypatch.setitem(shared.opts.data, name, value)
    judged = judge(ours.from_controls(*INTERVAL))
    p, _ = generate(accordion=[True, *INTERVAL], sampler_name=sampler, **kwargs)
    report(sampler, feature, judged)
    judged.check()
    guided = [c["guided"] for c in judged.calls]
    assert any(guided) and not all(guided)
    assert p.sampler_name == sampler


def test_all_samplers_are_tested(webui):
    from modules import sd_samplers

    assert {s.name for s in sd_samplers.all_samplers} == set(SAMPLERS)


# ----------------------------------------------------------------------------
# How it differs from the host's own savers, measured.


def rows_of(judge, generate, ours, **kwargs):
    """`(rows, rows with CFG everywhere)` of one generation."""
    judged = judge(ours.from_controls(*INTERVAL))
    generate(**kwargs)
    return sum(c["rows"] for c in judged.calls), 2 * len(judged.calls)


NEIGHBOURS = {
    "interval (0.28, 5.42]": ({"accordion": [True, *INTERVAL]}, {}),
    "NGMS 0.28": ({"s_min_uncond": 0.28}, {}),
    "NGMS 0.28, all steps": ({"s_min_uncond": 0.28}, {"s_min_uncond_all": True}),
    "Skip Early CFG 0.25": ({}, {"skip_early_cond": 0.25}),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM"])
def test_rows_of_the_neighbours(judge, generate, ours, monkeypatch, report, sampler, neighbour):
    from modules import shared

    kwargs, opts = NEIGHBOURS[neighbour]
    for name, value in opts.items():
        monkeypatch.setitem(shared.opts.data, name, value)
    rows, everywhere = rows_of(judge, generate, ours, sampler_name=sampler, steps=20, **kwargs)
    report(neighbour, f"{sampler}, 20 steps", f"{rows} of {everywhere}")
    never = sampler == "DDIM" and "NGMS" in neighbour  # It compares a timestep with a sigma.
    assert (rows == everywhere) == never


@pytest.fixture
def unet_rows(webui):
    """`unet_rows(run)`: the rows that the loaded UNet evaluates during `run()`."""
    from modules import shared

    def count(run):
        rows = []
        unet = shared.sd_model.model.diffusion_model
        handle = unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        try:
            run()
        finally:
            handle.remove()
        return sum(rows)

    return count


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("model", ["inpainting", "pix2pix"])
def test_models_with_image_conditioning(
    webui, generate, unet_rows, monkeypatch, report, model, neighbour, image, mask, checkpoint
):
    """The neighbours forget to shorten the image conditioning; on InstructPix2Pix, NGMS does not act."""
    from modules import shared

    kwargs, opts = NEIGHBOURS[neighbour]
    checkpoint(model)
    more = {"mask": mask} if model == "inpainting" else {"image_cfg_scale": 1.5}
    more |= {"image": image, "steps": 20, "denoising_strength": 1.0}
    everywhere = unet_rows(lambda: generate(**more))
    for name, value in opts.items():
        monkeypatch.setitem(shared.opts.data, name, value)
    try:
        rows = unet_rows(lambda: generate(**kwargs, **more))
        outcome = f"{rows} of {everywhere}"
    except (RuntimeError, IndexError) as e:
        rows, outcome = None, type(e).__name__
    report(neighbour, f"{model} model, 20 steps", outcome)
    if "interval" in neighbour:
        assert rows < everywhere
    elif "NGMS" in neighbour and model == "pix2pix":
        assert rows == everywhere
    else:
        assert rows is None


# ----------------------------------------------------------------------------
# Extensions that recombine the predictions.


def levels(one, other):
    """The largest difference of two images, in levels of 255."""
    import numpy as np

    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.fixture
def regional(webui):
    """As Regional Prompter in Latent mode: outside its region, each prompt's prediction becomes the negative one's."""
    from modules import script_callbacks

    def denoised(params):
        x = params.x
        half = x.shape[-1] // 2
        x[0, ..., half:] = x[-1, ..., half:]
        x[1, ..., :half] = x[-1, ..., :half]

    script_callbacks.on_cfg_denoised(denoised, name="regional")
    yield
    script_callbacks.remove_callbacks_for_function(denoised)
    script_callbacks.ordered_callbacks_map.clear()


TWO = "a photo of a cat AND a house by the sea"
CONDITIONAL = [True, "conditional only", 0, 0, "Both passes"]


def test_regions_outside_are_the_conditional_predictions_of_each(regional, generate):
    _, ours = generate(accordion=CONDITIONAL, prompt=TWO, cfg_scale=7.0)
    _, expected = generate(prompt=TWO, cfg_scale=1.0)  # uncond cancels where each region has one prompt.
    assert levels(ours.images[0], expected.images[0]) <= 1
    _, stock = generate(prompt=TWO, cfg_scale=7.0)
    assert levels(stock.images[0], expected.images[0]) > 10


@pytest.fixture
def perpendicular(webui, monkeypatch):
    """As Neutral Prompt's AND_PERP, which sets its hook on each sampler's denoiser; the denoisers are kept."""
    import functools

    from modules import sd_samplers

    create, denoisers = sd_samplers.create_sampler, []

    def combine(x_out, conds_list, uncond, cond_scale, original_function):
        denoised = original_function(x_out, [conds[:1] for conds in conds_list], uncond, cond_scale)
        for i, ((first, _), (second, weight)) in enumerate(conds_list):
            base, other = (x_out[row] - x_out[-uncond.shape[0] + i] for row in (first, second))
            along = (other * base).sum() / (base * base).sum().clamp(min=1e-20)
            denoised[i] += (other - base * along) * weight * cond_scale
        return denoised

    def create_sampler(name, model):
        sampler = create(name, model)
        denoiser = sampler.model_wrap_cfg
        denoiser.combine_denoised = functools.partial(combine, original_function=denoiser.combine_denoised)
        denoisers.append((denoiser, denoiser.combine_denoised))
        return sampler

    monkeypatch.setattr(sd_samplers, "create_sampler", create_sampler)
    return denoisers


def test_perpendicular_prompts_outside_are_the_first_ones_prediction(perpendicular, generate, monkeypatch):
    _, ours = generate(accordion=CONDITIONAL, prompt=TWO)
    assert perpendicular
    for denoiser, hook in perpendicular:
        assert vars(denoiser)["combine_denoised"] is hook, "the hook of another extension survives"
    monkeypatch.undo()
    _, expected = generate(accordion=CONDITIONAL, prompt=TWO.partition(" AND ")[0])
    assert levels(ours.images[0], expected.images[0]) <= 1


def test_a_hook_acts_as_before_inside(perpendicular, generate):
    _, stock = generate(prompt=TWO)
    _, inside = generate(accordion=[True, "custom", 0.0, 0.0, "Both passes"], prompt=TWO)
    assert inside.images[0].tobytes() == stock.images[0].tobytes()

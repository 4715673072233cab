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

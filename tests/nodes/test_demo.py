"""The demo model in the real ComfyUI: the host samples it as k-diffusion does, and what the nodes refuse."""

import subprocess
import sys

import comfy_harness as harness
import numpy as np
import pytest
import torch
from guidance_interval import CFGDenoiser, GuidanceInterval
from guidance_interval.toy import model as lab_model
from guidance_interval.toy import sampling

EMOJI = lab_model.SHIPPED.with_name("emoji.safetensors")


@pytest.fixture(scope="module")
def lab():
    return lab_model.load(EMOJI)


@pytest.fixture
def demo(host):
    """The module, whose file a test may put elsewhere."""
    return harness.our_module(host, "demo")


def node(host, name, **inputs):
    return harness.run_node(host, name, **inputs)


def prompt(host, subgroup):
    return node(host, "GuidanceIntervalDemoPrompt", subgroup=subgroup)[0]


def guider_of(host, positive="food-fruit", negative="none", cfg=2.5, interval=None, batch=3):
    """`(guider, vae, latent)` on the demo model."""
    import comfy.samplers

    model, vae, latent = node(host, "GuidanceIntervalDemoModel", batch_size=batch)
    if interval is not None:
        # Of the lab's noise levels; those of the nodes are relative to data of unit scale, and here it is 0.5.
        bounds = {"sigma_lo": 2 * interval.sigma_lo, "sigma_hi": 2 * interval.sigma_hi}
        model = node(host, "GuidanceInterval", model=model, **bounds)[0]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(host, positive), prompt(host, negative))
    guider.set_cfg(cfg)
    return guider, vae, latent["samples"]


def karras(model, steps):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", steps)


def on_the_models_scale(lab, latent):
    """From a LATENT, pixels from -1 to 1, to what the lab samples."""
    mean, std = lab.config["pixel_mean"], lab.config["pixel_std"]
    return ((latent + 1) / 2 - mean) / std * lab.config["sigma_data"]


# ----------------------------------------------------------------------------
# Sampling.


SETTINGS = {"none": (1.0, None), "cfg": (2.5, None), "interval": (2.5, GuidanceInterval(0.1, 5.0))}


@pytest.mark.parametrize("setting", SETTINGS)
@torch.inference_mode()
def test_euler_of_the_host_is_that_of_k_diffusion(host, lab, setting):
    import comfy.samplers
    from k_diffusion.sampling import sample_euler

    weight, interval = SETTINGS[setting]
    guider, _, latent = guider_of(host, cfg=weight, interval=interval)
    sigmas = sampling.karras_sigmas(8)
    torch.testing.assert_close(karras(guider.model_patcher, 8), sigmas)
    batches = []

    def count(executor, x, *args, **kwargs):
        batches.append(x.shape[0])
        return executor(x, *args, **kwargs)

    guider.model_patcher.add_wrapper_with_key("apply_model", "count", count)
    got = harness.sample(guider, comfy.samplers.sampler_object("euler"), sigmas, latent, seed=3)

    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    labels = torch.full([len(noise)], lab.config["classes"].index("food-fruit"))
    denoiser = CFGDenoiser(lab.denoiser, interval)
    no_class = torch.full_like(labels, lab.denoiser.null_class)
    extra_args = dict(cond={"class_cond": labels}, uncond={"class_cond": no_class}, cond_scale=weight)
    expected = sample_euler(denoiser, noise * sigmas[0], sigmas, extra_args=extra_args, disable=True)
    torch.testing.assert_close(on_the_models_scale(lab, got), expected, rtol=0, atol=1e-4)
    guided = [setting == "cfg" or (setting == "interval" and 0.1 < s <= 5) for s in sigmas[:-1].tolist()]
    assert batches == [6 if g else 3 for g in guided]  # Cond and uncond in one call.
    assert sum(batches) == denoiser.rows


@pytest.mark.parametrize("scheduler", ["normal", "simple", "exponential", "sgm_uniform", "beta"])
@torch.inference_mode()
def test_schedulers_span_the_models_noise_levels(host, scheduler):
    import comfy.samplers

    model = node(host, "GuidanceIntervalDemoModel", batch_size=1)[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, 12)
    assert sigmas[0] == pytest.approx(sampling.SIGMA_MAX, rel=0.01) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all() and sigmas[-2] < 1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp"])
@torch.inference_mode()
def test_samplers(host, sampler):
    import comfy.samplers

    interval = GuidanceInterval(0.1, 5.0)
    guider, vae, latent = guider_of(host, interval=interval, batch=2)
    sigmas = karras(guider.model_patcher, 6)
    images = vae.decode(harness.sample(guider, comfy.samplers.sampler_object(sampler), sigmas, latent))
    assert images.shape == (2, 256, 256, 3) and images.isfinite().all() and images.std() > 0.1


@torch.inference_mode()
def test_prompts_combine_as_those_of_other_models_do(host):
    """Zeroed out is none, the average of a prompt and none lies between them, and other sizes are sampled too."""
    import comfy.samplers

    def run(positive, latent=None):
        guider, _, empty = guider_of(host, cfg=1.0, batch=1)
        guider.set_conds(positive, positive)
        latent = empty if latent is None else latent
        return harness.sample(guider, comfy.samplers.sampler_object("euler"), karras(guider.model_patcher, 4), latent)

    fruit, none, fish = (prompt(host, name) for name in ("food-fruit", "none", "animal-marine"))
    assert torch.equal(run(node(host, "ConditioningZeroOut", conditioning=fruit)[0]), run(none))
    assert not torch.equal(run(fruit), run(none))
    average = {"conditioning_to": fruit, "conditioning_from": fish, "conditioning_to_strength": 0.5}
    average = node(host, "ConditioningAverage", **average)[0]
    concatenated = node(host, "ConditioningConcat", conditioning_to=fruit, conditioning_from=fish)[0]
    torch.testing.assert_close(run(average), run(concatenated), rtol=0, atol=1e-4)
    assert run(fruit, torch.zeros(1, 3, 64, 48)).shape == (1, 3, 64, 48)


@torch.inference_mode()
def test_two_prompts_in_one_batch_give_what_each_gives_alone(host):
    """Two tokens beside one: the host repeats the shorter."""
    import comfy.samplers

    fruit, fish = prompt(host, "food-fruit"), prompt(host, "animal-marine")
    pair = node(host, "ConditioningConcat", conditioning_to=fruit, conditioning_from=fish)[0]

    def run(cfg):
        guider, _, latent = guider_of(host, cfg=cfg, batch=1)
        guider.set_conds(pair, fruit)
        return harness.sample(guider, comfy.samplers.sampler_object("euler"), karras(guider.model_patcher, 4), latent)

    torch.testing.assert_close(run(1.0), run(1.0001), rtol=0, atol=1e-2)


# ----------------------------------------------------------------------------
# The VAE.


@torch.inference_mode()
def test_the_vae_enlarges_pixels_and_takes_them_back(host):
    _, vae, latent = node(host, "GuidanceIntervalDemoModel", batch_size=2)
    latent = torch.rand(latent["samples"].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = node(host, "VAEDecode", vae=vae, samples={"samples": latent})[0]
    expected = ((latent + 1) / 2).repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)
    torch.testing.assert_close(images, expected)
    encoded = node(host, "VAEEncode", vae=vae, pixels=images)[0]["samples"]
    torch.testing.assert_close(encoded, latent, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_compare_shows_it(host):
    model, vae, latent = node(host, "GuidanceIntervalDemoModel", batch_size=2)
    inputs = dict(positive=prompt(host, "food-fruit"), negative=prompt(host, "none"), steps=4, cfg=4.0)
    inputs |= dict(intervals="0.2, 10", sampler="euler", scheduler="karras", vae=vae, latent=latent)
    _, images, text = node(host, "GuidanceIntervalCompare", model=model, **inputs)
    assert images.shape == (6, 256, 256, 3)
    everywhere, interval, none = images.reshape(3, 2, 256, 256, 3)
    assert not torch.equal(everywhere, interval) and not torch.equal(interval, none)
    assert [int(line.split()[-3]) for line in text.splitlines()[1:]] == [16, 10, 8]


# ----------------------------------------------------------------------------
# Refused.


@torch.inference_mode()
def sample_once(model, positive, negative, latent):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    sampler = comfy.samplers.sampler_object("euler")
    return harness.sample(guider, sampler, torch.tensor([1.0, 0.5, 0.0]), latent)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_prompts_of_other_models_are_refused(host, side):
    model, _, latent = node(host, "GuidanceIntervalDemoModel", batch_size=1)
    prompts = {k: prompt(host, "none") for k in ("positive", "negative")} | {side: harness.conditioning(1)}
    with pytest.raises(ValueError, match=r"reads no text: connect Guidance Interval Demo Prompt nodes"):
        sample_once(model, prompts["positive"], prompts["negative"], latent["samples"])


@pytest.mark.parametrize("kind", [*harness.MODELS, "video"])
def test_other_models_refuse_its_prompts(host, kind):
    latent, fruit = harness.empty_latent(kind), prompt(host, "food-fruit")
    with pytest.raises(ValueError, match=r"is from Guidance Interval Demo Prompt, which only the .* can read"):
        sample_once(harness.tiny_model(kind), fruit, prompt(host, "none"), latent)
    with pytest.raises(ValueError, match=r"is from Guidance Interval Demo Prompt"):
        sample_once(harness.tiny_model(kind), harness.conditioning(1), fruit, latent)


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (1, 3, 30, 32)])
def test_latents_that_do_not_fit_are_refused(host, shape):
    model = node(host, "GuidanceIntervalDemoModel", batch_size=1)[0]
    with pytest.raises(ValueError, match=r"samples latents of \[batch, 3, 32, 32\].*connect the latent"):
        sample_once(model, prompt(host, "none"), prompt(host, "none"), torch.zeros(shape))


def test_an_unknown_subgroup_is_refused(host):
    with pytest.raises(ValueError, match=r"subgroup must be one of none, face-smiling, .*; got 'sofa'"):
        prompt(host, "sofa")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is not a readable safetensors file"), (b"cut", "is not a readable safetensors")],
)
def test_a_missing_or_damaged_file_is_told_in_the_node(host, demo, tmp_path, monkeypatch, content, message):
    path = tmp_path / "emoji.safetensors"
    if content is not None:
        path.write_bytes(EMOJI.read_bytes()[:100_000] if content else b"")
    monkeypatch.setattr(demo, "EMOJI", path)
    for run in (lambda: node(host, "GuidanceIntervalDemoModel"), lambda: prompt(host, "none")):
        with pytest.raises(ValueError, match=rf"emoji.safetensors.*{message}.*install the pack again"):
            run()
    types = host.nodes["GuidanceIntervalDemoPrompt"].INPUT_TYPES()  # The server goes on listing its nodes.
    assert types["required"]["subgroup"][1]["options"] == ["none"]


# ----------------------------------------------------------------------------
# Loading.


def test_nothing_is_read_before_a_node_runs_and_each_model_is_its_own(host, demo, monkeypatch):
    loads = []
    load = demo.lab_model.load
    monkeypatch.setattr(demo.lab_model, "load", lambda path: loads.append(path) or load(path))
    types = host.nodes["GuidanceIntervalDemoPrompt"].INPUT_TYPES()
    assert len(types["required"]["subgroup"][1]["options"]) == 97 and not loads
    (a, *_), (b, *_) = (node(host, "GuidanceIntervalDemoModel") for _ in range(2))
    assert len(loads) == 2 and a.model is not b.model


def test_the_nodes_import_nothing_that_comfyui_does_not_have(comfyui_path):
    code = f"""
import sys
for name in ("k_diffusion", "matplotlib", "mlxtend", "sklearn", "torchmetrics", "resvg_py", "setuptools"):
    sys.modules[name] = None  # As on a machine without it.
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {str(comfyui_path)!r})
sys.path.insert(1, {str(harness.ROOT / "tests" / "nodes")!r})
import comfy_harness
host = comfy_harness.start_comfyui({str(comfyui_path)!r})
comfy_harness.run_node(host, "GuidanceIntervalDemoModel")
comfy_harness.run_node(host, "GuidanceIntervalDemoPrompt", subgroup="food-fruit")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_images_are_what_the_lab_shows(host, lab):
    """A picture of the reference, through the VAE and the model's scale and back."""
    model, _, _ = node(host, "GuidanceIntervalDemoModel")
    picture = lab.reference["thumbnails"][:4]
    latent = torch.from_numpy(np.asarray(picture)).float() / 127.5 - 1
    scaled = model.model.process_latent_in(latent)
    torch.testing.assert_close(scaled, on_the_models_scale(lab, latent))
    torch.testing.assert_close(model.model.process_latent_out(scaled), latent, rtol=0, atol=1e-5)

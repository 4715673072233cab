"""In a real web UI: what the picture tells before an image is made is what is counted when it is made."""

import math

import pytest

pytestmark = [pytest.mark.a1111, pytest.mark.forge]

INTERVAL = ["custom", 0.28, 5.42, "Both passes"]
NARROW = ["custom", 0.5, 2.0, "Both passes"]
TXT2IMG = {"prompt": "a photo of a cat", "scheduler": "Automatic", "steps": 8, "cfg_scale": 7.0}


@pytest.fixture
def told(webui):
    """`told(ours, **controls)`: the passes of a generation, from the values of our controls and the host's."""
    from guidance_interval.a1111 import evaluations, settings

    def passes(ours, **controls):
        return evaluations.passes({**TXT2IMG, **controls}, settings.from_controls(*ours))

    return passes


@pytest.fixture
def counted(webui, generate):
    """`counted(ours, **p)`: `(noise levels, network evaluations per image)` of a generation."""
    from guidance_interval.a1111 import patch
    from modules import script_callbacks

    levels = []

    def record(params):
        levels.append(float(patch.noise_levels_of(params.denoiser.inner_model)(params.sigma)[0]))

    def run(ours, **kwargs):
        levels.clear()
        p, _ = generate(accordion=[True, *ours], **kwargs)
        return list(levels), p.guidance_interval_rows / (p.batch_size * p.n_iter)

    script_callbacks.on_cfg_denoiser(record, name="record")
    yield run
    script_callbacks.remove_callbacks_for_function(record)
    script_callbacks.ordered_callbacks_map.clear()


def check(passes, counted):
    levels, rows = counted
    expected = [sigma for one in passes for sigma in one.sigmas]
    assert levels == pytest.approx(expected, rel=1e-3)
    assert rows == sum(one.rows for one in passes)


def samplers():
    from modules import sd_samplers

    return [s.name for s in sd_samplers.all_samplers]


@pytest.mark.parametrize("denoising", [None, 0.5])
def test_every_sampler(told, counted, image, denoising):
    """All that the host has; those that go by the image say so."""
    from guidance_interval.a1111.evaluations import Unknown

    controls = {"steps": 5} if denoising is None else {"steps": 8, "denoising_strength": denoising}
    kwargs = controls if denoising is None else {**controls, "image": image}
    unknown, wrong = set(), {}
    for name in samplers():
        try:
            passes = told(INTERVAL, sampler=name, **controls)
        except Unknown as e:
            if "noise level of NaN" in str(e):
                assert name.endswith("RF")  # For sigmas up to 1, which this model does not have.
                continue
            unknown.add(name)
            assert "depends on the image" in str(e), str(e)
            continue
        try:
            check(passes, counted(INTERVAL, sampler_name=name, **kwargs))
        except AssertionError as e:
            wrong[name] = str(e)
    assert not wrong
    adaptive = {"DPM adaptive"} & set(samplers())  # Forge Classic has none.
    assert adaptive <= unknown <= {*adaptive, *(n for n in samplers() if n.startswith("ODE"))}


@pytest.mark.parametrize("steps", [1, 2, 20, 40])
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM", "PLMS", "UniPC", "DPM fast", "Heun", "Restart"])
def test_other_numbers_of_steps(told, counted, need_sampler, sampler, steps):
    from guidance_interval.a1111.evaluations import Unknown

    need_sampler(sampler)
    try:
        passes = told(INTERVAL, sampler=sampler, steps=steps)
    except Unknown as e:
        if e.__cause__ is None:
            assert "at no step" in str(e) and counted(INTERVAL, sampler_name=sampler, steps=steps) == ([], 0)
            return
        with pytest.raises(type(e.__cause__)):  # The host fails as the trial run did.
            counted(INTERVAL, sampler_name=sampler, steps=steps)
        return
    check(passes, counted(INTERVAL, sampler_name=sampler, steps=steps))


@pytest.mark.parametrize("scheduler", ["Karras", "Exponential", "SGM Uniform", "Simple"])
def test_schedulers(told, counted, scheduler):
    check(
        told(INTERVAL, sampler="Euler a", scheduler=scheduler),
        counted(INTERVAL, sampler_name="Euler a", scheduler=scheduler),
    )


def test_the_hosts_options_count(webui, told, counted, need_sampler, monkeypatch):
    from modules import shared

    need_sampler("DPM2 a")
    monkeypatch.setitem(shared.opts.data, "always_discard_next_to_last_sigma", True)
    monkeypatch.setitem(shared.opts.data, "eta_ancestral", 0.5)
    check(told(INTERVAL, sampler="DPM2 a"), counted(INTERVAL, sampler_name="DPM2 a"))
    monkeypatch.setitem(shared.opts.data, "s_churn", 3.0)
    for sampler in ("Euler", "Heun"):
        check(told(INTERVAL, sampler=sampler), counted(INTERVAL, sampler_name=sampler))


@pytest.mark.parametrize("ours", [NARROW, [*NARROW[:3], "First pass only"]])
def test_hires_fix(told, counted, hires, ours):
    kwargs = hires(hr_second_pass_steps=5, hr_sampler_name="DDIM")
    passes = told(
        ours,
        sampler="DPM++ 2M",
        hires=True,
        hires_steps=5,
        hires_sampler="DDIM",
        hires_scheduler="Use same scheduler",
        hires_denoising_strength=0.6,
        hires_cfg_scale=7.0,
    )
    assert len(passes) == 2
    check(passes, counted(ours, sampler_name="DPM++ 2M", **kwargs))


@pytest.mark.parametrize("prompt", ["a cat AND a dog", "a cat :1.2 AND a dog :0.6 AND a bird"])
def test_prompts_joined_by_and(told, counted, prompt):
    (one,) = told(INTERVAL, sampler="DPM++ 2M", prompt=prompt)
    assert one.cond == prompt.count("AND") + 1
    check([one], counted(INTERVAL, sampler_name="DPM++ 2M", prompt=prompt, batch_size=2))


def test_instruct_pix2pix(webui, told, counted, image, checkpoint):
    if webui.host == "forge":
        pytest.skip("Forge has no InstructPix2Pix")
    checkpoint("pix2pix")
    for image_cfg, uncond in ((1.5, 2), (1.0, 1)):
        (one,) = told(NARROW, sampler="DPM++ 2M", denoising_strength=0.8, image_cfg_scale=image_cfg)
        assert one.uncond == uncond
        run = counted(NARROW, sampler_name="DPM++ 2M", image=image, denoising_strength=0.8, image_cfg_scale=image_cfg)
        check([one], run)


def test_a_cfg_scale_of_1(webui, told, counted):
    (one,) = told(INTERVAL, sampler="Euler", cfg_scale=1.0)
    assert one.uncond == (0 if webui.host == "forge" else 1)
    check([one], counted(INTERVAL, sampler_name="Euler", cfg_scale=1.0))


def test_conditional_only(told, counted):
    ours = ["conditional only", 0, 0, "Both passes"]
    (one,) = told(ours, sampler="Euler")
    assert one.rows == 8 and not any(one.guided)
    check([one], counted(ours, sampler_name="Euler"))


# ----------------------------------------------------------------------------
# When it cannot be told.


def test_a_trial_run_leaves_no_trace(told, generate):
    """The image's own random numbers, k-diffusion's and torch's, are as they were."""
    import torch
    from guidance_interval.a1111 import evaluations
    from modules import sd_samplers_common

    sampling = getattr(sd_samplers_common, "sampling", None) or sd_samplers_common.k_diffusion.sampling
    _, before = generate(sampler_name="Euler a")
    hosts, state = sampling.torch, torch.random.get_rng_state()
    evaluations._kept.clear()
    for sampler in ("Euler a", "DPM++ SDE", "DDIM", "UniPC", "Restart"):
        told(INTERVAL, sampler=sampler)
    assert sampling.torch is hosts and torch.equal(torch.random.get_rng_state(), state)
    _, after = generate(sampler_name="Euler a")
    assert [i.tobytes() for i in before.images] == [i.tobytes() for i in after.images]


def test_while_an_image_is_made_only_known_schedules_are_shown(told):
    from guidance_interval.a1111 import evaluations
    from modules import call_queue

    evaluations._kept.clear()
    known = told(INTERVAL, sampler="Euler", steps=9)
    with call_queue.queue_lock:
        assert told(INTERVAL, sampler="Euler", steps=9) == known
        with pytest.raises(evaluations.Unknown, match="image is being made"):
            told(INTERVAL, sampler="Euler", steps=10)
    assert len(told(INTERVAL, sampler="Euler", steps=10)[0].sigmas) == 10


def test_why_it_cannot_be_told(webui, told, monkeypatch):
    from guidance_interval.a1111 import evaluations, ui
    from modules import sd_models

    with pytest.raises(evaluations.Unknown, match=r"no such sampler.*AssertionError: bad sampler name"):
        told(INTERVAL, sampler="no such sampler")
    monkeypatch.setattr(sd_models.model_data, "sd_model", None)
    with pytest.raises(evaluations.Unknown, match="when a model is loaded"):
        told(INTERVAL, sampler="Euler")
    assert "when a model is loaded" in ui.picture_of(INTERVAL, {**TXT2IMG, "sampler": "Euler"})


def test_the_picture(webui):
    from guidance_interval.a1111 import ui

    controls = {**TXT2IMG, "sampler": "DPM++ 2M", "scheduler": "Karras", "steps": 20}
    html = ui.picture_of(INTERVAL, controls)
    assert "9 of 20 steps are guided" in html and "29 network evaluations per image instead of 40" in html
    assert "swap them" in ui.picture_of(["custom", 5, 1, "Both passes"], controls)
    assert "20 of 20 steps" in ui.picture_of(["custom", 0, 0, "Both passes"], controls)
    if "DPM adaptive" in samplers():
        assert "depends on the image" in ui.picture_of(INTERVAL, {**controls, "sampler": "DPM adaptive"})
    assert "9 of 20 steps are guided" in ui.picture_of(INTERVAL, {**controls, "prompt": None})


def test_it_is_drawn_again_when_an_image_is_done(webui):
    """The page's own events: of the host's controls, of the text that follows an image, and its being opened."""
    from guidance_interval.a1111 import ui
    from modules import shared

    config = shared.demo.get_config_file()
    by_id = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    for tab in ("txt2img", "img2img"):
        picture = next(i for i, name in by_id.items() if name == f"{tab}_guidance_interval_picture")
        script = next(i for i, name in by_id.items() if name == f"{tab}_guidance_interval_script_picture")
        sources, opened = set(), set()
        for dependency in config["dependencies"]:
            if picture in dependency["outputs"]:
                for target in dependency["targets"]:
                    sources.add(by_id.get(target[0] if isinstance(target, list | tuple) else target))
            if _is_load(dependency):
                opened |= set(dependency["outputs"])
        assert {picture, script} <= opened, "a model may have been loaded since the page was made"
        assert f"generation_info_{tab}" in sources and f"html_log_{tab}" not in sources
        missing = ui.CONTROLS[tab].keys() - sources
        assert missing <= {"txt2img_hr_cfg"}, missing


def _is_load(dependency):
    """Whether it runs when the page is opened: without a target, or with that of the page's own event."""
    targets = dependency["targets"]
    return not targets or any(isinstance(t, list | tuple) and t[1] == "load" for t in targets)


@pytest.mark.parametrize("option", [("sd_noise_schedule", "Zero Terminal SNR"), ("use_downcasted_alpha_bar", True)])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_the_noise_schedule_of_the_options_is_told_before_the_first_image(
    webui, told, counted, monkeypatch, sampler, option
):
    from modules import shared

    name, value = option
    if name not in shared.opts.data_labels:
        pytest.skip(f"this host has no option {name}")
    (before,) = told(INTERVAL, sampler=sampler)
    monkeypatch.setitem(shared.opts.data, name, value)
    (one,) = told(INTERVAL, sampler=sampler)
    check([one], counted(INTERVAL, sampler_name=sampler))
    assert (one.sigmas != before.sigmas) == (name == "sd_noise_schedule" or webui.host == "a1111")
    monkeypatch.undo()
    assert told(INTERVAL, sampler=sampler)[0].sigmas == pytest.approx(before.sigmas, rel=1e-5)


@pytest.mark.parametrize("prompt", ["a cat # AND a dog", "a cat # AND\nAND a dog", "a cat <lora:this AND that:1>"])
def test_what_is_no_prompt_is_not_counted(told, counted, prompt):
    (one,) = told(INTERVAL, sampler="Euler", prompt=prompt)
    check([one], counted(INTERVAL, sampler_name="Euler", prompt=prompt))


@pytest.mark.parametrize("scheduler", ["Exponential", "Use same scheduler"])
def test_the_second_pass_has_its_own_scheduler(told, counted, hires, scheduler):
    kwargs = hires(hr_second_pass_steps=5, hr_scheduler=None if "same" in scheduler else scheduler)
    passes = told(
        NARROW, sampler="Euler", scheduler="Karras", hires=True, hires_steps=5, hires_scheduler=scheduler,
        hires_denoising_strength=0.6, hires_cfg_scale=7.0,
    )  # fmt: skip
    check(passes, counted(NARROW, sampler_name="Euler", scheduler="Karras", **kwargs))


def test_the_guided_evaluations_of_an_open_interval(told):
    (one,) = told(["custom", 0.28, 0, "Both passes"], sampler="DPM++ 2M")
    assert one.guided[0] and not one.guided[-1] and math.isfinite(one.sigmas[0])

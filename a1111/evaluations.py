"""At which noise levels the host's samplers will evaluate the network, found by running them on a recorder."""

import contextlib
import inspect
import io
import math
import threading
from types import SimpleNamespace

import torch
from modules import (
    call_queue,
    devices,
    extra_networks,
    processing,
    prompt_parser,
    scripts,
    sd_models,
    sd_samplers,
    sd_samplers_common,
    shared,
)

from .patch import noise_levels_of, predictor_of
from .picture import Pass

SAME_SAMPLER, SAME_SCHEDULER = "Use same sampler", "Use same scheduler"
NUMBERS = ("steps", "denoising_strength", "width", "height")
MAX_EVALUATIONS = 1000
MAX_KEPT = 64
_one_at_a_time = threading.Lock()  # Else one picture's trial run would be another's "An image is being made".
_kept = {}  # Noise levels of the last schedules, to be shown while an image is being made.


class Unknown(Exception):
    """Why it cannot be told at which noise levels the network will be evaluated; the message is for the user."""


class Busy(Unknown):
    """It cannot be told now, while an image is being made."""


# ----------------------------------------------------------------------------
# One generation, from the values of the host's own controls.


def passes(controls, settings):
    """`[Pass]` of the generation that the host's controls describe: one, or two with hires fix.

    controls: a dict of the values that `ui.CONTROLS` names, where the host has such a control. Raises Unknown.
    """
    if not {"sampler", "scheduler", "steps"} <= controls.keys():
        raise Unknown("The steps cannot be shown: this web UI makes its sampler's controls after this script's.")
    numbers = (*NUMBERS, "hires_denoising_strength") if controls.get("hires") else NUMBERS
    empty = [name for name in numbers if name in controls and controls[name] is None]
    if empty:
        raise Unknown(f"The steps cannot be shown: {empty[0].replace('_', ' ')} is empty.")
    model = _loaded_model()
    steps = int(controls["steps"])
    cfg = controls.get("cfg_scale", 7.0)
    prompt = _with_styles(controls.get("prompt"), controls)
    size = {name: controls[name] for name in ("width", "height") if name in controls}
    first = _pass(
        settings if settings.covers(hires_pass=False) else None,
        _noise_levels(
            model, controls["sampler"], controls["scheduler"], steps, controls.get("denoising_strength"), **size
        ),
        prompt,
        _uncond_rows(model, cfg, controls.get("image_cfg_scale")),
    )
    if not controls.get("hires"):
        return [first]
    sampler, scheduler = controls.get("hires_sampler"), controls.get("hires_scheduler")
    hires_prompt = controls.get("hires_prompt")
    enlarged = {name: controls[name] for name in ("hr_scale", "hr_resize_x", "hr_resize_y") if name in controls}
    second = _pass(
        settings if settings.covers(hires_pass=True) else None,
        _noise_levels(
            model,
            controls["sampler"] if sampler in (None, SAME_SAMPLER) else sampler,
            controls["scheduler"] if scheduler in (None, SAME_SCHEDULER) else scheduler,
            int(controls.get("hires_steps") or steps),
            controls["hires_denoising_strength"],
            hires=True,
            **size,
            **enlarged,
        ),
        _with_styles(hires_prompt, controls) if hires_prompt else prompt,
        _uncond_rows(model, controls.get("hires_cfg_scale") or cfg),
    )
    return [first, second]


def _pass(settings, sigmas, prompt, uncond):
    """settings None: the host's own CFG."""
    guided = [settings is None or settings.guides_any(sigma[None]) for sigma in sigmas]
    prompts, *_ = prompt_parser.get_multicond_prompt_list([prompt])  # Joined by AND, each is a row.
    return Pass(sigmas.tolist(), guided, cond=len(prompts[0]), uncond=uncond)


def _with_styles(prompt, controls):
    """The prompt as the text encoder will meet it: with styles, without comments and extra networks."""
    # Without a style too: Forge takes out comments there.
    prompt = shared.prompt_styles.apply_styles_to_prompt(prompt or "", controls.get("styles") or [])
    (prompt,), _ = extra_networks.parse_prompts([_without_comments(prompt)])
    return prompt


def _without_comments(prompt):
    """What the host's script "Comments" makes of it when an image is begun."""
    p = SimpleNamespace(all_prompts=[prompt], all_negative_prompts=[], main_prompt="", main_negative_prompt="")
    for script in getattr(scripts.scripts_txt2img, "alwayson_scripts", ()):
        if script.title() == "Comments":
            script.process(p)
    return p.all_prompts[0]


def _uncond_rows(model, cfg_scale, image_cfg_scale=None):
    """Rows per image, besides those of the prompt, that the host evaluates with CFG."""
    if hasattr(model, "forge_objects"):
        return 0 if abs(cfg_scale - 1) < 1e-9 else 1
    return 2 if getattr(model, "cond_stage_key", None) == "edit" and image_cfg_scale not in (None, 1) else 1


# ----------------------------------------------------------------------------
# One pass.


def _noise_levels(model, *args, **kwargs):
    """Noise levels of the evaluations of one pass, a tensor [evaluations]; only while no image is being made.

    A trial run would draw from the random numbers of an image that is being made, and set its model's noise levels.
    """
    with _one_at_a_time:
        return _kept_or_tried(model, *args, **kwargs)


def _kept_or_tried(model, *args, **kwargs):
    key = (id(model), args, *kwargs.items(), repr(shared.opts.data))  # Many an option changes a schedule.
    if not call_queue.queue_lock.acquire(blocking=False):
        if key in _kept:
            return _kept[key]
        raise Busy("An image is being made; its steps are shown here when it is done.")
    try:
        sigmas = _evaluated(model, *args, **kwargs)
    finally:
        call_queue.queue_lock.release()
    while len(_kept) >= MAX_KEPT:
        del _kept[next(iter(_kept))]
    _kept[key] = sigmas
    return sigmas


def _loaded_model():
    model = sd_models.model_data.sd_model  # Not shared.sd_model, which may load one.
    if not (hasattr(model, "forge_objects") or hasattr(model, "alphas_cumprod")):  # Forge has a stand-in at first.
        raise Unknown("The steps are shown here when a model is loaded.")
    return model


def _evaluated(model, sampler_name, scheduler, steps, denoising, **more):
    """The noise levels of the pass; denoising None begins with noise alone, as txt2img does."""
    depends = (
        f"How often {sampler_name} evaluates the network depends on the image, so the steps and what is saved cannot "
        "be told. It may take more steps than with CFG everywhere."
    )
    runs = []
    # Two networks: where they are not evaluated at the same noise levels, the image has a say in them.
    for network in (torch.zeros_like, lambda x: torch.sin(20 * x)):
        try:
            with _noise_schedule(model):
                sampler = sd_samplers.create_sampler(sampler_name, model)
                recorder = _Recorder(sampler.model_wrap_cfg, network)
                _trial_run(model, sampler, recorder, scheduler, steps, denoising, **more)
                runs.append(recorder.noise_levels())
        except Exception as e:  # Of any sampler that there is, and of any that an extension adds.
            if runs or isinstance(e, _TooMany):
                raise Unknown(depends) from e
            raise Unknown(f"{sampler_name}: the steps cannot be told ({type(e).__name__}: {e}).") from e
    if runs[0].isnan().any():
        raise Unknown(f"{sampler_name} does not suit this model: it evaluates the network at a noise level of NaN.")
    if len(runs[0]) != len(runs[1]) or not torch.allclose(*runs, rtol=1e-4, atol=0):
        raise Unknown(depends)
    if not len(runs[0]):
        raise Unknown(f"{sampler_name} evaluates the network at no step.")
    return runs[0]


@contextlib.contextmanager
def _noise_schedule(model):
    """The noise levels that the host gives its model for an image, by the options of now; then what they were."""
    objects = getattr(model, "forge_objects", None)
    if objects is None:
        before = model.alphas_cumprod
        sd_models.apply_alpha_schedule_override(model)
        try:
            yield
        finally:
            model.alphas_cumprod = before
        return
    zero_snr = getattr(shared.opts, "sd_noise_schedule", None) == "Zero Terminal SNR"
    if not (zero_snr or getattr(getattr(model, "model_config", model), "ztsnr", False)):
        yield
        return
    sampling = predictor_of(objects)
    before, alphas = sampling.sigmas, getattr(model, "alphas_cumprod", None)
    try:
        sampling.set_sigmas(processing.rescale_zero_terminal_snr_sigmas(before))
        override = getattr(sd_models, "apply_alpha_schedule_override", None)  # Of reForge, whose samplers go by alphas.
        old = getattr(shared.opts, "use_old_clip_g_load_and_ztsnr_application", False)
        if override is not None and alphas is not None and not old:
            model.alphas_cumprod_original = alphas
            override(model)
        yield
    finally:
        sampling.set_sigmas(before)
        if alphas is not None:
            model.alphas_cumprod = alphas


def _trial_run(
    model,
    sampler,
    recorder,
    scheduler,
    steps,
    denoising,
    hires=False,
    width=512,
    height=512,
    hr_scale=2.0,
    hr_resize_x=0,
    hr_resize_y=0,
):
    """What the host's `Sampler.sample` and `sample_img2img` do, without the network and the state that others see."""
    x = torch.linspace(-1, 1, 4 * 8 * 8, device=devices.device).view(1, 4, 8, 8)
    p = SimpleNamespace(
        sd_model=model,
        sampler_name=sampler.config.name,
        scheduler=scheduler,
        hr_scheduler=scheduler,
        is_hr_pass=hires,
        steps=steps,
        denoising_strength=denoising,
        eta=None,
        s_churn=shared.opts.s_churn,
        s_tmin=shared.opts.s_tmin,
        s_tmax=shared.opts.s_tmax or math.inf,
        s_noise=shared.opts.s_noise,
        rng=SimpleNamespace(next=lambda: torch.zeros_like(x)),
        sampler_noise_scheduler_override=None,
        extra_generation_params={},
        override_settings={},
        width=width,
        height=height,
    )
    if hires:
        vars(p).update(hr_scale=hr_scale, hr_resize_x=hr_resize_x, hr_resize_y=hr_resize_y)
        vars(p).update(hr_upscale_to_x=0, hr_upscale_to_y=0, truncate_x=0, truncate_y=0)
        p.applied_old_hires_behavior_to = None
        processing.StableDiffusionProcessingTxt2Img.calculate_target_resolution(p)
    if hasattr(sampler, "scheduler_name"):  # reForge's.
        sampler.scheduler_name = scheduler
    parameters = inspect.signature(sampler.func).parameters
    last = None
    if denoising is not None:
        steps, last = sd_samplers_common.setup_img2img_steps(p, steps if hires else None)
    with _own_random_numbers():
        kwargs = sampler.initialize(p)
        if hasattr(sampler, "get_timesteps"):
            kwargs["timesteps"] = sampler.get_timesteps(p, steps)[:last]
            if "is_img2img" in parameters:
                kwargs["is_img2img"] = last is not None
        else:
            sigmas = sampler.get_sigmas(p, steps).to(x.device)
            whole = sampler.model_wrap.sigmas
            sigma_min, sigma_max = whole[0].item(), whole[-1].item()
            if last is not None:
                sigmas = sigmas[steps - last - 1 :]
                sigma_min, sigma_max = sigmas[-2], sigmas[0]
            x = x * sigmas[0]
            steps = len(sigmas) - 1 if last is not None else steps
            offered = {"n": steps, "sigmas": sigmas, "sigma_sched": sigmas}
            offered |= {"sigma_min": sigma_min, "sigma_max": sigma_max}
            kwargs |= {name: value for name, value in offered.items() if name in parameters}
            if sampler.config.options.get("solver_type") == "heun" and "solver_type" in parameters:
                kwargs["solver_type"] = "heun"
        if "noise_sampler" in parameters:
            kwargs["noise_sampler"] = lambda sigma, sigma_next: torch.zeros_like(x)
        sampler.func(recorder, x, extra_args={}, callback=lambda state: None, disable=True, **kwargs)


@contextlib.contextmanager
def _own_random_numbers():
    """The host gives k-diffusion random numbers of its own; ours last for the trial run."""
    sampling = getattr(sd_samplers_common, "sampling", None) or sd_samplers_common.k_diffusion.sampling
    hosts = sampling.torch
    quiet = contextlib.redirect_stderr(io.StringIO())  # UniPC's progress bar.
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet:
            yield
    finally:
        sampling.torch = hosts


class _TooMany(Exception):
    """A sampler that goes by the error of its steps does not come to an end."""


class _Recorder:
    """Stands for the host's CFG denoiser in a trial run; `sigmas` are those that it was called with."""

    def __init__(self, denoiser, network):
        self.denoiser = denoiser
        self.network = network
        self.sigmas = []

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __delattr__(self, name):
        vars(self).pop(name, None)  # Of the denoiser, which some samplers of reForge set and delete attributes of.

    def __call__(self, x, sigma, **kwargs):
        if len(self.sigmas) == MAX_EVALUATIONS:
            raise _TooMany
        self.sigmas.append(sigma.flatten()[:1])
        denoised = self.last_noise_uncond = self.network(x)
        options = kwargs.get("model_options", {})
        args = {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "sigma": sigma}
        args |= {"input": x, "model": self, "model_options": options, "cond_scale": 1.0}
        for function in options.get("sampler_post_cfg_function", []):  # CFG++ samplers take uncond from theirs.
            args["denoised"] = function(args)
        return args["denoised"]

    def noise_levels(self):
        """[evaluations], in the units of k-diffusion."""
        if not self.sigmas:
            return torch.zeros(0)
        sigma = torch.cat(self.sigmas)
        inner = self.denoiser.inner_model
        if getattr(self.denoiser, "classic_ddim_eps_estimation", False):  # Forge's, before it asks extensions.
            alphas = inner.inner_model.alphas_cumprod
            sigma = ((1 - alphas) / alphas).sqrt()[sigma.round().long().clip(0, len(alphas) - 1)]
        return noise_levels_of(inner)(sigma).cpu()

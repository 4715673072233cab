"""What is read from the running web UI, and said to its user."""

from types import SimpleNamespace

from modules import scripts, sd_models, sd_samplers

from .. import noise_level
from . import settings as st
from .patch import ATTRIBUTE, Run, noise_levels

# Of Stable Diffusion 1, 2 and XL.
SIGMA_MIN, SIGMA_MAX = 0.0292, 14.6146
AXES_ATTRIBUTE = "guidance_interval_axes"
SETTINGS_ATTRIBUTE = "guidance_interval_settings"
ROWS_ATTRIBUTE = "guidance_interval_rows"


def say(p, text):
    """One message, on the console and under the generated image."""
    text = f"{st.TITLE}: {text}"
    print(text)
    if hasattr(p, "comment"):
        p.comment(text)


# ----------------------------------------------------------------------------
# One generation.


def begin(p, enabled, *controls):
    """Put a Run on `p` if the dropdown, an axis or the accordion asks for one; called before it is processed."""
    end(p)
    for key in st.KEYS:  # X/Y/Z plot's cells share these parameters.
        p.extra_generation_params.pop(key, None)
    try:
        settings = chosen(p, enabled, controls)
    except ValueError as e:
        say(p, f"{e}. This image has the web UI's own CFG.")
        return
    if settings is None:
        return
    setattr(p, ATTRIBUTE, Run(settings))
    p.extra_generation_params.update(settings.infotext(getattr(p, "enable_hr", False)))


def chosen(p, enabled, controls):
    """The Settings for `p`, or None for the host's own CFG."""
    if hasattr(p, SETTINGS_ATTRIBUTE):
        return getattr(p, SETTINGS_ATTRIBUTE)
    axes = getattr(p, AXES_ATTRIBUTE, {})
    if not enabled and not axes:
        return None
    settings = st.from_controls(*controls)
    return st.apply_axes(axes, settings) if axes else settings


def check(p):
    """After a batch was sampled: say once if the web UI evaluates its model in an unknown way."""
    run = getattr(p, ATTRIBUTE, None)
    if run is None or (run.calls and run.unknown is None):
        return
    reason = run.unknown or "it announced no denoiser call"
    say(p, f"this web UI or sampler is not supported ({reason}). The image has the web UI's own CFG.")
    for key in st.KEYS:
        p.extra_generation_params.pop(key, None)
    end(p)


def end(p):
    """Take the Run off `p`; its count of rows stays."""
    if hasattr(p, ATTRIBUTE):
        setattr(p, ROWS_ATTRIBUTE, getattr(p, ATTRIBUTE).rows)
        delattr(p, ATTRIBUTE)


# ----------------------------------------------------------------------------
# X/Y/Z plot.


def add_axes():
    """Offer the axes to X/Y/Z plot, which is the script with a list `axis_options`; once per load of it."""
    for module in {data.module for data in scripts.scripts_data}:
        options = getattr(module, "axis_options", None)
        if not isinstance(options, list) or not hasattr(module, "AxisOption"):
            continue
        labels = {option.label for option in options}
        options += [axis for axis in _axes(module.AxisOption) if axis.label not in labels]


def _axes(AxisOption):
    for name, (kind, choices) in st.AXES.items():

        def apply(p, x, xs, name=name):
            setattr(p, AXES_ATTRIBUTE, {**getattr(p, AXES_ATTRIBUTE, {}), name: x})  # New: cells are shallow copies.

        def confirm(p, xs, name=name):
            st.check_axis(name, xs)

        offered = None if choices is None else (lambda choices=choices: choices)
        yield AxisOption(f"[{st.TITLE}] {name}", kind, apply, confirm=confirm, choices=offered)


# ----------------------------------------------------------------------------
# The schedule, for the picture.


def step_sigmas(sampler_name, scheduler, steps, denoising=1.0):
    """`(sigmas, note)`: the noise levels at which the steps begin, decreasing, as the host would choose them.

    denoising below 1 leaves what img2img runs of them. Before a model is loaded it is Stable Diffusion's range.
    """
    steps = int(steps)
    try:
        sampler = sd_samplers.create_sampler(sampler_name, _loaded_model())
        sigmas = _host_sigmas(sampler, scheduler, steps)
        note = ""
        if sampler.config.options.get("second_order"):
            note = "This sampler evaluates the network twice a step; each evaluation goes by its own noise level."
    except Exception:
        sigmas = noise_level.schedule("karras", max(steps, 2), SIGMA_MIN, SIGMA_MAX)[:-1].tolist()
        note = "(For the noise levels of Stable Diffusion, until a model is loaded.)"
    if denoising < 1:
        sigmas = sigmas[-(int(min(denoising, 0.999) * steps) + 1) :]
    return sigmas, note


def _loaded_model():
    model = sd_models.model_data.sd_model  # Not shared.sd_model, which may load one.
    if model is None:
        raise LookupError("no model is loaded")
    return model


def _host_sigmas(sampler, scheduler, steps):
    p = SimpleNamespace(
        is_hr_pass=False,
        scheduler=scheduler,
        hr_scheduler=scheduler,
        sampler_noise_scheduler_override=None,
        extra_generation_params={},
        steps=steps,
        sampler_name=sampler.config.name,
        width=512,
        height=512,
        override_settings={},
    )
    if hasattr(sampler, "get_sigmas"):
        levels = sampler.get_sigmas(p, steps)[:-1]
    else:
        levels = sampler.get_timesteps(p, steps).flip(0)
    return [s for s in noise_levels(sampler.model_wrap_cfg, levels).tolist() if s > 0]

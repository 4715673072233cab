"""One unit for noise levels: sigma of x = x0 + sigma * n, relative to data of the model's own scale.

Published intervals carry over between models in this unit alone. Every conversion takes a number or a tensor
and computes in float64, whatever comes in: near either end of the range float32 cannot hold the round trip.
Numbers give numbers; tensors give float64 tensors on the CPU (schedules are short). All are monotonic and
defined at their limits. Out of range raises ValueError.

| model                          | its own measure of noise       | here                                |
| ------------------------------ | ------------------------------ | ----------------------------------- |
| eps and v, k-diffusion form    | sigma                          | the same                            |
| eps and v, as trained          | alpha-bar of a timestep        | `alpha_bar_to_sigma`                |
| v-diffusion                    | t in [0, 1], an angle          | `v_time_to_sigma`                   |
| flow matching (SD3, Flux, ...) | t in [0, 1], (1-t) x0 + t n    | `flow_time_to_sigma`                |
| EDM, EDM2                      | sigma for data of std. 0.5     | `rescale_sigma(sigma, 0.5)`         |
| any                            | log-SNR                        | `log_snr_to_sigma`                  |
| a sampling process             | percent of it, index of a step | `percent_to_sigma`, `steps_to_interval` |
"""

import functools
import itertools
import math

import torch

from .sampler_patch import GuidanceInterval


def _float64(value):
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()


def _conversion(low, high):
    """Decorator: number or tensor in [low, high] -> float64 in, the same kind out."""

    def decorate(fn):
        @functools.wraps(fn)
        def convert(value, *args, **kwargs):
            x = _float64(value)
            if not bool(((x >= low) & (x <= high)).all()):  # NaN fails too.
                raise ValueError(f"{fn.__name__}: {value!r} is out of range; it must lie in [{low:g}, {high:g}]")
            y = fn(x, *args, **kwargs)
            return y if isinstance(value, torch.Tensor) else y.item()

        return convert

    return decorate


# ----------------------------------------------------------------------------
# Between parameterizations.


@_conversion(0, 1)
def flow_time_to_sigma(t):
    """sigma = t / (1 - t): x_t = (1-t) x0 + t n, divided by 1-t, is x0 + sigma n. t = 1 gives inf."""
    return t / (1 - t)


@_conversion(0, math.inf)
def sigma_to_flow_time(sigma):
    """t = sigma / (1 + sigma), the inverse of `flow_time_to_sigma`."""
    return 1 / (1 + 1 / sigma)  # In this form inf gives 1 and 0 gives 0.


@_conversion(-math.inf, math.inf)
def log_snr_to_sigma(log_snr):
    """sigma = exp(-log_snr / 2), where log_snr = log(1 / sigma^2) (Kingma et al. 2021, for data of unit scale)."""
    return torch.exp(-log_snr / 2)


@_conversion(0, math.inf)
def sigma_to_log_snr(sigma):
    """log_snr = -2 log(sigma), the inverse of `log_snr_to_sigma`."""
    return -2 * torch.log(sigma)


@_conversion(0, 1)
def alpha_bar_to_sigma(alpha_bar):
    """sigma = sqrt((1 - abar) / abar): x_t = sqrt(abar) x0 + sqrt(1 - abar) n (Ho et al. 2020) over sqrt(abar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


@_conversion(0, math.inf)
def sigma_to_alpha_bar(sigma):
    """abar = 1 / (1 + sigma^2), the inverse of `alpha_bar_to_sigma`.

    Float64 holds the round trip to 1e-6 for sigma above 3e-5; below that abar is too near to 1.
    """
    return 1 / (1 + sigma**2)


@_conversion(0, 1)
def v_time_to_sigma(t):
    """sigma = tan(pi t / 2) (k_diffusion/external.py, VDenoiser.t_to_sigma)."""
    return torch.where(t == 1, torch.inf, torch.tan(t * (math.pi / 2)))


@_conversion(0, math.inf)
def sigma_to_v_time(sigma):
    """t = 2 atan(sigma) / pi, the inverse of `v_time_to_sigma`."""
    return sigma.atan() * (2 / math.pi)


@_conversion(0, math.inf)
def rescale_sigma(sigma, sigma_data, to_sigma_data=1.0):
    """The noise level, for data of standard deviation `to_sigma_data`, that is `sigma` for data of `sigma_data`.

    EDM2's latents have 0.5: the published 1.61 is 3.22 for a model whose data has unit scale.
    """
    for name, value in (("sigma_data", sigma_data), ("to_sigma_data", to_sigma_data)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a standard deviation above 0, got {value!r}")
    return sigma * (to_sigma_data / sigma_data)


# ----------------------------------------------------------------------------
# Along a sampling process.


def percent_to_sigma(percent, model_sigmas):
    """The noise level after a share `percent` (0 = start, 1 = end) of a discrete model's timesteps.

    model_sigmas: the model's own noise levels, one per timestep, increasing (1000 for Stable Diffusion), between
    which log sigma is interpolated, as ComfyUI (comfy/model_sampling.py, ModelSamplingDiscrete) does. As there,
    the two ends are open: 0 gives inf and 1 gives 0.
    """
    log_sigmas = _log_sigmas(model_sigmas)
    return _percent_to_sigma(percent, log_sigmas)


@_conversion(0, 1)
def _percent_to_sigma(percent, log_sigmas):
    timestep = (1 - percent) * (len(log_sigmas) - 1)
    low = timestep.floor().long().clamp(max=len(log_sigmas) - 2)
    sigma = torch.lerp(log_sigmas[low], log_sigmas[low + 1], timestep - low).exp()
    return torch.where(percent <= 0, torch.inf, torch.where(percent >= 1, 0.0, sigma))


def sigma_to_percent(sigma, model_sigmas):
    """The share of a discrete model's timesteps that is past at `sigma`, the inverse of `percent_to_sigma`.

    Noise levels beyond the model's own give 0 and 1.
    """
    log_sigmas = _log_sigmas(model_sigmas)
    return _sigma_to_percent(sigma, log_sigmas)


@_conversion(0, math.inf)
def _sigma_to_percent(sigma, log_sigmas):
    log_sigma = sigma.log().clamp(log_sigmas[0], log_sigmas[-1])
    low = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, len(log_sigmas) - 2)
    timestep = low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
    return 1 - timestep / (len(log_sigmas) - 1)


def _log_sigmas(model_sigmas):
    sigmas = _float64(model_sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas[1:] > sigmas[:-1]).all()) or not sigmas[0] > 0:
        raise ValueError(f"model_sigmas must be 1-D, positive and increasing, got shape {list(sigmas.shape)}")
    return sigmas.log()


def steps_to_interval(sigmas, first, last):
    """The GuidanceInterval that guides the steps `first` to `last`, both included, of a decreasing schedule.

    This is the authors' form (generate_zip.py: "[17, 22]"); negative indices count from the end. The bounds
    are (sigmas[last + 1], sigmas[first]].
    """
    levels = _float64(sigmas).tolist()
    steps = len(levels) - 1
    if steps < 1 or any(a <= b for a, b in itertools.pairwise(levels)):
        raise ValueError("sigmas must be a decreasing schedule of at least one step (two noise levels)")
    bounds = []
    for name, step in (("first", first), ("last", last)):
        if isinstance(step, bool) or not isinstance(step, int) or not -steps <= step < steps:
            raise ValueError(f"{name} must be the index of a step, {-steps} to {steps - 1}, got {step!r}")
        bounds.append(step % steps)
    if bounds[0] > bounds[1]:
        raise ValueError(f"first must not come after last, got first={first} and last={last} of {steps} steps")
    return GuidanceInterval(levels[bounds[1] + 1], levels[bounds[0]])


def interval_to_steps(interval, sigmas):
    """`(first, last)`: the steps of a decreasing schedule that an interval guides, or None when it guides none."""
    guided = interval.mask(torch.as_tensor(sigmas)[:-1]).nonzero()[:, 0].tolist()
    return (guided[0], guided[-1]) if guided else None


# ----------------------------------------------------------------------------
# Schedules, to show what an interval means before anything is sampled.


def _karras(ramp, sigma_min, sigma_max, rho=7.0):
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def _exponential(ramp, sigma_min, sigma_max):
    return torch.exp(math.log(sigma_max) + ramp * (math.log(sigma_min) - math.log(sigma_max)))


def _flow(ramp, sigma_min, sigma_max):
    t_min, t_max = sigma_to_flow_time(sigma_min), sigma_to_flow_time(sigma_max)
    return flow_time_to_sigma(t_max + ramp * (t_min - t_max))


# Karras et al. (2022), eq. 5; even in log sigma; even in the time of flow matching.
SCHEDULES = {"karras": _karras, "exponential": _exponential, "flow": _flow}


def schedule(name, steps, sigma_min, sigma_max):
    """A decreasing schedule, float64 [steps + 1]: `steps` noise levels from sigma_max to sigma_min, and 0."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; there are {', '.join(sorted(SCHEDULES))}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps!r}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}")
    sigmas = SCHEDULES[name](torch.linspace(0, 1, steps, dtype=torch.float64), sigma_min, sigma_max)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


# ----------------------------------------------------------------------------
# In words.


def describe_cost(guided, rows=None, rows_everywhere=None, unit="step", first=0):
    """One sentence: which steps of a run are guided, and the share of full CFG's network rows that this saves.

    guided: whether each step is. rows, rows_everywhere: network rows per image of the run, and with CFG everywhere
    (None: one for cond and one for uncond). unit: "step", or "evaluation" where a step takes several. first: the
    number of the first one.
    """
    which = [i for i, g in enumerate(guided, first) if g]
    rows = len(guided) + len(which) if rows is None else rows
    rows_everywhere = 2 * len(guided) if rows_everywhere is None else rows_everywhere
    saved = 1 - rows / rows_everywhere
    change = f"{saved:.0%} saved" if saved >= 0 else f"{-saved:.0%} more"
    cost = f"{rows} network rows per image instead of {rows_everywhere}, {change}"
    if not which:
        return f"none of the {len(guided)} {unit}s is guided: {cost}"
    span = f"{which[0]} to {which[-1]}" if len(which) > 1 else str(which[0])
    gaps = ", with gaps" if len(which) < which[-1] - which[0] + 1 else ""
    verb = "is" if len(which) == 1 else "are"
    return f"{len(which)} of {len(guided)} {unit}s {verb} guided ({span}{gaps}): {cost}"

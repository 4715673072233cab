"""One unit for noise levels: sigma of x = x0 + sigma * n, relative to data of the model's own scale.

Published intervals carry over between models in this unit alone. Every conversion takes a number or a tensor
and computes in float64, whatever comes in: near either end of the range float32 cannot hold the round trip.
Numbers give numbers; tensors give float64 tensors on the CPU (schedules are short). All are monotonic and
defined at their limits. Out of range raises ValueError.

| model                          | its own measure of noise       | here                                |
| ------------------------------ | ------------------------------ | ----------------------------------- |
| eps and v, k-diffusion form    | sigma                          | the same                            |
| eps and v, as trained          | alpha-bar of a timestep        | `alpha_bar_to_sigma`                |
| flow matching (SD3, Flux, ...) | t in [0, 1], (1-t) x0 + t n    | `flow_time_to_sigma`                |
| EDM, EDM2                      | sigma for data of std. 0.5     | `rescale_sigma(sigma, 0.5)`         |
| any                            | log-SNR                        | `log_snr_to_sigma`                  |
| eps and v, as trained          | timestep, may be fractional    | `Timesteps`                         |
| a sampling process             | percent of it, index of a step | `percent_to_sigma`, `steps_to_interval` |
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from .sampler_patch import GuidanceInterval

Level = TypeVar("Level", float, torch.Tensor)  # A noise level or a schedule of them; what comes in goes out.
Rest = ParamSpec("Rest")


def _float64(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float64)
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except OverflowError as e:
        raise ValueError("a noise level is larger than a float can be") from e


def _conversion(
    low: float, high: float
) -> Callable[[Callable[Concatenate[torch.Tensor, Rest], torch.Tensor]], Callable[Concatenate[Level, Rest], Level]]:
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
def flow_time_to_sigma(t: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t): x_t = (1-t) x0 + t n, divided by 1-t, is x0 + sigma n. t = 1 gives inf."""
    return t / (1 - t)


@_conversion(0, math.inf)
def sigma_to_flow_time(sigma: torch.Tensor) -> torch.Tensor:
    """t = sigma / (1 + sigma), the inverse of `flow_time_to_sigma`."""
    return 1 / (1 + 1 / sigma)  # In this form inf gives 1 and 0 gives 0.


@_conversion(-math.inf, math.inf)
def log_snr_to_sigma(log_snr: torch.Tensor) -> torch.Tensor:
    """sigma = exp(-log_snr / 2), where log_snr = log(1 / sigma^2) (Kingma et al. 2021, for data of unit scale)."""
    return torch.exp(-log_snr / 2)


@_conversion(0, 1)
def alpha_bar_to_sigma(alpha_bar: torch.Tensor) -> torch.Tensor:
    """sigma = sqrt((1 - abar) / abar): x_t = sqrt(abar) x0 + sqrt(1 - abar) n (Ho et al. 2020) over sqrt(abar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


@_conversion(0, math.inf)
def rescale_sigma(sigma: torch.Tensor, sigma_data: float, to_sigma_data: float = 1.0) -> torch.Tensor:
    """The noise level, for data of standard deviation `to_sigma_data`, that is `sigma` for data of `sigma_data`.

    EDM2's latents have 0.5: the published 1.61 is 3.22 for a model whose data has unit scale.
    """
    for name, value in (("sigma_data", sigma_data), ("to_sigma_data", to_sigma_data)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a standard deviation above 0, got {value!r}")
    return sigma * (to_sigma_data / sigma_data)


# ----------------------------------------------------------------------------
# Along a sampling process.


class Timesteps:
    """The noise levels of a discrete model, one per timestep, between which log sigma is linear.

    As in k-diffusion (external.py, DiscreteSchedule) and ComfyUI (comfy/model_sampling.py, ModelSamplingDiscrete).

    model_sigmas: 1-D, positive, increasing (1000 for Stable Diffusion).
    """

    def __init__(self, model_sigmas: torch.Tensor | np.ndarray | Sequence[float]) -> None:
        sigmas = _float64(model_sigmas).numpy()
        if sigmas.ndim != 1 or len(sigmas) < 2 or not (np.diff(sigmas) >= 0).all() or not sigmas[0] > 0:
            raise ValueError(f"model_sigmas must be 1-D, positive and increasing, got shape {list(sigmas.shape)}")
        self.timesteps = np.arange(len(sigmas), dtype=np.float64)
        self.log_sigmas = np.log(sigmas)

    def sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Noise levels, a float64 tensor like `timestep`; beyond either end they are those of the end."""
        log_sigma = np.interp(_float64(timestep).numpy(), self.timesteps, self.log_sigmas)
        return torch.from_numpy(np.asarray(np.exp(log_sigma)))


@_conversion(0, 1)
def percent_to_sigma(percent: torch.Tensor, model_sigmas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """The noise level after a share `percent` (0 = start, 1 = end) of a discrete model's timesteps.

    model_sigmas: as for `Timesteps`. The two ends are open, as in ComfyUI: 0 gives inf and 1 gives 0.
    """
    model = Timesteps(model_sigmas)
    sigma = model.sigma((1 - percent) * model.timesteps[-1])
    return torch.where(percent <= 0, torch.inf, torch.where(percent >= 1, 0.0, sigma))


def steps_to_interval(sigmas: torch.Tensor | Sequence[float], first: int, last: int) -> GuidanceInterval:
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


def schedule(name: str, steps: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
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


def describe_cost(
    guided: Sequence[bool],
    rows: int | None = None,
    rows_everywhere: int | None = None,
    unit: str = "step",
    first: int = 0,
) -> str:
    """One sentence: which steps of a run are guided, and what share of CFG's network evaluations this saves.

    guided: whether each step is. rows, rows_everywhere: network evaluations per image of the run, and with CFG
    everywhere (None: one for cond and one for uncond). unit: "step", or "evaluation" where a step takes several.
    first: the number of the first one.
    """
    which = [i for i, g in enumerate(guided, first) if g]
    rows = len(guided) + len(which) if rows is None else rows
    rows_everywhere = 2 * len(guided) if rows_everywhere is None else rows_everywhere
    saved = 1 - rows / rows_everywhere
    change = f"{saved:.0%} saved" if saved >= 0 else f"{-saved:.0%} more"
    cost = f"{rows} network evaluations per image instead of {rows_everywhere}, {change}"
    if not which:
        return f"None of the {len(guided)} {unit}s is guided: {cost}"
    span = f"{which[0]} to {which[-1]}" if len(which) > 1 else str(which[0])
    gaps = ", with gaps" if len(which) < which[-1] - which[0] + 1 else ""
    verb = "is" if len(which) == 1 else "are"
    return f"{len(which)} of {len(guided)} {unit}s {verb} guided ({span}{gaps}): {cost}"

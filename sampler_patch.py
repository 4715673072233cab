"""Guidance in a limited interval: the method, and nothing else.

Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models", NeurIPS 2024, https://arxiv.org/abs/2404.07724. Classifier-free guidance is applied where
sigma_lo < sigma <= sigma_hi; elsewhere the denoiser's output is the conditional prediction (eq. 5), and the
unconditional one is never evaluated.
"""

import functools
import math
import numbers
import warnings
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class GuidanceInterval:
    """The noise levels (sigma_lo, sigma_hi] at which guidance is applied.

    Bounds are in the units of k-diffusion and EDM, x = x0 + sigma * n; `noise_level.py` converts. 0 and inf
    leave an end open: `GuidanceInterval()` guides at every sigma above 0. Raises TypeError or ValueError
    unless 0 <= sigma_lo < sigma_hi.
    """

    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self):
        for name in ("sigma_lo", "sigma_hi"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
            if math.isnan(value):
                raise ValueError(f"{name} is NaN; give 0 <= sigma_lo < sigma_hi (inf leaves sigma_hi open)")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}; noise levels start at 0")
            object.__setattr__(self, name, float(value))
        if self.sigma_lo >= self.sigma_hi:
            raise ValueError(
                f"sigma_lo must be below sigma_hi, got sigma_lo={self.sigma_lo!r} and sigma_hi={self.sigma_hi!r}; "
                "swap them if they are reversed, or sample without guidance if nothing is to be guided"
            )

    def __contains__(self, sigma):
        """Whether one noise level, a number or a tensor of one element, is guided."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64 if isinstance(sigma, (int, float)) else None)
        if sigma.numel() != 1:
            raise TypeError(f"`in` takes one sigma, got a tensor of shape {list(sigma.shape)}; use .mask(sigma)")
        return self.guided_rows(sigma.reshape(1))[0]

    def mask(self, sigma):
        """Which of the noise levels are guided: a bool tensor of the shape and on the device of `sigma`."""
        lo, hi = self._bounds(sigma.dtype)
        return (sigma > lo) & (sigma <= hi)

    def guided_rows(self, sigma):
        """Which rows are guided, as a list: the `mask` of `sigma` [B], for a decision on the host.

        One copy to the host (a sync, where sigma is on an accelerator) and no kernel.
        """
        lo, hi = self._bounds(sigma.dtype)
        return [lo < level <= hi for level in sigma.tolist()]

    def _bounds(self, dtype):
        """(sigma_lo, sigma_hi) as a tensor of that dtype holds them: 5.42 contains float32(5.42), which is larger."""
        return _rounded(self.sigma_lo, dtype), _rounded(self.sigma_hi, dtype)

    def warn_if_unused(self, sigmas):
        """Warn when no noise level of a schedule (1-D tensor) lies in the interval; return whether one does."""
        used = bool(self.mask(sigmas).any())
        if not used:
            levels = sigmas[sigmas > 0]
            warnings.warn(
                f"no step of the schedule, sigma {levels.max():.4g} to {levels.min():.4g}, lies in the guidance "
                f"interval {self}: nothing will be guided",
                stacklevel=2,
            )
        return used

    def __str__(self):
        return f"({self.sigma_lo:.4g}, {self.sigma_hi:.4g}]"


@functools.lru_cache
def _rounded(value, dtype):
    return torch.tensor(value, dtype=dtype if dtype.is_floating_point else torch.float64).item()


class CFGDenoiser(nn.Module):
    """Classifier-free guidance in a limited interval, as a k-diffusion model wrapper.

    Samplers call `denoiser(x, sigma, cond={...}, uncond={...}, cond_scale=w)`, where `cond` and `uncond` are
    keyword arguments of `inner_model(x, sigma, **kwargs)`. The inner model sees one batch: the cond rows, then
    the uncond rows of the guided rows, and no others. Each row is judged by its own sigma at every
    evaluation. A `cond_scale` of 1 is no guidance and evaluates cond alone.

    Learning which rows are guided costs one host sync per evaluation when sigma is on an accelerator. Given
    `sigmas`, the schedule, it costs none: each evaluation takes the next entry, and the sigmas that came are
    compared at the end of the run, which raises RuntimeError if it strayed. That is for samplers of one
    evaluation per step; `evaluation_sigmas` lists the entries for others. On the CPU reading is free, and
    sigma itself decides.

    `per_step=True` judges a step as a whole by the sigma it starts from, as the authors' code does by step
    index (kynkaat/guidance-interval, sampling/edm_sampler.py): Heun's second evaluation keeps the decision of
    the first. It needs the schedule as `sigmas`, and `sample_heun` or a sampler that evaluates like it.

    Args:
        inner_model: a denoiser, `inner_model(x, sigma, **kwargs)` -> D(x; sigma), shaped like x.
        interval: a GuidanceInterval, or None for guidance everywhere.
        sigmas: 1-D tensor of noise levels ending where the run ends (mostly 0), which is not evaluated.
        per_step: judge by step instead of by evaluation.

    Attributes:
        rows: batch rows that the inner model evaluated since `reset()`.
        evaluations: calls since `reset()`.
    """

    def __init__(self, inner_model, interval=None, *, sigmas=None, per_step=False):
        super().__init__()
        if interval is None:
            interval = GuidanceInterval()
        if not isinstance(interval, GuidanceInterval):
            raise TypeError(f"interval must be a GuidanceInterval or None, got {interval!r}")
        if per_step and sigmas is None:
            raise ValueError("per_step=True judges by step index: give the schedule as sigmas=...")
        self.inner_model = inner_model
        self.interval = interval
        self.per_step = per_step
        self.plan = None if sigmas is None else self._plan(sigmas)
        self.reset()

    def reset(self):
        """Set the counters to zero and go back to the first entry of `sigmas`."""
        self.rows = self.evaluations = 0
        self.seen = []  # The sigmas of the run under way, when `sigmas` were given.

    def forward(self, x, sigma, cond, uncond, cond_scale):
        """Return the denoiser output, shaped like x.

        x: [B, ...]; sigma: [B]; cond, uncond: dicts of tensors [B, ...] or of such dicts, with the same keys
        (a value that is no tensor must be the same in both); cond_scale: the guidance weight, a number.
        """
        batch = x.shape[0]
        if sigma.shape != (batch,):
            raise ValueError(f"sigma must have shape [{batch}], one per row of x, got {list(sigma.shape)}")
        guided = self._guided_rows(sigma)
        num_guided = batch if guided is None else len(guided)
        if num_guided == 0 or cond_scale == 1:
            num_guided = 0
            denoised = self.inner_model(x, sigma, **cond)
        else:
            x_in, sigma_in = _join(x, x, guided), _join(sigma, sigma, guided)
            denoised = self.inner_model(x_in, sigma_in, **_join_kwargs(cond, uncond, guided, batch))
            denoised = _guide(denoised[:batch], denoised[batch:], guided, cond_scale)
        self.rows += batch + num_guided
        self.evaluations += 1
        return denoised

    def _guided_rows(self, sigma):
        """Index of the guided rows, or None when all are."""
        if self.plan is not None and (self.per_step or sigma.device.type != "cpu"):
            return None if self._next_in_plan(sigma) else ()
        guides = self.interval.guided_rows(sigma)  # The one host sync.
        if all(guides):
            return None
        rows = [i for i, guided in enumerate(guides) if guided]
        return torch.tensor(rows).to(sigma.device, non_blocking=True) if rows else ()

    def _plan(self, sigmas):
        """`[(sigma, guided)]` of each evaluation to come."""
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"sigmas must be 1-D, at least 2 noise levels, got shape {list(sigmas.shape)}")
        sigmas = sigmas.detach().cpu()
        self.interval.warn_if_unused(sigmas[:-1])
        levels, guided = sigmas.tolist(), self.interval.mask(sigmas).tolist()
        if not self.per_step:
            return list(zip(levels, guided, strict=True))[:-1]
        steps = zip(levels[:-1], levels[1:], guided[:-1], strict=True)
        plan = [(level, g) for start, end, g in steps for level in (start, end)]
        return plan if levels[-1] > 0 else plan[:-1]  # Heun's method takes no second evaluation at 0.

    def _next_in_plan(self, sigma):
        """The decision that stands next; the sigmas are compared when reading them costs no more than one sync."""
        guided = self.plan[len(self.seen)][1]
        self.seen.append(sigma)
        at_end = len(self.seen) == len(self.plan)
        if at_end or sigma.device.type == "cpu":
            expected = [level for (level, _), s in zip(self.plan, self.seen, strict=False) for _ in s]
            came = torch.cat(self.seen).cpu()
            tolerance = max(1e-4, 4 * torch.finfo(came.dtype).eps)  # A sampler may compute sigma from -log(sigma).
            if not torch.allclose(came.double(), torch.tensor(expected).double(), rtol=tolerance, atol=0):
                self.reset()
                raise RuntimeError(
                    f"the sampler did not evaluate at the given sigmas in their order, {len(self.plan)} evaluations "
                    f"from {self.plan[0][0]:.4g} to {self.plan[-1][0]:.4g}: see evaluation_sigmas, or leave sigmas out "
                    "(per_step=True is for sample_heun); call reset() after a run that was cut short"
                )
        if at_end:
            self.seen = []
        return guided


def evaluation_sigmas(sampler, *args, **kwargs):
    """The noise levels at which a fixed-step sampler evaluates its model, in order, ending in a 0 that it does not.

    `evaluation_sigmas(sample_heun, sigmas)` is what `CFGDenoiser(..., sigmas=...)` needs for a sampler of
    several evaluations per step. Found by running `sampler(model, x, *args, **kwargs)` on one number.
    """
    seen = []

    def record(x, sigma, **_):
        seen.append(sigma[0])
        return torch.zeros_like(x)

    args = [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args]
    with torch.random.fork_rng(devices=[]):
        sampler(record, torch.zeros(1, 1), *args, disable=True, **kwargs)
    return torch.stack([*seen, torch.zeros_like(seen[0])])


# ----------------------------------------------------------------------------
# Batches of cond rows and of the uncond rows that are guided.


def _join(cond, uncond, guided):
    """cond [B, ...] above the guided rows of uncond [B, ...]: [B + guided, ...]; guided None takes all."""
    return torch.cat([cond, uncond if guided is None else uncond[guided]])


def _guide(cond, uncond, guided, cond_scale):
    """The guided rows of cond [B, ...] moved away from uncond [guided, ...] (Ho & Salimans 2022, eq. 6)."""
    if guided is None:
        return uncond + (cond - uncond) * cond_scale
    return cond.index_copy(0, guided, uncond + (cond[guided] - uncond) * cond_scale)


def _join_kwargs(cond, uncond, guided, batch, name=""):
    if not isinstance(cond, dict) or not isinstance(uncond, dict):
        bad, value = ("uncond", uncond) if isinstance(cond, dict) else ("cond", cond)
        raise TypeError(f"{bad}{name} must be a dict of keyword arguments, got {type(value).__name__}")
    if cond.keys() != uncond.keys():
        raise ValueError(
            f"cond{name} and uncond{name} must have the same keys, got {sorted(map(str, cond))} and "
            f"{sorted(map(str, uncond))}"
        )
    joined = {}
    for key, c in cond.items():
        u = uncond[key]
        if isinstance(c, torch.Tensor) and isinstance(u, torch.Tensor):
            if c.shape[:1] != (batch,) or c.shape != u.shape:
                raise ValueError(
                    f"cond{name}[{key!r}] and uncond{name}[{key!r}] must have the same shape, with the batch size "
                    f"{batch} of x first, got {list(c.shape)} and {list(u.shape)}; pad or repeat the shorter one"
                )
            joined[key] = _join(c, u, guided)
        elif isinstance(c, dict) or isinstance(u, dict):
            joined[key] = _join_kwargs(c, u, guided, batch, f"{name}[{key!r}]")
        elif type(c) is type(u) and c == u:
            joined[key] = c
        else:
            raise TypeError(
                f"cond{name}[{key!r}] and uncond{name}[{key!r}] must be tensors or dicts of tensors, or the same "
                f"value, got {c!r} and {u!r}"
            )
    return joined

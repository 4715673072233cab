"""Guidance in a limited interval: the method, and nothing else.

Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models", NeurIPS 2024, https://arxiv.org/abs/2404.07724. Classifier-free guidance is applied where
sigma_lo < sigma <= sigma_hi; elsewhere the denoiser's output is the conditional prediction (eq. 5), and the
unconditional one is never evaluated.
"""

import functools
import math
import numbers
import operator
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

    def __post_init__(self) -> None:
        for name in ("sigma_lo", "sigma_hi"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
            try:
                number = float(value)
            except OverflowError as e:
                raise ValueError(f"{name} is larger than a float can be; inf leaves sigma_hi open") from e
            if math.isnan(number):
                raise ValueError(f"{name} is NaN; give 0 <= sigma_lo < sigma_hi (inf leaves sigma_hi open)")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}; noise levels start at 0")
            object.__setattr__(self, name, number)
        if self.sigma_lo >= self.sigma_hi:
            raise ValueError(
                f"sigma_lo must be below sigma_hi, got sigma_lo={self.sigma_lo!r} and sigma_hi={self.sigma_hi!r}; "
                "swap them if they are reversed, or sample without guidance if nothing is to be guided"
            )

    def __contains__(self, sigma: float | torch.Tensor) -> bool:
        """Whether one noise level, a number or a tensor of one element, is guided."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64 if isinstance(sigma, (int, float)) else None)
        if sigma.numel() != 1:
            raise TypeError(f"`in` takes one sigma, got a tensor of shape {list(sigma.shape)}; use .mask(sigma)")
        return self.guided_rows(sigma.reshape(1))[0]

    def mask(self, sigma: torch.Tensor) -> torch.Tensor:
        """Which of the noise levels are guided: a bool tensor of the shape and on the device of `sigma`."""
        lo, hi = self._bounds(sigma.dtype)
        return (sigma > lo) & (sigma <= hi)

    def guided_rows(self, sigma: torch.Tensor) -> list[bool]:
        """Which rows are guided, as a list: the `mask` of `sigma` [B], for a decision on the host.

        One copy to the host (a sync, where sigma is on an accelerator) and no kernel.
        """
        lo, hi = self._bounds(sigma.dtype)
        return [lo < level <= hi for level in sigma.tolist()]

    def _bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """(sigma_lo, sigma_hi) as a tensor of that dtype holds them: 5.42 contains float32(5.42), which is larger."""
        return _rounded(self.sigma_lo, dtype), _rounded(self.sigma_hi, dtype)

    def warn_if_unused(self, sigmas: torch.Tensor) -> bool:
        """Warn when no noise level of a schedule (1-D tensor) lies in the interval; return whether one does."""
        used = bool(self.mask(sigmas).any())
        if not used:
            levels = sigmas[sigmas > 0]
            span = f", sigma {levels.max():.4g} to {levels.min():.4g}," if len(levels) else ""
            warnings.warn(
                f"no step of the schedule{span} lies in the guidance interval {self}: nothing will be guided",
                stacklevel=2,
            )
        return used

    def __str__(self) -> str:
        return f"({self.sigma_lo:.4g}, {self.sigma_hi:.4g}]"


@functools.lru_cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype if dtype.is_floating_point else torch.float64).item()


def _uncompiled(fn):
    """Decorator: `torch.compiler.disable`, but loading the compiler (a second) at the first call, not at import."""
    disabled = None

    @functools.wraps(fn)
    def call(*args):
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args)

    return call


class CFGDenoiser(nn.Module):
    """Classifier-free guidance in a limited interval, as a k-diffusion model wrapper.

    Samplers call `denoiser(x, sigma, cond={...}, uncond={...}, cond_scale=w)`, where `cond` and `uncond` are
    keyword arguments of `inner_model(x, sigma, **kwargs)`. The inner model sees one batch: the cond rows, then
    the uncond rows of the guided rows, and no others. A row is guided where its own sigma lies in the interval
    and its weight is not 1 (which is no guidance), judged anew at every evaluation: one host sync where sigma is
    on an accelerator.

    `per_step=True` judges a step as a whole by the sigma it starts from, as the authors' code does by step
    index (kynkaat/guidance-interval, sampling/edm_sampler.py): Heun's second evaluation keeps the decision of
    the first. It needs the schedule as `sigmas`, and `sample_heun` or a sampler that evaluates like it; another
    one is refused with RuntimeError at its first evaluation out of order.

    `torch.compile` takes the wrapper or, better, the inner model; either way there are two graphs, of B rows and
    of 2 B (docs/k-diffusion.md).

    Args:
        inner_model: a denoiser, `inner_model(x, sigma, **kwargs)` -> D(x; sigma), shaped like x.
        interval: a GuidanceInterval, or None for guidance everywhere.
        sigmas: for per_step, the noise levels (1-D tensor, array or list) ending where the run ends (mostly 0),
            which is not evaluated.
        per_step: judge by step instead of by evaluation.

    Attributes:
        rows: batch rows handed to the inner model since `reset()`.
        evaluations: calls since `reset()`.
    """

    def __init__(
        self,
        inner_model: Callable[..., torch.Tensor],
        interval: GuidanceInterval | None = None,
        *,
        sigmas: torch.Tensor | np.ndarray | Sequence[float] | None = None,
        per_step: bool = False,
    ) -> None:
        super().__init__()
        if interval is None:
            interval = GuidanceInterval()
        if not isinstance(interval, GuidanceInterval):
            raise TypeError(f"interval must be a GuidanceInterval or None, got {_describe(interval)}")
        if per_step and sigmas is None:
            raise ValueError("per_step=True judges by step: give the schedule as sigmas=...")
        if sigmas is not None and not per_step:
            raise ValueError("sigmas is for per_step=True; without it, each evaluation is judged by its own sigma")
        self.inner_model = inner_model
        self.interval = interval
        self.per_step = per_step
        self.plan = _heun_plan(interval, sigmas) if per_step else None
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero and go back to the first of `sigmas`."""
        self.rows = self.evaluations = self.position = 0
        self._admitted: list[Any] = []

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        cond_scale: float | torch.Tensor | Sequence[float],
    ) -> torch.Tensor:
        """Return the denoiser output, shaped like x.

        x: [B, ...]; sigma: [B]; cond, uncond: dicts of tensors [B, ...], or of dicts, lists or tuples of them,
        alike but for what the tensors hold (any other value must be equal in both); cond_scale: the guidance
        weight, a number or one for each row. Raises TypeError or ValueError before anything is evaluated; cond and
        uncond are looked into at the first evaluation, and again when one of their values is another object.
        """
        guided, weight = self._decide(x, sigma, cond, uncond, cond_scale)
        if guided is False:
            return self.inner_model(x, sigma, **cond)
        x_in, sigma_in, kwargs = _join((x, sigma, cond), (x, sigma, uncond), guided)
        denoised = self.inner_model(x_in, sigma_in, **kwargs)  # [B + guided, ...]
        c, u = denoised[: len(x)], denoised[len(x) :]
        if guided is True:
            return _guide(c, u, weight)
        return c.index_copy(0, guided, _guide(c[guided], u, weight))

    @_uncompiled
    def _decide(self, x, sigma, cond, uncond, cond_scale):
        """Judge and count an evaluation. Returns which rows are guided, True for all, False for none or their
        index [guided], and their weight: a number, or a tensor [guided, 1, ...].
        """
        self._admit(x, sigma, cond, uncond)
        batch, (weights, weight) = len(x), _weights(cond_scale, x)
        guided = self.interval.guided_rows(sigma) if self.plan is None else [self._guided_step(sigma)] * batch
        guided = [g and not math.isclose(w, 1.0) for g, w in zip(guided, weights, strict=True)]  # As ComfyUI judges.
        num_guided = sum(guided)
        self.rows += batch + num_guided
        self.evaluations += 1
        if num_guided == 0:
            return False, None
        if num_guided == batch:
            return True, weight
        index = torch.tensor([i for i, g in enumerate(guided) if g]).to(x.device, non_blocking=True)
        return index, weight[index] if isinstance(weight, torch.Tensor) else weight

    def _admit(self, x, sigma, cond, uncond):
        """Raise TypeError or ValueError for what a sampler cannot be right to hand on."""
        if not isinstance(sigma, torch.Tensor) or sigma.shape != x.shape[:1]:
            raise _sigma_error(sigma, len(x))
        given = [len(x), cond, uncond, *_values(cond), *_values(uncond)]
        if len(given) == len(self._admitted) and all(map(operator.is_, given, self._admitted)):
            return
        _check_conds(cond, uncond, len(x))
        self._admitted = given

    def _guided_step(self, sigma):
        """Whether the step under way is guided; raises RuntimeError unless Heun's method evaluates at sigma next."""
        levels = sigma.tolist()
        tolerance = max(1e-4, torch.finfo(sigma.dtype).eps)  # A sampler may compute sigma from its logarithm.
        for position in (self.position, 0):  # 0: a new run, after one that was cut short.
            expected, guided = self.plan[position]
            strays = [level for level in levels if not math.isclose(level, expected, rel_tol=tolerance)]
            if not strays:
                self.position = (position + 1) % len(self.plan)
                return guided
        position, self.position = self.position, 0
        raise RuntimeError(
            f"per_step=True follows sample_heun through the given sigmas: evaluation {position + 1} of "
            f"{len(self.plan)} is at {self.plan[position][0]:.4g}, but the sampler evaluates at {strays[0]:.4g}; "
            "leave per_step and sigmas out for another sampler or schedule"
        )


def _heun_plan(interval, sigmas):
    """`[(sigma, guided)]` of each evaluation of Heun's method: a step's second one keeps the decision of the first."""
    try:
        sigmas = torch.as_tensor(sigmas).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise TypeError(f"sigmas must be a tensor, an array or a list of noise levels, got {_describe(sigmas)}") from e
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be 1-D, at least 2 noise levels, got shape {list(sigmas.shape)}")
    levels, guided = sigmas.tolist(), interval.guided_rows(sigmas)
    if not all(level > 0 for level in levels[:-1]):  # NaN is not either.
        raise ValueError(f"sigmas must be above 0, but for the last one, got {reprlib.repr(levels)}")
    interval.warn_if_unused(sigmas[:-1])
    plan = [(level, g) for start, end, g in zip(levels, levels[1:], guided, strict=False) for level in (start, end)]
    return plan if levels[-1] > 0 else plan[:-1]  # Heun's method takes no second evaluation at 0.


# ----------------------------------------------------------------------------
# Batches of cond rows and of the uncond rows that are guided.


def _join(cond, uncond, guided):
    """Tensors [B, ...] of cond above the guided rows of uncond's: [B + guided, ...], within dicts, lists and tuples."""
    if isinstance(cond, torch.Tensor):
        return torch.cat([cond, uncond if guided is True else uncond[guided]])
    if isinstance(cond, dict):
        return {key: _join(c, uncond[key], guided) for key, c in cond.items()}
    if isinstance(cond, (list, tuple)):
        return type(cond)([_join(c, uncond[i], guided) for i, c in enumerate(cond)])
    return cond


def _guide(cond, uncond, weight):
    """uncond + (cond - uncond) * weight: Ho & Salimans (2022), eq. 6, with weight 1 for no guidance."""
    return (cond - uncond).mul_(weight).add_(uncond)  # In place: the weights' dtype may be wider.


# ----------------------------------------------------------------------------
# What a sampler hands on from its user.


def _values(cond):
    return cond.values() if isinstance(cond, dict) else ()


def _sigma_error(sigma, batch):
    error = ValueError if isinstance(sigma, torch.Tensor) else TypeError
    return error(f"sigma must be a tensor of shape [{batch}], one per row of x, got {_describe(sigma)}")


def _check_conds(cond, uncond, batch):
    """Raise TypeError or ValueError unless both are dicts that `_join` can join."""
    for name, value in (("cond", cond), ("uncond", uncond)):
        if not isinstance(value, dict):
            raise TypeError(
                f"{name} must be a dict of keyword arguments of the model, such as {{'context': tensor}}, "
                f"got {_describe(value)}"
            )
    _check(cond, uncond, batch)


def _check(cond, uncond, batch, where=""):
    """Raise TypeError or ValueError unless `_join` can join the two; where: the keys that lead to them."""
    if isinstance(cond, torch.Tensor) and isinstance(uncond, torch.Tensor):
        same = cond.shape == uncond.shape and cond.dtype == uncond.dtype and cond.device == uncond.device
        if not same or cond.shape[:1] != (batch,):
            raise ValueError(
                f"cond{where} and uncond{where} must have the same shape, dtype and device, with the batch size "
                f"{batch} of x first, got {_describe(cond)} and {_describe(uncond)}; pad or repeat the shorter one"
            )
    elif isinstance(cond, dict) and isinstance(uncond, dict):
        if cond.keys() != uncond.keys():
            raise ValueError(
                f"cond{where} and uncond{where} must have the same keys, got {_describe(cond)} and {_describe(uncond)}"
            )
        for key, value in cond.items():
            _check(value, uncond[key], batch, f"{where}[{key!r}]")
    elif type(cond) is type(uncond) and type(cond) in (list, tuple) and len(cond) == len(uncond):
        for i, value in enumerate(cond):
            _check(value, uncond[i], batch, f"{where}[{i}]")
    elif isinstance(cond, (list, tuple)) or not _equal(cond, uncond):
        raise TypeError(
            f"cond{where} and uncond{where} must be alike: tensors with a row for each of x, or dicts, lists or tuples "
            f"of them, or one value for all rows, equal in both; got {_describe(cond)} and {_describe(uncond)}"
        )


def _weights(cond_scale, x):
    """The weight of each row as a list, and as what to multiply with: a number, or a tensor [B, 1, ...]."""
    if isinstance(cond_scale, (int, float)):
        try:
            weight = float(cond_scale)
        except OverflowError:  # An integer of hundreds of digits.
            weight = math.inf
        weights = [weight] * len(x)
    else:
        try:  # In the precision in which torch multiplies x with a number, so that the rows come out as with one.
            weight = torch.as_tensor(cond_scale, dtype=torch.promote_types(x.dtype, torch.float32))
        except (TypeError, ValueError, RuntimeError, OverflowError) as e:
            raise TypeError(f"cond_scale must be a number or one per row, got {_describe(cond_scale)}") from e
        if weight.shape not in ((), (len(x),)):
            raise ValueError(f"cond_scale must be a number or {len(x)}, one per row, got {_describe(cond_scale)}")
        weight = weight.expand(len(x))
        weights = weight.tolist()  # One more sync, if it is on an accelerator.
        weight = weight.to(x.device, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"cond_scale must be finite, got {next(w for w in weights if not math.isfinite(w))}")
    return weights, weight


def _equal(a, b):
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    try:
        return np.array_equal(a, b)
    except (TypeError, ValueError, RuntimeError):  # Objects of others, which may compare to anything.
        return False


def _describe(value):
    """A value in a few words, for an error message; never what a tensor holds."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"{kind} {list(value.shape)} {value.dtype} on {value.device}".replace("torch.", "")
    if isinstance(value, np.ndarray):
        return f"{kind} {list(value.shape)} {value.dtype}"
    if isinstance(value, dict):
        return f"{kind} of {reprlib.repr(sorted(map(str, value)))}"
    if isinstance(value, (list, tuple)):
        return f"{kind} of {len(value)}"
    return f"{kind} {reprlib.repr(value)}" if isinstance(value, (str, bytes, numbers.Number)) else kind

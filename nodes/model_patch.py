"""The guidance interval as a patch on ComfyUI's sampling: the one place that touches the host's internals.

The patch is two wrappers on a cloned model. OUTER_SAMPLE sees each run once: it turns the interval into the
model's own noise levels. PREDICT_NOISE sees each evaluation: inside the interval it hands on to the host,
unchanged; outside it evaluates the conditional prediction alone, whichever guider asks. Nothing is kept between
runs: what a run needs to remember lives in the guider's `model_options`, which the host clones for each run.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..noise_level import flow_time_to_sigma, rescale_sigma, sigma_to_flow_time
from ..sampler_patch import GuidanceInterval

KEY = "guidance_interval"
POST_CFG = "sampler_post_cfg_function"
PRE_CFG = "sampler_pre_cfg_function"

# What the model's evaluations outside of the interval return.
COND_ONLY = "conditional only"  # The conditional prediction, whatever other guidance is stacked on the model.
KEEP_PATCHES = "keep other patches"  # The host's chain at cfg 1 with uncond = cond: patches other than CFG act.
OUTSIDE = (COND_ONLY, KEEP_PATCHES)

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------
# Noise levels: sigma of x = x0 + sigma * n, for data of unit scale, and the model's own.


def to_model_sigma(sigma, model_sampling):
    """The model's own noise level, a number, for `sigma` of x = x0 + sigma * n with x0 of unit scale."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):  # Flow: x_t = (1 - t) x0 + t * noise_scale * n.
        return sigma_to_flow_time(sigma / getattr(model_sampling, "noise_scale", 1.0))
    return rescale_sigma(sigma, 1.0, getattr(model_sampling, "sigma_data", 1.0))


def from_model_sigma(sigma, model_sampling):
    """The inverse of `to_model_sigma`."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return flow_time_to_sigma(min(sigma, 1.0)) * getattr(model_sampling, "noise_scale", 1.0)
    return rescale_sigma(sigma, getattr(model_sampling, "sigma_data", 1.0), 1.0)


# How an interval is given: each makes a function from the host's model_sampling, known only when a run starts
# (nodes after ours may change it), to the GuidanceInterval of the model's own noise levels.


def in_edm_units(interval):
    """A GuidanceInterval for data of unit scale, as published."""
    return lambda ms: GuidanceInterval(*(to_model_sigma(s, ms) for s in (interval.sigma_lo, interval.sigma_hi)))


def in_model_units(interval):
    """A GuidanceInterval in the model's own noise levels: t in [0, 1] for flow models."""
    return lambda ms: interval


def in_percent(start, end):
    """From `start` to `end` of the sampling process, 0 to 1, as ComfyUI's other nodes count it."""
    return lambda ms: GuidanceInterval(float(ms.percent_to_sigma(end)), float(ms.percent_to_sigma(start)))


# ----------------------------------------------------------------------------
# The patch.


@dataclass
class Run:
    """What one sampling run remembers: the interval in the model's noise levels, and what was said already."""

    interval: GuidanceInterval
    said: set = field(default_factory=set)

    def say(self, text):
        if text not in self.said:
            self.said.add(text)
            log.info("Guidance Interval: %s", text)


@dataclass(frozen=True)
class IntervalPatch:
    """The two wrappers, and the settings they act by.

    resolve: model_sampling -> GuidanceInterval in the model's own noise levels. outside: one of OUTSIDE.
    """

    resolve: Callable
    outside: str = COND_ONLY

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        run = Run(self.resolve(model_sampling))
        levels = sigmas[:-1].cpu()  # The last is where the run ends; it is not evaluated.
        if len(levels) and not run.interval.mask(levels).any():
            log.warning("Guidance Interval: %s", _unused(run.interval, levels, model_sampling))
        guider.model_options[KEY] = run
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict_noise(self, executor, x, sigma, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        guider = executor.class_obj
        run = guider.model_options.get(KEY)
        if run is None:  # A guider of another node that samples in a way of its own.
            run = guider.model_options[KEY] = Run(self.resolve(guider.inner_model.model_sampling))
        nothing = _nothing_to_limit(guider, model_options)
        if nothing:
            run.say(f"{nothing}: nothing to limit")
            return executor(x, sigma, model_options, seed)

        guided = run.interval.guided_rows(sigma)  # The one host sync.
        if all(guided):
            return executor(x, sigma, model_options, seed)
        if self.outside == KEEP_PATCHES:
            outside = _keep_patches(executor, run, x, sigma, model_options, seed)
        else:
            outside = _cond_only(guider, x, sigma, model_options)
        if not any(guided):
            return outside
        # Rows at different noise levels. No sampler of the host does this, so both are paid for in full.
        rows = torch.tensor(guided, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(rows, executor(x, sigma, model_options, seed), outside)


def patch_model(model, resolve, outside=COND_ONLY):
    """A clone of `model` (a ModelPatcher) that is guided in the interval alone; an earlier interval is replaced."""
    model = unpatch_model(model)
    patch = IntervalPatch(resolve, outside)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, patch.outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, patch.predict_noise)
    return model


def unpatch_model(model):
    """A clone of `model` without our patch."""
    model = model.clone()
    for wrapper_type in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE):
        model.remove_wrappers_with_key(wrapper_type, KEY)
    return model


def model_interval(model):
    """The GuidanceInterval, in the model's own noise levels, that `model` is patched with, or None."""
    wrappers = model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY)
    return wrappers[-1].__self__.resolve(model.get_model_object("model_sampling")) if wrappers else None


def _nothing_to_limit(guider, model_options):
    """Why this evaluation has no unconditional pass to leave out, or None when it has one."""
    if "positive" not in guider.conds or len(guider.conds) == 1:
        return f"{type(guider).__name__} has no unconditional pass"
    # Other guiders have weights of their own; samplers of CFG++ ask for uncond at any cfg.
    plain = type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
    if plain and math.isclose(guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization"):
        return "cfg is 1"
    return None


def _unused(interval, levels, model_sampling):
    low, high = levels.min().item(), levels.max().item()
    text = f"no step of this schedule, sigma {high:.4g} to {low:.4g}, lies in the interval {interval}"
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        high, low = (from_model_sigma(s, model_sampling) for s in (high, low))
        text += f", in the flow model's own t (as noise relative to the data, the schedule is {high:.4g} to {low:.4g})"
    return f"{text}: nothing will be guided"


# ----------------------------------------------------------------------------
# Outside of the interval.


def _cond_only(guider, x, sigma, model_options):
    """The conditional prediction of [B, ...], from B rows for each of its conds."""
    positive = guider.conds["positive"]
    (cond,) = comfy.samplers.calc_cond_batch(guider.inner_model, [positive], x, sigma, model_options)
    # CFG++ samplers take their uncond from a function that they add for the call; nodes' are on the model.
    nodes = guider.model_options.get(POST_CFG, ())
    samplers = [fn for fn in model_options.get(POST_CFG, ()) if fn not in nodes]
    if not samplers:
        return cond
    options = {k: v for k, v in model_options.items() if k != "sampler_cfg_function"} | {POST_CFG: samplers}
    return comfy.samplers.cfg_function(
        guider.inner_model, cond, cond, 1.0, x, sigma, model_options=options, cond=positive, uncond=positive
    )


def _keep_patches(executor, run, x, sigma, model_options, seed):
    """The rest of the host's chain, with a guider at its end that knows no other prediction than cond."""
    guider = executor.class_obj

    def predict_noise(x, sigma, model_options={}, seed=None):  # noqa: B006
        positive = guider.conds["positive"]
        return comfy.samplers.sampling_function(
            guider.inner_model, x, sigma, None, positive, 1.0, model_options=_without_uncond(run, model_options)
        )

    chain = WrapperExecutor.new_class_executor(predict_noise, guider, executor.wrappers, executor.idx + 1)
    return chain.execute(x, sigma, model_options, seed)


def _without_uncond(run, model_options):
    post_cfg = model_options.get(POST_CFG, ())
    kept = [fn for fn in post_cfg if not _reads_uncond_pass(fn)]
    if len(kept) < len(post_cfg):
        run.say("Self-Attention Guidance reads the unconditional pass, so it acts inside the interval alone")
    return {**model_options, PRE_CFG: [_uncond_is_cond, *model_options.get(PRE_CFG, ())], POST_CFG: kept}


def _uncond_is_cond(args):
    return [args["conds_out"][0]] * len(args["conds_out"])


def _reads_uncond_pass(fn):
    # SAG takes its attention map from the uncond rows: without them it would use a stale one, or crash.
    return getattr(fn, "__module__", "").endswith("nodes_sag")

"""The guidance interval as a patch on ComfyUI's sampling: what is decided, and for which evaluation.

The patch is two wrappers on a cloned model. OUTER_SAMPLE sees each run once: it turns the interval into the
model's own noise levels. PREDICT_NOISE sees each evaluation: inside the interval it hands on to the host,
unchanged; outside it has the conditional prediction alone evaluated (`host.py`), whichever guider asks. Nothing
is kept between runs: what a run needs to remember lies on its guider and is taken off when the run ends.
"""

import itertools
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.k_diffusion import sampling as k_diffusion_sampling
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..interval_text import CONDITIONAL_ONLY
from ..noise_level import flow_time_to_sigma, rescale_sigma, sigma_to_flow_time
from ..sampler_patch import GuidanceInterval
from . import host

# What the model's evaluations outside of the interval return.
KEEP_PATCHES = "keep other patches"  # The host's chain at weight 1 with uncond = cond: patches other than CFG act.
OUTSIDE = (CONDITIONAL_ONLY, KEEP_PATCHES)

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


OPEN = -1.0  # A bound that is none, as it is typed: what the JSON of a workflow cannot hold is inf.


def to_interval(sigma_lo, sigma_hi):
    """A GuidanceInterval from bounds as they are typed: -1 leaves either open. Raises as GuidanceInterval does."""
    for name, value in (("sigma_lo", sigma_lo), ("sigma_hi", sigma_hi)):
        if value < 0 and value != OPEN:
            raise ValueError(f"{name} must be 0 or above, or -1 for none, got {value!r}")
    return GuidanceInterval(0.0 if sigma_lo == OPEN else sigma_lo, math.inf if sigma_hi == OPEN else sigma_hi)


# How an interval is given: each makes a function from the host's model_sampling, known only when a run starts
# (nodes after ours may change it), to the GuidanceInterval of the model's own noise levels.


def in_edm_units(interval):
    """A GuidanceInterval for data of unit scale, as published."""

    def resolve(model_sampling):
        bounds = (interval.sigma_lo, interval.sigma_hi)
        return GuidanceInterval(*(s if s == math.inf else to_model_sigma(s, model_sampling) for s in bounds))

    return resolve


def in_model_units(interval):
    """A GuidanceInterval in the model's own noise levels: t in [0, 1] for flow models."""
    return lambda ms: interval


def in_percent(start, end):
    """From `start` to `end` of the sampling process, 0 to 1, as ComfyUI's other nodes count it."""
    return lambda ms: GuidanceInterval(float(ms.percent_to_sigma(end)), float(ms.percent_to_sigma(start)))


NOWHERE = GuidanceInterval(sys.float_info.max, math.inf)  # Holds no noise level of any model.


def nowhere(model_sampling):
    """No noise level at all: what an interval does outside, throughout."""
    return NOWHERE


# ----------------------------------------------------------------------------
# The patch.


def reading_waits(device):
    """Whether reading a number from `device` waits for all that it has been given to do."""
    return device.type == "cuda"


@dataclass
class KnownSchedule:
    """The noise levels of a run that evaluates each once, in order: no evaluation has to wait for its sigma.

    Each sigma is compared all the same, where it is; whether all were the known ones is read once, after the run.

    levels: [n] on the CPU. differs: [B] of each evaluation, on the device of sigma.
    """

    levels: torch.Tensor
    differs: list = field(default_factory=list)

    def level(self, position, sigma):
        """What `sigma` [B], of the evaluation at `position`, has to be: [B] on the CPU."""
        level = self.levels[min(position, len(self.levels) - 1)]
        self.differs.append(sigma != level.item())
        return level.to(sigma.dtype).expand(len(sigma))

    def was_kept(self):
        return not (self.differs and torch.cat(self.differs).any())


def evaluates_each_level_once(sampler):
    """Whether it is the host's Euler, or DDIM. Nearly all others wait for numbers of their own at every step."""
    if type(sampler) is not comfy.samplers.KSAMPLER or sampler.extra_options.get("s_churn"):
        return False
    return sampler.sampler_function is k_diffusion_sampling.sample_euler


# Why evaluations are left as the host's own, by a code that the page has words for: level and text of the log.
LEFT = {
    "cfg_one": (logging.INFO, "cfg is 1: nothing to limit"),
    "no_uncond": (logging.INFO, "{} has no unconditional pass: nothing to limit"),
    "pack": (
        logging.WARNING,
        "the sampling function that {} has put in the place of ComfyUI's does not give the conditional prediction "
        "alone: this run is left as it is, without the interval",
    ),
    "past": (
        logging.WARNING,
        "{} evaluates the model past what nodes have set on its sampling: this run was left as it is, without the "
        "interval",
    ),
}


@dataclass
class SamplingRun:
    """What one sampling run remembers.

    interval: in the model's noise levels. schedule: None where sigma is read. position: of the evaluation under way.
    said: what the log was told. left: (code in LEFT, its value), why the latest evaluation was left as it is, or None.
    unlimited: so is the whole run. rows: what the network has evaluated. evaluations: [(guided, rows before it, clock)]
    of each that was judged; a clock is seconds, or an event on the GPU where nothing waits for it.
    """

    interval: GuidanceInterval
    schedule: KnownSchedule | None = None
    position: int = -1
    said: set = field(default_factory=set)
    left: tuple | None = None
    unlimited: bool = False
    rows: int = 0
    evaluations: list = field(default_factory=list)

    def say(self, text, level=logging.INFO):
        if text not in self.said:
            self.said.add(text)
            log.log(level, "Guidance Interval: %s", text)

    def leave(self, code, value):
        """Say why an evaluation, or the run, is left as it is."""
        self.left = code, value
        level, text = LEFT[code]
        self.say(text.format(value), level)

    def guided_rows(self, sigma):
        """Which rows of the evaluation are guided, as a list."""
        if self.schedule is not None:
            sigma = self.schedule.level(self.position, sigma)
        return self.interval.guided_rows(sigma)  # The one host sync, where sigma was not known.

    def begin(self, guided, device):
        """Note an evaluation that begins."""
        if self.schedule is not None and device.type == "cuda":
            clock = torch.cuda.Event(enable_timing=True)
            clock.record()
        else:
            clock = time.perf_counter()
        self.evaluations.append((guided, self.rows, clock))

    def count(self, executor, x, *args, **kwargs):
        """A wrapper around the network. A batch's size is known without waiting for it."""
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)

    def report(self, seconds, end):
        """What happened, and what of CFG everywhere, as what the page is sent.

        left: as above, of a run without an evaluation that was limited. rows_cfg and seconds_cfg are None where nothing
        tells: no evaluation was guided, or too few of either kind were timed. end: rows and clock when the run ended.
        """
        guided = [g for g, *_ in self.evaluations]
        rows = [b[1] - a[1] for a, b in itertools.pairwise([*self.evaluations, (None, *end)])]
        # An evaluation begins when its sigma is read, which waits for the one before it, or at its event. Left out are
        # the first of either kind, which may load or compile, and the last, which may still be under way.
        times = {True: [], False: []}
        for (g, _, start), (_, _, stop) in itertools.pairwise(self.evaluations):
            times[g].append(start.elapsed_time(stop) / 1000 if hasattr(start, "elapsed_time") else stop - start)
        timed = {kind: of[1:] for kind, of in times.items()}
        inside = [r for r, g in zip(rows, guided, strict=True) if g]
        rows_cfg = seconds_cfg = None
        left = self.left if self.unlimited or not guided else None
        if inside and left is None:
            rows_cfg = self.rows + round((len(guided) - len(inside)) * sum(inside) / len(inside))
            rows_cfg -= sum(r for r, g in zip(rows, guided, strict=True) if not g)
            if all(guided):
                seconds_cfg = seconds
            elif timed[True] and timed[False]:
                more = statistics.median(timed[True]) - statistics.median(timed[False])
                seconds_cfg = seconds + max(more, 0.0) * (len(guided) - len(inside))
        return {
            "left": left,
            "rows": self.rows,
            "seconds": seconds,
            "evaluations": len(guided),
            "guided": len(inside),
            "rows_cfg": rows_cfg,
            "seconds_cfg": seconds_cfg,
        }


def count_rows(model_options, run):
    """`model_options` with which the network's rows are counted on `run`."""
    transformer_options = model_options.get("transformer_options", {})
    wrappers = transformer_options.get("wrappers", {})
    of_network = {**wrappers.get(WrappersMP.APPLY_MODEL, {}), f"{host.KEY}_rows": [run.count]}
    wrappers = {**wrappers, WrappersMP.APPLY_MODEL: of_network}
    return {**model_options, "transformer_options": {**transformer_options, "wrappers": wrappers}}


@dataclass(frozen=True)
class IntervalPatch:
    """The two wrappers, and the settings they act by.

    resolve: model_sampling -> GuidanceInterval in the model's own noise levels. outside: one of OUTSIDE. tell: is
    given what each run was (`SamplingRun.report`), or None. stages: whether any run of the prompt has guided steps, or
    None where that is not known.
    """

    resolve: Callable
    outside: str = CONDITIONAL_ONLY
    tell: Callable | None = None
    stages: Callable | None = None

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        interval = self.resolve(model_sampling)
        levels = sigmas[:-1].cpu()  # The last is where the run ends; it is not evaluated.
        known = evaluates_each_level_once(sampler) and reading_waits(guider.model_patcher.load_device)
        run = SamplingRun(interval, KnownSchedule(levels) if known else None)
        if len(levels) and interval is not NOWHERE and not interval.mask(levels).any():
            unused = _unused(interval, levels, model_sampling)
            if self.stages is not None and self.stages():  # Of two samplers that share the steps, one may have none.
                run.say(f"{unused}: none of this stage is guided")
            else:
                run.say(f"{unused}: nothing will be guided", logging.WARNING)
        conds = {kind: [c.copy() for c in of] for kind, of in guider.conds.items()} if known else None
        out, start = self._sample(run, executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
        if known and not run.schedule.was_kept():
            run.say("the sampler left its schedule: it samples again, and sigma is read", logging.WARNING)
            guider.conds = conds  # As they were before the run prepared them.
            run = SamplingRun(interval, said=run.said)
            out, start = self._sample(run, executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
        if len(levels) and run.position < 0:  # Nothing of ours was asked.
            run.leave("past", type(guider).__name__)
        if self.tell is not None and (run.evaluations or run.left):
            end = time.perf_counter()
            self.tell(run.report(end - start, (run.rows, end)))
        return out

    def _sample(self, run, executor, *args, **kwargs):
        """`(latent, clock when it began)` of one run of the host."""
        guider = executor.class_obj
        setattr(guider, host.KEY, run)
        if self.tell is not None:
            guider.model_options = count_rows(guider.model_options, run)  # The run's own, which the host takes off.
        start = time.perf_counter()
        try:
            return executor(*args, **kwargs), start
        finally:
            vars(guider).pop(host.KEY, None)

    def predict_noise(self, executor, x, sigma, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        guider, predict = executor.class_obj, executor.original
        run = getattr(guider, host.KEY, None)
        if run is None:  # A guider of another node that samples in a way of its own.
            run = SamplingRun(self.resolve(guider.inner_model.model_sampling))
            setattr(guider, host.KEY, run)
        run.position += 1

        def decide(x, sigma, model_options={}, seed=None):  # noqa: B006
            return self._decide(run, guider, predict, x, sigma, model_options, seed)

        # At the chain's end, where other nodes have set what they set: before or after ours makes no difference.
        chain = WrapperExecutor.new_class_executor(decide, guider, executor.wrappers, executor.idx + 1)
        return chain.execute(x, sigma, model_options, seed)

    def _decide(self, run, guider, predict, x, sigma, model_options, seed):
        nothing = _nothing_to_limit(guider, model_options)
        if nothing:
            run.leave(*nothing)
        if nothing or run.unlimited:
            return predict(x, sigma, model_options, seed)
        guided = run.guided_rows(sigma)
        if self.tell is not None:
            run.begin(any(guided), sigma.device)
        if all(guided):
            return predict(x, sigma, model_options, seed)
        unguided = self._unguided(run, guider, x, sigma, model_options, seed)
        if unguided is None:
            run.unlimited = True
            run.leave("pack", getattr(comfy.samplers.sampling_function, "__module__", "another node pack"))
            return predict(x, sigma, model_options, seed)
        if not any(guided):
            return unguided
        # Rows at different noise levels. No sampler of the host mixes them, and no part of a batch can be taken out
        # of conds with areas, masks, ControlNets and context windows: both predictions are made for all rows.
        rows = torch.tensor(guided, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(rows, predict(x, sigma, model_options, seed), unguided)

    def _unguided(self, run, guider, x, sigma, model_options, seed):
        """What an evaluation outside of the interval returns, from B rows for each of the positive's conds."""
        model, cond = guider.inner_model, guider.conds["positive"]
        added = model_options.get(host.POST_CFG, ())
        if self.outside == CONDITIONAL_ONLY:
            # CFG++ samplers take their uncond from a function that they add for the call; nodes' are on the model.
            nodes = guider.model_options.get(host.POST_CFG, ())
            samplers = [fn for fn in added if fn not in nodes]
            return host.conditional_only(model, x, sigma, cond, model_options, seed, samplers)
        kept = [fn for fn in added if not host.reads_uncond_pass(fn)]
        if len(kept) < len(added):
            run.say("Self-Attention Guidance reads the unconditional pass, so it acts inside the interval alone")
        return host.sampling_function(model, x, sigma, cond, 1.0, {**model_options, host.POST_CFG: kept}, seed)


def patch_model(model, resolve, outside=CONDITIONAL_ONLY, tell=None, stages=None):
    """A clone of `model` (a ModelPatcher) that is guided in the interval alone; an earlier interval is replaced."""
    model = unpatch_model(model)
    patch = IntervalPatch(resolve, outside, tell, stages)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, host.KEY, patch.outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, host.KEY, patch.predict_noise)
    return model


def unpatch_model(model):
    """A clone of `model` without our patch."""
    model = model.clone()
    for wrapper_type in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE):
        model.remove_wrappers_with_key(wrapper_type, host.KEY)
    return model


def model_interval(model):
    """The GuidanceInterval, in the model's own noise levels, that `model` is patched with, or None."""
    wrappers = model.get_wrappers(WrappersMP.PREDICT_NOISE, host.KEY)
    return wrappers[-1].__self__.resolve(model.get_model_object("model_sampling")) if wrappers else None


def _nothing_to_limit(guider, model_options):
    """Why this evaluation has no unconditional pass to leave out, as `SamplingRun.leave` takes it, or None."""
    if "positive" not in guider.conds or len(guider.conds) == 1:
        return "no_uncond", type(guider).__name__
    # Other guiders have weights of their own; samplers of CFG++ ask for uncond at any cfg.
    plain = type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
    if plain and math.isclose(guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization"):
        return "cfg_one", ""
    return None


def _unused(interval, levels, model_sampling):
    low, high = levels.min().item(), levels.max().item()
    text = f"no step of this schedule, sigma {high:.4g} to {low:.4g}, lies in the interval {interval}"
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        high, low = (from_model_sigma(s, model_sampling) for s in (high, low))
        text += f", in the flow model's own t (as noise relative to the data, the schedule is {high:.4g} to {low:.4g})"
    return text

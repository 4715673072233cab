"""The noise levels at which a sampler evaluates the model, found by letting it sample nothing.

The host's own sampler runs over the schedule with a denoiser that only notes sigma: what a step costs (one
evaluation, two, three) is not written down here.
"""

import collections
import inspect
import threading
import time

import comfy.samplers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (1, 4, 4, 4)
KEEP = 64
MOST = 20000  # Evaluations: samplers that choose their steps by the model's answers may never be content.
SECONDS = 2.0  # Of one trace: the longest schedules of the slowest samplers.


class TooMany(RuntimeError):
    pass


class TooLong(RuntimeError):
    pass


def evaluations(sampler, sigmas, model, key=None):
    """`[sigma, ...]` of each evaluation, or None where they depend on what the model answers.

    sampler: a SAMPLER; sigmas: 1-D tensor; model: a ModelPatcher, for its model_sampling. key: what to remember the
    result by. Raises whatever the sampler raises, and TooLong after `SECONDS`.
    """
    if len(sigmas) < 2:
        return []
    if key is None:
        return _trace(sampler, sigmas, model)
    key = (key, tuple(sigmas.tolist()))
    if key not in _known:
        found = _trace(sampler, sigmas, model)
        with _lock:
            _known[key] = found
            while len(_known) > KEEP:
                _known.popitem(last=False)
    return _known.get(key)


_known, _lock = collections.OrderedDict(), threading.Lock()


def _trace(sampler, sigmas, model):
    if type(sampler) is comfy.samplers.KSAMPLER:  # Without noise for masks, which would seed torch's generator.
        sampler = comfy.samplers.KSAMPLER(sampler.sampler_function, _without_noise(sampler))
    seen = []
    for share in (0.0, 0.5):  # Two models that answer differently.
        noter = _Noter(model, share)
        with torch.inference_mode(), _OwnRandomness():
            noise = torch.linspace(-1, 1, 64).reshape(SHAPE)
            extra = {"model_options": {}, "seed": 0}
            try:
                sampler.sample(noter, sigmas.clone(), extra, None, noise, torch.zeros(SHAPE), None, True)
            except TooMany:
                return None
        seen.append(noter.levels)
    return seen[0] if seen[0] == seen[1] else None


def _without_noise(sampler):
    """Its options, with no noise where it takes a function for it: a Brownian tree is slow, and decides nothing."""
    options = dict(sampler.extra_options)
    if "noise_sampler" in inspect.signature(sampler.sampler_function).parameters:
        options.setdefault("noise_sampler", lambda sigma, sigma_next: torch.zeros(SHAPE))
    return options


class _Noter:
    """Stands where a guider does: what samplers ask of one, and no more."""

    cfg = 1.0

    def __init__(self, model, share):
        self.model_patcher, self.inner_model = model, model.model
        self.conds, self.model_options = {}, {}
        self.share, self.levels, self.end = share, [], time.monotonic() + SECONDS
        model.model.current_patcher = model

    def __call__(self, x, sigma, model_options=None, seed=None, **kwargs):
        if len(self.levels) >= MOST:
            raise TooMany
        if time.monotonic() > self.end:
            raise TooLong
        self.levels.append(float(sigma.reshape(-1)[0]))
        denoised = x * self.share
        for fn in (model_options or {}).get("sampler_post_cfg_function", ()):  # CFG++ samplers'.
            args = dict.fromkeys(("denoised", "cond", "uncond", "cond_denoised", "uncond_denoised", "input"), denoised)
            args |= {"cond_scale": 1.0, "model": self.inner_model, "sigma": sigma, "model_options": model_options}
            denoised = fn(args)
        return denoised


class _OwnRandomness(TorchDispatchMode):
    """Draws nothing from torch's generator, from which a run in another thread may be drawing its noise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if func.overloadpacket in (torch.ops.aten.randn_like, torch.ops.aten.rand_like):
                return torch.zeros_like(args[0])
            if not any(isinstance(a, torch.Generator) for a in args):
                raise RuntimeError(f"{func} draws from torch's own generator")
        return func(*args, **kwargs)

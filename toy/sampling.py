"""Sample the model that ships with k-diffusion's samplers, and count what it cost."""

import functools
import inspect
import time
import warnings
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..sampler_patch import CFGDenoiser, GuidanceInterval

SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 40.0, 7.0
MAX_WEIGHT = 1000  # Far more than anyone uses; further on samples overflow.
BATCH = 100  # A larger one's activations leave a desktop CPU's cache, and rows get slower.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Guidance:
    """One way to sample: guidance weight (1 is none) and interval (None is everywhere)."""

    name: str
    weight: float
    interval: GuidanceInterval | None = None


@dataclass(frozen=True)
class Samples:
    """What a run gave: x [N, C, H, W] on the model's scale, labels [N], network evaluations per sample, seconds."""

    x: torch.Tensor
    labels: torch.Tensor
    rows: float
    seconds: float

    @property
    def num(self):
        return len(self.labels)

    def first(self, num):
        """The first `num` of them, with their share of the seconds."""
        share = self.seconds * num / self.num
        return Samples(self.x[:num], self.labels[:num], self.rows, share)


def check_weight(weight, name="weight"):
    """Raise UserError, with the name of the input, unless `weight` guides."""
    if not 1 < weight <= MAX_WEIGHT:
        raise UserError(
            f"{name} must be a number above 1 (1 is conditional only) and at most {MAX_WEIGHT}, got {weight!r}"
        )


def check_seed(seed):
    """Raise UserError unless `seed` is one that every generator takes."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed must be a whole number from 0 to {MAX_SEED}, got {seed!r}")


def get_sampler(name):
    """The function `sample_<name>` of k-diffusion; raises UserError, with the names there are, for another."""
    from k_diffusion import sampling

    known = {k.removeprefix("sample_"): f for k, f in vars(sampling).items() if k.startswith("sample_") and callable(f)}
    if name not in known:
        raise UserError(f"unknown sampler {name!r}; k-diffusion has {', '.join(sorted(known))}")
    return known[name]


def karras_sigmas(steps, device="cpu"):
    """The schedule of the lab: Karras et al. (2022), eq. 5, `steps` noise levels and a final 0."""
    from k_diffusion.sampling import get_sigmas_karras

    return get_sigmas_karras(steps, SIGMA_MIN, SIGMA_MAX, RHO, device)


def schedule_args(sampler, sigmas):
    """What a sampler function takes after `(model, x)`: the schedule itself or, for DPM-Solver, its two ends."""
    takes = inspect.signature(sampler).parameters
    if "sigmas" in takes:
        return (sigmas,)
    levels = sigmas[sigmas > 0].tolist()
    return (min(levels), max(levels), *([len(levels)] if "n" in takes else []))


def evaluation_sigmas(sampler, *args, **kwargs):
    """The noise levels at which a fixed-step sampler evaluates its model, in order.

    Found by running `sampler(model, x, *args, **kwargs)` on one number.
    """
    seen = []

    def record(x, sigma, **_):
        seen.append(sigma[0])
        return torch.zeros_like(x)

    with torch.random.fork_rng(devices=[]):
        sampler(record, torch.zeros(1, 1), *args, disable=True, **kwargs)
    return torch.stack(seen)


@functools.cache
def evaluations(name, steps):
    """`(sigmas, fixed)` of a sampler on the lab's schedule: its evaluations, and whether they are always these.

    An adaptive sampler chooses them by what the model answers; the sigmas are then an example.
    """
    sampler = get_sampler(name)
    args = schedule_args(sampler, karras_sigmas(steps))
    return evaluation_sigmas(sampler, *args), len(args) != 2


def class_labels(lab, num):
    """The classes of `num` samples, int64 [num]: in turn, or as often as in the data where the model's file says so."""
    order = lab.reference.get("labels", torch.arange(lab.config["num_classes"])).long()
    return order[torch.arange(num, device=order.device) % len(order)]


@torch.inference_mode()
def sample(lab, setting, num, sampler="dpmpp_2m", steps=16, seed=0, progress=None):
    """Sample `num` images of `class_labels` and return `Samples`.

    One seed gives every setting the same initial noise, on any device, and the same noise of the sampler.
    progress(n) is called after each batch of n images. Raises UserError for an unknown sampler or a bad seed.
    """
    check_seed(seed)
    denoiser = CFGDenoiser(lab.denoiser, setting.interval)
    device = next(lab.denoiser.parameters()).device
    sample_fn, sigmas = get_sampler(sampler), karras_sigmas(steps, device)
    args = schedule_args(sample_fn, sigmas)
    shape = lab.config.get("image_channels", 1), lab.config["image_size"], lab.config["image_size"]
    labels = class_labels(lab, num).to(device)
    images, begin = [], time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        # The SDE samplers ask for the schedule's ends, which torchsde rounds.
        warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning, "torchsde")
        for start in range(0, num, BATCH):
            class_cond = labels[start : start + BATCH]
            torch.manual_seed(seed * 1_000_003 + start)
            x = torch.randn(len(class_cond), *shape).to(device) * sigmas[0]
            extra_args = dict(
                cond={"class_cond": class_cond},
                uncond={"class_cond": torch.full_like(class_cond, lab.denoiser.null_class)},
                cond_scale=setting.weight,
            )
            images.append(sample_fn(denoiser, x, *args, extra_args=extra_args, disable=True))
            if progress is not None:
                progress(len(class_cond))
        x = torch.cat(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Samples(x, labels, denoiser.rows / num, time.perf_counter() - begin)

"""Sample the model that ships with k-diffusion's samplers, and count what it cost."""

import inspect
import time
from dataclasses import dataclass

import torch

from ..sampler_patch import CFGDenoiser, GuidanceInterval

SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 40.0, 7.0
BATCH = 100  # Above this the activations leave a desktop CPU's cache, and rows get slower.


@dataclass(frozen=True)
class Setting:
    """One way to sample: guidance weight (1 is none) and interval (None is everywhere)."""

    name: str
    weight: float
    interval: GuidanceInterval | None = None


@dataclass
class Samples:
    """What a run gave: x [N, 1, 28, 28] on the model's scale, labels [N], network rows per sample, seconds."""

    x: torch.Tensor
    labels: torch.Tensor
    rows: float
    seconds: float


def samplers():
    """The samplers of `k_diffusion.sampling`: `{name: function}`."""
    from k_diffusion import sampling

    return {k.removeprefix("sample_"): f for k, f in vars(sampling).items() if k.startswith("sample_")}


def get_sampler(name):
    """The sampler `sample_<name>` of k-diffusion; raises ValueError, with the names there are, for another name."""
    known = samplers()
    if name not in known:
        raise ValueError(f"unknown sampler {name!r}; k-diffusion has {', '.join(sorted(known))}")
    return known[name]


def karras_sigmas(steps, device="cpu"):
    """The schedule of the lab: Karras et al. (2022), eq. 5, `steps` noise levels and a final 0."""
    from k_diffusion.sampling import get_sigmas_karras

    return get_sigmas_karras(steps, SIGMA_MIN, SIGMA_MAX, RHO, device)


def run_sampler(name, model, x, sigmas, **extra_args):
    """`sample_<name>(model, x, sigmas)`, whichever arguments that sampler takes; its noise is seeded by torch's RNG."""
    sampler = get_sampler(name)
    takes = inspect.signature(sampler).parameters
    if "sigmas" in takes:
        return sampler(model, x, sigmas, extra_args=extra_args, disable=True)
    levels = sigmas[sigmas > 0]
    args = (levels.min().item(), levels.max().item())
    if "n" in takes:
        args += (len(sigmas) - 1,)
    return sampler(model, x, *args, extra_args=extra_args, disable=True)


@torch.inference_mode()
def sample(lab, setting, num, sampler="dpmpp_2m", steps=18, seed=0, progress=None):
    """Sample `num` images of balanced classes and return `Samples`.

    The same seed gives the same initial noise, and the same sampler noise, to every setting. progress is
    called with the number of images after each batch.
    """
    denoiser = CFGDenoiser(lab.denoiser, setting.interval)
    device = next(lab.denoiser.parameters()).device
    sigmas = karras_sigmas(steps, device)
    num_classes, size = lab.config["num_classes"], lab.config["image_size"]
    labels = torch.arange(num, device=device) % num_classes
    images, begin = [], time.perf_counter()
    for start in range(0, num, BATCH):
        cond = labels[start : start + BATCH]
        # A generator per batch, on the CPU: the images do not depend on the device, nor on --samples.
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + start)
            x = torch.randn(len(cond), 1, size, size).to(device) * sigmas[0]
            images.append(
                run_sampler(
                    sampler,
                    denoiser,
                    x,
                    sigmas,
                    cond={"class_cond": cond},
                    uncond={"class_cond": torch.full_like(cond, lab.denoiser.null_class)},
                    cond_scale=setting.weight,
                )
            )
        if progress is not None:
            progress(len(cond))
    x = torch.cat(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Samples(x, labels, denoiser.rows / num, time.perf_counter() - begin)

"""The model that ships as a backend: the tuner offline, for the example, the tests and the benchmark."""

import functools
import time

import torch
from PIL import Image

from ...noise_level import rescale_sigma
from ...sampler_patch import CFGDenoiser, GuidanceInterval
from ...toy import data, model
from ...toy.sampling import evaluations, get_sampler, karras_sigmas, schedule_args
from .backend import Rendered, paste

SAMPLER, STEPS = "dpmpp_2m", 12
BATCH = 64
ENLARGE = 4  # Of the pixels in files, for the eyes.


@functools.lru_cache(maxsize=2)
def load(device):
    return model.load(model.shipped()["emoji"], device)


class Emoji:
    """A backend. Prompts are the names of Unicode's subgroups.

    Its settings are for data of unit scale, as in ComfyUI: the model's own noise levels are half of them.
    """

    host, source, workers = "emoji", "emoji", 0
    weight = 4.0

    def __init__(self, device="cpu"):
        self.lab, self.device, self.steps = load(device), device, STEPS
        self.prompts = list(self.lab.config["classes"])
        own, _ = evaluations(SAMPLER, self.steps)
        self.sigmas = rescale_sigma(own, self.lab.config["sigma_data"])
        self.identity = {"model": model.fingerprint(self.lab), "sampler": SAMPLER, "steps": self.steps}

    def render(self, jobs):
        by_setting = {}
        for i, job in enumerate(jobs):
            by_setting.setdefault(job.setting, []).append(i)
        for setting, members in by_setting.items():
            for start in range(0, len(members), BATCH):
                part, begin = members[start : start + BATCH], time.perf_counter()
                x, rows = self.sample(setting, [jobs[i] for i in part])
                seconds = (time.perf_counter() - begin) / len(part)
                for i, image in zip(part, self.to_images(x), strict=True):
                    yield i, Rendered(image, rows, seconds)

    @torch.inference_mode()
    def sample(self, setting, jobs):
        """`(x [N, C, H, W] on the model's scale, rows an image)`; each image has the noise of its own seed."""
        lab, sigmas = self.lab, karras_sigmas(self.steps, self.device)
        size = lab.config["image_size"]
        x = torch.stack([torch.randn(3, size, size, generator=torch.Generator().manual_seed(job.seed)) for job in jobs])
        labels = torch.tensor([self.prompts.index(job.prompt) for job in jobs], device=self.device)
        bounds = (rescale_sigma(s, 1.0, lab.config["sigma_data"]) for s in (setting.sigma_lo, setting.sigma_hi))
        denoiser, sampler = CFGDenoiser(lab.denoiser, GuidanceInterval(*bounds)), get_sampler(SAMPLER)
        extra_args = dict(
            cond={"class_cond": labels},
            uncond={"class_cond": torch.full_like(labels, lab.denoiser.null_class)},
            cond_scale=setting.weight,
        )
        x = x.to(self.device) * sigmas[0]
        x = sampler(denoiser, x, *schedule_args(sampler, sigmas), extra_args=extra_args, disable=True)
        return x, denoiser.rows / len(jobs)

    def to_pixels(self, x):
        """uint8 [N, 3, H, W] of x on the model's scale."""
        return data.to_pixels(x, self.lab.config["pixel_mean"], self.lab.config["pixel_std"])

    def to_images(self, x):
        pixels = self.to_pixels(x).repeat_interleave(ENLARGE, 2).repeat_interleave(ENLARGE, 3)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def describe(self):
        return [f"model: the emoji that ship, {SAMPLER}, {self.steps} steps, on {self.device}"]

    paste = staticmethod(paste)

    def close(self):
        """There is no connection."""

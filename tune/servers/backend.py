"""What the tuner asks of whatever renders: given settings, prompts and seeds, images come back as they are finished.

A backend has
- `source` and `host`, as the report names them; `weight`, the guidance weight of the baseline, which is CFG everywhere;
- `identity`, what moves its images beside setting, prompt and seed: a study is of one identity;
- `prompts`, its own ones, or None if they must be given;
- `sigmas`, the noise levels [N] of an image's evaluations in EDM units, or None where nobody tells them;
- `render(jobs)`: yields `(index, Rendered)` for each of a list of `Job`, in any order. Raises Refused for what the
  host refuses, which costs the trial, and UserError for what ends the command;
- `workers`: of how many the first image also loads the model;
- `describe()`: lines for `--dry-run`; `paste(setting)`: `{"comfyui": …, "a1111": …}`; `close()`.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image

from ...errors import plain
from ...interval_text import CONDITIONAL_ONLY, INTERVAL_KEY, LARGEST, SIGMA_NODE, format_interval
from ...sampler_patch import GuidanceInterval


class Refused(Exception):
    """A host's answer, in its own words, to a job that it cannot do, such as out of memory."""

    def __init__(self, text):
        super().__init__(plain(text))


@dataclass(frozen=True, order=True)
class Setting:
    """Guidance of `weight` in (sigma_lo, sigma_hi], in EDM units; a weight of 1 is conditional only."""

    sigma_lo: float
    sigma_hi: float
    weight: float

    @property
    def interval(self):
        return GuidanceInterval(self.sigma_lo, self.sigma_hi)

    @property
    def conditional_only(self):
        return self.weight == 1

    @property
    def folder(self):
        """A file name of its own."""
        return "conditional" if self.conditional_only else f"{self.sigma_lo:g}-{self.sigma_hi:g}-w{self.weight:g}"

    def __str__(self):
        if self.conditional_only:
            return CONDITIONAL_ONLY
        everywhere = self.sigma_lo == 0 and self.sigma_hi == math.inf
        return f"{'everywhere' if everywhere else self.interval} w={self.weight:g}"

    def rows(self, sigmas):
        """Network evaluations per image: of its noise levels `sigmas`, or None where they are not known.

        A guided step evaluates the network twice, with and without the prompt.
        """
        if sigmas is None:
            return None
        guided = 0 if self.conditional_only else self.interval.mask(sigmas).sum().item()
        return float(len(sigmas) + guided)


def everywhere(weight):
    """CFG as hosts do it."""
    return Setting(0.0, math.inf, weight)


CONDITIONAL = everywhere(1.0)


@dataclass(frozen=True)
class Job:
    """One image that is wanted."""

    setting: Setting
    prompt: str
    seed: int


@dataclass(frozen=True)
class Rendered:
    """One image, its network evaluations (rows) and the seconds that it took, each None where nobody knows."""

    image: Image.Image
    rows: float | None
    seconds: float | None


def paste_comfyui(setting):
    """The node as ComfyUI's API JSON has it: -1 is its open end."""
    lo, hi, units = setting.sigma_lo, setting.sigma_hi, "edm"
    if setting.conditional_only:
        # A flow model begins at sigma = inf, which every open end holds. As models count themselves, where that is
        # t = 1, none comes near this bound.
        lo, hi, units = LARGEST, math.inf, "model"
    inputs = {"sigma_lo": lo, "sigma_hi": -1.0 if hi == math.inf else hi, "units": units, "outside": CONDITIONAL_ONLY}
    return {"class_type": SIGMA_NODE, "inputs": inputs}


def paste_a1111(setting):
    """What *Read generation parameters* takes."""
    interval = CONDITIONAL_ONLY if setting.conditional_only else format_interval(setting.interval)
    return f"CFG scale: {setting.weight:g}, {INTERVAL_KEY}: {interval}"


def paste(setting):
    return {"comfyui": paste_comfyui(setting), "a1111": paste_a1111(setting)}


def in_space(sigmas):
    """The ends of the bounds that are worth a try for a schedule: `(lowest, highest)` noise level above 0."""
    levels = torch.as_tensor(sigmas)
    levels = levels[(levels > 0) & levels.isfinite()]
    return levels.min().item(), levels.max().item()

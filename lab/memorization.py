"""Does the colour model copy? `guidance-interval memorization` looks for the originals of its samples.

Every sample is compared with all training images, as they are and mirrored, and with the emoji whose names were kept
out of training. A copy is nearer to its original than a new drawing of another thing ever is: the real drawings that
were held out show how near that comes by chance. Needs the drawings that `emoji` makes.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..files import output_folder
from ..toy import data, model
from ..toy.sampling import Guidance, sample
from . import demo, emoji, plots

POOLED = 16  # Pixels a side: a drawing that is shifted by one is still the same.
COLUMNS = 10


def distances(x, others):
    """RMS difference of each of x [N, C, H, W] to its nearest of others [M, C, H, W] or their mirror images.

    Both on one scale. Returns (distances [N], indices [N]).
    """
    x, others = (F.adaptive_avg_pool2d(part, POOLED) for part in (x, others))
    both = torch.cat([others, others.flip(-1)]).flatten(1)
    found = [torch.cdist(part.flatten(1), both).min(1) for part in x.split(500)]
    value, index = (torch.cat(part) for part in zip(*found, strict=True))
    return value / both.shape[1] ** 0.5, index % len(others)


def run(data_path, out, samples=1000, seed=0, device="cpu"):
    """Sample the demo's interval, find the neighbours, draw them to `out` and print what was found."""
    own, lab = demo.DEFAULTS["emoji"], model.load(model.shipped()["emoji"], device)
    arrays = emoji.load(data_path)
    output_folder(Path(out).parent)
    held_out = torch.as_tensor(arrays["held_out"])
    # On the scale of pixels, 0 to 1.
    real = torch.as_tensor(arrays["images"]).float() / 255
    setting = Guidance("", own.weight, own.interval)
    drawn = sample(lab, setting, samples, own.sampler, own.steps, seed)
    x = drawn.x.cpu() * (lab.config["pixel_std"] / data.SIGMA_DATA) + lab.config["pixel_mean"]
    x = x.clamp(0, 1)
    train, other = real[~held_out], real[held_out]
    nearest, in_train = distances(x, train)
    by_chance, _ = distances(other, train)
    # As many of the training images as were held out: which of the two sets is nearer says nothing otherwise.
    some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(other)]]
    (near_some, _), (near_other, in_other) = distances(x, some), distances(x, other)
    nearer = (near_some < near_other).float()
    error = 1.96 * nearer.std().item() / samples**0.5
    first = np.quantile(by_chance, 0.01)
    order = nearest.argsort()
    rows = [order[:COLUMNS], order[torch.linspace(0, samples - 1, COLUMNS).long()]]
    plots.neighbours(out, [(x[i], train[in_train[i]], other[in_other[i]]) for i in rows])
    told = [
        f"{samples:,} samples at w = {setting.weight:g} in {own.interval}; RMS difference of pixels from 0 to 1, at "
        f"{POOLED} x {POOLED}.",
        f"Nearest of {len(train):,} training images: median {nearest.median():.3f}, smallest {nearest.min():.3f}. For "
        f"the {len(other):,} real drawings that were held out: {by_chance.median():.3f} and {by_chance.min():.3f}.",
        f"Nearer than 99 % of those are to a training image: {(nearest < first).float().mean():.1%} of the samples.",
        f"Nearer to one of {len(some):,} training images than to one of as many held-out ones: {nearer.mean():.1%} ± "
        f"{error:.1%} of the samples; half would be chance.",
    ]
    print("\n".join(told))

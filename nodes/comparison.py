"""One seed sampled with CFG everywhere, in several intervals, and without guidance, laid side by side."""

import time
from dataclasses import dataclass

import comfy.model_management
import torch

from ..interval_text import CONDITIONAL_ONLY
from .model_patch import SamplingRun, count_rows, in_edm_units, nowhere, patch_model, to_interval, unpatch_model
from .pictures import label_grid, to_image

FRAMES = 4  # Of a video, how many are shown.


def parse_intervals(text):
    """[GuidanceInterval] from one `sigma_lo, sigma_hi` per line; blank lines and what follows # are left out.

    Raises ValueError, naming the line, for anything else.
    """
    intervals = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].strip(" \t()[]").replace(",", " ").split()
        if not words:
            continue
        try:
            low, high = map(float, words)
        except ValueError:
            raise ValueError(
                f"line {number}: give sigma_lo and sigma_hi, two numbers (inf or -1 leaves sigma_hi open), "
                f"got {line.strip()!r}"
            ) from None
        try:
            intervals.append(to_interval(low, high))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if not intervals:
        raise ValueError("give at least one interval, one per line: sigma_lo, sigma_hi")
    return intervals


@dataclass
class Column:
    """What one setting gave.

    rows: that the network evaluated. images: [N, height, width, 3], one per latent or, of a video, FRAMES of its
    frames, evenly spaced. frames: how many the video has, or None for pictures.
    """

    label: str
    rows: int
    seconds: float
    images: torch.Tensor
    frames: int | None


def compare(model, positive, negative, vae, latent, intervals, sample, cfg):
    """[Column]: CFG everywhere, each interval, and what an interval does outside, throughout, from the same noise.

    sample(model, cfg, positive, negative, latent) -> a LATENT dict: the host's sampling with all else fixed.
    Raises ValueError for sound, which has no picture.
    """
    if latent.get("type") == "audio" or getattr(vae, "output_channels", 3) < 3:
        raise ValueError(
            "this latent or this vae is for sound, and the comparison is one of pictures: sample sound once per "
            "setting, with a Guidance Interval node, and save each with its own name"
        )
    plain = unpatch_model(model)
    settings = [("CFG everywhere", plain)]
    settings += [(f"{interval}", patch_model(plain, in_edm_units(interval))) for interval in intervals]
    settings += [(CONDITIONAL_ONLY, patch_model(plain, nowhere))]
    comfy.model_management.load_models_gpu([plain])  # Not to be timed with the first.
    columns = []
    for label, patched in settings:
        run, counted = SamplingRun(None), patched.clone()
        counted.model_options = count_rows(counted.model_options, run)
        start = time.perf_counter()
        samples = sample(counted, cfg, positive, negative, latent)["samples"]
        seconds = time.perf_counter() - start
        images, frames = vae.decode(samples), None  # [batch, (frames,) height, width, 3]
        if images.ndim == 5:
            frames = images.shape[1]
            images = images[:, torch.linspace(0, frames - 1, min(FRAMES, frames)).round().long()]
        columns.append(Column(label, run.rows, seconds, images.reshape(-1, *images.shape[-3:]), frames))
    return columns


def report(columns):
    """(IMAGE grid, IMAGE batch, STRING report) of what `compare` found."""
    full = columns[0]
    shown = f", {FRAMES} of {full.frames} frames" if (full.frames or 0) > FRAMES else ""
    labels = [f"{c.label}\nNFE {c.rows}, {c.seconds:.2f} s{shown}" for c in columns]
    grid = label_grid([(label, c.images) for label, c in zip(labels, columns, strict=True)])
    lines = [f"{'setting':<18} {'NFE':>6} {'of CFG':>7} {'seconds':>8}"]
    lines += [f"{c.label:<18} {c.rows:>6} {c.rows / full.rows:>7.0%} {c.seconds:>8.2f}" for c in columns]
    if shown:
        lines.append(f"of each video {FRAMES} of {full.frames} frames are shown, evenly spaced")
    return to_image(grid), torch.cat([c.images for c in columns]), "\n".join(lines)

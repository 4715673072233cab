"""What the two nodes that explain do: read a schedule, and sample one seed at several intervals."""

import time
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..noise_level import interval_to_steps
from ..sampler_patch import GuidanceInterval
from .model_patch import from_model_sigma, in_edm_units, model_interval, patch_model, unpatch_model
from .pictures import label_grid, plot_schedule, to_image

# ----------------------------------------------------------------------------
# A schedule.


def describe_schedule(model, sigmas):
    """(plot [1, H, W, 3], table, guided steps, rows against full CFG) of a patched model's run over `sigmas`.

    Counts one evaluation per step, as Euler's and most multistep samplers make. Raises ValueError for a model
    without an interval and for fewer than two noise levels.
    """
    interval = model_interval(model)
    if interval is None:
        raise ValueError("this model has no guidance interval: connect the output of a Guidance Interval node")
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must hold at least 2 noise levels, got {len(sigmas)}")
    model_sampling = model.get_model_object("model_sampling")
    own = sigmas[:-1].float().cpu()
    guided = interval.mask(own).tolist()
    levels = [from_model_sigma(s, model_sampling) for s in own.tolist()]
    bounds = tuple(from_model_sigma(s, model_sampling) for s in (interval.sigma_lo, interval.sigma_hi))

    steps, count = len(levels), sum(guided)
    rows = (steps + count) / (2 * steps)
    first_last = interval_to_steps(interval, sigmas.cpu())
    which = f"steps {first_last[0]} to {first_last[1]}" if first_last else "none"
    head = f"{count} of {steps} steps guided ({which}), {rows:.0%} of the rows of full CFG"
    lines = [head, f"interval ({bounds[0]:.4g}, {bounds[1]:.4g}]", "step  sigma     model's   guided"]
    for i, (level, s, g) in enumerate(zip(levels, own.tolist(), guided, strict=True)):
        lines.append(f"{i:>4}  {level:<8.4g}  {s:<8.4g}  {'yes' if g else '-'}")
    return to_image(plot_schedule(levels, guided, bounds, head)), "\n".join(lines), count, rows


# ----------------------------------------------------------------------------
# A comparison.


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
            raise ValueError(f"line {number}: give sigma_lo and sigma_hi, two numbers, got {line.strip()!r}") from None
        try:
            intervals.append(GuidanceInterval(low, high))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if not intervals:
        raise ValueError("give at least one interval, one per line: sigma_lo, sigma_hi")
    return intervals


@dataclass
class Result:
    label: str
    rows: int
    seconds: float
    images: torch.Tensor


def compare(model, positive, negative, vae, latent, intervals, sample, cfg):
    """[Result]: CFG everywhere, each interval, and the conditional prediction alone, from the same noise.

    sample(model, cfg, positive, negative, latent) -> a LATENT dict: the host's sampling with all else fixed.
    """
    plain = unpatch_model(model)
    runs = [("CFG everywhere", plain, cfg)]
    runs += [(f"{interval}", patch_model(plain, in_edm_units(interval)), cfg) for interval in intervals]
    runs += [("conditional only", plain, 1.0)]
    comfy.model_management.load_models_gpu([plain])  # Not to be timed with the first.
    results = []
    for label, patched, weight in runs:
        counted, rows = _count_rows(patched)
        start = time.perf_counter()
        samples = sample(counted, weight, positive, negative, latent)["samples"]
        seconds = time.perf_counter() - start
        images = vae.decode(samples)
        images = images.reshape(-1, *images.shape[-3:])  # Of a video, the frames.
        results.append(Result(label, sum(rows), seconds, images))
    return results


def report(results):
    """(IMAGE grid, IMAGE batch, STRING report) of what `compare` found."""
    full = results[0]
    labels = [f"{r.label}\n{r.rows} rows, {r.seconds:.2f} s" for r in results]
    columns = [(label, r.images) for label, r in zip(labels, results, strict=True)]
    lines = [f"{'setting':<18} {'rows':>6} {'of CFG':>7} {'seconds':>8}"]
    lines += [f"{r.label:<18} {r.rows:>6} {r.rows / full.rows:>7.0%} {r.seconds:>8.2f}" for r in results]
    return to_image(label_grid(columns)), torch.cat([r.images for r in results]), "\n".join(lines)


def _count_rows(model):
    """A clone of `model`, and the list of batch sizes that its network is given from then on."""
    rows = []

    def count(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    counted = model.clone()
    counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "guidance_interval_rows", count)
    return counted, rows

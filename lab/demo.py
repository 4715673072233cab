"""The main job: what guidance in a limited interval buys, on the model that ships, in one table and three pictures."""

import itertools
import json
import platform
from dataclasses import asdict, replace

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..errors import user_input
from ..files import aligned, atomic_path, output_folder, sole_use
from ..sampler_patch import GuidanceInterval
from . import data, model, plots
from .sampling import Samples, Setting, check_weight, get_sampler, karras_sigmas, sample
from .scores import score_samples

MAX_CFG_RUNS = 8  # To bracket the interval's accuracy.


def run(out, samples, sampler, steps, seed, device, weight, sigma_lo, sigma_hi):
    """Sample every setting, write the pictures and report.json, print the table and the findings; return the report.

    Raises UserError, before anything is sampled, for an unknown sampler, an interval or a weight that makes no sense,
    and a folder that cannot be written to or that another run is writing to.
    """
    with user_input():
        interval = GuidanceInterval(sigma_lo, sigma_hi)
    check_weight(weight)
    get_sampler(sampler)
    out = output_folder(out)
    with sole_use(out):
        lab = model.load(device=device)
        sigmas = karras_sigmas(steps)
        interval.warn_if_unused(sigmas[:-1])
        cfg, limited, ablations, none, real = measure_all(lab, interval, weight, samples, sampler, steps, seed)
        runs = [none, *cfg, limited, *(r for _, r in ablations)]
        found = findings(cfg, limited, ablations)
        plots.grid(out / "grid.png", [real, *runs], lab.config["pixel_mean"], lab.config["pixel_std"])
        plots.tradeoff(out / "tradeoff.png", runs, real)
        plots.schedule(out / "schedule.png", sigmas, interval)
        report = dict(
            settings=[describe(*r) for r in runs],
            real=asdict(real[2]),
            findings=found,
            arguments=dict(
                samples=samples, sampler=sampler, steps=steps, seed=seed, device=str(device), weight=weight,
                sigma_lo=interval.sigma_lo, sigma_hi=_or_null(interval.sigma_hi),
            ),
            sigmas=sigmas.tolist(),
            model=dict(file=model.SHIPPED.name, config=lab.config, record=lab.record),
            versions=versions(),
        )  # fmt: skip
        with atomic_path(out / "report.json") as tmp:
            tmp.write_text(json.dumps(report, indent=2) + "\n")
    print(table([real, *runs]), *found, sep="\n")
    print(f"\nwrote grid.png, tradeoff.png, schedule.png and report.json to {out}")
    return report


def measure_all(lab, interval, weight, samples, sampler, steps, seed):
    """Every run, each (Setting, Samples, Scores): [CFG everywhere], in the interval, [(part, widened)], none, real.

    Of the images those that are shown are kept.
    """
    with tqdm(total=6 * samples, unit="image") as bar:

        def measure(setting):
            bar.set_description(setting.name)
            drawn = sample(lab, setting, samples, sampler, steps, seed, bar.update)
            return _scored(lab, setting, drawn)

        def extend():
            bar.total += samples
            bar.refresh()

        none = measure(Setting("no guidance", 1.0))
        limited = measure(Setting(f"interval {interval}, w={weight:g}", weight, interval))
        cfg = bracket(measure, limited, extend)
        ablations = []
        for part, widened in (
            ("low", GuidanceInterval(0, interval.sigma_hi)),
            ("high", GuidanceInterval(interval.sigma_lo)),
        ):
            if widened != interval:
                ablations.append((part, measure(Setting(f"… {part} part on: {widened}", weight, widened))))
        bar.set_description("done")
    return cfg, limited, ablations, none, _scored(lab, Setting("real digits", 1.0), real_digits(lab, samples, seed))


def _scored(lab, setting, drawn):
    scores = score_samples(lab, drawn.x, drawn.labels)
    return setting, replace(drawn, x=drawn.x[: plots.COLUMNS].clone()), scores


def real_digits(lab, num, seed):
    """As many real images (of the 5,000 there are) as `Samples`, their classes in turn: the floor of the distance."""
    images, labels = map(torch.as_tensor, data.load_digits())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == c][: -(-num // data.NUM_CLASSES)] for c in range(data.NUM_CLASSES)]
    index = torch.stack(classes, dim=1).flatten()[:num]
    x = data.to_model(images[index], lab.config["pixel_mean"], lab.config["pixel_std"])
    device = lab.reference["mean"].device
    return Samples(x.to(device), labels[index].to(device), 0.0, 0.0)


def bracket(measure, limited, extend):
    """CFG everywhere at weights whose accuracies enclose that of the interval, as `measure` gave them, by weight.

    The excess weight, w - 1, starts at a sixth of the interval's and is doubled or halved until the
    accuracies enclose the target. extend() is called before each run after the second.
    """
    setting, _, scores = limited
    excess, runs = (setting.weight - 1) / 6, {}
    while excess not in runs and len(runs) < MAX_CFG_RUNS:
        if len(runs) >= 2:
            extend()
        runs[excess] = measure(Setting(f"CFG everywhere, w={1 + excess:.4g}", 1 + excess))
        excess *= 2 if runs[excess][2].accuracy < scores.accuracy else 0.5
    return [runs[k] for k in sorted(runs)]


def findings(cfg, limited, ablations):
    """The paper's three claims as these runs bear them out, or do not: a list of sentences."""
    lines = [compare(cfg, limited)]
    _, drawn, scores = limited
    for part, (_, part_drawn, part_scores) in ablations:
        points = 100 * (part_scores.accuracy - scores.accuracy)
        lines.append(
            f"Guidance in the {part} part as well: the distance is {change(part_scores.fd, scores.fd)}, accuracy "
            f"{points:+.1f} points, rows are {change(part_drawn.rows, drawn.rows)}."
        )
    return lines


def compare(cfg, limited):
    """The interval against CFG everywhere at the same accuracy, in a sentence that says so when there is none.

    Between two weights the accuracy is taken as linear and the distance as exponential, as in lab/results.py. Of
    several places with that accuracy the one with the lowest distance counts: not to flatter the interval.
    """
    _, drawn, scores = limited
    rivals = []
    for (a, drawn_a, score_a), (b, _, score_b) in itertools.pairwise(cfg):
        low, high = sorted((score_a.accuracy, score_b.accuracy))
        if not low <= scores.accuracy <= high:
            continue
        share = (scores.accuracy - score_a.accuracy) / (score_b.accuracy - score_a.accuracy) if low < high else 0.0
        fd, fd_low, fd_high = (
            max(getattr(score_a, name), 0.0) ** (1 - share) * max(getattr(score_b, name), 0.0) ** share
            for name in ("fd", "fd_low", "fd_high")
        )
        rivals.append((fd, fd_low, fd_high, drawn_a.rows, f"between w={a.weight:.4g} and w={b.weight:.4g}"))
    if rivals:
        fd, fd_low, fd_high, rows, where = min(rivals)
        apart = scores.fd_high < fd_low or fd_high < scores.fd_low
        return (
            f"At equal accuracy, {scores.accuracy:.1%}, which CFG everywhere has {where}: the distance is "
            f"{change(scores.fd, fd)} (95 % intervals {'do not ' if apart else ''}overlap), rows are "
            f"{change(drawn.rows, rows)}."
        )
    setting, near_drawn, near = min(cfg, key=lambda r: abs(r[2].accuracy - scores.accuracy))
    return (
        f"No comparison at equal accuracy: none of the weights of CFG everywhere that were tried comes to "
        f"{scores.accuracy:.1%}. The nearest is {setting.name}, with {near.accuracy:.1%}: against it the distance is "
        f"{change(scores.fd, near.fd)}, rows are {change(drawn.rows, near_drawn.rows)}."
    )


def change(value, base):
    """How much more or less than `base` a value is, in words."""
    ratio = value / base
    if abs(ratio - 1) < 0.0005:
        return "the same"
    if ratio >= 2:
        return f"{ratio:.1f} times as much"
    return f"{abs(ratio - 1):.1%} {'higher' if ratio > 1 else 'lower'}"


def table(runs):
    """The runs as a Markdown table, which reads well in a terminal too."""
    head = ("setting", "1000 FD [95 % interval]", "accuracy", "variety", "rows", "seconds")
    body = [
        (
            setting.name,
            f"{1000 * s.fd:.2f} [{1000 * s.fd_low:.2f}, {1000 * s.fd_high:.2f}]",
            f"{s.accuracy:.1%}",
            f"{s.variety:.3f}",
            f"{drawn.rows:.1f}" if drawn.rows else "",
            f"{drawn.seconds:.1f}" if drawn.rows else "",
        )
        for setting, drawn, s in runs
    ]
    return aligned(head, body)


def describe(setting, drawn, scores):
    """One run as JSON; an open end of an interval is null."""
    bounds = None
    if setting.interval is not None:
        bounds = [setting.interval.sigma_lo, _or_null(setting.interval.sigma_hi)]
    return dict(
        name=setting.name,
        weight=setting.weight,
        interval=bounds,
        rows_per_sample=drawn.rows,
        seconds=round(drawn.seconds, 3),
        **asdict(scores),
    )


def _or_null(bound):
    return None if bound == float("inf") else bound


def versions():
    from importlib import metadata

    return dict(
        guidance_interval=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        k_diffusion=metadata.version("k-diffusion"),
    )

"""The paper's findings on the models that ship: every figure and number of docs/results.md (`make results`).

The cells that the figures need are measured by `sweep.complete`, one SQLite file for each model, sampler, step count
and seed: a run that was cut off goes on where it was. `--quick` does the same in minutes on two CPU cores, with too
few samples to conclude from.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch

from ..errors import UserError
from ..files import aligned, atomic_path, output_file, output_folder
from ..interval_text import CONDITIONAL_ONLY
from ..measure import metrics
from ..noise_level import steps_to_interval
from ..sampler_patch import GuidanceInterval
from ..toy import data
from ..toy.sampling import Guidance, class_labels, karras_sigmas, sample
from . import demo, plots, sweep, workers
from .compare import against, ratio
from .scores import judge_samples
from .sweep import Cell, Sampling

SAMPLER, STEPS = "dpmpp_2m", 16
SEARCHED, CONFIRMED = 0, 1  # Sampling seeds: what a search chose is told of samples that it never saw.
EMOJI = {0: "emoji", 1: "emoji-seed1", 2: "emoji-seed2"}
# The digits' interval was chosen on their model with this sampler, and is used for their other data as it is.
INTERVALS = {"emoji": GuidanceInterval(0.1, 5.5), "digits": GuidanceInterval(0.1, 2.5)}
DIGITS = {"digits": None, "training seed 1": "digits-seed1", "training seed 2": "digits-seed2"}
OTHERS = {"8x8 digits": "optdigits", "clips": "clips"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured. samples: of a cell; confirmed: of those that the headline is told of. Weights are those
    beside 1; `digits_` is for the digits, the 8x8 digits and the clips."""

    samples: int
    confirmed: int
    samplers: tuple = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde")
    steps: tuple = (8, 16, 32)
    trainings: tuple = (0, 1, 2)
    cfg_weights: tuple = (1.25, 1.375, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
    interval_his: tuple = (3.5, 5.5, 8.0)
    interval_weights: tuple = (2.0, 2.5, 3.0, 4.0)
    part_weights: tuple = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
    heat_weights: tuple = (2.0, 4.0)
    sigma_los: tuple = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
    sigma_his: tuple = (1.0, 2.0, 3.5, 5.5, 8.0, 14.0, math.inf)
    digits_cfg: tuple = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
    digits_weights: tuple = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    other_his: tuple = (1.0, 4.0, 6.5)
    shown: int = 500


FULL = Scale(samples=2500, confirmed=10_000)
QUICK = Scale(
    samples=60,
    confirmed=120,
    samplers=("dpmpp_2m", "dpmpp_sde"),
    steps=(8,),
    trainings=(0, 1),
    cfg_weights=(1.25, 1.5, 2.0),
    interval_his=(5.5,),
    interval_weights=(2.0, 3.0),
    part_weights=(2.0, 4.0),
    heat_weights=(3.0,),
    sigma_los=(0.0, 0.1),
    sigma_his=(2.0, 5.5, math.inf),
    digits_cfg=(1.25, 2.0),
    digits_weights=(2.0, 4.0),
    other_his=(4.0,),
    shown=40,
)

# ----------------------------------------------------------------------------
# Cells.

NONE = Cell(1.0, 0.0, math.inf)


def everywhere(weights):
    return [NONE, *(Cell(w, 0.0, math.inf) for w in weights)]


def within(weights, interval):
    return [NONE, *(Cell(w, interval.sigma_lo, interval.sigma_hi) for w in weights)]


def thirds():
    """The high, middle and low third of the steps, as intervals that together are everything."""
    sigmas = karras_sigmas(STEPS)
    first, second = (steps_to_interval(sigmas, 0, last).sigma_lo for last in (STEPS // 3 - 1, 2 * STEPS // 3))
    return {
        "high third": GuidanceInterval(first),
        "middle third": GuidanceInterval(second, first),
        "low third": GuidanceInterval(0.0, second),
    }


def parts(weights, interval):
    """`{label: cells}`: CFG everywhere, in each third alone, and in the interval."""
    named = {"everywhere": everywhere(weights)}
    named |= {name: within(weights, third) for name, third in thirds().items()}
    return named | {f"interval {interval}": within(weights, interval)}


def main_job(scale, source="emoji"):
    return Sampling(scale.samples, SAMPLER, STEPS, SEARCHED, source)


def headline_jobs(scale):
    """`{label: Sampling}`: each sampler with each step count on the first training, and the others with `SAMPLER`."""
    job = Sampling(scale.samples, SAMPLER, STEPS, SEARCHED, EMOJI[0])
    named = {
        f"{sampler}, {steps} steps": dataclasses.replace(job, sampler=sampler, steps=steps)
        for sampler, steps in itertools.product(scale.samplers, scale.steps)
    }
    return named | {f"training seed {t}": dataclasses.replace(job, source=EMOJI[t]) for t in scale.trainings if t}


def headline_cells(scale):
    """`(CFG everywhere, {interval: cells})`: of each side the best one is chosen."""
    intervals = [GuidanceInterval(0.1, hi) for hi in scale.interval_his]
    return everywhere(scale.cfg_weights)[1:], {i: within(scale.interval_weights, i)[1:] for i in intervals}


def chosen(scale, searched):
    """The cell of the lowest distance by the ruler among CFG's, and among the intervals'."""
    cfg, limited = headline_cells(scale)
    sides = cfg, itertools.chain(*limited.values())
    return tuple(min(cells, key=lambda c: searched[c].scores.fd) for cells in sides)


def confirming(scale, job):
    """The job in which what `job` has chosen is measured again."""
    return dataclasses.replace(job, samples=scale.confirmed, seed=CONFIRMED)


def digits_cells(scale, label):
    """`{label: cells}` of the digits' section: CFG's curve, the intervals', and the thirds at the highest weight."""
    named = {"everywhere": everywhere(scale.digits_cfg)}
    intervals = [INTERVALS["digits"]]
    if label in OTHERS:
        intervals += [GuidanceInterval(0.1, hi) for hi in scale.other_his]
    named |= {str(i): within(scale.digits_weights, i) for i in intervals}
    return named | {name: within(scale.digits_weights[-1:], third) for name, third in thirds().items()}


def wanted(scale):
    """`{figure: {job: [Cell]}}`: what each figure shows, without regard to what another one shows too."""
    flat = lambda named: list(itertools.chain(*named.values()))  # noqa: E731
    cfg, limited = headline_cells(scale)
    main, both = main_job(scale), [NONE, *cfg, *flat(limited)]
    headline = {job: both for job in headline_jobs(scale).values()}
    return {
        "headline": headline,
        "saturation": {},
        "parts": {main: flat(parts(scale.part_weights, INTERVALS["emoji"]))},
        "heatmap": {main: sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights)},
        "variety": {main: both},
        "cost": headline,
        "digits": {main_job(scale, name): flat(digits_cells(scale, x)) for x, name in (DIGITS | OTHERS).items()},
    }


def wanted_then(scale, figures, results):
    """The cells that depend on what the others gave: `{job: [Cell]}`."""
    if not {"headline", "cost"} & {*figures}:
        return {}
    return {confirming(scale, job): [NONE, *chosen(scale, results[job])] for job in headline_jobs(scale).values()}


# ----------------------------------------------------------------------------
# Figures. Each takes the scale, `{job: {Cell: Measured}}`, a folder and a device, writes its pictures and returns
# its text.


def points(results, cells):
    """[(weight, accuracy, 1000 FD, rows)] of the cells, by weight."""
    return sorted((c.weight, r.scores.accuracy, 1000 * r.scores.fd, r.rows) for c in cells for r in [results[c]])


def headline_verdict(open_ended, ratios, more_accuracy):
    """Is the interval's best below CFG's best: "yes" or "no" by both judges, "unclear", or "open".

    open_ended: whether CFG's best weight is the highest that was tried, beyond which its true best may lie.
    """
    found = {r.below for r in ratios}
    if open_ended:
        return "open"
    if "no" in found:
        return "no"
    return "yes" if found == {"yes"} and more_accuracy >= 0 else "unclear"


def headline_rows(scale, results):
    """`{label: (CFG's cell, the interval's cell, {cell: Measured} of the confirmation)}`."""
    found = {}
    for label, job in headline_jobs(scale).items():
        found[label] = *chosen(scale, results[job]), results[confirming(scale, job)]
    return found


def draw_headline(scale, results, out, device):
    body, verdicts, shown = [], {}, []
    for label, (cfg, limited, r) in headline_rows(scale, results).items():
        ratios = [ratio(r[limited].judged, r[cfg].judged, judge) for judge in ("fd", "class_fd")]
        a, b = r[cfg].scores, r[limited].scores
        verdict = headline_verdict(cfg.weight == scale.cfg_weights[-1], ratios, b.accuracy - a.accuracy)
        verdicts.setdefault(verdict, []).append(label)
        body.append([
            label, f"w = {cfg.weight:g}: {1000 * a.fd:.1f}, {a.accuracy:.1%}",
            f"w = {limited.weight:g} in {limited.interval}: {1000 * b.fd:.1f}, {b.accuracy:.1%}",
            *map(str, ratios), str(ratio(r[limited].judged, r[NONE].judged)),
            f"{r[cfg].rows:.0f} → {r[limited].rows:.0f}", verdict,
        ])  # fmt: skip
    cfg, intervals = headline_cells(scale)
    for label, job in headline_jobs(scale).items():
        curves = {"CFG everywhere": points(results[job], [NONE, *cfg])}
        curves |= {str(i): points(results[job], [NONE, *cells]) for i, cells in intervals.items()}
        shown.append((label, curves, "accuracy"))
    plots.panels(out / "headline.png", shown, 3)
    told = (
        f"The interval's best has a lower distance than CFG's best by both judges, at no less accuracy, in "
        f"**{len(verdicts.get('yes', []))} of {len(body)}** cases."
    )
    for verdict, meaning in (
        ("no", "It has not"),
        ("unclear", "It is unclear"),
        ("open", f"CFG's distance still falls at {scale.cfg_weights[-1]:g}, its highest weight here,"),
    ):
        if verdict in verdicts:
            told += f" {meaning} for {'; '.join(verdicts[verdict])}."
    head = ["", "CFG at its best weight", "interval at its best", "by the ruler", "by the classifier", "against none"]
    tried = sum(map(len, intervals.values()))
    return (
        "## The headline: the interval at its best against CFG at its best\n\n"
        "![Distance against accuracy on emoji, for each sampler and step count](results/headline.png)\n\n"
        f"{told}\n\n"
        f"Each side's best is the one with the lowest distance by the ruler, of {len(cfg)} weights for CFG and of "
        f"{tried} settings in {len(intervals)} intervals ({scale.samples:,} samples each, in the picture). Both were "
        f"then sampled again from another seed, {scale.confirmed:,} images each, and only those are in the table: 1000 "
        "FD and accuracy, and the change of the distance from CFG to the interval by each judge, and from conditional "
        "only to the interval by the ruler, with 95 % confidence intervals paired by seed. *Lower* is *yes* when both "
        "judges' "
        f"confidence intervals lie below zero, *no* when one lies above, else *unclear*.\n\n"
        f"{aligned([*head, 'NFE', 'lower'], body)}"
    )


def draw_cost(scale, results, out, device):
    found, body = [], []
    for label, (cfg, limited, r) in headline_rows(scale, results).items():
        sampler, _, steps = label.partition(", ")
        if not steps:
            continue
        ends = [(r[c].rows, 1000 * r[c].scores.fd) for c in (cfg, limited)]
        found.append((sampler, *ends))
        body.append([label, *(f"{rows:.0f}" for rows, _ in ends), *(f"{fd:.1f}" for _, fd in ends)])
    plots.cost(out / "cost.png", found)
    return (
        "## Cost against quality\n\n"
        "![Rows per image against distance; an arrow leads from CFG to the interval](results/cost.png)\n\n"
        "CFG and the interval, each at its best, as in the headline.\n\n"
        + aligned(["", "NFE, CFG", "NFE, interval", "1000 FD, CFG", "1000 FD, interval"], body)
    )


def draw_parts(scale, results, out, device):
    r = results[main_job(scale)]
    named = parts(scale.part_weights, INTERVALS["emoji"])
    curves = {name: points(r, cells) for name, cells in named.items()}
    panels = [("distance against weight", curves, "weight"), ("and against accuracy", curves, "accuracy")]
    plots.panels(out / "parts.png", panels, 2)
    head = ["guided in", *(f"w = {w:g}" for w in scale.part_weights)]
    body = [[name, *(f"{fd:.1f}, {a:.1%}" for _, a, fd, _ in curve[1:])] for name, curve in curves.items()]
    none, w = curves["everywhere"][0], scale.part_weights[-1]
    lines = []
    for name, cells in named.items():
        changed = ratio(r[cells[-1]].judged, r[NONE].judged)
        points_more = 100 * (r[cells[-1]].scores.accuracy - r[NONE].scores.accuracy)
        lines.append(f"- **{name}**, at w = {w:g}: the distance is {changed}, accuracy {points_more:+.1f} points.")
    where = ", ".join(f"{name} {interval}" for name, interval in thirds().items())
    return (
        "## Which third of the noise levels helps, and which harms\n\n"
        "![Distance by weight and by accuracy, for guidance in each third alone](results/parts.png)\n\n"
        f"1000 FD and accuracy; without guidance {none[2]:.1f}, {none[1]:.1%}. The thirds of the steps: {where}.\n\n"
        f"{aligned(head, body)}\n\nAgainst conditional only, with 95 % confidence intervals:\n\n" + "\n".join(lines)
    )


def draw_heatmap(scale, results, out, device):
    r = results[main_job(scale)]
    cells = sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights)
    plots.heatmaps(out / "heatmap.png", {c: r[c] for c in cells})
    lines = []
    for w in scale.heat_weights:
        bounded = [c for c in cells if c.weight == w]
        best = min(bounded, key=lambda c: r[c].scores.fd)
        cell = lambda lo, hi: Cell(w, lo, hi)  # noqa: E731, B023 (used at once)
        top, bottom = scale.sigma_his[-1], min(scale.sigma_his, key=lambda hi: r[cell(0.0, hi)].scores.fd)
        text = f"- w = {w:g}: lowest in {best.interval}, {1000 * r[best].scores.fd:.1f}."
        if bottom != top:
            high = ratio(r[cell(0.0, top)].judged, r[cell(0.0, bottom)].judged)
            text += f" Guiding above {bottom:g} as well: {high}."
        low_los = [lo for lo in scale.sigma_los if 0 < lo <= 0.1]
        if low_los:
            hi = best.sigma_hi if best.sigma_hi > low_los[-1] else top
            low = ratio(r[cell(0.0, hi)].judged, r[cell(low_los[-1], hi)].judged)
            text += f" Guiding below {low_los[-1]:g} as well: {low}."
        lines.append(text)
    return (
        "## The distance over both bounds\n\n"
        "![Distance and accuracy over sigma_lo and sigma_hi](results/heatmap.png)\n\n"
        "What guiding further does to the distance, with 95 % confidence intervals:\n\n" + "\n".join(lines)
    )


def draw_saturation(scale, results, out, device):
    """Means of the pictures' saturation and contrast against the weight, with and without the interval."""
    lab = sweep.load_lab(EMOJI[0], device)
    limited = INTERVALS["emoji"]
    weights = scale.part_weights
    none = pixel_values(lab, Guidance("", 1.0), scale.shown)
    changed = {}
    for name, interval in (("CFG everywhere", None), (f"interval {limited}", limited)):
        guided = [(w, pixel_values(lab, Guidance("", w, interval), scale.shown)) for w in weights]
        changed[name] = [(1.0, torch.zeros_like(none)), *((w, values - none) for w, values in guided)]
    shown = {
        f"change of {what}, against conditional only": {
            name: [(w, *with_interval(values[:, i])) for w, values in curve] for name, curve in changed.items()
        }
        for i, what in enumerate(("saturation", "contrast"))
    }
    plots.against_weight(out / "saturation.png", shown)
    head = ["change of saturation, of contrast", *(f"w = {w:g}" for w in weights)]
    body = [
        [name, *("{:+.3f}, {:+.3f}".format(*values.mean(0)[:2]) for _, values in curve[1:])]
        for name, curve in changed.items()
    ]
    w = weights[-1]
    told = " and ".join(
        "{:+.3f} [{:+.3f}, {:+.3f}] {}".format(*with_interval(curve[-1][1][:, 0]), where)
        for curve, where in zip(changed.values(), ("everywhere", "in the interval"), strict=True)
    )
    saturation, contrast, _ = none.mean(0).tolist()
    return (
        "## Saturation and contrast against the weight\n\n"
        "![Saturation and contrast by weight, everywhere and in the interval](results/saturation.png)\n\n"
        f"{scale.shown:,} emoji of the same seeds at each weight: mean saturation of the HSV model, {saturation:.3f} "
        f"without guidance, and the standard deviation of luma, {contrast:.3f}. At w = {w:g} guidance moves the "
        f"saturation by {told}.\n\n{aligned(head, body)}"
    )


def pixel_values(lab, setting, num):
    """`metrics.pixel_statistics` of each of `num` samples, float64 [num, 3]."""
    x = sample(lab, setting, num, SAMPLER, STEPS).x.cpu()
    pixels = data.to_pixels(x, lab.config["pixel_mean"], lab.config["pixel_std"]).permute(0, 2, 3, 1)
    return torch.stack([metrics.pixel_statistics(image.numpy()) for image in pixels]).double()


def with_interval(values):
    """`(mean, low, high)` of values [N]."""
    mean = values.mean()
    return mean.item(), *metrics.influence_interval(mean, values - mean)


def draw_variety(scale, results, out, device):
    cfg, limited = chosen(scale, results[main_job(scale)])
    strong = demo.DEFAULTS["emoji"].strong
    lab = sweep.load_lab(EMOJI[0], device)
    settings = [
        Guidance(CONDITIONAL_ONLY, 1.0),
        Guidance(f"CFG everywhere, w={cfg.weight:g}", cfg.weight),
        Guidance(f"CFG everywhere, w={strong:g}", strong),
        Guidance(f"interval {limited.interval}, w={limited.weight:g}", limited.weight, limited.interval),
        Guidance(f"interval {limited.interval}, w={strong:g}", strong, limited.interval),
    ]
    names = demo.DEFAULTS["emoji"].shown
    real, body, runs = lab.reference["features"].double(), [], []
    score, moved = metrics.vendi(real, influence=True)
    body.append(["real emoji", *[""] * 5, with_ends(score, moved, "{:.1f}")])
    for setting in settings:
        drawn = sample(lab, setting, scale.samples, SAMPLER, STEPS)
        scores, _ = judge_samples(lab, drawn.x, drawn.labels)
        f = torch.cat([lab.ruler(part) for part in drawn.x.split(500)]).double()
        value, influence = metrics.prdc(real, f, influence=True)
        score, moved = metrics.vendi(f, influence=True)
        body.append([
            setting.name, f"{1000 * scores.fd:.1f} [{1000 * scores.fd_low:.1f}, {1000 * scores.fd_high:.1f}]",
            f"{scores.accuracy:.1%}", with_ends(value.precision, influence.precision),
            with_ends(value.recall, influence.recall), with_ends(value.coverage, influence.coverage),
            with_ends(score, moved, "{:.1f}"),
        ])  # fmt: skip
        index = demo.shown(lab, names)(drawn.labels)
        runs.append(demo.Result(setting, dataclasses.replace(drawn, x=drawn.x[index]), scores))
    real_run = demo.real_images(lab, scale.samples, 0)
    plots.grid(out / "variety.png", [real_run, *runs], lab.config["pixel_mean"], lab.config["pixel_std"], names)
    head = ["", "1000 FD", "accuracy", "precision", "recall", "coverage", "Vendi score"]
    return (
        "## Variety\n\n"
        "![Samples under each setting, from the same seeds](results/variety.png)\n\n"
        f"{aligned(head, body)}\n\n"
        f"In the ruler's features, {scale.samples:,} samples against {len(real):,} real emoji. Precision and recall "
        "(Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020) with 5 neighbours; Vendi score (Friedman and "
        "Dieng 2023): the effective number of different images. In brackets 95 % confidence intervals."
    )


def with_ends(value, influence, form="{:.3f}"):
    ends = metrics.influence_interval(value, influence)
    return " ".join([form.format(value), "[" + ", ".join(map(form.format, ends)) + "]"])


def draw_digits(scale, results, out, device):
    shown, body, told = [], [], []
    for label, name in (DIGITS | OTHERS).items():
        r, named = results[main_job(scale, name)], digits_cells(scale, label)
        strata = class_labels(sweep.load_lab(name, "cpu"), scale.samples)
        curves = {key: named[key] for key in named if key not in thirds()}
        shown.append((label, {key: points(r, cells) for key, cells in curves.items()}, "accuracy"))
        cfg = [r[c].judged for c in curves.pop("everywhere")]
        for key, cells in curves.items():
            a = against({c.weight: r[c].judged for c in cells if c != NONE}, cfg, labels=strata)
            rows = f"{r[everywhere(scale.digits_cfg)[-1]].rows:.0f} → {r[cells[-1]].rows:.0f}"
            head = [f"{label}, {key}"]
            if a is None:
                body.append([*head, "", "", "", rows, "unclear"])
                continue
            weight, highest = a.highest
            weights = ", ".join(f"{w:g}" for w, _ in a.at)
            body.append([*head, weights, str(a.average), f"{highest} at w = {weight:g}", rows, a.dominates])
        none = r[NONE].scores
        w = scale.digits_weights[-1]
        alone = "; ".join(
            f"{part} {1000 * s.fd:.2f}, {s.accuracy:.1%}" for part in thirds() for s in [r[named[part][-1]].scores]
        )
        told.append(f"- **{label}**: without guidance {1000 * none.fd:.2f}, {none.accuracy:.1%}; guided at w = {w:g} "
                    f"in one third alone: {alone}.")  # fmt: skip
    plots.panels(out / "digits.png", shown, 3)
    plots.strips(out / "clips.png", data.load_clips(1)[0][::500], sample_clips())
    head = ["", "weights compared", "distance, on average", "highest", "NFE", "dominates"]
    sources = "; ".join(
        f"*{x}*: {sweep.load_lab(name, 'cpu').record['data'].split(':')[0].rstrip('.')}" for x, name in OTHERS.items()
    )
    return (
        "## Other data: digits, and moving ones\n\n"
        "![Distance against accuracy on the digits, the 8x8 digits and the clips](results/digits.png)\n\n"
        f"Handwritten digits, three trainings judged by one classifier; {sources}. Here the classifier is the only "
        "judge: mind that it also measures the accuracy. The distance in the interval over the lowest of CFG with no "
        "less accuracy, paired by seed, at each weight that no other one beats in both and as far as CFG's curve goes: "
        "on average over these weights, and the highest of them. *Dominates* is *yes* when the average lies below zero "
        f"and no weight above it, *no* when one does, else *unclear*.\n\n{aligned(head, body)}\n\n"
        + "\n".join(told)
        + "\n\n"
        "![Six frames of real clips, and of clips sampled in the interval](results/clips.png)"
    )


def sample_clips(weight=4.0):
    """Ten clips, one for each class, sampled in the digits' interval: uint8 [10, 6, 20, 20]."""
    lab = sweep.load_lab("clips", "cpu")
    drawn = sample(lab, Guidance("", weight, INTERVALS["digits"]), 10, SAMPLER, STEPS)
    return data.to_pixels(drawn.x, lab.config["pixel_mean"], lab.config["pixel_std"]).numpy()


FIGURES = {
    "headline": draw_headline,
    "saturation": draw_saturation,
    "parts": draw_parts,
    "heatmap": draw_heatmap,
    "variety": draw_variety,
    "cost": draw_cost,
    "digits": draw_digits,
}

# ----------------------------------------------------------------------------
# The page.


def not_reproduced(scale, results):
    """Where the paper's claims do not hold here, out of the same cells."""
    lines = []
    for label, name in (DIGITS | OTHERS).items():
        r = results[main_job(scale, name)]
        best = min((c for c in r if c != NONE), key=lambda c: r[c].scores.fd)
        strata = class_labels(sweep.load_lab(name, "cpu"), scale.samples)
        changed = ratio(r[best].judged, r[NONE].judged, labels=strata)
        verdict = {"yes": "It does.", "no": "**It does not.**", "unclear": "**Unclear.**"}[changed.below]
        where = "everywhere" if best.everywhere else f"in {best.interval}"
        lines.append(f"- **{label}: does guidance lower the distance itself?** At the best of all cells, w = "
                     f"{best.weight:g} {where}, it is {changed}. {verdict}")  # fmt: skip
    return (
        "## Where the claims do not reproduce\n\n"
        "The paper's headline is a lower distance with guidance in an interval than without any guidance and than with "
        "CFG at its best weight. On emoji the headline's table says where that holds. A row of a table that does not "
        "say *yes* is a case where it does not, or is not known to. The digits' model is already about as good as its "
        "data:\n\n" + "\n".join(lines) + "\n"
        "- The training images are the reference, as in the paper: a model that memorized them would score well.\n"
        "- An accuracy near 100 % leaves little room: there, a tenth of a point is a few images."
    )


def page(scale, sections, results, command):
    quick = "--quick " if scale is QUICK else ""
    cells = sum(map(len, results.values()))
    texts = []
    for name, text in sections.items():
        title, rest = text.split("\n", 1)
        texts.append(f'{title}\n{rest}\n\n```console\n$ make results ARGS="{quick}--only {name}"\n```')
    return (
        "# Results\n\n"
        f"Written by `{command}`: the numbers and pictures on this page come from that command and from nothing "
        f"else: {cells} cells of {scale.samples:,} samples each, {scale.confirmed:,} for the headline's table. "
        "[How to read this for a model of your own](guide.md).\n\n"
        f"Unless it says otherwise: the emoji model that ships, {SAMPLER}, {STEPS} steps, Karras schedule from 40 to "
        f"0.01, interval {INTERVALS['emoji']}. *1000 FD* is a thousand times the Fréchet distance to the training "
        "images, by the *ruler*, a network that never saw the classes: lower is better. *Accuracy* is how often a "
        "second network, the *classifier*, sees the class that was asked for: the adherence. It also gives a distance "
        "of its own, the second opinion. *NFE* are network evaluations per image, the cost. All confidence intervals "
        "are 95 %, of one method (`measure/metrics.py`), and cover the expectation at that number of images.\n\n"
        + "\n\n".join([*texts, not_reproduced(scale, results)])
        + "\n"
    )


def run(quick=False, only=None, out=None, page_path=None, devices=None, cluster=None):
    """Measure what is not done yet, draw the figures and write the page; with `only`, print the text of those figures.

    Raises UserError, for an unknown figure and as `sweep.run` does, before anything is sampled if it can be known.
    """
    for figure in only or ():
        if figure not in FIGURES:
            raise UserError(f"unknown figure {figure!r}; there are {', '.join(FIGURES)}")
    for name in sweep.EXPERIMENTS:
        sweep.experiment(name)
    workers.check(devices, cluster)
    scale = QUICK if quick else FULL
    out = output_folder(out or Path("out") / ("results-quick" if quick else "results"))
    target = output_file(page_path or (out / "results.md" if quick else "docs/results.md"))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if not devices:
        # One process leaves a GPU waiting for its next launch: as many as there are cores to launch from.
        several = max(1, min(14, (os.cpu_count() or 1) - 2)) if here == "cuda" else 1
        devices = [] if cluster else [here] * several
    pictures = output_folder(target.with_suffix(""))
    begin = time.time()

    figures = only or list(FIGURES)
    cells = {}
    for figure in figures:
        for job, some in wanted(scale)[figure].items():
            cells[job] = sorted({*cells.get(job, []), *some})
    results = measured(out, cells, devices, cluster)
    results |= measured(out, wanted_then(scale, figures, results), devices, cluster)

    sections = {}
    for figure in figures:
        print(f"drawing {figure}", file=sys.stderr)
        sections[figure] = FIGURES[figure](scale, results, pictures, here if cluster else devices[0])
    if only:
        print("\n\n".join(sections.values()))
    else:
        command = "make results" + (' ARGS="--quick"' if quick else "")
        with atomic_path(target) as tmp:
            tmp.write_text(page(scale, sections, results, command))
        print(f"wrote {target} and its pictures in {pictures}; {command} took {time.time() - begin:.0f} s")


def measured(out, cells, devices, cluster):
    """`{job: {Cell: Measured}}` of `{job: [Cell]}`, each job's in a file of its own in the folder `out`."""
    with contextlib.ExitStack() as stack:
        stores = {}
        for job in cells:
            identity = job.identity(sweep.load_lab(job.source, "cpu"))
            path = out / f"{job.name}-{job.sampler}-{job.steps}-seed{job.seed}.sqlite"
            stores[job] = stack.enter_context(sweep.Store(path, identity))
        return sweep.complete(stores, cells, devices, cluster) if cells else {}

"""The paper's findings on the models that ship: every figure and number of docs/results.md (`make results`).

The cells that the figures need are measured by `sweep.complete`, one SQLite file for each model, sampler and
step count: a run that was cut off goes on where it was. `--quick` does the same in minutes on two CPU cores, with
too few samples to conclude from.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..files import aligned, atomic_path, output_folder
from ..measure import metrics
from ..noise_level import steps_to_interval
from ..sampler_patch import GuidanceInterval
from . import data, demo, model, plots, sweep, workers
from .compare import ratio
from .sampling import Setting, karras_sigmas, sample
from .scores import class_spread, score_samples
from .sweep import Cell, Job

# Chosen on the digits, with the sampler and the steps of MAIN, and used for everything else as it is.
INTERVAL = GuidanceInterval(0.1, 2.5)
SAMPLER, STEPS = "dpmpp_2m", 16
MODELS = ("optdigits", "clips")  # As `sweep.load_lab` knows them.
SEEDS = {0: None, 1: "digits-seed1", 2: "digits-seed2"}
EMOJI = {0: "emoji", 1: "emoji-seed1", 2: "emoji-seed2"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured. Weights are those beside 1; steps are the step counts of the frontier."""

    samples: int
    samplers: tuple = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde")
    steps: tuple = (8, 16, 32)
    part_weights: tuple = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    cfg_weights: tuple = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
    interval_weights: tuple = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    heat_weights: tuple = (2.0, 6.0)
    sigma_los: tuple = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
    sigma_his: tuple = (0.5, 1.0, 1.5, 2.5, 4.0, 8.0, math.inf)
    other_his: tuple = (1.0, 4.0, 6.5)
    emoji_cfg: tuple = (1.25, 1.375, 1.5, 1.75)
    emoji_his: tuple = (3.5, 5.5)
    emoji_weights: tuple = (2.0, 2.5, 3.0)


FULL = Scale(samples=2500)
QUICK = Scale(
    samples=100,
    steps=(8,),
    part_weights=(2.0, 4.0),
    cfg_weights=(1.25, 2.0),
    interval_weights=(2.0, 4.0),
    heat_weights=(4.0,),
    sigma_los=(0.0, 0.25),
    sigma_his=(1.0, 2.5, math.inf),
    other_his=(4.0,),
    emoji_cfg=(1.5,),
    emoji_his=(3.5,),
    emoji_weights=(2.5,),
)

# ----------------------------------------------------------------------------
# Cells.

NONE = Cell(1.0, 0.0, math.inf)


def everywhere(weights):
    return [NONE, *(Cell(w, 0.0, math.inf) for w in weights)]


def within(weights, interval=INTERVAL):
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


def parts(weights):
    """`{label: cells}`: CFG everywhere, in each third alone, and in the interval."""
    named = {"everywhere": everywhere(weights)}
    named |= {name: within(weights, interval) for name, interval in thirds().items()}
    return named | {f"interval {INTERVAL}": within(weights)}


def two_curves(scale, interval=INTERVAL):
    return {"CFG everywhere": everywhere(scale.cfg_weights), "interval": within(scale.interval_weights, interval)}


def main_job(scale, source=None, sampler=SAMPLER, steps=STEPS):
    return Job(scale.samples, sampler, steps, 0, source)


def emoji_jobs(scale):
    """`{label: Job}`: each sampler with each step count on the first training, and the others with MAIN's."""
    named = {f"{s}, {n} steps": main_job(scale, EMOJI[0], s, n) for s in scale.samplers for n in scale.steps}
    named |= {f"training seed {seed}": main_job(scale, name) for seed, name in EMOJI.items() if seed}
    return named


def emoji_cells(scale):
    """`(CFG everywhere, in intervals)`: the cells of which each side has the best one compared."""
    intervals = [GuidanceInterval(0.1, hi) for hi in scale.emoji_his]
    return everywhere(scale.emoji_cfg)[1:], [c for i in intervals for c in within(scale.emoji_weights, i)[1:]]


def wanted(scale):
    """`{figure: {job: [Cell]}}`: what each figure shows, without regard to what another one shows too."""
    main = main_job(scale)
    flat = lambda named: list(itertools.chain(*named.values()))  # noqa: E731
    curves = flat(two_curves(scale))
    frontier = {main_job(scale, None, sampler, steps): curves for sampler in scale.samplers for steps in scale.steps}
    others = [c for hi in scale.other_his for c in within(scale.interval_weights, GuidanceInterval(0.1, hi))]
    headline = [NONE, *itertools.chain(*emoji_cells(scale))]
    return {
        "headline": dict.fromkeys(emoji_jobs(scale).values(), headline),
        "parts": {main: flat(parts(scale.part_weights))},
        "heatmap": {main: sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights)},
        "frontier": frontier,
        "variety": {main: curves},
        "cost": frontier,
        "seeds": {main_job(scale, source): curves for source in SEEDS.values()},
        "data": {main_job(scale, source): [*curves, *others, *flat(parts(scale.part_weights))] for source in MODELS},
    }


# ----------------------------------------------------------------------------
# Comparing two curves.


def points(results, cells):
    """[(weight, accuracy, 1000 FD, rows)] of the cells, by weight."""
    return sorted((c.weight, r.scores.accuracy, 1000 * r.scores.fd, r.rows) for c in cells for r in [results[c]])


def reached(curve, accuracy, dense=50):
    """The lowest distance at which a curve of `points` has at least this accuracy; inf if it never has.

    Between two weights accuracy is taken as linear and the distance as exponential.
    """
    best = math.inf
    for (_, a0, fd0, _), (_, a1, fd1, _) in itertools.pairwise(curve):
        t = np.linspace(0, 1, dense + 1)
        inside = a0 + (a1 - a0) * t >= accuracy - 1e-9
        best = min([best, *np.exp(np.log(fd0) + (np.log(fd1) - np.log(fd0)) * t)[inside]])
    return best


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The interval's distance over CFG's at equal accuracy: at the median of the accuracies and at the worst of them.

    at: the accuracy of the worst; span: the accuracies compared, from just above no guidance to the highest
    that both reach; best: the highest that each reaches, CFG's first.
    """

    median: float
    worst: float
    at: float
    span: tuple
    best: tuple

    @property
    def dominates(self):
        return self.worst <= 1


def compare(cfg, limited):
    """The `Comparison` of two curves that both begin without guidance."""
    start, best = cfg[0][1], tuple(max(a for _, a, *_ in curve) for curve in (cfg, limited))
    accuracies = sorted({a for _, a, *_ in [*cfg, *limited] if start < a <= min(best)}) or [min(best)]
    ratios = [reached(limited, a) / reached(cfg, a) for a in accuracies]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    return Comparison(float(np.median(ratios)), ratios[worst], accuracies[worst], (accuracies[0], accuracies[-1]), best)


# ----------------------------------------------------------------------------
# Markdown.


def percent(ratio):
    return f"{100 * (ratio - 1):+.0f} %"


def comparison_row(name, c, rows):
    return [
        name, percent(c.median), f"{percent(c.worst)} at {c.at:.1%}", f"{c.span[0]:.1%} to {c.span[1]:.1%}",
        f"{c.best[0]:.2%}, {c.best[1]:.2%}", rows, "yes" if c.dominates else "no",
    ]  # fmt: skip


COMPARISON = ["", "distance, median", "worst", "accuracies compared", "highest of CFG, interval", "rows", "dominates"]
EXPLAINED = (
    "*Distance* is the lowest that the interval reaches with at least a given accuracy over the lowest of CFG, the "
    "median and the worst over the accuracies that were measured; *dominates* is a worst of 0 % or less."
)


# ----------------------------------------------------------------------------
# Figures. Each takes the scale, `{job: {Cell: Result}}` and a folder, writes its pictures and returns its text.


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


def draw_headline(scale, results, out):
    body, shown, verdicts = [], [], {}
    everywhere_cells, interval_cells = emoji_cells(scale)
    for label, job in emoji_jobs(scale).items():
        r = results[job]
        cfg, limited = (min(cells, key=lambda c: r[c].scores.fd) for cells in (everywhere_cells, interval_cells))
        ratios = [ratio(r[limited].judged, r[cfg].judged, judge) for judge in ("fd", "class_fd")]
        to_none = ratio(r[limited].judged, r[NONE].judged)
        a, b = r[cfg].scores, r[limited].scores
        verdict = headline_verdict(cfg.weight == scale.emoji_cfg[-1], ratios, b.accuracy - a.accuracy)
        verdicts.setdefault(verdict, []).append(label)
        body.append([
            label, f"w = {cfg.weight:g}: {1000 * a.fd:.1f}, {a.accuracy:.1%}",
            f"w = {limited.weight:g} in {limited.interval}: {1000 * b.fd:.1f}, {b.accuracy:.1%}",
            *map(str, ratios), str(to_none), f"{r[cfg].rows:.0f} → {r[limited].rows:.0f}", verdict,
        ])  # fmt: skip
        curves = {"CFG everywhere": points(r, [NONE, *everywhere_cells])}
        for hi in scale.emoji_his:
            some = [c for c in interval_cells if c.sigma_hi == hi]
            curves[str(GuidanceInterval(0.1, hi))] = points(r, [NONE, *some])
        shown.append((label, curves, "accuracy"))
    plots.panels(out / "headline.png", shown, 3)
    head = ["", "CFG at its best weight", "interval at its best", "by the ruler", "by the classifier", "against none"]
    yes, known = len(verdicts.get("yes", [])), len(body) - len(verdicts.get("open", []))
    told = (
        f"The interval's best is below CFG's best by both judges, at no less accuracy, in {yes} of the {known} cases "
        "in which CFG's best weight is known."
    )
    for verdict, meaning in (
        ("no", "It is not"),
        ("unclear", "It is unclear"),
        (
            "open",
            f"CFG's distance still falls at {scale.emoji_cfg[-1]:g}, its highest weight here, so nothing follows,",
        ),
    ):
        if verdict in verdicts:
            told += f" {meaning} for {'; '.join(verdicts[verdict])}."
    return (
        "## The headline: the interval at its best against CFG at its best\n\n"
        "![Distance against accuracy on emoji, for each sampler and step count](results/headline.png)\n\n"
        f"{told}\n\n"
        "Colour emoji. 1000 FD is by the ruler, a network that never saw the classes; the accuracy is the "
        "classifier's. Each side shows the weight, and the interval, of its lowest distance by the ruler. The changes "
        "are those from CFG to the interval by each judge, and from no guidance to the interval by the ruler, with "
        "95 % intervals paired by seed. *Lower* is yes when those of both judges lie below zero. Each side's best is "
        f"chosen on the samples that are shown, of {len(everywhere_cells)} weights for CFG and {len(interval_cells)} "
        f"settings for the interval, which flatters both a little.\n\n{aligned([*head, 'rows', 'lower'], body)}"
    )


def draw_parts(scale, results, out):
    r = results[main_job(scale)]
    curves = {name: points(r, cells) for name, cells in parts(scale.part_weights).items()}
    panels = [("distance against weight", curves, "weight"), ("and against accuracy", curves, "accuracy")]
    plots.panels(out / "parts.png", panels, 2)
    head = ["guided in", *(f"w = {w:g}" for w in scale.part_weights)]
    body = [[name, *(f"{fd:.2f}, {a:.1%}" for _, a, fd, _ in curve[1:])] for name, curve in curves.items()]
    none = curves["everywhere"][0]
    last = {name: curve[-1] for name, curve in curves.items()}
    w = scale.part_weights[-1]
    lines = []
    for name, interval in thirds().items():
        _, a, fd, _ = last[name]
        lines.append(
            f"- **{name}**, {interval}: at w = {w:g} the distance is {fd / none[2]:.1f} times that without guidance, "
            f"accuracy {100 * (a - none[1]):+.1f} points."
        )
    everywhere_fd = last["everywhere"][2]
    lines.append(f"- Everywhere, at the same weight: {everywhere_fd / none[2]:.1f} times.")
    return (
        "## Which third of the noise levels helps, and which harms\n\n"
        "![Distance by weight and by accuracy, for guidance in each third alone](results/parts.png)\n\n"
        f"1000 FD and accuracy; without guidance {none[2]:.2f}, {none[1]:.1%}.\n\n"
        f"{aligned(head, body)}\n\n" + "\n".join(lines)
    )


def draw_heatmap(scale, results, out):
    r = results[main_job(scale)]
    cells = sweep.grid(scale.sigma_los, scale.sigma_his, scale.heat_weights)
    plots.heatmaps(out / "heatmap.png", {c: r[c] for c in cells})
    lines = []
    for w in scale.heat_weights:
        fd = {(c.sigma_lo, c.sigma_hi): 1000 * r[c].scores.fd for c in cells if c.weight == w}
        low_los = [lo for lo in scale.sigma_los if 0 < lo <= 0.1]
        moved = ""
        if low_los:
            most = max(abs(fd[lo, hi] / fd[0.0, hi] - 1) for lo, hi in fd if lo in low_los and hi >= 1)
            moved = (
                f"raising `sigma_lo` from 0 up to {low_los[-1]:g} moves it by {most:.1%} at most (`sigma_hi` of 1 or "
                "more). "
            )
        column = [fd[0.0, hi] for hi in scale.sigma_his]
        best = min(fd, key=fd.get)
        lines.append(
            f"- w = {w:g}: raising `sigma_hi` from {scale.sigma_his[0]:g} to {scale.sigma_his[-1]:g} multiplies the "
            f"distance by {column[-1] / column[0]:.0f}{'; ' if moved else '. '}{moved}"
            f"Lowest: {fd[best]:.2f} in {GuidanceInterval(*best)}."
        )
    return (
        "## The distance over both bounds\n\n"
        "![Distance and accuracy over sigma_lo and sigma_hi](results/heatmap.png)\n\n" + "\n".join(lines)
    )


def draw_frontier(scale, results, out):
    shown, body, failing = [], [], []
    for sampler in scale.samplers:
        for steps in scale.steps:
            r = results[main_job(scale, None, sampler, steps)]
            curves = {name: points(r, cells) for name, cells in two_curves(scale).items()}
            c = compare(*curves.values())
            rows = f"{curves['CFG everywhere'][1][3]:.0f} → {curves['interval'][1][3]:.0f}"
            body.append(comparison_row(f"{sampler}, {steps} steps", c, rows))
            if not c.dominates:
                failing.append(f"{sampler} with {steps} steps ({percent(c.worst)} at {c.at:.1%})")
            shown.append((f"{sampler}, {steps} steps", curves, "accuracy"))
    plots.panels(out / "frontier.png", shown, 3)
    verdict = f"The interval dominates CFG in {len(body) - len(failing)} of {len(body)} cases."
    if failing:
        verdict += f" It does not dominate for {'; '.join(failing)}."
    return (
        f"## Five samplers, {len(scale.steps)} step counts\n\n"
        "![Distance against accuracy for each sampler and step count](results/frontier.png)\n\n"
        f"{verdict} {EXPLAINED}\n\n{aligned(COMPARISON, body)}"
    )


def draw_cost(scale, results, out, target=0.995):
    found = []
    for sampler in scale.samplers:
        for steps in scale.steps:
            r = results[main_job(scale, None, sampler, steps)]
            cfg, limited = (points(r, cells) for cells in two_curves(scale).values())
            ends = [(curve[1][3], reached(curve, target)) for curve in (cfg, limited)]
            found.append((sampler, steps, *ends))
    plots.cost(out / "cost.png", found, target)
    body = [
        [f"{sampler}, {steps} steps", *(f"{rows:.0f}" for rows, _ in ends),
         *("never" if fd == math.inf else f"{fd:.2f}" for _, fd in ends)]
        for sampler, steps, *ends in found
    ]  # fmt: skip
    return (
        f"## Cost against quality, at an accuracy of {target:.1%}\n\n"
        "![Rows per image against distance; an arrow leads from CFG to the interval](results/cost.png)\n\n"
        + aligned(["", "rows, CFG", "rows, interval", "1000 FD, CFG", "1000 FD, interval"], body)
    )


def draw_seeds(scale, results, out):
    shown, body = [], []
    for seed, source in SEEDS.items():
        curves = {name: points(results[main_job(scale, source)], cells) for name, cells in two_curves(scale).items()}
        shown.append((f"training seed {seed}", curves, "accuracy"))
        rows = f"{curves['CFG everywhere'][1][3]:.0f} → {curves['interval'][1][3]:.0f}"
        body.append(comparison_row(f"seed {seed}", compare(*curves.values()), rows))
    plots.panels(out / "seeds.png", shown, len(shown))
    return (
        "## Three trainings of the same recipe\n\n"
        "![Distance against accuracy for three training seeds](results/seeds.png)\n\n"
        f"The same classifier judges all three. {EXPLAINED}\n\n{aligned(COMPARISON, body)}"
    )


def draw_data(scale, results, out):
    shown, body, worst = [], [], []
    for name in MODELS:
        r, described = results[main_job(scale, name)], sweep.load_lab(name, "cpu").record["data"]
        curves = {key: points(r, cells) for key, cells in two_curves(scale).items()}
        for hi in scale.other_his:
            other = GuidanceInterval(0.1, hi)
            curves[str(other)] = points(r, within(scale.interval_weights, other))
        shown.append((name, curves, "accuracy"))
        for label, limited in list(curves.items())[1:]:
            c = compare(curves["CFG everywhere"], limited)
            rows = f"{curves['CFG everywhere'][1][3]:.0f} → {limited[1][3]:.0f}"
            label = str(INTERVAL) if label == "interval" else label
            body.append(comparison_row(f"{name} {label}", c, rows))
        cells = parts(scale.part_weights)
        w, none = scale.part_weights[-1], r[NONE].scores
        third = "; ".join(
            f"{part} {1000 * s.fd:.2f}, {s.accuracy:.1%}" for part in thirds() for s in [r[cells[part][-1]].scores]
        )
        worst.append(
            f"- **{name}** ({described.split(':')[0].rstrip('.')}): without guidance {1000 * none.fd:.2f}, "
            f"{none.accuracy:.1%}; guided at w = {w:g} in one third alone: {third}."
        )
    plots.panels(out / "data.png", shown, len(shown))
    plots.strips(out / "clips.png", data.load_clips(1)[0][::500], sample_clips())
    return (
        "## Other data: another set of digits, and moving ones\n\n"
        "![Distance against accuracy on the 8x8 digits and on clips](results/data.png)\n\n"
        f"The interval of the digits, untouched, and others beside it. {EXPLAINED}\n\n"
        f"{aligned(COMPARISON, body)}\n\n" + "\n".join(worst) + "\n\n"
        "![Six frames of real clips, and of clips sampled in the interval](results/clips.png)"
    )


def sample_clips(weight=4.0):
    """Ten clips, one for each class, sampled in the interval: uint8 [10, 6, 20, 20]."""
    lab = sweep.load_lab("clips", "cpu")
    drawn = sample(lab, Setting("", weight, INTERVAL), 10, SAMPLER, STEPS)
    scale = lab.config["pixel_mean"], lab.config["pixel_std"]
    return torch.stack([data.to_pixels(drawn.x[:, t : t + 1], *scale) for t in range(data.FRAMES)], dim=1).numpy()


def draw_variety(scale, results, out, device="cpu"):
    r = results[main_job(scale)]
    limited = within(scale.interval_weights)[-2]
    rival = min(everywhere(scale.cfg_weights)[1:], key=lambda c: abs(r[c].scores.accuracy - r[limited].scores.accuracy))
    strong = everywhere(scale.cfg_weights)[-1]
    lab = model.load(device=device)
    settings = [Setting("no guidance", 1.0)]
    settings += [Setting(f"CFG everywhere, w={c.weight:g}", c.weight) for c in sorted({rival, strong})]
    settings += [Setting(f"interval {INTERVAL}, w={limited.weight:g}", limited.weight, INTERVAL)]
    real = demo.real_digits(lab, scale.samples, 0)
    runs = [(Setting("real digits", 1.0), real)]
    runs += [(s, sample(lab, s, scale.samples, SAMPLER, STEPS)) for s in settings]
    runs = [(setting, drawn, score_samples(lab, drawn.x, drawn.labels)) for setting, drawn in runs]
    by_class = []  # So that one sees one class beside another.
    for setting, drawn, scores in runs:
        order = torch.cat([(drawn.labels == c).nonzero()[:4, 0] for c in (1, 2, 4, 7, 8)])
        by_class.append(demo.Run(setting, dataclasses.replace(drawn, x=drawn.x[order]), scores))
    plots.grid(out / "variety.png", by_class, lab.config["pixel_mean"], lab.config["pixel_std"])
    whole = demo.real_digits(lab, 5000, 0)
    reference, spread = features_of(lab, whole), lab.reference["spread"].double().cpu()
    ink_real = strength(lab, whole)
    body, bars = [], {}
    for setting, drawn, scores in runs:
        f = features_of(lab, drawn)
        value, influence = metrics.prdc(reference, f, influence=True)
        score, moved = metrics.vendi(f, influence=True)
        labels = drawn.labels.cpu()
        bars[setting.name] = (class_spread(f, labels, data.NUM_CLASSES) / spread).tolist()
        ink = strength(lab, drawn)

        def shown(x, influence, labels=labels, form="{:.3f}"):
            ends = metrics.influence_interval(x, influence, labels)
            return " ".join([form.format(x), "[" + ", ".join(map(form.format, ends)) + "]"])

        body.append([
            setting.name, f"{1000 * scores.fd:.2f} [{1000 * scores.fd_low:.2f}, {1000 * scores.fd_high:.2f}]",
            f"{scores.accuracy:.1%}", shown(value.precision, influence.precision),
            shown(value.recall, influence.recall), shown(value.coverage, influence.coverage),
            shown(score, moved, form="{:.2f}"), f"{scores.variety:.3f}",
            shown(ink.mean() / ink_real.mean(), (ink - ink.mean()) / ink_real.mean()),
        ])  # fmt: skip
    plots.classes(out / "classes.png", bars)
    head = ["", "1000 FD", "accuracy", "precision", "recall", "coverage", "Vendi score", "variety", "contrast"]
    return (
        "## Variety, and what guidance does to the strokes\n\n"
        "![Samples of five classes under each setting, from the same seeds](results/variety.png)\n\n"
        "![Variety of each class under each setting, relative to the real digits](results/classes.png)\n\n"
        f"{aligned(head, body)}\n\n"
        "Precision, recall (Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020) with 5 neighbours, against all "
        "5,000 digits; Vendi score (Friedman and Dieng 2023): the effective number of different samples; variety: mean "
        "distance within a class; contrast: standard deviation of an image's pixels; the last two relative to the "
        "real digits. In brackets 95 % bootstrap intervals. The real digits are part of the 5,000, which flatters them."
    )


@torch.inference_mode()
def features_of(lab, drawn):
    return torch.cat([lab.classifier(part)[0] for part in drawn.x.split(500)]).double().cpu()


def strength(lab, drawn):
    """Contrast of each image [N]: the standard deviation of its pixels, clipped as they are when saved."""
    pixels = data.to_pixels(drawn.x, lab.config["pixel_mean"], lab.config["pixel_std"])
    return pixels.double().flatten(1).std(1, correction=0).cpu()


FIGURES = {
    "headline": draw_headline,
    "parts": draw_parts,
    "heatmap": draw_heatmap,
    "frontier": draw_frontier,
    "variety": draw_variety,
    "cost": draw_cost,
    "seeds": draw_seeds,
    "data": draw_data,
}

# ----------------------------------------------------------------------------
# The page.


def not_reproduced(scale, results):
    """Where the paper's claims do not hold here, out of the same cells."""
    lines = []
    for name, source in [("digits", None), *((name, name) for name in MODELS)]:
        r = results[main_job(scale, source)]
        none, best = r[NONE].scores, min((c for c in r if c != NONE), key=lambda c: r[c].scores.fd)
        s = r[best].scores
        apart = s.fd_high < none.fd_low
        where = "everywhere" if best.everywhere else f"in {best.interval}"
        lines.append(
            f"- **{name}: does guidance lower the distance itself?** Without it {1000 * none.fd:.2f} "
            f"[{1000 * none.fd_low:.2f}, {1000 * none.fd_high:.2f}]; the lowest of all guided cells is "
            f"{1000 * s.fd:.2f} [{1000 * s.fd_low:.2f}, {1000 * s.fd_high:.2f}] (w = {best.weight:g} {where}). "
            + ("It does." if apart else "**Not shown**: the intervals overlap, or guidance is worse.")
        )
    return (
        "## Where the claims do not reproduce\n\n"
        "The paper's headline is a lower FID with guidance in an interval than without any guidance and than with CFG "
        "at its best weight. What is compared above is the trade-off at equal accuracy.\n\n" + "\n".join(lines) + "\n"
        "- A case that the tables above mark as not dominated is one of these too.\n"
        "- The distances are those of a small classifier, which also judges the accuracy: a failing that it cannot see "
        "is not in these numbers. The training images are the reference, as in the paper: a model that memorized "
        "them would score well.\n"
        "- An accuracy near 100 % leaves little room: there, a tenth of a point is a few images."
    )


def page(scale, sections, results, command, device):
    quick = "--quick " if scale is QUICK else ""
    cells = sum(map(len, results.values()))
    texts = []
    for name, text in sections.items():
        title, rest = text.split("\n", 1)
        texts.append(f'{title}\n{rest}\n\n```console\n$ make results ARGS="{quick}--only {name}"\n```')
    return (
        "# Results\n\n"
        f"Written by `{command}`: the numbers and pictures on this page come from that command and from nothing "
        f"else: {cells} cells of {scale.samples:,} samples each, measured on {device}. The models are in "
        "`lab/`, trained by `lab/train.py`. [How to read this for a model of your own](guide.md).\n\n"
        f"Unless it says otherwise: the digits that ship, {SAMPLER}, {STEPS} steps, Karras schedule from 40 to 0.01, "
        f"interval {INTERVAL}, which was chosen on this model with this sampler and is used for all others as it is. "
        "*1000 FD* is a thousand times the Fréchet distance to the training images in the features of a small "
        "classifier: lower is better. *Accuracy* is how often that classifier sees the class that was asked for: the "
        "adherence. *Rows* are network evaluations per image, the cost.\n\n"
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
    workers.check(devices, cluster)
    scale = QUICK if quick else FULL
    out = output_folder(out or Path("out") / ("results-quick" if quick else "results"))
    target = Path(page_path or (out / "results.md" if quick else "docs/results.md"))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if not cluster and not devices:
        # One process leaves a GPU waiting for its next launch: as many as there are cores to launch from.
        devices = [here] * max(1, min(14, (os.cpu_count() or 1) - 2)) if here == "cuda" else [here]
    pictures = output_folder(target.with_suffix(""))
    begin = time.time()

    figures = only or list(FIGURES)
    cells = {}
    for figure in figures if only else FIGURES:
        for job, some in wanted(scale)[figure].items():
            cells[job] = sorted({*cells.get(job, []), *some})
    with contextlib.ExitStack() as stack:
        stores = {}
        for job in cells:
            identity = job.identity(sweep.load_lab(job.source, "cpu"))
            path = out / f"{job.name}-{job.sampler}-{job.steps}.sqlite"
            stores[job] = stack.enter_context(sweep.Store(path, identity))
        results = sweep.complete(stores, cells, devices, cluster)

    sections = {}
    for figure in figures:
        print(f"drawing {figure}", file=sys.stderr)
        more = dict(device=here if cluster else devices[0]) if figure == "variety" else {}
        sections[figure] = FIGURES[figure](scale, results, pictures, **more)
    if only:
        print("\n\n".join(sections.values()))
    else:
        command = "make results" + (' ARGS="--quick"' if quick else "")
        device = "a CPU"
        if cluster:
            device = "a Dask cluster"
        elif devices[0].startswith("cuda"):
            device = torch.cuda.get_device_name(devices[0])
        with atomic_path(target) as tmp:
            tmp.write_text(page(scale, sections, results, command, device))
        print(f"wrote {target} and its pictures in {pictures}; {command} took {time.time() - begin:.0f} s")

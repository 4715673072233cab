"""Pictures of the demo, the sweep and the results, with matplotlib. Each function writes one PNG."""

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # No window, no display needed.

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, Normalize

from ..files import atomic_path
from ..interval_text import CONDITIONAL_ONLY
from ..toy.data import to_pixels

COLUMNS = 20  # Images in a row.
GUIDED = "#d95f02"
INK = "#222222"


def _write(fig, path):
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", dpi=130, facecolor="white")
    plt.close(fig)


def _adherence_axes(ax):
    """Axes of the Fréchet distance, times 1000, against adherence."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(axis="y", which="minor", labelsize=7)
    ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=1))
    ax.set_xlabel("class accuracy (adherence) →")
    ax.set_ylabel("← Fréchet distance to the real images, times 1000")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def grid(path, runs, pixel_mean, pixel_std, titles=()):
    """One row of images per `demo.Result`, of the same seeds; titles: of groups of as many columns, if any."""
    fig, axes = plt.subplots(len(runs), 1, figsize=(13, 0.62 * len(runs) + 0.6), squeeze=False)
    for ax, run in zip(axes[:, 0], runs, strict=True):
        pixels = to_pixels(run.drawn.x[:COLUMNS].cpu(), pixel_mean, pixel_std)
        if pixels.shape[1] == 1:  # Grey: dark ink on white.
            pixels = (255 - pixels).expand(-1, 3, -1, -1)
        pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=255)
        ax.imshow(pixels.permute(2, 0, 3, 1).flatten(1, 2), interpolation="nearest")
        ax.set_axis_off()
        detail = f"{run.scores.accuracy:.1%} · {run.drawn.rows:.0f} rows" if run.drawn.rows else ""
        for y, text, size, colour in ((0.66, run.setting.name, 10.5, INK), (0.24, detail, 8.5, "#666666")):
            ax.text(-0.01, y, text, transform=ax.transAxes, ha="right", va="center", fontsize=size, color=colour)
    for i, title in enumerate(titles):
        at = (i + 0.5) / len(titles)
        axes[0, 0].text(at, 1.12, title, transform=axes[0, 0].transAxes, ha="center", fontsize=8.5, color=INK)
    fig.suptitle("The same seeds under each setting, below real images", fontsize=11, color=INK, y=0.99)
    fig.subplots_adjust(left=0.2, right=0.998, top=1 - 0.55 / fig.get_figheight(), bottom=0, hspace=0)
    _write(fig, path)


def tradeoff(path, runs, real):
    """Distance to the real images against adherence, one point per setting, its cost as the colour.

    runs: list of `demo.Result`; real: one of as many real images, whose distance is the floor.
    """
    fig, ax = plt.subplots(figsize=(8.6, 5.2))
    rows = [r.drawn.rows for r in runs]
    norm = Normalize(min(rows), max(rows))
    curve = sorted((r.setting.weight, r.scores.accuracy, 1000 * r.scores.fd) for r in runs if not r.setting.interval)
    ax.plot([a for _, a, _ in curve], [fd for *_, fd in curve], color="#999999", lw=1, zorder=1)
    for setting, samples, scores in ((r.setting, r.drawn, r.scores) for r in runs):
        star = setting.name.startswith("interval")
        marker, size = ("*", 360) if star else ("s", 60) if setting.interval else ("o", 80)
        fd, low, high = (1000 * v for v in (scores.fd, scores.fd_low, scores.fd_high))
        ax.errorbar(scores.accuracy, fd, yerr=[[fd - low], [high - fd]], color="#999999", lw=1, capsize=2, zorder=1)
        points = ax.scatter(
            scores.accuracy, fd, c=[samples.rows], norm=norm, cmap="viridis_r", s=size, marker=marker,
            edgecolors=INK, linewidths=0.8, zorder=3 if star else 2,
        )  # fmt: skip
    if not np.isnan(real.scores.fd):
        ax.axhline(1000 * real.scores.fd, color=INK, lw=1, ls=":", zorder=0)
        ax.annotate(
            "as many real images", (0.01, 1000 * real.scores.fd), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", fontsize=8.5, color=INK,
        )  # fmt: skip
    fig.colorbar(points, label="cost: network evaluations per sample")
    _adherence_axes(ax)
    low, high = (f(r.scores.accuracy for r in runs) for f in (min, max))
    ax.set_xlim(low - 0.45 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    ax.set_title("Lower right is better (bars: 95 % confidence intervals; line: CFG everywhere)", fontsize=10.5)
    fig.tight_layout()
    _label_points(ax, [(r.setting.name, r.scores.accuracy, 1000 * r.scores.fd) for r in runs])
    _write(fig, path)


def _label_points(ax, points, gap=14):
    """Write each (text, x, y) left of its point, from the bottom up, and never on another label."""
    placed = -gap
    at = [(ax.transData.transform((x, y))[1] * 72 / ax.figure.dpi, text, x, y) for text, x, y in points]
    for y_points, text, x, y in sorted(at):
        placed = max(y_points - 3, placed + gap)
        ax.annotate(
            text,
            (x, y),
            xytext=(-11, placed - y_points),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=INK,
        )


def schedule(path, sigmas, interval):
    """The noise level of each step, with the interval shaded and the guided steps marked. sigmas: 1-D, ending in 0."""
    levels, guided = sigmas[:-1].cpu(), interval.mask(sigmas[:-1]).cpu()
    steps = range(len(levels))
    fig, ax = plt.subplots(figsize=(8, 3.8))
    low, high = levels.min().item() / 2, levels.max().item() * 2
    ax.axhspan(max(interval.sigma_lo, low), min(interval.sigma_hi, high), color=GUIDED, alpha=0.15, lw=0)
    ax.plot(steps, levels, color="#999999", lw=1, zorder=1)
    for mask, colour, face, label in (
        (guided, GUIDED, GUIDED, "guided: cond and uncond"),
        (~guided, INK, "white", CONDITIONAL_ONLY),
    ):
        if mask.any():
            ax.scatter(
                [s for s in steps if mask[s]], levels[mask], edgecolors=colour, c=face, s=46, zorder=2, label=label
            )
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_xticks(steps)
    ax.set_xlabel("step")
    ax.set_ylabel("noise level sigma")
    ax.set_title(f"Guidance in {interval}: {int(guided.sum())} of {len(levels)} steps", fontsize=11, color=INK)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    _write(fig, path)


def heatmaps(path, results):
    """The distance over sigma_lo and sigma_hi, one panel for each weight. results: `{Cell: Measured}` of a sweep."""
    cells = [c for c in results if c.weight != 1]
    weights, los, his = (sorted({getattr(c, name) for c in cells}) for name in ("weight", "sigma_lo", "sigma_hi"))
    fds = [1000 * results[c].scores.fd for c in cells]
    norm = LogNorm(min(fds), max(fds))
    size = (0.85 * len(his) * len(weights) + 2.2, 0.6 * len(los) + 1.7)
    fig, axes = plt.subplots(1, len(weights), figsize=size, squeeze=False, layout="constrained")
    for ax, weight in zip(axes[0], weights, strict=True):
        values = np.full((len(los), len(his)), np.nan)
        for c in cells:
            if c.weight == weight:
                at = los.index(c.sigma_lo), his.index(c.sigma_hi)
                values[at] = 1000 * results[c].scores.fd
                dark = norm(values[at]) > 0.6
                text = f"{values[at]:.2g}\n{results[c].scores.accuracy:.1%}"
                ax.text(*at[::-1], text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
        image = ax.imshow(values, norm=norm, cmap="viridis_r", origin="lower", aspect="auto")
        ax.set_xticks(range(len(his)), [f"{h:g}" for h in his])
        ax.set_yticks(range(len(los)), [f"{lo:g}" for lo in los])
        ax.set_xlabel("sigma_hi")
        ax.set_title(f"weight {weight:g}", fontsize=10.5, color=INK)
    axes[0, 0].set_ylabel("sigma_lo")
    fig.colorbar(image, ax=axes, label="1000 FD")
    _write(fig, path)


def frontier(path, results, best):
    """Distance against adherence of every cell, CFG's own curve, and the frontier. best: the cells of the frontier."""
    fig, ax = plt.subplots(figsize=(8.6, 5.2))
    at = {c: (r.scores.accuracy, 1000 * r.scores.fd) for c, r in results.items()}
    everywhere = [at[c] for c in sorted(results) if c.everywhere]
    ax.plot(*zip(*everywhere, strict=True), "o-", color=INK, ms=6, lw=1, label="CFG everywhere", zorder=2)
    ax.plot(*zip(*(at[c] for c in best), strict=True), color=GUIDED, lw=1.2, label="frontier", zorder=1)
    inside = [c for c in results if not c.everywhere]
    if inside:
        rows = [results[c].rows for c in inside]
        xy = np.array([at[c] for c in inside])
        points = ax.scatter(*xy.T, c=rows, cmap="viridis_r", edgecolors=INK, lw=0.5, s=46, label="interval", zorder=3)
        fig.colorbar(points, label="cost: network evaluations per sample")
    _adherence_axes(ax)
    ax.set_title("Lower right is better", fontsize=10.5, color=INK)
    ax.legend(frameon=False, loc="upper left")
    fig.tight_layout()
    _write(fig, path)


COLOURS = [INK, GUIDED, "#1b9e77", "#7570b3", "#e7298a"]


def panels(path, shown, columns):
    """Small multiples of the distance against accuracy or weight, one line for each curve.

    shown: [(title, `{label: [(weight, accuracy, 1000 FD, rows)]}`, "accuracy" or "weight")].
    """
    rows = -(-len(shown) // columns)
    size = (12, 4.4 if columns < 3 else 3.2 * rows + 0.4)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, curves, x) in zip(axes.flat, shown, strict=False):
        for (label, curve), colour in zip(curves.items(), COLOURS, strict=False):
            weight, accuracy, fd, _ = zip(*curve, strict=True)
            ax.plot(weight if x == "weight" else accuracy, fd, "o-", ms=3.5, lw=1.2, color=colour, label=label)
        _adherence_axes(ax)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        if x == "weight":
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_xlabel("guidance weight")
        else:
            ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        ax.set_ylabel("")
        ax.set_title(title, fontsize=10, color=INK)
    for ax in axes[:, 0]:
        ax.set_ylabel("← 1000 FD")
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    axes[0, 0].legend(frameon=False, fontsize=8)
    _write(fig, path)


def cost(path, found):
    """Distance against rows; an arrow leads from CFG everywhere to the interval.

    found: [(sampler, (rows, 1000 FD) of CFG, the same of the interval)].
    """
    fig, ax = plt.subplots(figsize=(8.6, 5.2))
    samplers = list(dict.fromkeys(sampler for sampler, *_ in found))
    for sampler, cfg, limited in found:
        colour = COLOURS[samplers.index(sampler)]
        ax.scatter(*cfg, s=34, facecolors="white", edgecolors=colour, zorder=2)
        ax.scatter(*limited, s=34, color=colour, zorder=3)
        ax.annotate("", limited, cfg, arrowprops=dict(arrowstyle="->", color=colour, lw=1, shrinkA=4, shrinkB=4))
    for sampler, colour in zip(samplers, COLOURS, strict=False):
        ax.plot([], [], "o-", color=colour, label=sampler)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    ax.tick_params(which="minor", labelsize=7)
    ax.set_xlabel("← cost: network evaluations per image")
    ax.set_ylabel("← 1000 FD")
    ax.set_title("Each at its best: CFG everywhere (hollow) → interval (filled)", fontsize=10.5)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.tight_layout()
    _write(fig, path)


def against_weight(path, shown):
    """One panel for each quantity: lines over the guidance weight, with their intervals shaded.

    shown: `{quantity: {label: [(weight, value, low, high)]}}`.
    """
    fig, axes = plt.subplots(1, len(shown), figsize=(10, 3.8), squeeze=False, layout="constrained")
    for ax, (quantity, curves) in zip(axes[0], shown.items(), strict=True):
        for (label, curve), colour in zip(curves.items(), COLOURS, strict=False):
            weight, value, low, high = zip(*curve, strict=True)
            ax.plot(weight, value, "o-", ms=4, lw=1.3, color=colour, label=label)
            ax.fill_between(weight, low, high, color=colour, alpha=0.15, lw=0)
        ax.set_xlabel("guidance weight")
        ax.set_title(quantity, fontsize=10.5, color=INK)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9)
    _write(fig, path)


def strips(path, real, sampled):
    """Clips as rows of frames, real ones left and sampled ones right. real, sampled: uint8 [N, F, H, W]."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 0.62 * len(real)), layout="constrained")
    for ax, clips, title in zip(axes, (real, sampled), ("real", "sampled"), strict=True):
        ax.imshow(255 - clips.transpose(0, 2, 1, 3).reshape(-1, clips.shape[1] * clips.shape[3]), cmap="gray")
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_axis_off()
    _write(fig, path)


def neighbours(path, groups):
    """Samples above their nearest training images, and those above the nearest that were held out.

    groups: two of (samples, training images, held-out images), each float [N, 3, H, W] from 0 to 1: those nearest to a
    training image, and some from the nearest to the farthest.
    """
    fig, axes = plt.subplots(len(groups), 1, figsize=(8, 2.5 * len(groups)), layout="constrained")
    titles = ("The samples nearest to a training image", "From the nearest to the farthest")
    for ax, group, title in zip(axes, groups, titles, strict=True):
        padded = [torch.nn.functional.pad(part, (1, 1, 1, 1), value=1.0) for part in group]
        ax.imshow(torch.cat([p.permute(2, 0, 3, 1).flatten(1, 2) for p in padded]), interpolation="nearest")
        size = padded[0].shape[-1]
        ax.set_yticks([size * (i + 0.5) for i in range(3)], ["samples", "nearest in training", "nearest held out"])
        ax.tick_params(length=0)
        ax.set_xticks([])
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=10, color=INK)
    _write(fig, path)

"""The demo's pictures, with matplotlib. Each function writes one PNG."""

import matplotlib

matplotlib.use("Agg")  # No window, no display needed.

from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from .data import to_pixels
from .files import atomic_path

GUIDED = "#d95f02"
INK = "#222222"


def _write(fig, path):
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", dpi=130, facecolor="white")
    plt.close(fig)


def grid(path, runs, pixel_mean, pixel_std, columns=20):
    """One row of images per setting, the same seeds in every row. runs: list of (Setting, Samples, Scores)."""
    fig, axes = plt.subplots(len(runs), 1, figsize=(13, 0.72 * len(runs) + 0.5), squeeze=False)
    for ax, (setting, samples, scores) in zip(axes[:, 0], runs, strict=True):
        pixels = 255 - to_pixels(samples.x[:columns].cpu(), pixel_mean, pixel_std)
        ax.imshow(pixels.permute(1, 0, 2).flatten(1), cmap="gray", vmin=0, vmax=255)
        ax.set_axis_off()
        ax.text(-0.012, 0.62, setting.name, transform=ax.transAxes, ha="right", va="center", fontsize=10, color=INK)
        detail = f"FD {1000 * scores.fd:.2f} · {scores.accuracy:.1%} · {samples.rows:.0f} rows"
        ax.text(-0.012, 0.25, detail, transform=ax.transAxes, ha="right", va="center", fontsize=8, color="#666666")
    fig.suptitle("Same seeds, row by row: what guidance changes", fontsize=12, color=INK, y=0.985)
    fig.subplots_adjust(left=0.25, right=0.995, top=0.93, bottom=0.01, hspace=0.08)
    _write(fig, path)


def tradeoff(path, runs):
    """Distance to the real images against adherence, one point per setting, its cost as the colour."""
    fig, ax = plt.subplots(figsize=(8, 5.2))
    rows = [samples.rows for _, samples, _ in runs]
    norm = Normalize(min(rows), max(rows))
    curve = [r for r in runs if r[0].interval is None]
    curve.sort(key=lambda r: r[0].weight)
    ax.plot([s.accuracy for *_, s in curve], [1000 * s.fd for *_, s in curve], color="#999999", lw=1, zorder=1)
    for setting, samples, scores in runs:
        marker = "o" if setting.interval is None else ("*" if setting.name.startswith("interval") else "s")
        fd, low, high = (1000 * v for v in (scores.fd, scores.fd_low, scores.fd_high))
        ax.errorbar(scores.accuracy, fd, yerr=[[fd - low], [high - fd]], color="#999999", lw=1, capsize=2, zorder=1)
        size = 320 if marker == "*" else 90
        points = ax.scatter(
            scores.accuracy, fd, c=[samples.rows], norm=norm, cmap="viridis_r", s=size, marker=marker,
            edgecolors=INK, linewidths=0.8, zorder=3,
        )  # fmt: skip
        ax.annotate(setting.name, (scores.accuracy, fd), xytext=(-9, 6), textcoords="offset points",
                    fontsize=8.5, color=INK, ha="right")  # fmt: skip
    fig.colorbar(points, label="cost: network rows per sample")
    ax.set_xlabel("class accuracy (adherence) →")
    ax.set_ylabel("← Fréchet distance to the real images × 1000 (quality and variety)")
    ax.set_title("Lower right is better; bars are 95 % bootstrap intervals", fontsize=11, color=INK)
    ax.margins(x=0.22, y=0.12)
    ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=1))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    _write(fig, path)


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
        (~guided, INK, "white", "cond alone"),
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

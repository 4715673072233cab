"""Which steps are guided, and what that saves, as a small picture in HTML."""

import math

WIDTH, HEIGHT = 600, 64
GUIDED, UNGUIDED = "#f97316", "#9ca3af"


def count(guided):
    """`(rows, rows with CFG everywhere)` per image, from whether each step is guided, one evaluation per step."""
    return len(guided) + sum(guided), 2 * len(guided)


def caption(guided):
    """One sentence on the guided steps and the share of the network's rows that is saved."""
    rows, everywhere = count(guided)
    saved = f"{rows} network rows per image instead of {everywhere}, {1 - rows / everywhere:.0%} saved."
    if not any(guided):
        return f"None of the {len(guided)} steps is guided: the negative prompt and CFG have no effect. {saved}"
    steps = [i + 1 for i, g in enumerate(guided) if g]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"{len(steps)} of {len(guided)} steps are guided ({span}): {saved}"


def draw(sigmas, interval, note=""):
    """HTML for the steps that start at the noise levels `sigmas`, a list, decreasing; `note` ends the caption.

    One bar a step, as high as log sigma; guided ones in colour. Draws with SVG alone, in light and dark themes.
    """
    guided = [s in interval for s in sigmas]
    low, high = math.log(min(sigmas)), math.log(max(sigmas))
    width = WIDTH / len(sigmas)
    bars = []
    for i, (sigma, g) in enumerate(zip(sigmas, guided, strict=True)):
        share = 1.0 if high == low else (math.log(sigma) - low) / (high - low)
        height = HEIGHT * (0.1 + 0.9 * share)
        bars.append(
            f'<rect x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{max(width - 2, 1):.1f}" '
            f'height="{height:.1f}" rx="2" fill="{GUIDED if g else UNGUIDED}" fill-opacity="{1 if g else 0.45}">'
            f"<title>step {i + 1}: sigma {sigma:.4g}, {'guided' if g else 'conditional only'}</title></rect>"
        )
    return (
        '<div class="guidance-interval-picture" style="margin:4px 0">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'style="width:100%;height:{HEIGHT}px;display:block">{"".join(bars)}</svg>'
        f'<div style="font-size:0.85em;opacity:0.85;margin-top:4px">{caption(guided)} {note}</div></div>'
    )

"""Which evaluations are guided, and what that saves, as a small picture in HTML."""

import html
import math
from dataclasses import dataclass

from ..noise_level import describe_cost

WIDTH, HEIGHT = 600, 64
GUIDED, UNGUIDED = "#f97316", "#9ca3af"


@dataclass(frozen=True)
class Pass:
    """One pass of a generation, as it will be sampled.

    sigmas: noise levels of the network's evaluations, in order. guided: whether each is.
    cond, uncond: rows per image of a guided evaluation; an unguided one takes those of cond alone.
    """

    sigmas: list
    guided: list
    cond: int = 1
    uncond: int = 1

    @property
    def rows(self):
        """Network evaluations per image."""
        return self.cond * len(self.guided) + self.uncond * sum(self.guided)

    @property
    def rows_everywhere(self):
        """The same with CFG everywhere."""
        return (self.cond + self.uncond) * len(self.guided)


def caption(passes, steps=None):
    """One sentence on the guided evaluations and the share of the work that is saved.

    steps: those that the user asked for; where each is one evaluation, they are counted as steps.
    """
    guided = [g for one in passes for g in one.guided]
    rows, everywhere = (sum(getattr(p, name) for p in passes) for name in ("rows", "rows_everywhere"))
    unit = "step" if steps == len(guided) else "evaluation"
    text = describe_cost(guided, rows, everywhere, unit, first=1)
    return f"{text}." if any(guided) else f"{text}. The negative prompt and CFG have no effect."


def draw(passes, steps=None, note=""):
    """HTML for `[Pass]`; `note` ends the caption.

    One bar an evaluation, as high as log sigma; guided ones in colour. Draws with SVG alone, in light and dark
    themes.
    """
    sigmas = [sigma for one in passes for sigma in one.sigmas]
    guided = [g for one in passes for g in one.guided]
    finite = [math.log(s) for s in sigmas if 0 < s < math.inf]  # Flow matching starts at inf.
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    width = WIDTH / len(sigmas)
    bars = []
    for i, (sigma, g) in enumerate(zip(sigmas, guided, strict=True)):
        level = high if sigma == math.inf else low if sigma <= 0 else math.log(sigma)
        share = 1.0 if high == low else (level - low) / (high - low)
        height = HEIGHT * (0.1 + 0.9 * share)
        bars.append(
            f'<rect x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{max(width - 2, 1):.1f}" '
            f'height="{height:.1f}" rx="2" fill="{GUIDED if g else UNGUIDED}" fill-opacity="{1 if g else 0.45}">'
            f"<title>{i + 1}: sigma {sigma:.4g}, {'guided' if g else 'conditional only'}</title></rect>"
        )
    return (
        '<div class="guidance-interval-picture" style="margin:4px 0">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'style="width:100%;height:{HEIGHT}px;display:block">{"".join(bars)}</svg>'
        f'<div style="font-size:0.85em;opacity:0.85;margin-top:4px">{caption(passes, steps)} {note}</div></div>'
    )


# ----------------------------------------------------------------------------
# In its place.

_OUTDATED = '<div class="guidance-interval-outdated">'


def note(text):
    """HTML for a sentence that says why there is no picture."""
    return f"<div>{html.escape(text, quote=False)}</div>"


def warning(text):
    """HTML for a sentence on what is wrong, in the colours that the page's theme has for errors."""
    return (
        '<div class="guidance-interval-warning" role="alert" style="color:var(--error-text-color,#b91c1c);'
        "border-left:4px solid var(--error-border-color,#dc2626);background:var(--error-background-fill,transparent);"
        f'padding:6px 10px">{html.escape(text, quote=False)}</div>'
    )


def outdated(shown, text):
    """HTML of the picture `shown`, faint because it is not that of the controls, and a sentence that says why."""
    if shown and shown.startswith(_OUTDATED):
        return shown
    if not shown or "<svg" not in shown:
        return note(text)
    return f'{_OUTDATED}<div style="opacity:0.4">{shown}</div>{note(text)}</div>'

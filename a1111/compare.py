"""The same seeds with CFG everywhere, in the interval and with none, in one labelled grid."""

import copy
import time

from modules import images, processing, shared
from modules.processing import Processed, process_images

from ..sampler_patch import GuidanceInterval
from .generation import ROWS_ATTRIBUTE, SETTINGS_ATTRIBUTE, say
from .settings import TITLE, Settings, describe

WARM_UP_STEPS = 3  # Without them the first column alone pays for loading and tuning.


def run(p, settings):
    """Render `p` three times; return a Processed with the grid first and then all images, column by column.

    Seconds are those of the whole generation, after a short one that warms up.
    """
    processing.fix_seed(p)
    columns = [
        ("CFG everywhere", Settings(GuidanceInterval())),
        (f"Interval {describe(settings)}", settings),
        ("Conditional only", Settings(None, settings.passes)),
    ]
    shared.state.job_count = 1 + len(columns) * p.n_iter
    _render(p, "Warming up", settings, n_iter=1, steps=min(p.steps, WARM_UP_STEPS), do_not_save_samples=True)
    done = []
    for label, column in columns:
        if shared.state.interrupted:
            break
        shared.state.job = f"{label} ({len(done) + 1} of {len(columns)})"
        done.append(_render(p, label, column))
    return _assemble(p, done) if done else Processed(p, [], p.seed, "")


def _render(p, label, settings, **changed):
    """`(label with seconds and rows, Processed)` of a copy of `p` with these settings and changed attributes."""
    cell = copy.copy(p)
    cell.styles = list(p.styles or [])
    cell.override_settings = dict(p.override_settings)
    cell.extra_generation_params = dict(p.extra_generation_params)
    cell.do_not_save_grid = True
    for name, value in changed.items():
        setattr(cell, name, value)
    setattr(cell, SETTINGS_ATTRIBUTE, settings)
    start = time.perf_counter()
    processed = process_images(cell)
    seconds = time.perf_counter() - start
    rows = getattr(cell, ROWS_ATTRIBUTE, None)
    cost = f"{seconds:.1f} s" + ("" if rows is None else f", {rows} network evaluations")
    return f"{label}\n{cost}", processed


def _assemble(p, done):
    columns = [(label, processed.images[processed.index_of_first_image :], processed) for label, processed in done]
    height = min(len(found) for _, found, _ in columns)
    result = columns[0][2]
    if height == 0:
        say(p, "nothing to compare: the generation was skipped or interrupted.")
        return result
    cells = [found[row] for row in range(height) for _, found, _ in columns]
    grid = images.image_grid(cells, rows=height)
    labels = [[images.GridAnnotation(line) for line in label.split("\n")] for label, _, _ in columns]
    size = max(c.width for c in cells), max(c.height for c in cells)
    grid = images.draw_grid_annotations(grid, *size, labels, [[images.GridAnnotation()] for _ in range(height)])
    first = [processed.infotexts[processed.index_of_first_image :] for _, _, processed in columns]
    if shared.opts.grid_save:
        images.save_image(
            grid,
            p.outpath_grids,
            "guidance_interval",
            info=first[min(1, len(first) - 1)][0],
            extension=shared.opts.grid_format,
            prompt=p.prompt,
            seed=result.seed,
            grid=True,
            p=p,
        )
    result.images = [grid] + [image for _, found, _ in columns for image in found[:height]]
    result.infotexts = [first[0][0]] + [text for texts in first for text in texts[:height]]
    result.index_of_first_image = 1
    summary = f"{TITLE}: " + "; ".join(label.replace("\n", ": ") for label, _, _ in columns)
    print(summary)
    result.comments = f"{result.comments or ''}{summary}\n"
    return result

"""A picture of a forecast, in coordinates from 0 to 1: the front end draws, and knows nothing of noise."""

import bisect
import math

import torch

from ...interval_text import GUIDER_NODE, PERCENT_NODE, SIGMA_NODE, STEPS_NODE
from .. import model_patch
from .prompt_node import is_link

GRID = 200


def chart(run):
    """What the front end draws of a Forecast, as JSON holds it."""
    sampling = run.model.get_model_object("model_sampling")
    own = run.levels.tolist()
    steps = max(len(own) - 1, 0)
    interval = model_patch.NOWHERE if run.nothing else run.interval
    guided = interval.mask(run.levels).tolist()
    levels = [model_patch.from_model_sigma(s, sampling) for s in own]
    axis = _Axis(levels[:-1])
    points = [[i / max(steps, 1), axis(s), g, True] for i, (s, g) in enumerate(zip(levels[:-1], guided, strict=False))]
    result = {
        "steps": steps,
        "guided": sum(guided[:-1]),
        "nothing": run.nothing,
        "sampler_id": run.sampler_id,
        "samplers": run.samplers,
        "hurried": run.hurried,
        "sampler": run.sampler,
        "scheduler": run.scheduler,
        "notes": run.notes,
        "band": [
            axis(model_patch.from_model_sigma(s, sampling)) for s in (run.interval.sigma_lo, run.interval.sigma_hi)
        ],
        "bounds": [
            _finite(model_patch.from_model_sigma(s, sampling)) for s in (run.interval.sigma_lo, run.interval.sigma_hi)
        ],
        "ticks": axis.ticks(),
        "end": axis(levels[-1]) if steps > 0 else 0,
        "sigmas": None
        if run.evaluated is None
        else [_finite(model_patch.from_model_sigma(s, sampling)) for s in run.evaluated],
    }
    if run.evaluated is not None and steps > 0:
        mask = interval.mask(torch.tensor(run.evaluated)).tolist()
        rows_everywhere = run.rows_guided * len(mask)
        rows = sum(run.rows_guided if g else 1 for g in mask)
        result |= {
            "evaluations": len(mask),
            "evaluations_guided": sum(mask),
            "rows": rows,
            "rows_everywhere": rows_everywhere,
            "saved": round(100 * (1 - rows / rows_everywhere)),
        }
        places = set(own[:-1])
        falling = sorted(own)
        for s, g in zip(run.evaluated, mask, strict=True):
            if s not in places:
                places.add(s)
                points.append([_between(s, falling, steps), axis(model_patch.from_model_sigma(s, sampling)), g, False])
    result["points"] = points
    result["edges"] = _edges(run, axis, sampling)
    return result


def _finite(value):
    return value if math.isfinite(value) else None


def _between(s, rising, steps):
    """Where along a falling schedule a noise level lies, 0 to 1."""
    i = min(max(bisect.bisect_left(rising, s), 1), len(rising) - 1)
    low, high = rising[i - 1], rising[i]
    share = (high - s) / (high - low) if high > low else 0.0
    return min(max((len(rising) - 1 - i + share) / steps, 0.0), 1.0)


class _Axis:
    """Noise levels (data of unit scale) on a logarithmic axis: 0 below all of the schedule, 1 above."""

    def __init__(self, levels):
        finite = sorted(s for s in levels if 0 < s < math.inf) or [0.1, 10.0]
        self.low, self.high = math.log(finite[0] / 1.5), math.log(finite[-1] * 1.5)

    def __call__(self, sigma):
        if sigma <= 0:
            return 0.0
        return min(max((math.log(min(sigma, 1e30)) - self.low) / (self.high - self.low), 0.0), 1.0)

    def sigma(self, y):
        return math.exp(self.low + y * (self.high - self.low))

    def ticks(self):
        """[[y, sigma]]: powers of ten, with 2 and 5 where they are few."""
        for factors in ((1,), (1, 3), (1, 2, 5)):
            values = [f * 10.0**e for e in range(-6, 7) for f in factors]
            ticks = [[self(v), v] for v in values if 0.02 < self(v) < 0.98]
            if len(ticks) >= 3:
                break
        return ticks


def _edges(run, axis, sampling):
    """{"lo", "hi": {"widget", "y", "value", "stops": [[y, value]]}}, from the bottom up; None: not to be dragged."""
    kind, inputs = run.node["class_type"], run.node["inputs"]
    low, high = (model_patch.from_model_sigma(s, sampling) for s in (run.interval.sigma_lo, run.interval.sigma_hi))

    def edge(widget, y, stops):
        if is_link(inputs.get(widget)):
            return None
        return {"widget": widget, "y": y, "value": inputs.get(widget), "stops": stops}

    if kind in (SIGMA_NODE, GUIDER_NODE):
        flow = inputs.get("units") == "model"

        def typed(y):
            sigma = axis.sigma(y)
            value = model_patch.to_model_sigma(sigma, sampling) if flow else sigma
            return max(round(value, 3), 0.001) if value < 1 else float(f"{value:.3g}")

        inside = [[i / GRID, typed(i / GRID)] for i in range(1, GRID)]
        return {
            "lo": edge("sigma_lo", axis(low), [[0.0, 0.0], *inside]),
            "hi": edge("sigma_hi", axis(high), [*inside, [1.0, model_patch.OPEN]]),
        }
    if kind == PERCENT_NODE:
        stops = []
        for i in range(GRID, -1, -1):  # From the end of the process, which is the bottom.
            y = axis(model_patch.from_model_sigma(float(sampling.percent_to_sigma(i / GRID)), sampling))
            if stops and y <= stops[-1][0]:
                if y < 1:
                    stops[-1] = [y, i / GRID]
                continue
            stops.append([y, i / GRID])
        lows = [[y, p] if y > 0 else [0.0, 1.0] for y, p in stops]
        highs = [[y, p] if y < 1 else [1.0, 0.0] for y, p in stops]
        return {"lo": edge("end_percent", axis(low), lows), "hi": edge("start_percent", axis(high), highs)}
    if kind == STEPS_NODE:
        levels = [axis(model_patch.from_model_sigma(s, sampling)) for s in run.counted.tolist()]
        steps = len(levels) - 1

        def index(i, widget):
            value = inputs.get(widget)
            return i - steps if isinstance(value, int) and value < 0 else i

        return {
            "lo": edge(
                "last_step", axis(low), [[levels[i + 1], index(i, "last_step")] for i in reversed(range(steps))]
            ),
            "hi": edge("first_step", axis(high), [[levels[i], index(i, "first_step")] for i in reversed(range(steps))]),
        }
    return {"lo": None, "hi": None}

"""What is measured of a setting's images, as paired differences with confidence intervals.

Images come in blocks: one prompt and SEEDS seeds. A block is what is drawn, the images of a prompt being alike, so
confidence intervals resample blocks. Each metric is a mean over blocks of what they contribute: for a mean over images
or pairs that of the block, for a distance, which is of all images at once, its value plus the influence of the block's
images (`measure/metrics.py`). Two settings are compared by the difference of contributions, over the blocks that both
have.

A judge (`judges/`) has
- `adherence`, the name of its measure, with the `margin` that a setting may lose of it and `digits` to show;
- `reference`, what distances are to, or None, and `distance_name`; `identity`, which changes with its weights;
- `check(prompts)`, which loads what it needs, `look(image)`, called with each image as it comes, and
- `measure(images, prompts)` and `distance(features)`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from ..measure.metrics import influence_interval, mean_distance, pixel_statistics

SEEDS = 4  # Of a prompt: the fewest whose variety says something.


@dataclass(frozen=True)
class Metric:
    """key: in files; name: for people; better: "lower", "higher" or "" where neither is; digits: after the point."""

    key: str
    name: str
    better: str
    digits: int


def word(key):
    """A metric's key as people read it."""
    return "NFE" if key == "rows" else key


def metrics(judge, rows=True):
    """What a study measures, in the report's order; rows: whether they are known."""
    found = [Metric("rows", "Network evaluations per image", "lower", 1)] if rows else []
    found += [
        Metric("seconds", "Seconds per image", "lower", 2),
        Metric("adherence", judge.adherence, "higher", judge.digits),
        Metric("variety", "Variety between seeds of a prompt", "higher", 3),
        Metric("drift", "Colour drift from conditional only (saturation, points)", "lower", 2),
    ]
    if judge.reference is not None:
        found.append(Metric("distance", judge.distance_name, "lower", 2))
    return found


def measure(judge, images, prompts, rows, seconds, blocks, parts=()):
    """What a setting's images give: `{metric: [block] or, for a distance, {part: [block]}}`, JSON without more ado.

    images: PIL, block by block; prompts, rows, seconds: of each, where known (the first image of a server also loads
    the model: it counts like the others' mean); blocks: their numbers; parts: the sequences of them over which a
    distance may be compared, beside all. `saturation` is of each image, for the drift.
    """
    features, adherence = judge.measure(images, prompts)
    if not (features.isfinite().all() and adherence.isfinite().all()):
        raise ValueError("the features of an image are not finite")
    saturation = [pixel_statistics(np.asarray(image.convert("RGB")))[0].item() * 100 for image in images]
    timed = [s for s in seconds if s is not None]
    mean = sum(timed) / len(timed) if timed else 0.0
    found = {
        "blocks": list(blocks),
        "adherence": _means(adherence),
        "variety": [mean_distance(block).item() if len(block) > 1 else 0.0 for block in features.split(SEEDS)],
        "seconds": _means([mean if s is None else s for s in seconds]),
        "saturation": saturation,
    }
    if None not in rows:
        found["rows"] = _means(rows)
    if judge.reference is not None:
        at, grouped = {b: i for i, b in enumerate(blocks)}, features.unflatten(0, (-1, SEEDS))
        found["distance"] = {}
        for part in {tuple(blocks), *(p for p in map(tuple, parts) if set(p) <= set(at))}:
            value, moved = judge.distance(grouped[[at[b] for b in part]].flatten(0, 1))
            found["distance"][_name(part)] = [value.item() + m for m in _means(moved)]
    return found


def _name(part):
    """Of a sequence of blocks, in JSON."""
    return ",".join(map(str, part))


def _means(values):
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, SEEDS).mean(1).tolist()


def num_blocks(measured):
    return len(measured["adherence"])


def blocks_of(measured):
    """The numbers of its blocks, in their order."""
    return measured.get("blocks") or list(range(num_blocks(measured)))


def known(measured, key, conditional=None):
    """Those of its blocks for which a metric can be known: colour drift is against conditional only, where that is."""
    if key != "drift":
        return blocks_of(measured)
    both = set(blocks_of(conditional)) if conditional else set()
    return [b for b in blocks_of(measured) if b in both]


def contributions(measured, key, blocks, conditional=None):
    """Float64 [blocks]: what these blocks of `measured` contribute to a metric, or None where it is not known.

    conditional: what conditional only measured, for the drift.
    """
    if not blocks:
        return None
    if key == "drift":
        ours, theirs = (_of_blocks(m, np.reshape(m["saturation"], (-1, SEEDS)), blocks)
                        for m in (measured, conditional))  # fmt: skip
        return (ours - theirs).abs().mean(1)
    values = measured.get(key)
    if key == "distance" and values is not None:
        found = values.get(_name(blocks))
        return None if found is None else torch.tensor(found, dtype=torch.float64)
    return None if values is None else _of_blocks(measured, values, blocks)


def _of_blocks(measured, values, blocks):
    at = {b: i for i, b in enumerate(blocks_of(measured))}
    if not set(blocks) <= set(at):
        return None
    return torch.as_tensor(np.asarray(values, dtype="float64")[[at[b] for b in blocks]])


RACING = 0.8  # The level of a trial's race: a good one that is left early costs less than images for all bad ones.


def estimate(values, level=0.95):
    """`[mean, low, high]` of contributions [B] with a confidence interval of that level.

    The bootstrap of few blocks is too narrow, by what Student's t and the degree of freedom of the mean tell: the
    influences are scaled by it.
    """
    mean, count = values.mean(), len(values)
    if count < 2:
        return [mean.item(), -math.inf, math.inf]
    end = (1 + level) / 2
    widen = stats.t.ppf(end, count - 1) / stats.norm.ppf(end) * math.sqrt(count / (count - 1))
    low, high = influence_interval(mean, (values - mean) * widen, level=level)
    return [mean.item(), low, high]


def paired(ours, theirs, key, conditional=None):
    """Contributions of ours minus theirs [blocks that both have], or None where the metric is not known of them."""
    both = set(known(theirs, key, conditional))
    blocks = [b for b in known(ours, key, conditional) if b in both]
    a, b = (contributions(m, key, blocks, conditional) for m in (ours, theirs))
    return None if a is None or b is None else a - b


def difference(ours, theirs, key, conditional=None, level=0.95):
    """`estimate` of `paired`, or None."""
    change = paired(ours, theirs, key, conditional)
    return None if change is None else estimate(change, level)


def value(measured, baseline, key, conditional=None):
    """`estimate` of a setting as if it had all the blocks of the baseline.

    With fewer, its prompts may be easier ones: the value is the baseline's plus the paired difference.
    """
    own = contributions(measured, key, known(measured, key, conditional), conditional)
    if own is None:
        return None
    mean, low, high = estimate(own)
    if num_blocks(measured) < num_blocks(baseline):
        everything = contributions(baseline, key, known(baseline, key, conditional), conditional)
        change = difference(measured, baseline, key, conditional)
        if everything is not None and change is not None:
            shift = everything.mean().item() + change[0] - mean
            mean, low, high = mean + shift, low + shift, high + shift
    return [mean, low, high]


def verdict(change):
    """ "lower", "higher" or "unclear": which side of 0 the confidence interval of a difference lies on."""
    return None if change is None else "lower" if change[2] < 0 else "higher" if change[1] > 0 else "unclear"


# ----------------------------------------------------------------------------
# The goal: two objectives, and a bound on a third.


@dataclass(frozen=True)
class Goal:
    """minimize, maximize: keys of metrics; bound, margin: the metric that may be worse than the baseline by so much."""

    minimize: tuple
    maximize: tuple
    bound: str
    margin: float

    @property
    def keys(self):
        return (*self.minimize, *self.maximize)

    @property
    def directions(self):
        """Of the keys."""
        return ["minimize"] * len(self.minimize) + ["maximize"] * len(self.maximize)

    def signs(self):
        """By which values become losses."""
        return [1.0] * len(self.minimize) + [-1.0] * len(self.maximize)

    def describe(self):
        return {
            "minimize": list(self.minimize),
            "maximize": list(self.maximize),
            "bound": {"metric": self.bound, "margin": self.margin},
        }

    def __str__(self):
        return f"{wanted(self.minimize, self.maximize)}, {self.bound} no more than {self.margin:g} below the baseline's"


def wanted(minimize, maximize):
    """Objectives in words."""
    parts = (("minimize", minimize), ("maximize", maximize))
    return ", ".join(f"{what} {' and '.join(map(word, keys))}" for what, keys in parts if keys)


def goal(judge, rows=True):
    """Minimize the cost and maximize variety, or with a reference minimize the distance; adherence keeps up."""
    cost = "rows" if rows else "seconds"
    if judge.reference is None:
        return Goal((cost,), ("variety",), "adherence", judge.margin)
    return Goal((cost, "distance"), (), "adherence", judge.margin)


LIKELY = 0.75  # With what probability a setting of the front is within the bound: its best estimate is a lucky one.


def _of_bound(goal, measured, baseline):
    """`(how far a setting is beyond the bound, standard error)`; 0 where one block alone tells nothing of it."""
    mean, low, high = difference(measured, baseline, goal.bound)
    error = (high - low) / (2 * stats.norm.ppf(0.975))
    return -goal.margin - mean, error if error < math.inf else 0.0


def violation(goal, measured, baseline, likely=0.5):
    """How far a setting is beyond the bound at most, with a probability of `likely`; 0.5 is the best estimate."""
    beyond, error = _of_bound(goal, measured, baseline)
    return beyond + stats.norm.ppf(likely) * error


def chance(goal, measured, baseline):
    """The probability that a setting is within the bound, by the confidence interval of its difference."""
    beyond, error = _of_bound(goal, measured, baseline)
    return float(stats.norm.cdf(-beyond, scale=max(error, 1e-12)))


def is_lost(goal, measured, baseline, rivals):
    """Whether a setting has lost its race for the front, by confidence intervals: it misses the bound, or a rival is no
    worse in every objective."""
    if difference(measured, baseline, goal.bound, level=RACING)[2] < -goal.margin:
        return True
    for rival in rivals:
        changes = [difference(measured, rival, key, level=RACING) for key in goal.keys]
        if all(
            change is not None and min(sign * change[1], sign * change[2]) >= 0
            for sign, change in zip(goal.signs(), changes, strict=True)
        ):
            return True
    return False


def front(points):
    """Indices of the points [(loss, …)] that no other beats: no worse in all and better in one; equal ones once."""
    kept = []
    for i, p in enumerate(points):
        beaten = any(
            all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or j < i) for j, q in enumerate(points) if j != i
        )
        if not beaten:
            kept.append(i)
    return kept


def hypervolume(points, corner):
    """The area that points [(loss, loss)] dominate up to `corner`."""
    area, floor = 0.0, corner[1]
    for x, y in sorted(points):
        if x < corner[0] and y < floor:
            area += (corner[0] - x) * (floor - y)
            floor = y
    return area


def best(points, corner, count=3):
    """Indices of up to `count` points of the front that together dominate most, the one that does most first.

    corner: the baseline's losses. Points that do not improve on it in both objectives come last, nearest first.
    """
    chosen, left = [], front(points)
    scale = [abs(c) or 1.0 for c in corner]
    while left and len(chosen) < count:

        def gain(i):
            area = hypervolume([points[j] for j in [*chosen, i]], corner)
            return area, -sum(max(0.0, (a - c) / s) for a, c, s in zip(points[i], corner, scale, strict=True))

        winner = max(left, key=gain)
        chosen.append(winner)
        left.remove(winner)
    return chosen

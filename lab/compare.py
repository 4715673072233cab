"""Is one setting better than another? Ratios of distances with their intervals, paired by seed.

Settings that are compared sample the same noise and the same classes: what a lucky seed gives to one, it mostly gives
to the other too. To first order the logarithm of a ratio a / b moves with sample i by a_i / a - b_i / b, where a_i and
b_i are its influences (`scores.judge_samples`); the interval is that of this difference
(`metrics.influence_interval`). As with a distance, it covers the expectation at this number of images; with more of
them a ratio lies further from 1.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from ..measure.metrics import influence_interval

JUDGES = {"fd": 0, "class_fd": 1}  # Rows of the influence; row 2 is that of accuracy.
ACCURACY = 2


@dataclass(frozen=True)
class Ratio:
    """A ratio of distances and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def below(self):
        """Whether the ratio is below 1: "yes", "no", or "unclear" when the interval holds 1."""
        return "yes" if self.high < 1 else "no" if self.low > 1 else "unclear"

    def __str__(self):
        """The change in percent, like -31 % [-38, -24]."""
        value, low, high = (f"{100 * (r - 1):+.0f}" for r in (self.value, self.low, self.high))
        return f"{value} % [{low}, {high}]"


def ratio(a, b, judge="fd", labels=None):
    """The `Ratio` of the distance of `a` over that of `b`, each (Scores, influence [3, N]), of the same seeds.

    labels: int64 [N] to resample within, see `metrics.influence_interval`.
    """
    return _ratio(_log(a, judge), _log(b, judge), labels)


@dataclass(frozen=True)
class Against:
    """A curve over another at equal accuracy. average: the geometric mean `Ratio`; at: [(weight, `Ratio`)] of each."""

    average: Ratio
    at: list

    @property
    def highest(self):
        return max(self.at, key=lambda found: found[1].value)

    @property
    def dominates(self):
        """ "yes" when the average lies below 1 and no weight above it, "no" when one does, else "unclear"."""
        if any(r.below == "no" for _, r in self.at):
            return "no"
        return "yes" if self.average.below == "yes" else "unclear"


def against(limited, curve, judge="fd", labels=None):
    """`Against` of the weights of `limited`, {weight: (Scores, influence)}, with an accuracy that `curve` has too.

    Of weights that another one of `limited` beats in accuracy and distance nobody would choose any: they are left out.
    Between two weights of `curve`, whose accuracies must differ clearly, accuracy is taken as linear and the distance
    as exponential; the uncertainty of the accuracies is part of the confidence interval. None when no weight is left.
    The average is over these weights.
    """
    chosen = front({w: (scores.accuracy, getattr(scores, judge)) for w, (scores, _) in limited.items()})
    limited = {w: judged for w, judged in limited.items() if w in chosen}
    pairs = {w: (_log(judged, judge), _at_equal_accuracy(judged, curve, judge)) for w, judged in limited.items()}
    pairs = {w: (a, b) for w, (a, b) in pairs.items() if b is not None}
    if not pairs:
        return None
    sides = zip(*pairs.values(), strict=True)
    means = [(sum(log for log, _ in side) / len(pairs), sum(moved for _, moved in side) / len(pairs)) for side in sides]
    return Against(_ratio(*means, labels), [(w, _ratio(a, b, labels)) for w, (a, b) in pairs.items()])


def front(points):
    """The keys of `{key: (accuracy, distance)}` that no other one beats in both, from the least accurate on."""
    best, keys = math.inf, []
    for key in sorted(points, key=lambda k: (-points[k][0], points[k][1])):
        if points[key][1] < best:
            best = points[key][1]
            keys.append(key)
    return keys[::-1]


def _at_equal_accuracy(limited, curve, judge):
    """`_log` of the lowest distance of the curve with the accuracy of `limited` or more; None if it has none."""
    scores, moved = limited
    found = [_log(judged, judge) for judged in curve if judged[0].accuracy >= scores.accuracy]
    for a, b in itertools.pairwise(curve):
        low, high = a[0].accuracy, b[0].accuracy
        differing = (b[1][ACCURACY] - a[1][ACCURACY]).double()
        error = differing.std(correction=0).item() / math.sqrt(max(1, len(differing)))
        if abs(high - low) <= 2 * error or not min(low, high) <= scores.accuracy <= max(low, high):
            continue
        t = (scores.accuracy - low) / (high - low)
        (log_a, moved_a), (log_b, moved_b) = _log(a, judge), _log(b, judge)
        step = (moved[ACCURACY] - (1 - t) * a[1][ACCURACY] - t * b[1][ACCURACY]).double() / (high - low)
        found.append(((1 - t) * log_a + t * log_b, (1 - t) * moved_a + t * moved_b + (log_b - log_a) * step))
    return min(found, key=lambda f: f[0]) if found else None


def _log(judged, judge):
    """The logarithm of a distance, and what each sample moves it by, float64 [N]."""
    scores, moved = judged
    value = getattr(scores, judge)
    return math.log(value), moved[JUDGES[judge]].double() / value


def _ratio(a, b, labels):
    (log_a, moved_a), (log_b, moved_b) = a, b
    value = torch.tensor(log_a - log_b, dtype=torch.float64)
    low, high = influence_interval(value, moved_a - moved_b, labels)
    return Ratio(math.exp(value), math.exp(low), math.exp(high))

"""Which setting a study tries next.

Few images leave open what a setting is worth and where the bound lies. A Gaussian process for each metric, which knows
the standard errors, tells what may be true. In each draw of it the front is another one; the next setting is the one
that adds most to its area, on average over the draws. This is the noisy expected hypervolume improvement of Daulton,
Balandat and Bakshy (NeurIPS 2021, arXiv 2105.08195), with a bound, over settings drawn at random.
"""

import math

import numpy as np
import optuna
from optuna.trial import TrialState
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from . import objectives
from .servers.backend import Setting

STARTUP = 13  # Trials before the first that is not drawn at random.
# Over the coordinates. A smoother one is too sure of what lies between and beyond.
KERNEL = Matern([0.5, 0.5, 0.4], "fixed", nu=1.5)
CANDIDATES, KEPT, DRAWS = 4096, 400, 1024
SHRINK = 4  # Blocks that the usual variance is worth: that of four blocks alone says little.


def to_setting(values):
    """The Setting of `{sigma_lo, sigma_hi, weight}`, rounded to what is pasted: what is measured is what is told."""
    lo, hi = sorted(float(f"{values[k]:.3g}") for k in ("sigma_lo", "sigma_hi"))
    return Setting(lo, hi if lo < hi else float(f"{1.05 * hi:.3g}"), float(f"{values['weight']:.3g}"))


class IntervalSampler(optuna.samplers.BaseSampler):
    """Optuna's sampler of one `study.Search`."""

    def __init__(self, search, seed):
        self.search, self.rng = search, np.random.default_rng(seed)
        self.independent = optuna.samplers.RandomSampler(seed)

    def infer_relative_search_space(self, study, trial):
        return {k: optuna.distributions.FloatDistribution(*ends, log=True) for k, ends in self.search.ranges.items()}

    def sample_independent(self, study, trial, name, distribution):
        return self.independent.sample_independent(study, trial, name, distribution)

    def sample_relative(self, study, trial, search_space):
        search = self.search
        if "fixed_params" in trial.system_attrs or len(search.results()) < STARTUP:
            return {}
        low, high = np.array(list(search.ranges.values())).T
        drawn = np.clip(low * (high / low) ** self.rng.random((CANDIDATES, len(low))), low, high)
        params = [dict(zip(search.ranges, map(float, values), strict=True)) for values in drawn]
        running = [search.setting_of(t) for t in search.trials(TrialState.RUNNING) if "setting" in t.user_attrs]
        best = most_promising(search.belief(), running, [to_setting(p) for p in params], self.rng)
        return {} if best is None else params[best]


class Belief:
    """What all trials together tell of the true differences to the baseline.

    goal: `objectives.Goal` of two keys; baseline: what it measured; done: `[(Setting, measured)]`; ranges: the ends
    `{name: (low, high)}` of the space; sigmas: see `servers/backend.py`.
    """

    def __init__(self, goal, baseline, done, ranges, sigmas):
        self.goal, self.ranges, self.sigmas, self.rows = goal, ranges, sigmas, baseline.get("rows")
        self.settings = [setting for setting, _ in done]
        x, self.processes, self.luck = self.at(self.settings), {}, {}
        for key in (k for k in (*goal.keys, goal.bound) if k != "rows"):
            changes = [objectives.paired(measured, baseline, key).numpy() for _, measured in done]
            usual = usual_variance(changes)
            self.processes[key] = fit(x, changes, usual)
            # All have the prompts and seeds of the baseline in common, and what is lucky in them.
            self.luck[key] = math.sqrt(usual / objectives.num_blocks(baseline))

    def at(self, settings):
        """float64 [N, 3]"""
        return np.array([coordinates(s, self.ranges, self.sigmas) for s in settings])

    def expected(self, x):
        """`{key: (mean [N], standard deviation [N])}` at x [N, 3]."""
        found = {}
        for key, process in self.processes.items():
            mean, deviation = process.predict(x, return_std=True)
            found[key] = mean, np.hypot(deviation, self.luck[key])
        if "rows" in self.goal.keys:
            found["rows"] = self._more_rows(x), np.zeros(len(x))
        return found

    def _more_rows(self, x):
        """Than the baseline's: known without any image."""
        return len(self.sigmas) * (1 + x[:, 1] - x[:, 0]) - np.mean(self.rows)

    def draw(self, x, rng):
        """`{key: [DRAWS, N]}`: what may be true at x."""
        found = {}
        for key, process in self.processes.items():
            mean, covariance = process.predict(x, return_cov=True)
            root = np.linalg.cholesky(covariance + (1e-6 * covariance.diagonal().max() + 1e-300) * np.eye(len(x)))
            luck = self.luck[key] * rng.standard_normal((DRAWS, 1))
            found[key] = mean + rng.standard_normal((DRAWS, len(x))) @ root.T + luck
        if "rows" in self.goal.keys:
            found["rows"] = np.tile(self._more_rows(x), (DRAWS, 1))
        return found

    def told(self, settings, likely):
        """`(losses [N, 2], beyond [N])`: how far beyond the bound each is at most, with a probability of `likely`.

        Losses are relative to the baseline's.
        """
        expected = self.expected(self.at(settings))
        mean, deviation = expected[self.goal.bound]
        losses = [sign * expected[key][0] for key, sign in zip(self.goal.keys, self.goal.signs(), strict=True)]
        return np.stack(losses, 1), -self.goal.margin - mean + stats.norm.ppf(likely) * deviation


def most_promising(belief, running, candidates, rng):
    """The index of the candidate that is expected to add most to the front, or None if none adds anything.

    running: the settings that others are at, which count as tried.
    """
    goal, x = belief.goal, belief.at(candidates)
    # First the few that may be worth it, by what is probable of each alone.
    expected = belief.expected(x)
    mean, deviation = expected[goal.bound]
    score = stats.norm.cdf((mean + goal.margin) / np.maximum(deviation, 1e-12))
    for key, sign in zip(goal.keys, goal.signs(), strict=True):
        mean, deviation = expected[key]
        score = score * np.maximum(deviation - sign * mean, 0)
    kept = np.argsort(-score)[:KEPT]

    tried = belief.at(belief.settings + running)
    drawn = belief.draw(np.concatenate([tried, x[kept]]), rng)
    within = drawn[goal.bound] >= -goal.margin
    losses = np.stack([sign * drawn[key] for key, sign in zip(goal.keys, goal.signs(), strict=True)], axis=-1)
    n, gained = len(tried), np.zeros(len(kept))
    for points, fits in zip(losses, within, strict=True):
        gained += gains(points[:n][fits[:n]], points[n:], (0.0, 0.0)) * fits[n:]
    return int(kept[gained.argmax()]) if gained.any() else None


def coordinates(setting, ranges, sigmas):
    """`[start, end, weight]` of what a setting guides, each from 0 to 1 in the space: over the steps of a schedule,
    or where nobody tells `sigmas` over the logarithm of the noise level; the weight's logarithm."""
    start = end = 0.5
    weight = 1.0
    if sigmas is None:
        if not setting.conditional_only:
            low, high = np.log(ranges["sigma_lo"][0]), np.log(ranges["sigma_hi"][1])
            levels = np.log(np.maximum([setting.sigma_hi, setting.sigma_lo], np.exp(low)))
            start, end = np.clip((high - levels) / (high - low), 0, 1)
            weight = setting.weight
    elif not setting.conditional_only:
        guided = setting.interval.mask(sigmas).nonzero()[:, 0]
        if len(guided):
            start, end = guided[0].item() / len(sigmas), (guided[-1].item() + 1) / len(sigmas)
            weight = setting.weight
    low, high = np.log(ranges["weight"])
    return [start, end, (np.log(weight) - low) / (high - low)]


def usual_variance(changes):
    """Of one block's difference to the baseline."""
    return float(np.median([c.var(ddof=1) for c in changes if len(c) > 1 and c.any()] or [0.0]))


def fit(x, changes, usual):
    """The Gaussian process of the true values at x [N, 3], of which `changes`, [blocks] each, are noisy.

    usual: their `usual_variance`.
    """
    values = np.array([c.mean() for c in changes])
    counts = np.array([len(c) for c in changes])
    variances = ((counts - 1) * [c.var(ddof=1) if len(c) > 1 else 0.0 for c in changes]
                 + SHRINK * usual) / (counts - 1 + SHRINK)  # fmt: skip
    known = [not c.any() for c in changes]  # The baseline's difference to itself.
    errors = np.where(known, 0.0, variances / counts)
    scale = values.std() or 1.0
    process = GaussianProcessRegressor(KERNEL, alpha=errors / scale**2 + 1e-6, optimizer=None, normalize_y=True)
    return process.fit(x, values)


def gains(points, candidates, corner):
    """What each of the candidates [M, 2] adds to the area that points [N, 2] dominate up to `corner`; losses."""
    points = points[points[:, 0].argsort()]
    starts = np.concatenate([[-np.inf], points[:, 0]])
    ends = np.minimum(np.concatenate([points[:, 0], [np.inf]]), corner[0])
    floors = np.minimum.accumulate(np.concatenate([[corner[1]], points[:, 1]]))
    x, y = candidates.T
    widths = np.maximum(ends[:, None] - np.maximum(starts[:, None], x), 0)
    return (widths * np.maximum(floors[:, None] - y, 0)).sum(0)

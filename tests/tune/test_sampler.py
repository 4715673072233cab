"""Which setting is tried next: what all noisy trials together tell."""

import itertools
import math

import numpy as np
import pytest
import torch
from guidance_interval.tune import objectives, sampler, study
from guidance_interval.tune.servers.backend import Setting, everywhere
from tune_harness import GRIDS, Painter


@pytest.mark.parametrize("points", GRIDS)
def test_what_a_candidate_adds_is_the_difference_of_the_areas(points):
    candidates = [(a + 0.5, b - 0.5) for a, b in itertools.product(range(-1, 7), repeat=2)]
    added = sampler.gains(np.array(points, dtype=float), np.array(candidates), (5.0, 5.0))
    before = objectives.hypervolume(points, (5, 5))
    expected = [objectives.hypervolume([*points, c], (5, 5)) - before for c in candidates]
    np.testing.assert_allclose(added, expected, atol=1e-12)
    assert sampler.gains(np.zeros((0, 2)), np.array([[1.0, 2.0]]), (5.0, 5.0)) == [12.0]


def test_settings_are_alike_that_guide_the_same_steps():
    ranges, sigmas = study.space(Painter()), Painter.sigmas

    def at(lo, hi, weight, known=sigmas):
        return sampler.coordinates(Setting(lo, hi, weight), ranges, known)

    assert (
        at(0.15, 1.5, 4.0)
        == at(0.18, 1.9, 4.0)
        == [3 / 7, 6 / 7, pytest.approx(math.log(4 / 1.75) / math.log(10 / 1.75))]
    )
    assert at(0.0, math.inf, 10.0) == [0, 1, pytest.approx(1)]
    assert at(6.0, 7.0, 4.0) == at(1.2, 1.3, 9.0) == sampler.coordinates(study.CONDITIONAL, ranges, sigmas)
    assert at(0.15, 1.5, 4.0, None) != at(0.18, 1.9, 4.0, None)  # Where nobody tells the steps.
    assert at(0.0, math.inf, 1.75, None) == [0, 1, pytest.approx(0)]
    assert all(0 <= v <= 1 for v in at(0.15, 1.5, 4.0, None))


def test_the_next_setting_is_at_the_bound_that_many_noisy_trials_tell(monkeypatch):
    """Adherence is 2 (weight - 4) below CFG's 0 at -3, and a lower weight is more variety: 2.5 is at the bound."""
    draw, steps, ranges = (
        np.random.default_rng(0),
        4,
        {"sigma_lo": (0.1, 3.0), "sigma_hi": (1.0, 10.0), "weight": (1.0, 8.0)},
    )
    goal = objectives.Goal(("rows",), ("variety",), "adherence", 3.0)
    baseline = {"adherence": [0.0] * 64, "variety": [0.0] * 64, "rows": [2.0 * steps] * 64}
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0])

    def rendered(setting, first):
        truth = {"adherence": 2 * (setting.weight - 4), "variety": 0.4 * (4 - setting.weight)}
        noisy = {k: (v + draw.normal(0, s, 16)).tolist() for (k, v), s in zip(truth.items(), (6, 0.5), strict=True)}
        return {**noisy, "blocks": [*range(first, first + 16)], "rows": [setting.rows(sigmas)] * 16}

    settings = [Setting(0.5, 3.0, w) for w in draw.uniform(1, 8, 40).round(2)]
    done = [(everywhere(4.0), baseline), *((s, rendered(s, 16 * (i % 4))) for i, s in enumerate(settings))]
    candidates = [Setting(0.5, 3.0, w) for w in np.linspace(1.05, 7.95, 70)] + [Setting(0.5, math.inf, 2.5)] * 5
    belief = sampler.Belief(goal, baseline, done, ranges, sigmas)
    chosen = [
        candidates[sampler.most_promising(belief, [], candidates, np.random.default_rng(seed))] for seed in range(5)
    ]
    assert all(1.5 < s.weight < 3.5 and s.sigma_hi == 3.0 for s in chosen)
    monkeypatch.setattr(sampler, "KEPT", 3)  # Of the 75, and none of them needless.
    few = [candidates[sampler.most_promising(belief, [], candidates, np.random.default_rng(seed))] for seed in range(5)]
    assert all(1.5 < s.weight < 3.5 and s.sigma_hi == 3.0 for s in few)
    monkeypatch.undo()
    # What runs counts as done: elsewhere then.
    busy = [chosen[0]] * 3
    assert candidates[sampler.most_promising(belief, busy, candidates, np.random.default_rng(0))] != chosen[0]
    worse = [everywhere(4.0), Setting(0.0, math.inf, 8.0)]
    assert sampler.most_promising(belief, [], worse, np.random.default_rng(0)) is None
    # And what is within the bound is told by all of them: each alone is off by 1.5.
    losses, beyond = belief.told([Setting(0.5, 3.0, w) for w in (1.5, 2.0, 3.5, 4.0)], 0.5)
    assert np.allclose(losses[:, 0], -2) and np.allclose(losses[:, 1], [-1.0, -0.8, -0.2, 0.0], atol=0.2)
    assert np.allclose(beyond, [2.0, 1.0, -2.0, -3.0], atol=1)
    assert all(belief.told([Setting(0.5, 3.0, 2.0)], 0.75)[1] > beyond[1])


def test_the_luck_that_all_share_moves_all_together():
    draw, settings = np.random.default_rng(0), [everywhere(4.0), *(Setting(0.15, 1.5, w) for w in (2.0, 3.0, 5.0, 6.0))]
    goal = objectives.Goal(("seconds",), ("variety",), "adherence", 3.0)
    base = {k: [0.0] * 64 for k in ("adherence", "variety", "seconds")}
    rest = [{k: draw.normal(0, 8, 16).tolist() for k in base} for _ in settings[1:]]
    belief = sampler.Belief(goal, base, list(zip(settings, [base, *rest], strict=True)), study.space(Painter()), None)
    assert belief.luck["adherence"] == pytest.approx(8 / 64**0.5, rel=0.3)
    belief.luck = dict.fromkeys(belief.luck, 0.0)
    x = belief.at(settings)
    alone = belief.draw(x, np.random.default_rng(0))["adherence"]
    assert alone[:, 0].std() < 0.05 < alone[:, 1].std()  # The baseline's difference to itself is known.
    belief.luck = dict.fromkeys(belief.luck, 9.0)
    together = belief.draw(x, np.random.default_rng(0))["adherence"]
    assert np.cov(together.T)[np.triu_indices(5)].min() > 70 and "rows" not in belief.expected(x)
    assert belief.expected(x)["adherence"][1][0] == pytest.approx(9, rel=0.01)

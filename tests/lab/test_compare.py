"""Ratios of distances: what their intervals cover, and what is said of them."""

import math

import numpy as np
import pytest
import torch
from guidance_interval.lab import compare, scores, sweep
from guidance_interval.measure.metrics import frechet_distance

DIM = 8
REAL = torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)


def judged(features, right=None):
    fd, moved = frechet_distance(features, *REAL, influence=True)
    right = torch.zeros(len(features), dtype=torch.float64) if right is None else right.double()
    value = scores.Scores(fd.item(), 0.0, 0.0, right.mean().item(), 1.0, 2 * fd.item(), 0.0, 0.0)
    return value, torch.stack([moved, 2 * moved, right - right.mean()]).float()


def pair(generator, n=400, spread=0.3):
    """Two settings whose samples share most of their noise: the first is off by less."""
    noise = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    own = spread * torch.randn(2, n, DIM, generator=generator, dtype=torch.float64)
    return judged(noise + own[0] + 0.4), judged(noise + own[1] + 0.5)


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    found = [compare.ratio(*pair(generator)) for _ in range(200)]
    true = np.exp(np.mean([math.log(r.value) for r in found]))
    assert 0.89 <= np.mean([r.low <= true <= r.high for r in found]) <= 0.99
    assert np.mean([r.below == "yes" for r in found]) > 0.9


def test_pairs_say_more_than_sets_of_their_own():
    generator = torch.Generator().manual_seed(0)
    a, b = pair(generator)
    shuffled = b[0], b[1][:, torch.randperm(400, generator=generator)]
    width = lambda r: math.log(r.high / r.low)  # noqa: E731
    assert width(compare.ratio(a, b)) < 0.6 * width(compare.ratio(a, shuffled))


def test_a_setting_against_itself_is_the_same_and_unclear():
    a, _ = pair(torch.Generator().manual_seed(0))
    same = compare.ratio(a, a)
    assert same == compare.Ratio(1.0, 1.0, 1.0) and same.below == "unclear"
    assert str(compare.Ratio(0.69, 0.62, 0.76)) == "-31 % [-38, -24]"
    assert compare.Ratio(1.2, 1.1, 1.3).below == "no"


def test_each_judge_has_its_own_ratio():
    a, b = pair(torch.Generator().manual_seed(0))
    doubled = scores.Scores(*[*vars(b[0]).values()][:5], 4 * b[0].fd), b[1] * torch.tensor([[1.0], [2.0], [1.0]])
    assert compare.ratio(a, doubled, "class_fd").value == pytest.approx(compare.ratio(a, b).value / 2)


def at_equal_accuracy(limited, curve):
    found = compare.against({1.0: limited}, curve)
    return found and found.average


def test_at_equal_accuracy_the_curve_is_interpolated():
    """Halfway in accuracy lies the geometric mean of the distances; its interval holds the accuracies' too."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, DIM, generator=generator, dtype=torch.float64)
    draws = torch.rand(500, generator=generator)
    low, high, limited = (
        judged(noise + shift, draws < share) for shift, share in ((0.3, 0.6), (0.8, 0.9), (0.4, 0.75))
    )
    t = (limited[0].accuracy - low[0].accuracy) / (high[0].accuracy - low[0].accuracy)
    expected = limited[0].fd / (low[0].fd ** (1 - t) * high[0].fd ** t)
    found = at_equal_accuracy(limited, [low, high])
    assert found.value == pytest.approx(expected)
    at_the_weight = compare.ratio(limited, low)
    assert math.log(found.high / found.low) > math.log(at_the_weight.high / at_the_weight.low)
    assert at_equal_accuracy(limited, [low, low]) is None  # The curve never has that accuracy.


@pytest.mark.parametrize(("apart", "interpolated"), [(0.49, False), (0.5, False), (0.51, True)])
def test_the_curve_is_interpolated_where_two_accuracies_differ_by_more_than_two_errors(apart, interpolated):
    """Of 16 pairs that differ by +1 or -1 the error is a quarter."""
    right = torch.tensor([1.0, -1.0] * 8)

    def point(fd, accuracy, moved):
        return scores.Scores(fd, 0.0, 0.0, accuracy, 1.0, fd, 0.0, 0.0), torch.stack([0 * right, 0 * right, moved])

    low, high = point(1.0, 0.5 - apart / 2, 0 * right), point(4.0, 0.5 + apart / 2, right)
    found = at_equal_accuracy(point(2.0, 0.5, 0 * right), [low, high])
    assert found.value == pytest.approx(1.0 if interpolated else 0.5)  # Else the curve's weight of more accuracy.


def cloud(shift, share, generator, noise=None):
    noise = torch.randn(2000, DIM, generator=generator, dtype=torch.float64) if noise is None else noise
    return judged(noise + shift, torch.linspace(0, 1, len(noise)) < share)


def test_a_curve_below_another_dominates_and_one_weight_above_is_enough_to_lose():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, DIM, generator=generator, dtype=torch.float64)
    points = lambda *pairs: [cloud(shift, share, generator, noise) for shift, share in pairs]  # noqa: E731
    cfg = points((0.2, 0.5), (0.4, 0.7), (0.8, 0.9))
    lower, crossing = points((0.25, 0.6), (0.5, 0.8)), points((0.25, 0.6), (0.9, 0.8))
    won = compare.against({2.0: lower[0], 3.0: lower[1]}, cfg)
    assert won.dominates == "yes" and [w for w, _ in won.at] == [2.0, 3.0]
    ratios = [at_equal_accuracy(judged, cfg).value for judged in lower]
    assert won.average.value == pytest.approx(math.prod(ratios) ** 0.5)
    lost = compare.against({2.0: crossing[0], 3.0: crossing[1]}, cfg)
    assert lost.dominates == "no" and lost.highest[0] == 3.0
    assert compare.against({1.0: cfg[1]}, cfg).dominates == "unclear"
    assert compare.against({4.0: points((0.1, 0.95))[0]}, cfg) is None  # More accuracy than CFG ever has.


def test_a_weight_that_another_beats_in_both_is_not_compared_nor_is_a_worse_branch_of_the_curve():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, DIM, generator=generator, dtype=torch.float64)
    points = lambda *pairs: [cloud(shift, share, generator, noise) for shift, share in pairs]  # noqa: E731
    cfg = points((0.6, 0.5), (0.3, 0.7), (0.8, 0.9))  # Falling first: nobody would take its first weight.
    a, b = points((0.3, 0.6), (0.7, 0.6))
    found = compare.against({2.0: a, 3.0: b}, cfg)
    assert [w for w, _ in found.at] == [2.0]
    assert found.average.value == pytest.approx(compare.ratio(a, cfg[1]).value)


def test_a_sweep_keeps_what_moves_its_scores(tmp_path):
    moved = torch.randn(3, 20)
    cell = sweep.Cell(2.0, 0.1, 2.5)
    with sweep.Store(tmp_path / "x.sqlite", {"model": "a"}) as store:
        store.add([cell], sweep.Measured(scores.Scores(1.0, 0.9, 1.1, 0.5, 1.0), 20.0, 1.0, moved))
    with sweep.Store(tmp_path / "x.sqlite", {"model": "a"}) as store:
        kept = store.results()[cell]
    assert torch.equal(kept.influence, moved) and kept.judged[0].fd == 1.0 and math.isnan(kept.scores.class_fd)

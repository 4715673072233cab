"""What is measured of a setting, and how two settings are compared."""

import itertools

import pytest
import torch
from guidance_interval.measure.metrics import cmmd
from guidance_interval.tune import objectives
from guidance_interval.tune.objectives import SEEDS
from PIL import Image
from tune_harness import GRIDS, Eye, measured


@pytest.mark.parametrize("points", GRIDS)
def test_the_front_and_its_area_are_those_of_counting(points):
    kept = {points[i] for i in objectives.front(points)}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == set(points) - beaten and len(objectives.front(points)) == len(kept)
    cells = sum(any(x >= p[0] and y >= p[1] for p in points) for x, y in itertools.product(range(6), repeat=2))
    assert objectives.hypervolume(points, (6, 6)) == cells
    order = objectives.best(points, (6, 6))
    areas = {c: objectives.hypervolume([points[i] for i in c], (6, 6))
             for c in itertools.combinations(objectives.front(points), 1)}  # fmt: skip
    assert objectives.hypervolume([points[order[0]]], (6, 6)) == max(areas.values())


@pytest.mark.parametrize("blocks", [4, 8, 30])
def test_intervals_of_few_blocks_cover(blocks):
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        _, low, high = objectives.estimate(torch.randn(blocks, generator=generator, dtype=torch.float64))
        held += low <= 0 <= high
    assert 0.92 <= held / 300 <= 0.98


def test_a_setting_with_fewer_blocks_counts_as_if_it_had_the_baselines():
    baseline, ours = measured([10.0, 20.0, 60.0]), measured([12.0, 23.0])
    assert objectives.difference(ours, baseline, "adherence")[0] == 2.5
    assert objectives.value(ours, baseline, "adherence")[0] == 32.5  # 30 of all, and not 17.5 of the easier ones.
    assert objectives.value(baseline, baseline, "adherence")[0] == 30


def test_settings_are_compared_over_the_blocks_that_both_have():
    baseline, ours = measured([10.0, 20.0, 60.0, 80.0]), measured([21.0, 62.0], first=1)
    assert objectives.paired(ours, baseline, "adherence").tolist() == [1.0, 2.0]
    assert objectives.value(ours, baseline, "adherence")[0] == 42.5 + 1.5
    other = measured([66.0, 80.0], first=2)
    assert objectives.paired(other, ours, "adherence").tolist() == [4.0]
    assert objectives.difference(measured([1.0], first=3), ours, "adherence") is None
    back = {**measured([80.0, 10.0]), "blocks": [3, 0]}  # From the end on to the beginning.
    assert objectives.paired(back, baseline, "adherence").tolist() == [0.0, 0.0]


def test_colour_drift_is_the_distance_to_conditional_only():
    ours, conditional = measured([1.0], [5.0, 1.0, 3.0, 3.0]), measured([1.0], [3.0, 3.0, 3.0, 3.0])
    assert objectives.value(ours, ours, "drift", conditional)[0] == 1.0
    assert objectives.value(ours, ours, "drift") is None
    two = measured([1.0, 1.0], [9.0] * 4 + [5.0, 1.0, 3.0, 3.0])
    only = {**conditional, "blocks": [1]}  # Conditional only has a part of the blocks.
    assert objectives.contributions(two, "drift", objectives.known(two, "drift", only), only).tolist() == [1.0]
    assert objectives.value(two, two, "drift", only)[0] == 1.0
    assert objectives.value(ours, two, "drift", only) is None  # None of its blocks.


def test_a_distance_is_compared_at_equal_numbers_of_images():
    generator = torch.Generator().manual_seed(0)
    images = [Image.fromarray(p.numpy()) for p in torch.randint(0, 255, [16, 4, 4, 3], generator=generator).byte()]
    reference = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    judge = Eye(reference)
    parts = [(5, 6), (6, 7), (7, 5)]
    found = objectives.measure(judge, images, [""] * 16, [1.0] * 16, [1.0] * 16, [4, 5, 6, 7], [*parts, (7, 8)])
    for part in [*parts, (4, 5, 6, 7)]:
        features, _ = judge.measure([images[(b - 4) * SEEDS + k] for b in part for k in range(SEEDS)], None)
        contributed = objectives.contributions(found, "distance", part)
        torch.testing.assert_close(contributed.mean(), cmmd(features, reference))
    assert objectives.contributions(found, "distance", (4, 5)) is None
    assert len(found["distance"]) == 4  # (7, 8) was not rendered.


def test_a_trial_is_lost_when_its_intervals_say_so_and_not_before():
    goal = objectives.Goal(("seconds",), ("variety",), "adherence", 5.0)
    generator = torch.Generator().manual_seed(0)

    def made(adherence, variety, seconds):
        noise = torch.randn(2, 8, generator=generator).double()
        return {**measured((adherence + noise[0]).tolist()), "variety": (variety + 0.1 * noise[1]).tolist(),
                "seconds": [seconds] * 8}  # fmt: skip

    baseline, rival = made(50, 1, 2), made(50, 2, 1)
    assert objectives.is_lost(goal, made(40, 3, 1), baseline, [])
    assert not objectives.is_lost(goal, made(45, 3, 1), baseline, [])
    assert objectives.is_lost(goal, made(50, 1, 1.5), baseline, [rival])
    assert not objectives.is_lost(goal, made(50, 1, 0.5), baseline, [rival])
    assert not objectives.is_lost(goal, made(50, 2, 1), baseline, [rival])

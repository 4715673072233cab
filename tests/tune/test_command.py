"""The tuner without a server: what it measures, how it searches, what survives a kill, what is refused, presets."""

import base64
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import optuna
import pytest
import torch
from guidance_interval import cli, presets
from guidance_interval.a1111 import settings as a1111_settings
from guidance_interval.errors import UserError
from guidance_interval.interval_text import CONDITIONAL_ONLY
from guidance_interval.measure.metrics import cmmd
from guidance_interval.tune import command, confirm, objectives, sampler, study
from guidance_interval.tune.images import Images
from guidance_interval.tune.judges import clip
from guidance_interval.tune.objectives import SEEDS
from guidance_interval.tune.servers import webui
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Refused, Rendered, Setting, everywhere
from guidance_interval.tune.view import Quiet, View
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console

PROMPTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture(autouse=True)
def _own_presets(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "presets.toml"))


class Painter:
    """A backend whose images are one colour: red is adherence, green and blue are drawn by the seed."""

    host, source, workers, weight, identity = "painter", "painter", 0, 4.0, {}
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1])

    def __init__(self, refuses=lambda setting: False, before=lambda job: None):
        self.jobs, self.refuses, self.before = [], refuses, before

    def render(self, jobs):
        for i, job in enumerate(jobs):
            self.before(job)
            if self.refuses(job.setting):
                raise Refused("CUDA out of memory")
            self.jobs.append(job)
            yield i, Rendered(self.paint(job), job.setting.rows(self.sigmas), 0.1)

    def paint(self, job):
        guided = job.setting.rows(self.sigmas) - len(self.sigmas)
        draw = random.Random(job.seed)
        red = 60 + 9 * guided * (job.setting.weight > 1) * min(job.setting.weight, 10) / 4 + draw.uniform(-5, 5)
        spread = 100 / max(1, guided)
        other = [128 + draw.uniform(-spread, spread) for _ in range(2)]
        return Image.new("RGB", (4, 4), tuple(round(min(255, max(0, v))) for v in (red, *other)))

    def describe(self):
        return ["a painter"]

    @staticmethod
    def paste(setting):
        return {"comfyui": {}, "a1111": ""}


class Eye:
    adherence, margin, digits, distance_name, identity = "red", 5.0, 1, "distance", "eye"

    def __init__(self, reference=None):
        self.reference = reference

    def check(self, prompts):
        pass

    look = check

    def measure(self, images, prompts):
        pixels = torch.tensor(np.stack([np.asarray(i)[0, 0] for i in images]), dtype=torch.float64)
        return pixels[:, 1:] / 50, pixels[:, 0]

    def distance(self, features):
        return cmmd(features, self.reference, influence=True)


def make_search(tmp_path, backend=None, trials=8, images=16, judge=None, out="out", storage=None, prompts=PROMPTS):
    plan = study.make_plan("s", prompts, trials, images, 0, confirm_images=16, screen=8)
    storage = study.open_storage(storage or f"sqlite:///{tmp_path / 's.db'}")
    return study.Search(plan, backend or Painter(), judge or Eye(), storage, tmp_path / out, Quiet())


def settings_of(trials):
    return [tuple(t.user_attrs["setting"]) for t in trials]


# ----------------------------------------------------------------------------
# Objectives.

grids = [[(a, b) for a, b in zip(*[random.Random(s).choices(range(6), k=7) for s in (s, s + 99)], strict=True)]
         for s in range(30)]  # fmt: skip


@pytest.mark.parametrize("points", grids)
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


def measured(adherence, saturation=None, first=0):
    blocks = len(adherence)
    return {
        "blocks": [*range(first, first + blocks)],
        "adherence": adherence,
        "variety": [1.0] * blocks,
        "seconds": [1.0] * blocks,
        "saturation": saturation or [0.0] * blocks * SEEDS,
    }


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


# ----------------------------------------------------------------------------
# The plan.


def test_the_confirmation_has_prompts_and_seeds_that_the_search_never_saw():
    plan = study.make_plan("s", PROMPTS, 10, 32, 0)
    searched, confirmed = ([(b.text, s) for b in part for s in b.seeds] for part in (plan.search, plan.confirm))
    assert not {p for p, _ in searched} & {p for p, _ in confirmed} and plan.fresh_prompts
    seeds = [s for _, s in searched + confirmed]
    assert len(set(seeds)) == len(seeds) == study.MORE * 32 + 64 and max(seeds) < 2**32
    assert plan == study.make_plan("s", PROMPTS, 10, 32, 0) != study.make_plan("s", PROMPTS, 10, 32, 1)
    assert (plan.stages, plan.share) == ((4,), 8)
    assert study.make_plan("s", PROMPTS, 10, 64, 0).stages == (4, 8)
    assert study.make_plan("s", PROMPTS, 10, 8, 0).stages == (2,)
    assert plan.all_stages == (4, 8, 16, 32)
    turns = [plan.part(turn, 4) for turn in range(plan.turns)]
    assert sorted(b for part in turns for b in part) == [*range(32)]  # No two trials in a row have the same ones.
    assert plan.part(7, 8) == (28, 29, 30, 31, 0, 1, 2, 3) and plan.part(7, 8) in plan.parts
    odd = study.make_plan("s", PROMPTS, 10, 60, 0)
    assert (odd.share, odd.stages, odd.turns, odd.all_stages[-1]) == (15, (4, 8), 8, 60)
    assert plan.most == 32 + 32 + 8 * 4 and study.make_plan("s", PROMPTS, 60, 64, 0).most == 60 * 16
    for one in (plan, odd):
        assert all(set(one.of_all_turns) & set(part) for part in one.parts)
    few = study.make_plan("s", PROMPTS[:3], 10, 32, 0)
    assert not few.fresh_prompts and {b.text for b in few.search} == set(PROMPTS[:3])
    assert len({(b.prompt, b.first) for b in few.search}) == len(few.search)


@pytest.mark.parametrize("levels", [None, [10.0, 5.0, 1.0, 0.1], [0.8, 0.4, 0.2], [math.inf, 20.0, 0.05]])
def test_what_is_suggested_is_an_interval_and_short_to_write(levels):
    backend = Painter()
    backend.sigmas = None if levels is None else torch.tensor(levels)
    ranges = study.space(backend)
    assert all(0 < lo < hi < math.inf for lo, hi in ranges.values())
    for seed in range(100):
        draw = random.Random(seed)
        values = {k: math.exp(draw.uniform(math.log(lo), math.log(hi))) for k, (lo, hi) in ranges.items()}
        setting = study.suggest(optuna.trial.FixedTrial(values), ranges)
        assert setting.sigma_lo < setting.sigma_hi and len(setting.folder) < 30
        assert Setting(*map(float, re.fullmatch(r"([\d.e-]+)-([\d.]+)-w([\d.]+)", setting.folder).groups())) == setting


# ----------------------------------------------------------------------------
# The sampler.


@pytest.mark.parametrize("points", grids)
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
    chosen = [candidates[sampler.choose(belief, [], candidates, np.random.default_rng(seed))] for seed in range(5)]
    assert all(1.5 < s.weight < 3.5 and s.sigma_hi == 3.0 for s in chosen)
    monkeypatch.setattr(sampler, "KEPT", 3)  # Of the 75, and none of them needless.
    few = [candidates[sampler.choose(belief, [], candidates, np.random.default_rng(seed))] for seed in range(5)]
    assert all(1.5 < s.weight < 3.5 and s.sigma_hi == 3.0 for s in few)
    monkeypatch.undo()
    # What runs counts as done: elsewhere then.
    busy = [chosen[0]] * 3
    assert candidates[sampler.choose(belief, busy, candidates, np.random.default_rng(0))] != chosen[0]
    worse = [everywhere(4.0), Setting(0.0, math.inf, 8.0)]
    assert sampler.choose(belief, [], worse, np.random.default_rng(0)) is None
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


# ----------------------------------------------------------------------------
# The search.


def test_so_probable_as_is_said_a_setting_is_within_the_bound():
    draw = np.random.default_rng(0)
    goal = objectives.Goal(("rows",), ("variety",), "adherence", 5.0)
    baseline = {"adherence": [0.0] * 16}
    within = [  # The true difference is the bound itself: at that probability it is not taken to be within.
        [objectives.violation(goal, measured, baseline, p) <= 0 for p in (0.5, objectives.LIKELY)]
        for measured in ({"adherence": draw.normal(-5, 10, 16).tolist()} for _ in range(400))
    ]
    assert np.mean(within, axis=0) == pytest.approx([0.5, 1 - objectives.LIKELY], abs=0.06)


def test_the_search_goes_beyond_the_bound_and_the_front_stays_within(tmp_path):
    search = make_search(tmp_path, trials=20)
    complete, baseline = search.run(), search.measured(study.BASELINE)
    for trial in complete:
        beyond = trial.user_attrs["beyond"]
        best, cautious = (
            objectives.violation(search.goal, trial.user_attrs["measured"], baseline, p)
            for p in (0.5, objectives.LIKELY)
        )
        assert beyond == cautious >= best and trial.constraints == {"adherence": best}
        assert len(trial.values) == len(search.losses(trial)) == 2
        told = objectives.value(trial.user_attrs["measured"], baseline, "adherence")[
            0
        ]  # As if of the baseline's images.
        assert trial.user_attrs["adherence"] == told
    named = dict(zip(search.study.metric_names, search.study.directions, strict=True))
    assert named == {"rows": optuna.study.StudyDirection.MINIMIZE, "variety": optuna.study.StudyDirection.MAXIMIZE}
    assert any(t.user_attrs["beyond"] > 0 for t in complete[3:])
    assert all(t.user_attrs["beyond"] <= 0 for t in search.front())
    chosen = [setting for _, _, setting, _ in confirm.choose(search)[1:]]
    believed = search.belief().told(chosen, objectives.LIKELY)[1]
    assert len(set(chosen)) == 3 and (believed <= 0).any()


def test_the_time_left_is_told_by_images_and_from_the_first_on(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 4)
    view = View(objectives.Goal(("rows",), ("variety",), "adherence", 5.0), Console(file=io.StringIO()))
    view.trials(0, 10, [], 0, 400)
    for _ in range(100):
        view.image()
    assert view.bar.tasks[0].fields["speed"] == "4 images/s, 2 min left"
    view.trials(1, 10, [], 100, 400)  # The baseline, with a quarter of all images.
    assert view.bar.tasks[0].fields["speed"] == "4 images/s, 76 s left"


def test_each_trial_has_its_turn_of_the_baselines_blocks(tmp_path):
    search = make_search(tmp_path, trials=20)
    found, plan = search.run(), search.plan
    base, conditional = (search.measured(label) for label in (study.BASELINE, CONDITIONAL_ONLY))
    assert base["blocks"] == [*range(16)] and conditional["blocks"] == [*range(16)]
    rest = [t for t in found if t.user_attrs.get("label") not in (study.BASELINE, CONDITIONAL_ONLY)]
    assert {t.user_attrs["measured"]["blocks"][0] for t in rest} == {*range(0, 16, 2)}
    for trial in rest:
        measured = trial.user_attrs["measured"]
        blocks = measured["blocks"]
        assert tuple(blocks) == plan.part(trial.user_attrs["turn"], len(blocks))
        assert len(objectives.paired(measured, base, "adherence")) == len(blocks)
        assert objectives.value(measured, base, "drift", conditional) is not None
        setting = study.from_json(trial.user_attrs["setting"])
        seeds = sorted(j.seed for j in search.backend.jobs if j.setting == setting)
        assert seeds == sorted(seed for b in blocks for seed in plan.search[b].seeds)


def test_a_study_begins_with_what_all_is_compared_with_and_ends_with_its_trials(tmp_path):
    search = make_search(tmp_path)
    complete = search.run()
    labels = [t.user_attrs.get("label") for t in complete]
    assert labels[:3] == ["CFG as it was", "conditional only", "preset sdxl"] and len(complete) == 8
    assert settings_of(complete)[:2] == [(0.0, None, 4.0), (0.0, None, 1.0)]
    assert len(set(settings_of(complete))) == 8
    assert [objectives.num_blocks(t.user_attrs["measured"]) for t in complete[:2]] == [16, 16]
    assert {objectives.num_blocks(t.user_attrs["measured"]) for t in complete[2:]} == {
        2
    }  # Nothing is left to go on with.
    front = search.front()
    assert front and all(t.user_attrs["beyond"] <= 0 for t in front)
    rendered = len(search.backend.jobs)
    assert rendered == len(set(search.backend.jobs)) == len(list((tmp_path / "out" / "images").glob("*/*.png")))
    make_search(tmp_path).run()  # Once more: all is there.
    assert not make_search(tmp_path).backend.jobs


def test_more_trials_go_on_from_there(tmp_path):
    make_search(tmp_path, trials=5).run()
    assert len(make_search(tmp_path, trials=9).run()) == 9


def test_what_lost_races_saved_goes_to_those_that_may_still_be_on_the_front(tmp_path):
    search = make_search(tmp_path, trials=20)
    found = search.run()
    again = [t for t in search.trials() if "again" in t.user_attrs]
    assert again and len(found) == len(set(settings_of(found))) == 20  # They are none of the 20.
    before, over = {}, 0  # The last of each setting.
    for trial in search.trials():
        setting = tuple(trial.user_attrs["setting"])
        if "again" in trial.user_attrs:
            first = before[setting]
            had, has = (objectives.num_blocks(t.user_attrs["measured"]) for t in (first, trial))
            assert had == trial.user_attrs["again"] and has == 2 * had <= 16 and trial.params == first.params
            assert first not in found
            rendered = sum(objectives.num_blocks(t.user_attrs["measured"]) for t in before.values()) + has - had
            assert rendered <= over * search.plan.share  # What the trials until then have left, and no more.
            assert trial.user_attrs["measured"]["adherence"][:had] == first.user_attrs["measured"]["adherence"]
        before[setting] = trial
        over += "again" not in trial.user_attrs
    assert again[0].number < max(t.number for t in found if "again" not in t.user_attrs)  # Not only at the end.
    assert len(search.backend.jobs) == len(set(search.backend.jobs)) <= 20 * 16  # No more than without races.
    assert [t["number"] for t in confirm._trials(search, [], None, None)] == sorted(t.number for t in found)
    resumed = make_search(tmp_path, trials=20)
    resumed.run()
    assert not resumed.backend.jobs and len(resumed.trials()) == len(search.trials())


def test_what_goes_on_is_unclear_and_has_room_in_the_trials_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STARTUP", 4)
    search = make_search(tmp_path, trials=99)
    corner = {"sigma_lo": 0.1, "sigma_hi": 10.0, "weight": 4.0}
    ranges = {k: optuna.distributions.FloatDistribution(v, v) for k, v in corner.items()}

    def add(weight, adherence, variety, rows, label=None):
        blocks = len(adherence)
        found = {**measured(adherence), "variety": [variety] * blocks, "rows": [rows] * blocks}
        beyond = 0.0 if label != CONDITIONAL_ONLY else 1.0
        told = {"measured": found, "setting": [0.1, 10.0, weight], "beyond": beyond} | (
            {"label": label} if label else {}
        )
        search.study.add_trial(
            optuna.trial.create_trial(params=corner, distributions=ranges, values=[rows, variety], user_attrs=told)
        )

    add(4.0, [0.0] * 16, 0.0, 14.0, study.BASELINE)
    add(1.0, [-3.0, -6.5] * 2, 9.0, 7.0, CONDITIONAL_ONLY)  # It has all that it is to have.
    for i in range(6):
        add(5.0 + i, [0.0, 0.0], 0.5 + i / 50, 11.0 + i / 10)  # On the front, and within the bound without a doubt.
    assert search._undecided() is None  # 8 trials of 4 blocks each, and 32 are rendered.
    for i in range(3):
        add(20.0 + i, [0.0, 0.0], 0.7 + i / 50, 12.0 + i / 10)
    assert search._undecided() is None  # There is room, and nothing to find out.
    add(2.0, [-3.0, -6.5], 1.0, 10.0)
    assert search._undecided().user_attrs["setting"][2] == 2.0
    for i in range(2):
        add(30.0 + i, [0.0] * 8, 0.5, 11.0)
    assert search._undecided() is None  # No more room: 56 blocks of 14 trials.


def test_a_race_that_goes_on_survives_ctrl_c_and_is_run_once(tmp_path):
    search = make_search(tmp_path, trials=20)
    whole = search.run()

    def press(job):
        if any("again" in t.user_attrs for t in stopped.trials()):
            raise KeyboardInterrupt

    stopped = make_search(tmp_path, Painter(before=press), 20, out="out2", storage=f"sqlite:///{tmp_path / 'two.db'}")
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert [t.state for t in stopped.trials() if "again" in t.user_attrs] == [TrialState.FAIL]
    known = len(stopped.results())
    again = make_search(tmp_path, None, 20, out="out2", storage=f"sqlite:///{tmp_path / 'two.db'}")
    for trial in [t for t in again.trials(TrialState.WAITING) if "again" in t.user_attrs]:
        again.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)  # Another process, in the same second.
    found = again.run()
    assert settings_of(whole)[:known] == settings_of(found)[:known] and len(found) == 20
    went_on = [
        (*t.user_attrs["setting"], t.user_attrs["again"])
        for t in again.trials(TrialState.COMPLETE)
        if "again" in t.user_attrs
    ]
    assert went_on and len(set(went_on)) == len(went_on)
    assert not set(stopped.backend.jobs) & set(again.backend.jobs)


def test_a_race_that_is_refused_leaves_its_trial_as_it_was(tmp_path):
    def refuses(setting):
        return any("again" in t.user_attrs for t in search.trials(TrialState.RUNNING))

    search = make_search(tmp_path, Painter(refuses=refuses), trials=20)
    found = search.run()
    assert len(found) == 20 and not any("again" in t.user_attrs for t in found)
    refused = settings_of(search.trials(TrialState.FAIL))
    assert refused and len(set(refused)) == len(refused)


def test_a_refusal_costs_the_trial_and_is_told_in_the_hosts_words(tmp_path):
    search = make_search(tmp_path, Painter(refuses=lambda s: s.weight > 5))
    complete = search.run()
    failed = search.trials(TrialState.FAIL)
    assert failed and len(complete) + len(failed) == 8
    assert all(t.user_attrs["error"] == "CUDA out of memory" for t in failed)
    told = confirm._trials(search, [], None, None)
    assert Counter(t["state"] for t in told) == {"complete": len(complete), "failed": len(failed)}


def test_without_a_baseline_the_command_ends_and_goes_on_when_it_can_be_rendered(tmp_path):
    with pytest.raises(UserError, match="CFG as it was cannot be rendered: CUDA out of memory"):
        make_search(tmp_path, Painter(refuses=lambda s: s.weight == 4)).run()
    assert len(make_search(tmp_path).run()) == 7  # The refusal was one of the 8.


def test_ctrl_c_keeps_what_is_done_and_the_trial_is_taken_up(tmp_path):
    count = itertools.count()

    def press(job):
        if next(count) == 70:
            raise KeyboardInterrupt

    search = make_search(tmp_path, Painter(before=press))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    stopped = search.trials(TrialState.FAIL)
    again = make_search(tmp_path)
    complete = again.run()
    assert len(stopped) == 1 and len(complete) == 8
    assert settings_of(stopped)[0] in settings_of(complete)
    assert not set(search.backend.jobs) & set(again.backend.jobs)
    assert len(search.backend.jobs) == 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 8}, "--images 16, not 8"),
        ({"prompts": PROMPTS[:10]}, "other prompts"),
        ({"judge": Eye(reference=torch.ones(3, 2))}, "objective .least rows, most variety.*, not .least rows and dist"),
        ({"judge": type("Other", (Eye,), {"identity": "other"})()}, "judge 'eye', not 'other'"),
        ({"backend": type("Other", (Painter,), {"source": "other.json"})()}, "source 'painter', not 'other.json'"),
    ],
)
def test_another_study_of_the_same_name_is_refused(tmp_path, change, message):
    make_search(tmp_path)
    with pytest.raises(UserError, match=rf"the study 's' in this storage is another one, with .*{message}.*--name"):
        make_search(tmp_path, **change)


def test_a_study_of_an_earlier_version_is_refused(tmp_path):
    search = make_search(tmp_path)
    search.study.set_user_attr("identity", {k: v for k, v in search.identity.items() if k != "search"})
    with pytest.raises(UserError, match="with the search of an earlier version: choose another --name"):
        make_search(tmp_path)


def test_processes_share_a_study(tmp_path):
    searches = [make_search(tmp_path, Painter(before=lambda job: time.sleep(0.003)), out=f"out{i}") for i in (0, 1)]
    threads = [threading.Thread(target=s.run) for s in searches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    complete = searches[0].results()
    assert len(complete) == len(set(settings_of(complete))) == 8
    assert {t.user_attrs["folder"] for t in complete} == {s.mine for s in searches}
    assert not searches[0].trials(TrialState.RUNNING, TrialState.WAITING)


def test_a_process_killed_when_it_had_just_taken_a_trial_does_not_hold_up_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "GRACE", 2)
    search = make_search(tmp_path)
    search.study.optimize(search._objective, n_trials=1)
    taken = search.study._pop_waiting_trial_id()  # And then there was neither a heartbeat nor a name.
    assert search.study._storage.get_trial(taken).state == TrialState.RUNNING
    complete = make_search(tmp_path).run()
    assert len(complete) == len(set(settings_of(complete))) == 8
    lost = search.trials(TrialState.FAIL)
    assert [t._trial_id for t in lost] == [taken]
    assert [t.system_attrs["retry_history"] for t in complete if "retry_history" in t.system_attrs] == [
        [lost[0].number]
    ]


def test_a_queued_trial_is_given_to_one_process_only(tmp_path):
    url, count = f"sqlite:///{tmp_path / 's.db'}", 4
    optuna.create_study(storage=study.open_storage(url), study_name="s")
    studies = [optuna.load_study(storage=study.open_storage(url), study_name="s") for _ in range(count)]
    barrier, rounds, popped = threading.Barrier(count), 25, []

    def pop(mine):
        for _ in range(rounds):
            if barrier.wait(timeout=60) == 0:
                mine.enqueue_trial({})
            barrier.wait(timeout=60)
            popped.append(mine._pop_waiting_trial_id())

    threads = [threading.Thread(target=pop, args=[s]) for s in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    given = [p for p in popped if p is not None]
    assert len(popped) == count * rounds and len(given) == len(set(given)) == rounds


def test_first_trials_that_two_processes_queued_are_rendered_once(tmp_path):
    search = make_search(tmp_path)
    for label, setting, params in study.first_trials(search.backend, search.ranges):
        search.study.enqueue_trial(params, user_attrs={"label": label, "setting": [*study._as_json(setting)]})
    complete = search.run()
    assert len(complete) == 8 == len(set(settings_of(complete)))
    assert len(search.backend.jobs) == len(set(search.backend.jobs))
    assert all(t["state"] == "complete" for t in confirm._trials(search, [], None, None))


def test_an_image_that_is_damaged_or_of_another_job_is_rendered_again(tmp_path):
    folder, job = Images(tmp_path), Job(Setting(0.1, 2.0, 3.0), "a", 1)
    folder.put((0, 0), job, Rendered(Painter().paint(job), 9.0, 0.5))
    found = folder.get((0, 0), job)
    assert (found.rows, found.seconds) == (9.0, 0.5) and found.image.tobytes() == Painter().paint(job).tobytes()
    assert folder.get((0, 0), Job(job.setting, "b", 1)) is None and folder.get((0, 1), job) is None
    file = folder.file(job.setting, (0, 0))
    file.write_bytes(file.read_bytes()[:-30])
    assert folder.get((0, 0), job) is None


def test_images_of_another_workflow_are_rendered_again(tmp_path):
    first, same, other = Painter(), Painter(), type("Other", (Painter,), {"identity": {"workflow": "other"}})()
    for i, backend in enumerate((first, same, other)):  # Studies of the same folder, whose settings are drawn alike.
        make_search(tmp_path, backend, trials=4, storage=f"sqlite:///{tmp_path / f'{i}.db'}").run()
    assert first.jobs and not same.jobs and other.jobs == first.jobs


# ----------------------------------------------------------------------------
# The confirmation.


def test_the_confirmation_is_of_fresh_images_and_keeps_both_numbers(tmp_path):
    search = make_search(tmp_path, trials=12)
    search.run()
    before = len(search.backend.jobs)
    out = tmp_path / "out"
    found = confirm.report(search, out, confirm.confirm(search, out))
    assert found == json.loads((out / "confirmed.json").read_text())
    jobs = search.backend.jobs[before:]
    assert not {j.seed for j in jobs} & {j.seed for j in search.backend.jobs[:before]}
    baseline, *rest = found["settings"]
    assert baseline["id"] == "baseline" and 1 <= len(rest) <= 3
    for setting in found["settings"]:
        assert len(setting["images"]) == len(found["prompts"]) * len(found["seeds"]) == len(found["image_seeds"])
        for name, seed in zip(setting["images"], found["image_seeds"], strict=True):
            told = json.loads(Image.open(out / name).text["guidance_interval_tune"])
            assert told["of"][2] == seed
    for setting in rest:
        numbers = setting["confirmed"]
        for key in ("rows", "adherence", "variety", "drift"):
            value, low, high = numbers[key]["difference"]
            assert low <= value <= high
            assert math.isclose(numbers[key]["value"][0] - baseline["confirmed"][key]["value"][0], value, abs_tol=1e-9)
        assert setting["search"]["variety"] != numbers["variety"]["value"]
        assert numbers["rows"]["verdict"] == "lower"
    count = len(search.backend.jobs)
    confirm.confirm(search, out)
    assert len(search.backend.jobs) == count  # All is there.
    text = "\n".join([command.table(found), *command.findings(found)])
    assert "best-1" in text and "in the search" in text


def test_a_dry_run_with_more_servers_than_images_tells_the_time(tmp_path, capsys):
    class Slow(Painter):
        workers = 9

    for images, workers in ((4, 9), (4, 100), (64, 9), (64, 0)):
        Slow.workers = workers
        command.tune(Slow(), Eye(), PROMPTS, tmp_path / "out", images=images, trials=4, dry_run=True)
        assert re.search(r"at most [\d,]+ images, about .* a second", capsys.readouterr().out)


def test_what_is_refused_where_nothing_goes_on_without_it_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the host refuses to render .CUDA out of memory.; what is done is kept"):
        command.tune(Painter(refuses=lambda s: True), Eye(), PROMPTS, tmp_path / "out", trials=4, dry_run=True)
    confirming = []
    monkeypatch.setattr(confirm, "choose", lambda search, real=confirm.choose: confirming.append(1) or real(search))
    painter = Painter(refuses=lambda s: bool(confirming))
    with pytest.raises(UserError, match="the host refuses to render"):
        command.tune(painter, Eye(), PROMPTS, tmp_path / "out", trials=4, images=8)


# ----------------------------------------------------------------------------
# Killed: the command itself, on the emoji model.


def tune(out, *more, trials=6):
    args = ["tune", "--model", "emoji", "--trials", str(trials), "--images", "16", "--out", str(out), *more]
    return [sys.executable, "-m", "guidance_interval", *args]


def trials_of(url):
    try:
        return optuna.load_study(study_name="emoji", storage=url).get_trials()
    except Exception:  # Not there yet.
        return []


def test_killed_and_joined_by_a_second_process_nothing_is_lost_or_doubled(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = subprocess.Popen(tune(tmp_path / "a", "--storage", url), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a").glob("images/*/*.png"))) < 20:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert any(t.state == TrialState.RUNNING for t in trials_of(url))
    both = [
        subprocess.Popen(tune(tmp_path / name, "--storage", url), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    told = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    found = trials_of(url)
    complete = [t for t in found if t.state == TrialState.COMPLETE and "again" not in t.user_attrs]
    assert len(complete) == len({tuple(t.user_attrs["setting"]) for t in complete}) == 6
    lost = {t.number for t in found if t.state == TrialState.FAIL and not t.user_attrs.get("error")}
    again = [n for t in found for n in t.system_attrs.get("retry_history", [])]
    assert lost and sorted(again) == sorted(lost)
    # The one that rendered the baseline confirms; the other one says so.
    confirmed = [(tmp_path / name / "confirmed.json").is_file() for name in "ab"]
    assert sorted(confirmed) == [False, True]
    assert [b"confirms the best settings" in err for _, err in told] == [not c for c in confirmed]


# ----------------------------------------------------------------------------
# A web UI, by its API.


class FakeWebUI(http.server.BaseHTTPRequestHandler):
    scripts, error, seen = ["guidance interval"], None, []

    def do_GET(self):
        answers = {
            "/sdapi/v1/scripts": {"txt2img": self.scripts, "img2img": []},
            "/sdapi/v1/options": {"sd_model_checkpoint": "sd.safetensors [abc]"},
            "/sdapi/v1/progress": {"progress": 0.5, "state": {"sampling_step": 3}},
        }
        path = self.path.partition("?")[0]
        self.answer(200 if path in answers else 404, answers.get(path, {"detail": "Not Found"}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/sdapi/v1/png-info":
            has = b"Steps" in base64.b64decode(body["image"].partition(",")[2])
            parameters = {"Steps": "12", "Sampler": "Euler", "CFG scale": "5.5", "Size-1": "256", "Size-2": "320"}
            return self.answer(200, {"info": "", "parameters": parameters if has else {}})
        self.seen.append(body)
        if self.error:
            return self.answer(500, self.error)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (body["seed"] % 256, 0, 0)).save(buffer, "PNG")
        return self.answer(200, {"images": [base64.b64encode(buffer.getvalue()).decode()], "info": "{}"})

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def web_ui(monkeypatch):
    handler = type("Handler", (FakeWebUI,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(webui, "POLL", 0.02)
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_a_web_ui_renders_what_the_accordion_takes(web_ui):
    url, handler = web_ui
    backend = webui.WebUI(url)
    jobs = [Job(s, "a cat", 9) for s in (Setting(0.28, 5.42, 9.0), everywhere(7.0), CONDITIONAL)]
    found = dict(backend.render(jobs))
    assert [found[i].image.getpixel((0, 0)) for i in range(3)] == [(9, 0, 0)] * 3
    assert found[0].seconds is None and found[1].seconds > 0
    for job, sent in zip(jobs, handler.seen, strict=True):
        enabled, *controls = sent["alwayson_scripts"]["Guidance Interval"]["args"]
        settings = a1111_settings.from_controls(*controls)
        assert enabled is True
        assert settings.interval == (None if job.setting.conditional_only else job.setting.interval)
        assert (sent["prompt"], sent["seed"], sent["steps"], sent["scheduler"]) == ("a cat", 9, 20, "Karras")
    assert [sent["cfg_scale"] for sent in handler.seen] == [9.0, 7.0, 7.0]


def test_a_picture_gives_its_parameters(web_ui, tmp_path):
    (tmp_path / "a.png").write_bytes(b"Steps: 12")
    backend = webui.WebUI(web_ui[0], tmp_path / "a.png")
    assert backend.weight == 5.5 and backend.source == "a.png"
    assert (backend.parameters["steps"], backend.parameters["sampler_name"]) == (12, "Euler")
    assert (backend.parameters["width"], backend.parameters["scheduler"]) == (256, "Automatic")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b.png' holds no parameters"):
        webui.WebUI(web_ui[0], tmp_path / "b.png")


def test_a_web_uis_errors_are_told_in_its_words(web_ui):
    url, handler = web_ui
    backend = webui.WebUI(url)
    handler.error = {"error": "OutOfMemoryError", "detail": "", "errors": "CUDA out of memory."}
    with pytest.raises(Refused, match=r"OutOfMemoryError: CUDA out of memory\."):
        list(backend.render([Job(CONDITIONAL, "a", 1)]))
    handler.scripts = ["x/y/z plot"]
    with pytest.raises(UserError, match="lacks the extension Guidance Interval"):
        webui.WebUI(url)
    with pytest.raises(UserError, match=r"no web UI with an API there .*--api"):
        webui.WebUI("http://127.0.0.1:9")


def test_a_web_ui_that_goes_away_is_waited_for(web_ui, monkeypatch):
    backend = webui.WebUI(web_ui[0])
    original, fails = backend._image, itertools.count()

    def render(job):
        if next(fails) < 2:
            raise webui.Gone("it does not answer")
        return original(job)

    monkeypatch.setattr(backend, "_image", render)
    assert len(list(backend.render([Job(CONDITIONAL, "a", 1)]))) == 1
    monkeypatch.setattr(backend, "_image", lambda _: (_ for _ in ()).throw(webui.Gone("no")))
    monkeypatch.setattr(backend, "_is_there", lambda: False)
    monkeypatch.setattr(webui, "ALONE", 0.05)
    with pytest.raises(UserError, match=r"does not answer any more .no.; what is done is kept"):
        list(backend.render([Job(CONDITIONAL, "a", 1)]))


# ----------------------------------------------------------------------------
# CLIP, a tiny one of random weights.


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghij", *(f"{c}</w>" for c in "abcdefghij")]
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(small, vocab_size=len(words), bos_token_id=0, eos_token_id=1)
    vision = dict(small, image_size=32, patch_size=16)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    return str(path)


def test_a_study_judged_by_clip_with_a_reference(small_clip, tmp_path):
    reference = tmp_path / "photos"
    reference.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(reference / f"{i}.png")
    judge = clip.ClipJudge("cpu", str(reference), small_clip)
    prompts = list("abcdefghij")
    judge.check(prompts)
    images = [Image.new("RGB", (64, 64), (30 * i, 0, 90)) for i in range(4)]
    features, scores = judge.measure(images, prompts[:4])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4, dtype=torch.float64))
    text = torch.nn.functional.normalize(judge.clip.text_rows(prompts[:4]).double(), dim=1)
    torch.testing.assert_close(scores, 100 * (features * text).sum(1).clamp(min=0), rtol=1e-4, atol=1e-3)
    shown, rows = [], judge.clip.rows
    judge.clip.rows = lambda tensors: shown.append(len(tensors)) or rows(tensors)
    search = make_search(tmp_path, judge=judge, prompts=prompts, trials=4)
    search.run()
    assert sum(shown) <= len(search.backend.jobs)  # None is embedded twice.
    assert search.goal.keys == ("rows", "distance") and search.goal.margin == 0.5
    found = confirm.report(search, tmp_path / "out", confirm.confirm(search, tmp_path / "out"))
    assert all(s["confirmed"]["distance"]["value"][0] > 0 for s in found["settings"])


def test_without_clips_weights_it_says_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--clip .*nowhere: no config.json there"):
        clip.ClipJudge(source=str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=r"CLIP, which judges .*no network.*`hf download openai/clip.*--clip FOLDER"):
        clip.ClipJudge()


# ----------------------------------------------------------------------------
# Presets of one's own.

ENTRY = {"model": 'my "XL".json', "sigma_lo": 0.5, "sigma_hi": math.inf, "weight": 9.0, "weight_everywhere": 7.0,
         "study": "s", "date": "2026-01-02", "objective": "least rows", "said": "rows lower (-7)",
         "difference": {"rows": [-7.0, -7.0, -7.0]}}  # fmt: skip


def test_presets_of_ones_own_come_after_the_published_ones_and_are_marked():
    assert presets.all_presets() == presets.PRESETS
    file = presets.save_mine("mine", ENTRY)
    presets.save_mine("été 2", ENTRY | {"sigma_hi": 4.0})
    assert list(presets.all_presets()) == [*presets.PRESETS, "mine (measured by you)", "été 2 (measured by you)"]
    mine = presets.get_preset("mine")
    assert mine == presets.get_preset("MINE (measured by you)")
    assert mine.interval() == Setting(0.5, math.inf, 9.0).interval and (mine.weight, mine.model) == (
        9.0,
        'my "XL".json',
    )
    assert mine.source == "measured by you: study 's', 2026-01-02, rows lower (-7)"
    presets.save_mine("mine", ENTRY | {"weight": 8.0})
    assert presets.get_preset("mine").weight == 8.0 and presets.get_preset("été 2").sigma_hi == 4.0
    assert "rows = [-7.0, -7.0, -7.0]" in file.read_text(encoding="utf-8")


def test_a_presets_file_that_is_broken_stops_no_host_and_is_not_overwritten(caplog, tmp_path):
    file = presets.my_file()
    for content in (
        "[mine",
        '["mine"]\n"sigma_lo" = 1.0\n',
        '["mine"]\n"model" = "a"\n"sigma_lo" = 5\n"sigma_hi" = 1\n',
    ):
        file.write_text(content)
        assert presets.all_presets() == presets.PRESETS
        assert str(file) in caplog.text
    file.write_text("[mine")
    with pytest.raises(UserError, match=r"presets.toml' cannot be read .*put it right"):
        presets.save_mine("other", ENTRY)
    assert file.read_text() == "[mine"


def test_without_a_reader_of_toml_the_published_ones_are_there(monkeypatch):
    presets.save_mine("mine", ENTRY)
    monkeypatch.setattr(presets, "tomllib", None)
    assert presets.all_presets() == presets.PRESETS
    with pytest.raises(UserError, match="pip install tomli"):
        presets.check_name("mine")


def confirmed(*settings):
    """What confirmed.json holds of these settings, the first being the baseline."""
    told = {"rows": {"value": [1.0] * 3, "difference": [-1.0] * 3, "verdict": "lower"}}
    bound = {"metric": "adherence", "margin": 5.0}
    return {
        "source": "w.json", "name": "w", "created": "2026-01-02",
        "objective": {"minimize": ["rows"], "maximize": [], "bound": bound},
        "settings": [{"id": "baseline" if i == 0 else f"best-{i}", **confirm._bounds(s), "confirmed": told}
                     for i, s in enumerate(settings)],
    }  # fmt: skip


def test_conditional_only_is_no_preset_which_would_be_cfg_everywhere(capsys):
    found = confirmed(everywhere(7.0), CONDITIONAL, Setting(0.5, 4.0, 9.0))
    with pytest.raises(UserError, match=r"^--save mine: best-1 is conditional only.*cfg to 1.*--save mine=best-2$"):
        command._save(found, "mine", "best-1")
    assert not presets.my_file().exists()
    command._save(found, "mine", "best-2")
    assert presets.get_preset("mine").interval() == Setting(0.5, 4.0, 9.0).interval
    with pytest.raises(UserError, match="the study confirmed no 'best-3'; there is best-1, best-2"):
        command._save(found, "mine", "best-3")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("mine=best-9", r"--save 'mine=best-9': a study confirms best-1, best-2, best-3, and no 'best-9'"),
        ("mine=baseline", "and no 'baseline'"),
        ("mine", r"FILE' cannot be written to .it is a file.; set GUIDANCE_INTERVAL_PRESETS"),
        ("mine", r"FOLDER' cannot be read .it is no file"),
        ("mine", r"BROKEN' cannot be read .*put it right"),
    ],
)
def test_what_could_not_be_saved_is_told_before_the_work(save, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BROKEN").write_text("[mine")
    for name in ("FILE", "FOLDER", "BROKEN"):
        if name in message:
            file = tmp_path / name / "presets.toml" if name == "FILE" else tmp_path / name
            monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(file))
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], []):
        assert cli.main(["tune", "--model", "emoji", "--save", save, *more]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and (tmp_path / "BROKEN").read_text() == "[mine"


def test_looking_whether_a_preset_can_be_saved_leaves_the_file_as_it_is():
    presets.check_writable()
    assert not presets.my_file().exists()
    file = presets.save_mine("mine", ENTRY)
    before = file.read_bytes()
    presets.check_writable()
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["", "sdxl", "a=b", "a/b", " a", "[x]"])
def test_names_that_cannot_be(name):
    with pytest.raises(UserError, match="--save"):
        presets.check_name(name)


def test_the_accordion_lists_them():
    presets.save_mine("mine", ENTRY)
    code = (
        "from guidance_interval.a1111 import settings as st\n"
        "assert st.PRESET_NAMES[-3] == 'mine (measured by you)', st.PRESET_NAMES\n"
        "for name in ('mine', 'mine (measured by you)'):\n"
        "    interval = st.from_controls(name, 0, 1, 'Both passes').interval\n"
        "    assert (interval.sigma_lo, interval.sigma_hi) == (0.5, float('inf'))\n"
        "assert st.apply_axes({'preset': 'Mine (measured by you)'}, st.Settings(None)).interval == interval\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_info_tells_the_file(capsys):
    presets.save_mine("mine", ENTRY)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert str(presets.my_file()) in out and "measured by you: study 's'" in out


# ----------------------------------------------------------------------------
# Refused.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of a workflow, --a1111 URL and --model emoji, got none of them"),
        (["w.json", "--model", "emoji"], "got 'w.json' and 'emoji'"),
        (["--model", "emoji", "--server", "http://x"], "--server is for a workflow"),
        (["--model", "emoji", "--prompts", "EMPTY"], "holds no prompt; write one on each line"),
        (["--model", "emoji", "--prompts", "NONE"], "cannot be read .No such file"),
        (["--model", "emoji", "--prompts", "BINARY"], "is not text in UTF-8"),
        (["--model", "emoji", "--prompts", "CATS"], "the emoji model knows no 'a cat'"),
        (["--model", "emoji", "--save", "sdxl"], "--save 'sdxl' is a published one"),
        (["--model", "emoji", "--reference", "x"], "--reference 'x': with --model emoji it is `emoji`"),
        (["--model", "emoji", "--storage", "nonsense"], "storage 'nonsense' cannot be used"),
        (["--model", "emoji", "--storage", "sqlite:////no/where/s.db"], "cannot be used"),
        (["--model", "emoji", "--out", "FILE"], "it is a file"),
        (["w.json"], "--prompts is missing"),
        (["w.json", "--prompts", "CATS"], "workflow 'w.json' cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text(" \n\n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "CATS").write_text("a cat\n")
    (tmp_path / "FILE").write_text("")
    code = cli.main(["tune", "--trials", "4", "--images", "4", "--out", "out", *args] if "--out" not in args else
                    ["tune", *args])  # fmt: skip
    told = capsys.readouterr().err
    assert code == 2 and re.search(message, told) and told.count("\n") == 1
    assert not list(tmp_path.glob("out/*/*.png"))


def test_the_emoji_need_no_network_and_dry_run_renders_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--model", "emoji", "--dry-run", "--reference", "emoji"]) == 0
    out = capsys.readouterr().out
    assert "least rows and distance" in out and re.search(r"at most 3,200 images, about [\d.]+ (s|min|h) at", out)
    assert not list(tmp_path.iterdir())

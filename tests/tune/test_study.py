"""The search: its plan, its races, and what survives a kill or a second process."""

import itertools
import math
import random
import re
import threading
import time
from collections import Counter

import numpy as np
import optuna
import pytest
import torch
from guidance_interval.errors import UserError
from guidance_interval.interval_text import CONDITIONAL_ONLY
from guidance_interval.tune import confirm, objectives, study
from guidance_interval.tune.servers.backend import Setting
from optuna.trial import TrialState
from tune_harness import PROMPTS, Eye, Painter, make_search, measured, settings_of

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
    if levels is not None:  # A flow model begins at infinity, above which nothing is left to try.
        assert ranges["sigma_hi"][1] == pytest.approx(1.01 * max(s for s in levels if s < math.inf))
    for seed in range(100):
        draw = random.Random(seed)
        values = {k: math.exp(draw.uniform(math.log(lo), math.log(hi))) for k, (lo, hi) in ranges.items()}
        setting = study.suggest(optuna.trial.FixedTrial(values), ranges)
        assert setting.sigma_lo < setting.sigma_hi and len(setting.folder) < 30
        assert Setting(*map(float, re.fullmatch(r"([\d.e-]+)-([\d.]+)-w([\d.]+)", setting.folder).groups())) == setting


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
    assert labels[:3] == ["baseline", "conditional only", "preset sdxl"] and len(complete) == 8
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
    with pytest.raises(UserError, match="the baseline cannot be rendered: CUDA out of memory"):
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
        (
            {"judge": Eye(reference=torch.ones(3, 2))},
            "objective .minimize NFE, maximize variety.*, not .minimize NFE and dist",
        ),
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


def test_images_of_another_workflow_are_rendered_again(tmp_path):
    first, same, other = Painter(), Painter(), type("Other", (Painter,), {"identity": {"workflow": "other"}})()
    for i, backend in enumerate((first, same, other)):  # Studies of the same folder, whose settings are drawn alike.
        make_search(tmp_path, backend, trials=4, storage=f"sqlite:///{tmp_path / f'{i}.db'}").run()
    assert first.jobs and not same.jobs and other.jobs == first.jobs

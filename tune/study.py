"""The search: an Optuna study that several processes may share, and that goes on after any of them was killed.

The storage is Optuna's, and so is what keeps processes apart: trials are handed out by it, a trial whose process gives
no sign of life is failed and queued again by its heartbeat. A process's own trials are known by its output folder, of
which it has the sole use (`files.sole_use`): what still runs under that name when it starts was killed with it.

Images are dear, so a trial races: it begins with a few blocks of images, and gets more while it may still be on the
front, by confidence intervals of paired differences, up to half of its share. What is left of all shares goes at once
to trials that may be on the front, until they have as many blocks as the baseline.

The baseline has MORE shares, and trials take turns with its blocks. Each is compared with the baseline on the same
prompts and seeds; were they the same for all trials, so would be their luck, and the whole search would have the bound
in the wrong place.
"""

import contextlib
import math
import os
import random
import socket
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from ..errors import UserError, without_password
from ..interval_text import CONDITIONAL_ONLY
from ..presets import DEFAULT, get_preset
from . import objectives
from .images import Images
from .objectives import SEEDS
from .sampler import STARTUP, Belief, IntervalSampler, to_setting
from .servers.backend import CONDITIONAL, Job, Refused, Setting, everywhere, in_space

HEARTBEAT, GRACE = 10, 60  # Seconds between signs of life, and without one until a trial is given to another process.
BASELINE = "baseline"
OPEN = 100.0  # Above it there is hardly any image left: as good as no bound.
VERSION = 4  # Of what trials hold: a study is not gone on with by another one.
SURPLUS = "surplus: another process has it, or had begun the last one"

# Those that are compared on the emoji model, benchmarks/tune_quality.py.
SAMPLERS = {
    "ehvi": IntervalSampler,
    "tpe": lambda _, seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "random": lambda _, seed: optuna.samplers.RandomSampler(seed=seed),
}


# ----------------------------------------------------------------------------
# The plan.


@dataclass(frozen=True)
class Block:
    """One prompt and its seeds; `prompt` and `first` are its indices in the file names."""

    prompt: int
    first: int
    text: str
    seeds: tuple

    def jobs(self, setting):
        """`[((prompt, seed) indices, Job)]`."""
        return [((self.prompt, self.first + k), Job(setting, self.text, s)) for k, s in enumerate(self.seeds)]


@dataclass(frozen=True)
class Plan:
    """What a study does; the same for all that join it.

    share: of a trial, in blocks; stages: numbers of blocks at which its race is judged; search, confirm: Blocks, MORE
    shares of them for the search. fresh_prompts: whether those of the confirmation are others than those of the search.
    """

    name: str
    trials: int
    seed: int
    share: int
    stages: tuple
    search: tuple
    confirm: tuple
    fresh_prompts: bool

    @property
    def all_stages(self):
        """With those of races that go on."""
        found = list(self.stages)
        while found[-1] < len(self.search):
            found.append(min(2 * found[-1], len(self.search)))
        return tuple(found)

    def next_stage(self, had):
        """After that of `had` blocks, or `had` if it was the last."""
        return next((s for s in self.all_stages if s > had), had)

    @property
    def turns(self):
        """How many trials in a row have other blocks."""
        return -(-len(self.search) // self.stages[-1])

    def part(self, turn, count):
        """The numbers of the first `count` blocks of a trial whose turn it is."""
        return tuple((turn * self.stages[-1] + i) % len(self.search) for i in range(count))

    @property
    def of_all_turns(self):
        """The first of every turn: conditional only has some in common with each trial, for the colour drift."""
        return tuple(dict.fromkeys(b for turn in range(self.turns) for b in self.part(turn, self.stages[0])))

    @property
    def parts(self):
        """Those over which two settings may be compared."""
        return [self.of_all_turns, *(self.part(turn, n) for turn in range(self.turns) for n in self.all_stages)]

    @property
    def most(self):
        """Blocks of the search at most: races go on only while the shares have room."""
        first = len(self.search) + len(self.of_all_turns)
        return max(self.trials * self.share, first + max(0, self.trials - 2) * self.stages[-1])


MORE = 4  # Shares of the baseline, and of a trial whose race went on to its end.
AT_LEAST = 8  # Prompts, from which on half of them are kept for the confirmation.


def make_plan(name, prompts, trials, images, seed, confirm_images=None, screen=16):
    """The `Plan` for prompts [text]; numbers of images are rounded up to whole blocks."""
    blocks = -(-images // SEEDS)
    confirmed = max(-(-(confirm_images or max(64, 2 * images)) // SEEDS), 2)
    draw = random.Random(seed)
    order = draw.sample(list(prompts), len(prompts))
    fresh = len(order) >= AT_LEAST
    later = order[-min(confirmed, len(order) // 2) :] if fresh else order
    sooner = order[: len(order) - len(later)] if fresh else order
    first = draw.randrange(2**30)
    stage, last = max(1, screen // SEEDS), max(-(-blocks // 2), min(blocks, screen // SEEDS))
    stages = []
    while stage < last:
        stages.append(stage)
        stage *= 2
    return Plan(
        name, trials, seed, blocks, (*stages, last), _blocks(sooner, MORE * blocks, first),
        _blocks(later, confirmed, first + 2**30), fresh,
    )  # fmt: skip


def _blocks(prompts, count, first_seed):
    """Every image has a seed of its own: the same noise under two prompts makes them alike, and intervals narrow."""
    found = []
    for b in range(count):
        p, group = b % len(prompts), b // len(prompts)
        seeds = tuple(first_seed + b * SEEDS + k for k in range(SEEDS))
        found.append(Block(p, group * SEEDS, prompts[p], seeds))
    return tuple(found)


def space(backend):
    """`{name: (low, high)}` of the search, each on a log scale.

    sigma_lo is within a factor of three of the published ones, 0.28 to 1.2. sigma_hi goes to the top of the schedule:
    where the prompt is decided early, none of it can be given up. In an interval the best weight is higher than
    everywhere, so there is more room above.
    """
    low, high = (0.0, OPEN) if backend.sigmas is None else in_space(backend.sigmas)
    extra = backend.weight - 1
    ranges = {"sigma_lo": (max(0.1, 0.9 * low), 3.0), "sigma_hi": (1.0, min(OPEN, 1.01 * high))}
    if any(lo >= hi for lo, hi in ranges.values()):  # An image that is only retouched: the schedule is short.
        ranges = {"sigma_lo": (0.9 * low, math.sqrt(low * high)), "sigma_hi": (math.sqrt(low * high), 1.01 * high)}
    return ranges | {"weight": (round(1 + extra / 4, 3), round(1 + 3 * extra, 3))}


def suggest(trial, ranges):
    """The Setting of a trial."""
    return to_setting({k: trial.suggest_float(k, low, high, log=True) for k, (low, high) in ranges.items()})


def first_trials(backend, ranges):
    """`[(label, Setting, parameters)]` that every study begins with; the parameters are the nearest in the space."""
    lo, hi, weight = (ranges[k] for k in ("sigma_lo", "sigma_hi", "weight"))
    preset = get_preset(DEFAULT).interval()

    def within(value, ends):
        return min(max(value, ends[0]), ends[1])

    return [
        (BASELINE, everywhere(backend.weight), {"sigma_lo": lo[0], "sigma_hi": hi[1], "weight": backend.weight}),
        (CONDITIONAL_ONLY, CONDITIONAL, {"sigma_lo": lo[0], "sigma_hi": hi[0], "weight": weight[0]}),
        (
            f"preset {DEFAULT}",
            Setting(preset.sigma_lo, preset.sigma_hi, backend.weight),
            {
                "sigma_lo": within(preset.sigma_lo, lo),
                "sigma_hi": within(preset.sigma_hi, hi),
                "weight": backend.weight,
            },
        ),
    ]


# ----------------------------------------------------------------------------
# The storage.


def open_storage(url):
    """Optuna's storage for a URL: a database of SQLAlchemy's, or grpc://HOST:PORT. Raises UserError if it is none."""
    try:
        if url.startswith("grpc://"):
            host, _, port = url.removeprefix("grpc://").partition(":")
            storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
            storage.wait_server_ready(timeout=10)
            return storage
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        sqlite = url.startswith("sqlite:")
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        if sqlite:
            _lock_when_begun(storage.engine)
        return storage
    except Exception as e:  # Of SQLAlchemy, of its drivers, of gRPC.
        raise UserError(
            f"storage {without_password(url)!r} cannot be used ({_first_line(e)}); give a database's URL, like "
            "postgresql+psycopg://user:password@host/name or sqlite:///study.db, or leave it out"
        ) from e


def _lock_when_begun(engine):
    """SQLite has no FOR UPDATE, by which Optuna gives a queued trial to one process only: each transaction locks."""
    import sqlalchemy

    sqlalchemy.event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    sqlalchemy.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # The connections that there are.


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Later(Exception):
    """A trial cannot be judged before another one, which waits."""


class Search:
    """One process's part in a study.

    view: what is told of `images(count)`, `trial(...)`; sampler: one of SAMPLERS. Raises UserError when the study of
    this name is another one's.
    """

    def __init__(self, plan, backend, judge, storage, out, view, sampler="ehvi"):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.plan, self.backend, self.judge, self.view = plan, backend, judge, view
        self.goal = objectives.goal(judge, backend.sigmas is not None)
        self.folder = Images(Path(out) / "images", backend.identity)
        self.mine = f"{socket.gethostname()}:{Path(out).resolve()}"
        self.ranges = space(backend)
        self.nameless_since = {}  # Trial's number: when it was first seen without its process's name.
        created = True
        try:
            self.study = optuna.create_study(storage=storage, study_name=plan.name, directions=self.goal.directions)
        except optuna.exceptions.DuplicatedStudyError:
            created = False
            self.study = optuna.load_study(storage=storage, study_name=plan.name)
        # One that goes on must not draw again what was drawn.
        seed = plan.seed if created else int.from_bytes(os.urandom(4), "little")
        self.study.sampler = SAMPLERS[sampler](self, seed)
        self._check_identity()
        self.study.set_metric_names(list(self.goal.keys))
        self._recover()
        if not created:
            self._await_first()
        self._enqueue_first()

    @property
    def identity(self):
        """What all trials of the study have in common."""
        prompts = sorted({b.text for b in (*self.plan.search, *self.plan.confirm)})
        return {
            "source": self.backend.source,
            "weight": self.backend.weight,
            "images": self.plan.share * SEEDS,
            "seed": self.plan.seed,
            "prompts": _digest(prompts),
            "judge": self.judge.identity,
            "objective": str(self.goal),
            "search": VERSION,
            **self.backend.identity,
        }

    def _check_identity(self):
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", self.identity)
            return
        names = {"weight": "cfg", "images": "--images", "seed": "--seed"}
        words = {"prompts": "other prompts", "search": "the search of an earlier version"}
        ours = self.identity
        differing = [
            words.get(k) or f"{names.get(k, k)} {known.get(k)!r}, not {ours.get(k)!r}"
            for k in sorted({*known, *ours})
            if known.get(k) != ours.get(k)
        ]
        if differing:
            raise UserError(
                f"the study {self.plan.name!r} in this storage is another one, with {'; '.join(differing)}: choose "
                "another --name, or use the options the study started with"
            )

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _recover(self):
        """Queue again what this output folder's process was at when it was stopped or killed."""
        trials = self.trials()
        followed = {n for t in trials for n in t.system_attrs.get("retry_history", [])}
        for trial in trials:
            if trial.user_attrs.get("folder") != self.mine:
                continue
            lost = trial.state == TrialState.FAIL and "error" not in trial.user_attrs and self._settled(trial)
            if trial.state == TrialState.RUNNING:
                self._fail(trial)
            elif lost and trial.number not in followed:
                self._queue_again(trial)

    def _fail(self, trial):
        """Fail a trial that was lost with its process, and queue it again, unless another process has just done so."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if self.study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                self._queue_again(trial)

    def _queue_again(self, trial):
        optuna.storages.RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])

    def _fail_stale(self):
        """Fail and queue again what was lost with any process.

        The heartbeat does not know a trial whose process was killed when it had just taken it. Such a one bears no
        process's name, and is given up when this process has seen that for a while, by its own clock.
        """
        optuna.storages.fail_stale_trials(self.study)
        nameless = {t.number: t for t in self.trials(TrialState.RUNNING) if "folder" not in t.user_attrs}
        now = time.monotonic()
        self.nameless_since = {number: self.nameless_since.get(number, now) for number in nameless}
        for number, since in self.nameless_since.items():
            if now - since > GRACE:
                self._fail(nameless[number])

    @staticmethod
    def _settled(trial):
        """Whether nobody is just about to queue it again: it was interrupted here, or failed a while ago."""
        ended = trial.datetime_complete.timestamp() if trial.datetime_complete else 0
        return "interrupted" in trial.user_attrs or time.time() - ended > GRACE

    def _labels(self):
        """Of the first trials that are queued, under way or complete."""
        return {t.user_attrs.get("label") for t in self.trials() if _counts(t) and not t.user_attrs.get("error")}

    def _await_first(self):
        """Give the process that has just made the study a few seconds to queue the first trials."""
        deadline, wanted = time.monotonic() + 5, {label for label, *_ in first_trials(self.backend, self.ranges)}
        while not wanted <= self._labels() and not self.trials(TrialState.FAIL) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _enqueue_first(self):
        known = self._labels()
        for label, setting, params in first_trials(self.backend, self.ranges):
            if label not in known:
                self.study.enqueue_trial(params, user_attrs={"label": label, "setting": _as_json(setting)})

    def _is_surplus(self, trial):
        """Whether other processes had begun all that there are to be, or queued or did the same one."""
        if had := trial.user_attrs.get("again"):
            same = [t for t in self.trials() if t.user_attrs.get("setting") == trial.user_attrs["setting"]]
            return any(
                _blocks_of(t) > had if t.state == TrialState.COMPLETE else _goes_on(t) and t.number < trial.number
                for t in same
            )
        counted = [t for t in self.trials() if _counts(t)]
        if trial.number in [t.number for t in counted][self.plan.trials :]:
            return True
        label = trial.user_attrs.get("label")
        return label is not None and any(
            t.number < trial.number and t.user_attrs.get("label") == label and "error" not in t.user_attrs
            for t in counted
        )

    # ------------------------------------------------------------------------
    # The work.

    def run(self):
        """Take part until all trials are done; returns the `results`. Raises UserError without a baseline."""
        while True:
            trials = [t for t in self.trials() if not _is_void(t)]
            states, every = Counter(t.state for t in trials if _counts(t)), Counter(t.state for t in trials)
            total = self.plan.trials + len(trials) - sum(states.values())
            images = sum(map(_blocks_of, self.results())) * SEEDS
            done = every[TrialState.COMPLETE] + every[TrialState.FAIL]
            self.view.trials(done, total, self.front(), images, self.plan.most * SEEDS)
            self._check_baseline()
            if not every[TrialState.WAITING] and (undecided := self._undecided()):
                self._enqueue_again(undecided)
            elif every[TrialState.WAITING] or (self.measured(BASELINE) and sum(states.values()) < self.plan.trials):
                self.study.optimize(self._objective, n_trials=1, catch=(Refused, _Later))
            elif every[TrialState.RUNNING]:
                self.view.waiting(every[TrialState.RUNNING])
                time.sleep(1)
                self._fail_stale()
            else:
                return self.results()

    def complete(self, label):
        """The complete trial of this label, or None."""
        return next((t for t in self.trials(TrialState.COMPLETE) if t.user_attrs.get("label") == label), None)

    def measured(self, label):
        """What it measured, or None."""
        trial = self.complete(label)
        return trial and trial.user_attrs["measured"]

    def belief(self):
        """What all trials together tell, once there is a baseline."""
        done = [(self.setting_of(t), t.user_attrs["measured"]) for t in self.results()]
        return Belief(self.goal, self.measured(BASELINE), done, self.ranges, self.backend.sigmas)

    @staticmethod
    def setting_of(trial):
        return from_json(trial.user_attrs["setting"])

    def _check_baseline(self):
        """Raise UserError if what all is compared with has failed, in the host's words."""
        known = [t for t in self.trials() if t.user_attrs.get("label") == BASELINE and _counts(t)]
        if known and all(t.state == TrialState.FAIL for t in known):
            raise UserError(f"the {BASELINE} cannot be rendered: {known[-1].user_attrs.get('error', 'it failed')}")

    def _objective(self, trial):
        trial.set_user_attr("folder", self.mine)
        given = trial.user_attrs.get("setting")
        setting = suggest(trial, self.ranges) if given is None or "label" not in trial.user_attrs else from_json(given)
        if "label" in trial.user_attrs:
            suggest(trial, self.ranges)  # The sampler learns from it too.
        trial.set_user_attr("setting", _as_json(setting))
        try:
            return self._race(trial, setting)
        except Refused as e:
            trial.set_user_attr("error", str(e))
            self.view.failed(trial.number, setting, str(e))
            raise
        except _Later:  # Behind the baseline, in the order of the queue.
            self._queue_again(trial)
            raise
        except KeyboardInterrupt:
            trial.set_user_attr("interrupted", True)
            raise

    def _race(self, trial, setting):
        if self._is_surplus(trial):
            raise Refused(SURPLUS)
        label, had = (trial.user_attrs.get(k) for k in ("label", "again"))
        turn = trial.user_attrs.get("turn", trial.number % self.plan.turns)
        trial.set_user_attr("turn", turn)
        if label == BASELINE:
            parts = [range(len(self.plan.search))]
        elif label == CONDITIONAL_ONLY:
            parts = [self.plan.of_all_turns]
        else:
            stages = self.plan.stages if had is None else [self.plan.next_stage(had)]
            parts = [self.plan.part(turn, stage) for stage in stages]
        for part in parts:
            blocks = [self.plan.search[b] for b in part]
            measured = self.render(setting, blocks, self.folder, part, self.plan.parts)
            baseline = measured if label == BASELINE else self._baseline()
            if label is None and self._is_lost(trial, measured, baseline, self.front()):
                break
        trial.set_user_attr("measured", measured)
        best, cautious = (objectives.violation(self.goal, measured, baseline, p) for p in (0.5, objectives.LIKELY))
        trial.set_user_attr("beyond", cautious)
        trial.set_constraint(self.goal.bound, best)
        trial.set_user_attr(self.goal.bound, objectives.value(measured, baseline, self.goal.bound)[0])
        return [objectives.value(measured, baseline, key)[0] for key in self.goal.keys]

    def _undecided(self):
        """The trial whose race goes on next, or None: it is not lost, and what lost races saved has room for it.

        First comes the one that makes most difference to the area of the front, times how uncertain its bound is.
        """
        found, front = self.results(), self.front()
        first = self.complete(BASELINE)
        if first is None or len(found) < min(STARTUP, self.plan.trials):
            return None
        baseline, corner = first.user_attrs["measured"], self.losses(first)
        missing = {t.number: self.plan.next_stage(had := _blocks_of(t)) - had for t in found}
        going = [t.user_attrs["setting"] for t in self.trials() if _goes_on(t)]
        over = sum(_counts(t) and t.state.is_finished() for t in self.trials())
        room = over * self.plan.share - sum(_blocks_of(t) for t in found)
        room -= sum(missing[t.number] for t in found if t.user_attrs["setting"] in going)

        def worth(trial):
            others = [self.losses(t) for t in front if t.number != trial.number]
            area = objectives.hypervolume([*others, self.losses(trial)], corner)
            chance = objectives.chance(self.goal, trial.user_attrs["measured"], baseline)
            return (area - objectives.hypervolume(others, corner)) * chance * (1 - chance)

        left = [
            t
            for t in found
            if 0 < missing[t.number] <= room and t.user_attrs["setting"] not in going
            and t.user_attrs.get("label") != CONDITIONAL_ONLY
            and not self._is_lost(t, t.user_attrs["measured"], baseline, front)
        ]  # fmt: skip
        best = max(left, key=worth, default=None)
        return best if best and worth(best) > 0 else None

    def _is_lost(self, trial, measured, baseline, front):
        """Whether a trial has lost its race against the front, now that it has `measured`."""
        mine = trial.user_attrs["setting"]
        rivals = [t.user_attrs["measured"] for t in front if t.user_attrs["setting"] != mine]
        return objectives.is_lost(self.goal, measured, baseline, rivals)

    def _enqueue_again(self, trial):
        """A complete trial cannot be changed: its race goes on in another one, of the same setting."""
        kept = {k: v for k, v in trial.user_attrs.items() if k in ("label", "setting", "turn")}
        self.study.enqueue_trial(trial.params, user_attrs={**kept, "again": _blocks_of(trial)})

    def _baseline(self):
        """What the baseline measured; waits for the process that is at it. Raises _Later where there is none."""
        while (found := self.measured(BASELINE)) is None:
            self._check_baseline()
            if any(t.user_attrs.get("label") == BASELINE for t in self.trials(TrialState.WAITING)):
                raise _Later
            time.sleep(1)
            self._fail_stale()
        return found

    def results(self):
        """The complete trials; of a setting, the one with most images."""
        found = {}
        for trial in self.trials(TrialState.COMPLETE):
            key = tuple(trial.user_attrs["setting"])
            found[key] = max(found.get(key, trial), trial, key=_blocks_of)
        return list(found.values())

    def front(self):
        """The results that no other one beats, of those within the bound; by cost."""
        trials = [t for t in self.results() if t.user_attrs["beyond"] <= 0]
        kept = objectives.front([self.losses(t) for t in trials])
        return sorted((trials[i] for i in kept), key=self.losses)

    def losses(self, trial):
        return tuple(s * v for s, v in zip(self.goal.signs(), trial.values, strict=True))

    def render(self, setting, blocks, folder, numbers, parts=()):
        """What the blocks of a setting measure; images that the folder has are not rendered again.

        numbers, parts: see `objectives.measure`.
        """
        wanted = [pair for block in blocks for pair in block.jobs(setting)]
        have = {at: found for at, job in wanted if (found := folder.get(at, job))}
        todo = [(at, job) for at, job in wanted if at not in have]
        for i, rendered in self.backend.render([job for _, job in todo]):
            at, job = todo[i]
            have[at] = folder.put(at, job, rendered)
            self.judge.look(rendered.image)
            self.view.image()
        got = [have[at] for at, _ in wanted]
        return objectives.measure(
            self.judge,
            [r.image for r in got],
            [job.prompt for _, job in wanted],
            [r.rows for r in got],
            [r.seconds for r in got],
            numbers,
            parts,
        )


def _counts(trial):
    """Whether it is one of the study's trials, and not the rest of another one's race."""
    return "again" not in trial.user_attrs and not _is_void(trial)


def _is_void(trial):
    """Whether it was lost with its process, or surplus."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("error", SURPLUS) == SURPLUS


def _goes_on(trial):
    """Whether it is a race that goes on, or that was refused: it is not to be queued again."""
    return "again" in trial.user_attrs and trial.state != TrialState.COMPLETE and not _is_void(trial)


def _blocks_of(trial):
    return objectives.num_blocks(trial.user_attrs["measured"])


def _as_json(setting):
    hi = None if setting.sigma_hi == math.inf else setting.sigma_hi
    return [setting.sigma_lo, hi, setting.weight]


def from_json(values):
    lo, hi, weight = values
    return Setting(lo, math.inf if hi is None else hi, weight)


def _digest(texts):
    import hashlib

    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]

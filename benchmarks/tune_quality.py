"""How good is the tuner? Its searches and its confirmations on the emoji model against a dense sweep.

    python benchmarks/tune_quality.py --device cuda --workers 14 --out out/tune-quality

Several GPUs are `--device cuda:0 cuda:1`, with so many workers on each. What is finished is kept in --out: dense.npz,
refined/, studies.json, true.json, and the tables in quality.md.

The dense sweep renders every interval that guides other steps (78 for 12 steps) at ten weights. Which of them are the
best within the bound is decided by less than its standard error, so those that may be are rendered again with many more
images, and at weights between. It gives the true values of any setting: those of the same guided steps, between the
weights by monotone cubics in the logarithm of the weight.

Search: the area (hypervolume) that a study's settings dominate, by their true values and up to the baseline's, over
that of the dense sweep: of all that it tried, of the front that it reports, and of the three that it confirms. Each
sampler has the same budget.
Confirmation: how many 95% confidence intervals of a difference contain the true one, which is rendered anew, densely,
for just these settings.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import optuna
import torch
from guidance_interval.files import aligned, atomic_path
from guidance_interval.lab import workers
from guidance_interval.tune import confirm, objectives, study
from guidance_interval.tune.judges.emoji import EmojiJudge
from guidance_interval.tune.objectives import SEEDS
from guidance_interval.tune.servers import toy
from guidance_interval.tune.servers.backend import Job, Setting, everywhere
from guidance_interval.tune.view import Quiet
from scipy.interpolate import PchipInterpolator
from tqdm import tqdm

WEIGHTS = [1.75, 2.1, 2.6, 3.2, 4.0, 4.9, 6.0, 7.3, 8.7, 10.0]
FIRST_SEED = 2**32  # Of the dense sweep: none of a study's.
BATCH = 1024
NEAR = 0.4  # Of the dense sweep's area: what a setting that is rendered again has at least on its own.
OURS = "ehvi"  # The sampler whose studies are confirmed: that of the tuner.
# Keys (first and last guided step, weight) of the dense sweep.
CONDITIONAL_CELL, BASELINE_CELL = (-1, -1, 1.0), (0, toy.STEPS - 1, toy.Emoji.weight)


# ----------------------------------------------------------------------------
# In the workers.


def measure_densely(setting, groups, classes=None, before=0):
    """`(rows, adherence [blocks], variety [blocks])` of `groups` blocks of every prompt, or of so many of them.

    before: the blocks of each prompt that were rendered already; these have other seeds.
    """
    backend, judge = toy.Emoji(workers.device()), EmojiJudge(workers.device())
    prompts = backend.prompts[:: len(backend.prompts) // (classes or len(backend.prompts))]
    first = FIRST_SEED + before * len(prompts) * SEEDS
    blocks = enumerate(prompts * groups)
    jobs = [Job(setting, prompt, first + b * SEEDS + k) for b, prompt in blocks for k in range(SEEDS)]
    adherence, variety = [], []
    for start in range(0, len(jobs), BATCH):
        part = jobs[start : start + BATCH]
        x, rows = backend.sample(setting, part)
        features, probability = judge.measure_pixels(backend.to_pixels(x).cpu(), [j.prompt for j in part])
        blocks = features.view(-1, SEEDS, features.shape[1])
        adherence.append(probability.view(-1, SEEDS).mean(1))
        variety.append(torch.cdist(blocks, blocks).sum((1, 2)) / (SEEDS * (SEEDS - 1)))
    return rows, torch.cat(adherence).numpy(), torch.cat(variety).numpy()


def run_study(seed, sampler, trials, images, confirms):
    """One study: its trials, and what was confirmed."""
    backend, judge = toy.Emoji(workers.device()), EmojiJudge(workers.device())
    with tempfile.TemporaryDirectory() as out:
        plan = study.make_plan("quality", backend.prompts, trials, images, seed)
        search = study.Search(plan, backend, judge, optuna.storages.InMemoryStorage(), out, Quiet(), sampler)
        search.run()
        front = {t.number for t in search.front()}
        found = {
            "trials": [(t.user_attrs["setting"], t.number in front, objectives.num_blocks(t.user_attrs["measured"]))
                       for t in search.results()],
            "chosen": [t.user_attrs["setting"] for *_, t in confirm.choose(search)[1:]],
            "confirmed": [],
        }  # fmt: skip
        if confirms:
            measured = confirm.confirm(search, Path(out))
            for key, _, setting, trial in confirm.choose(search)[1:]:
                base = search.measured(study.BASELINE)
                found["confirmed"].append({
                    "setting": (setting.sigma_lo, setting.sigma_hi, setting.weight),
                    "search": {m: objectives.difference(trial.user_attrs["measured"], base, m)
                               for m in ("adherence", "variety")},
                    "confirmed": {m: objectives.difference(measured[key], measured["baseline"], m)
                                  for m in ("adherence", "variety")},
                })  # fmt: skip
    return found


# ----------------------------------------------------------------------------
# The truth.


def steps_setting(sigmas, first, last, weight):
    """The Setting that guides the steps first to last: its bounds lie between noise levels."""
    levels = [math.inf, *sigmas, 0.0]
    lo = math.sqrt(levels[last + 1] * levels[last + 2])
    hi = math.inf if first == 0 else math.sqrt(levels[first] * levels[first + 1])
    return Setting(lo, hi, weight)


class Truth:
    """What the dense sweep says of any setting. cells: `{key: (rows, variety, adherence)}`."""

    def __init__(self, cells, sigmas):
        self.cells, self.sigmas = cells, torch.tensor(sigmas)
        self.curves = {}
        for steps in {k[:2] for k in cells if k != CONDITIONAL_CELL}:
            weights = sorted(w for *of, w in cells if tuple(of) == steps)
            values = np.array([cells[(*steps, w)] for w in weights])
            self.curves[steps] = PchipInterpolator(np.log(weights), values)

    def __call__(self, setting):
        """`(rows, variety, adherence)`, float64."""
        guided = [] if setting.weight == 1 else setting.interval.mask(self.sigmas).nonzero()[:, 0].tolist()
        if not guided:
            return self.cells[CONDITIONAL_CELL]
        at = math.log(min(max(setting.weight, WEIGHTS[0]), WEIGHTS[-1]))
        return tuple(map(float, self.curves[guided[0], guided[-1]](at)))

    def settings(self):
        """Those of the dense sweep that are guided."""
        return [steps_setting(self.sigmas.tolist(), *k) for k in self.cells if k != CONDITIONAL_CELL]

    @property
    def baseline(self):
        return self(everywhere(toy.Emoji.weight))

    def area(self, settings):
        """What these dominate by their true values, up to the baseline, of those within the bound."""
        rows, variety, adherence = self.baseline
        points = [self(s) for s in settings]
        kept = [(r, -v) for r, v, a in points if a >= adherence - EmojiJudge.margin]
        return objectives.hypervolume(kept, (rows, -variety))


# ----------------------------------------------------------------------------
# The parts.


def run_all(tasks, args, what):
    """Yield `(key, value)` of the tasks, with a bar."""
    if tasks:
        running = workers.run(tasks, args.device * args.workers)
        yield from tqdm(running, total=len(tasks), desc=what, mininterval=5)


def dense(args):
    """`(Truth, what it is made of, {key: standard error of its adherence})` of dense.npz, `keys` [cells, 3], `rows`
    [cells], `adherence` and `variety` [cells, blocks], and of refined/, adherence and variety [2, blocks] each."""
    file = args.out / "dense.npz"
    sigmas = toy.Emoji().sigmas.tolist()
    if not file.exists():
        steps = range(len(sigmas))
        cells = {(a, b, w): steps_setting(sigmas, a, b, w) for a in steps for b in steps if a <= b for w in WEIGHTS}
        cells[CONDITIONAL_CELL] = study.CONDITIONAL
        tasks = {k: (("dense", str(s)), measure_densely, s, args.dense, args.classes) for k, s in cells.items()}
        found = dict(run_all(tasks, args, "dense sweep"))
        rows, adherence, variety = (np.stack([found[k][i] for k in cells]) for i in range(3))
        with atomic_path(file) as tmp, tmp.open("wb") as f:
            small = dict(adherence=adherence.astype("float32"), variety=variety.astype("float32"))
            np.savez_compressed(f, keys=np.array(list(cells)), rows=rows, **small)
    with np.load(file) as told:
        keys, rows, adherence, variety = (told[k] for k in ("keys", "rows", "adherence", "variety"))
    keys = [(int(a), int(b), float(w)) for a, b, w in keys]
    values = zip(rows, variety.mean(1), adherence.mean(1), strict=True)
    cells = {k: tuple(map(float, v)) for k, v in zip(keys, values, strict=True)}
    errors = standard_error(adherence - adherence[keys.index(BASELINE_CELL)])
    refined = refine(args, Truth(cells, sigmas), dict(zip(keys, errors, strict=True)))
    cells |= {key: told[:3] for key, told in refined.items()}
    images = (adherence.size + len(refined) * args.refine * adherence.shape[1] // args.dense) * SEEDS
    made = f"dense sweep: {images:,} images, {len(cells):,} settings, {len(refined)} of them rendered again or between"
    return Truth(cells, sigmas), made, {key: told[3] for key, told in refined.items()}


def standard_error(blocks):
    """Of the means of [..., blocks]."""
    return blocks.std(-1, ddof=1) / math.sqrt(blocks.shape[-1])


def refine(args, truth, errors):
    """`{key: (rows, variety, adherence, standard error of its difference)}` of the cells that may be among the best
    within the bound, if the dense sweep is wrong by three standard errors."""
    folder, sigmas = args.out / "refined", truth.sigmas.tolist()
    rows, variety, adherence = truth.baseline
    least = NEAR * truth.area(truth.settings())
    near = [
        key
        for key, (r, v, a) in truth.cells.items()
        if max(rows - r, 0) * max(v - variety, 0) >= least and a - adherence + 3 * errors[key] >= -EmojiJudge.margin
    ]
    wanted = {BASELINE_CELL, *near}
    for first, last, weight in near:  # And between.
        at = WEIGHTS.index(weight)
        wanted |= {
            (first, last, round(math.sqrt(weight * w), 3)) for w in WEIGHTS[max(at - 1, 0) : at + 2] if w != weight
        }
    files = {k: folder / f"{k[0]}-{k[1]}-{k[2]:g}.npy" for k in sorted(wanted)}
    tasks = {
        k: (("refined", str(k)), measure_densely, steps_setting(sigmas, *k), args.refine, args.classes, args.dense)
        for k, file in files.items()
        if not file.exists()
    }
    folder.mkdir(exist_ok=True)
    for key, (_, *blocks) in run_all(tasks, args, "those that may be the best"):
        with atomic_path(files[key]) as tmp, tmp.open("wb") as f:
            np.save(f, np.stack(blocks).astype("float32"))
    found = {k: np.load(file).astype("float64") for k, file in files.items()}

    def told(key):
        rows, (adherence, variety) = steps_setting(sigmas, *key).rows(truth.sigmas), found[key].mean(1)
        return rows, variety, adherence, standard_error(found[key][0] - found[BASELINE_CELL][0])

    return {k: tuple(map(float, told(k))) for k in found}


def studies(args):
    wanted = [(seed, name) for name in args.samplers for seed in range(args.studies if name == OURS else args.seeds)]
    file = args.out / "studies.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    tasks = {
        f"{name} {seed}": ((name, str(seed)), run_study, seed, name, args.trials, args.images, name == OURS)
        for seed, name in wanted
        if f"{name} {seed}" not in known
    }
    for key, value in run_all(tasks, args, "studies"):
        known[key] = value
        file.write_text(json.dumps(known))
    return known


def search_table(args, truth, made, errors, found):
    whole = truth.area(truth.settings())
    bound = truth.baseline[2] - EmojiJudge.margin
    head = ["search", "images", "tried", "front", "best three", "of these within the bound", "tried >= 95 %"]
    body, detail = [], {}
    for name in args.samplers:
        images, within, shares = [], [], {"tried": [], "front": [], "best three": []}
        for seed in range(args.seeds):
            one = found[f"{name} {seed}"]
            sets = [s for s, _, _ in one["trials"]], [s for s, on, _ in one["trials"] if on], one["chosen"]
            for share, settings in zip(shares.values(), sets, strict=True):
                share.append(truth.area(map(study.from_json, settings)) / whole)
            within += [truth(study.from_json(s))[2] >= bound for s in one["chosen"]]
            images.append(sum(n for *_, n in one["trials"]) * SEEDS)
        detail[name] = shares
        body.append([
            name, f"{np.mean(images):,.0f}", *[f"{np.mean(v):.1%}" for v in shares.values()],
            f"{sum(within)} of {len(within)}", f"{sum(t >= 0.95 for t in shares['tried'])} of {args.seeds}",
        ])  # fmt: skip
    text = f"{aligned(head, body)}\n\n- {made}\n- {best_of(truth, errors)}"
    for name, shares in detail.items():
        by_seed = [f"{what} {' '.join(f'{v:.3f}' for v in values)}" for what, values in shares.items()]
        text += f"\n- {name}, by seed: {'; '.join(by_seed)}"
    return text


def best_of(truth, errors):
    """What the front of the dense sweep is, by name."""
    rows, variety, adherence = truth.baseline
    within = {k: v for k, v in truth.cells.items() if v[2] >= adherence - EmojiJudge.margin}
    keys = list(within)
    front = [keys[i] for i in objectives.front([(r, -v) for r, v, _ in within.values()])]
    told = [
        f"steps {a + 1} to {b + 1} at {w:g} ({within[a, b, w][0]:g} rows, variety {within[a, b, w][1] - variety:+.3f}, "
        f"adherence {within[a, b, w][2] - adherence:+.2f}, standard error {errors.get((a, b, w), math.nan):.2f})"
        for a, b, w in front
        if within[a, b, w][0] < rows and within[a, b, w][1] > variety
    ]
    return f"its best within the bound: {'; '.join(told)}"


def coverage_table(args, found):
    settings = {"baseline": everywhere(toy.Emoji.weight)}
    chosen = {}
    for seed in range(args.studies):
        for place, c in enumerate(found[f"{OURS} {seed}"]["confirmed"], 1):
            chosen[seed, place] = c
            settings[seed, place] = Setting(*c["setting"])
    file = args.out / "true.json"
    true = json.loads(file.read_text()) if file.exists() else {}
    tasks = {
        str(s): (("true", str(s)), measure_densely, s, args.groups, args.classes)
        for s in settings.values()
        if str(s) not in true
    }
    for key, (_, *blocks) in run_all(tasks, args, "the chosen settings, densely"):
        true[key] = [float(b.mean(dtype="float64")) for b in blocks]
        file.write_text(json.dumps(true))
    head = ["confirmation", "held, of best-1", "held, of all", "bias of the search", "bias of the confirmation"]
    body = []
    for column, metric in enumerate(("adherence", "variety")):
        held, biases = [], []
        for key, c in chosen.items():
            truth = true[str(settings[key])][column] - true[str(settings["baseline"])][column]
            _, low, high = c["confirmed"][metric]
            held.append((key[1], low <= truth <= high))
            biases.append([c[when][metric][0] - truth for when in ("search", "confirmed")])
        first = [h for place, h in held if place == 1]
        body.append([
            metric, f"{sum(first)} of {len(first)}", f"{sum(h for _, h in held)} of {len(held)}",
            *[f"{b:+.3f}" for b in np.mean(biases, axis=0)],
        ])  # fmt: skip
    return aligned(head, body)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--workers", type=int, default=1, help="processes on each device")
    parser.add_argument("--out", type=Path, default=Path("out/tune-quality"))
    parser.add_argument("--dense", type=int, default=2, help="blocks of each prompt in a cell of the dense sweep")
    parser.add_argument("--refine", type=int, default=32, help="the same, in the cells that may be the best")
    parser.add_argument("--groups", type=int, default=8, help="the same, for the true values of what was confirmed")
    parser.add_argument("--classes", type=int, help="of so many prompts only: a try")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="studies of each sampler that are compared")
    parser.add_argument("--studies", type=int, default=20, help="studies whose confirmations are judged")
    parser.add_argument("--samplers", nargs="+", default=list(study.SAMPLERS), choices=list(study.SAMPLERS))
    args = parser.parse_args()
    args.studies = max(args.studies, args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    truth, made, errors = dense(args)
    found = studies(args)
    text = (
        "# The tuner against a dense sweep\n\n"
        f"Written by `benchmarks/tune_quality.py`: studies of the emoji model, {args.trials} trials of {args.images} "
        "images. *Tried*, *front* and *best three*: the share of the dense sweep's hypervolume that all settings of a "
        "study, those on its front, or those that it confirms have by their true values, on average over the seeds. "
        "*Held*: 95% confidence intervals with the true value in them. *Bias*: how much too high the value of a "
        "confirmed setting was, on average.\n\n"
    )
    text += search_table(args, truth, made, errors, found)
    print(text, flush=True)
    text += "\n\n" + (covered := coverage_table(args, found))
    print(covered)
    (args.out / "quality.md").write_text(text + "\n")


if __name__ == "__main__":
    main()

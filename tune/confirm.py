"""The confirmation: the best three and the baseline again, on prompts and seeds that the search never saw.

The best of many noisy trials is partly the luckiest (the winner's curse), so its numbers of the search are too good.
Those of the confirmation are not: nothing was chosen by them. Both are kept.
"""

import datetime
import json
import math
import platform
from importlib import metadata

import torch
from optuna.trial import TrialState

from .. import __version__
from ..files import atomic_path
from ..interval_text import CONDITIONAL_ONLY
from . import objectives, study
from .images import Images
from .objectives import SEEDS
from .servers.backend import CONDITIONAL

CONFIRMED = "confirmed.json"
BEST = [f"best-{place}" for place in (1, 2, 3)]  # The ids of those that are confirmed, beside the baseline.


def choose(search):
    """`[(id, label, Setting, Trial)]`: the baseline, and the best of those within the bound, as all trials tell.

    First those of the front that together improve most on the baseline; if it has fewer than three, those of the
    front without them; at last those that are least beyond the bound: in the search that may be bad luck.
    """
    count, baseline = len(BEST), search.complete(study.BASELINE)
    rivals = [t for t in search.results() if t.number != baseline.number]
    losses, beyond = search.belief().told([search.setting_of(t) for t in rivals], objectives.LIKELY)
    corner = search.losses(baseline)
    left, chosen = [i for i in range(len(rivals)) if beyond[i] <= 0], []
    while left and len(chosen) < count:
        order = objectives.best([tuple(losses[i] + corner) for i in left], corner, count - len(chosen))
        chosen += [left[i] for i in order]
        left = [i for i in left if i not in chosen]
    chosen += sorted((i for i in range(len(rivals)) if beyond[i] > 0), key=beyond.__getitem__)[: count - len(chosen)]
    found = [("baseline", study.BASELINE, baseline)]
    best = [rivals[i] for i in chosen]
    found += [(name, t.user_attrs.get("label", ""), t) for name, t in zip(BEST, best, strict=False)]
    return [(i, label, search.setting_of(t), t) for i, label, t in found]


def confirm(search, out):
    """Render and measure the chosen settings on the plan's fresh blocks; `{id: measured}`, with `conditional`."""
    folder, found = Images(out / "confirmed", search.backend.identity), {}
    for key, _, setting, _ in [*choose(search), ("conditional", "", CONDITIONAL, None)]:
        blocks = search.plan.confirm
        found[key] = search.render(setting, blocks, folder, range(len(blocks)))
    return found


def report(search, out, confirmed):
    """Write confirmed.json, all that the report tells, and return it."""
    plan, backend = search.plan, search.backend
    kept = [m for m in objectives.metrics(search.judge, backend.sigmas is not None)]
    base, drift = search.measured(study.BASELINE), search.measured(CONDITIONAL_ONLY)
    settings = []
    for key, label, setting, trial in choose(search):
        folder = setting.folder
        settings.append({
            "id": key,
            "label": label or str(setting),
            **_bounds(setting),
            "search": _values(kept, trial.user_attrs["measured"], base, drift),
            "confirmed": {
                m.key: _confirmed(m.key, confirmed[key], confirmed["baseline"], confirmed["conditional"],
                                  key == "baseline")
                for m in kept
            },
            "images": [f"confirmed/{folder}/{b.prompt}-{b.first + k}.png" for b in plan.confirm for k in range(SEEDS)],
            "paste": backend.paste(setting),
        })  # fmt: skip
    found = {
        "name": plan.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": backend.source,
        "host": backend.host,
        "versions": versions(),
        "seed": plan.seed,
        "objective": search.goal.describe(),
        "metrics": [dict(key=m.key, name=m.name, better=m.better, digits=m.digits) for m in kept],
        "fresh_prompts": plan.fresh_prompts,
        "prompts": [b.text for b in plan.confirm],
        "seeds": list(plan.confirm[0].seeds),
        "image_seeds": [s for b in plan.confirm for s in b.seeds],
        "trials": _trials(search, kept, base, drift),
        "settings": settings,
    }
    with atomic_path(out / CONFIRMED) as tmp:
        tmp.write_text(json.dumps(_finite(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _trials(search, kept, base, drift):
    on_front, found = {t.number for t in search.front()}, []
    failed = [t for t in search.trials(TrialState.FAIL) if "again" not in t.user_attrs]
    for trial in sorted([*search.results(), *failed], key=lambda t: t.number):
        error = trial.user_attrs.get("error", "")
        done = trial.state == TrialState.COMPLETE
        if not done and (not error or error == study.SURPLUS):
            continue
        measured = trial.user_attrs["measured"] if done else None
        found.append({
            "number": trial.number,
            "label": trial.user_attrs.get("label", ""),
            "state": "complete" if done else "failed",
            "error": error,
            **_bounds(study.from_json(trial.user_attrs["setting"])),
            "images": objectives.num_blocks(measured) * SEEDS if done else 0,
            "values": _values(kept, measured, base, drift) if done else {},
            "front": trial.number in on_front,
        })  # fmt: skip
    return found


def _values(kept, measured, base, drift):
    values = {m.key: objectives.value(measured, base, m.key, drift) for m in kept}
    return {k: v for k, v in values.items() if v is not None}


def _confirmed(key, measured, base, drift, is_baseline):
    change = None if is_baseline else objectives.difference(measured, base, key, drift)
    return {
        "value": objectives.value(measured, measured, key, drift),
        "difference": change,
        "verdict": objectives.verdict(change),
    }


def _bounds(setting):
    hi = None if setting.sigma_hi == math.inf else setting.sigma_hi
    return {"sigma_lo": setting.sigma_lo, "sigma_hi": hi, "weight": setting.weight}


def _finite(value):
    """JSON has no infinity: what has no end is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions():
    found = {"guidance_interval": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: metadata.version(name) for name in ("optuna", "numpy")}

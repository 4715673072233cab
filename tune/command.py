"""The command `guidance-interval tune`: from a workflow and prompts to a report and a preset."""

import contextlib
import math
import time
from pathlib import Path

from ..errors import UserError, plain, quoted
from ..files import aligned, content_of, output_folder, printed, sole_use
from ..interval_text import CONDITIONAL_ONLY
from . import confirm, objectives, study
from .servers.backend import Refused, everywhere
from .view import View, duration

PREVIEW = 3  # Prompts that --dry-run shows.
LONGEST = 16 * 2**20  # Bytes of a file of prompts.


def run(
    source=None,
    servers=None,
    a1111=None,
    model=None,
    prompts=None,
    reference=None,
    device="cpu",
    clip=None,
    output_node=None,
    **options,
):
    """Tune one of: a workflow `source` on ComfyUI `servers`; the web UI at `a1111`, with the parameters of a picture
    `source` if there is one; or the `model` that ships.

    prompts: a text file; reference: a folder of images; clip: of CLIP's weights; output_node: whose image of the
    workflow is judged, None for the last one; options: see `tune`. Raises UserError for what cannot be.
    """
    if bool(model) == bool(source or a1111):
        given = " and ".join(repr(x) for x in (source, a1111, model) if x)
        raise UserError(f"tune takes one of a workflow, --a1111 URL and --model emoji, got {given or 'none of them'}")
    if servers and (a1111 or not source):
        raise UserError("--server is for a workflow of ComfyUI: name its file, and no --a1111")
    if output_node is not None and (a1111 or not source):
        raise UserError("--output-node is for a workflow of ComfyUI: name its file, and no --a1111")
    _parse_save(options.get("save"))
    texts = None if prompts is None else read_prompts(prompts)
    if model is not None:
        from .judges.emoji import EmojiJudge
        from .servers.toy import Emoji

        if reference not in (None, EmojiJudge.own_reference):
            raise UserError(f"--reference {reference!r}: with --model emoji it is `emoji`, the real ones, or left out")
        backend, judge = Emoji(device), EmojiJudge(device, reference)
        texts = texts or backend.prompts
        if unknown := [t for t in texts if t not in backend.prompts]:
            raise UserError(
                f"--prompts {prompts!r}: unknown prompt: {quoted(unknown[0])}; the emoji model has "
                f"{', '.join(backend.prompts[:5])} and {len(backend.prompts) - 5} more"
            )
        return tune(backend, judge, texts, **options)
    if texts is None:
        raise UserError("--prompts is missing: a text file, one prompt on a line, 8 or more")
    if a1111 is not None:
        from .servers.webui import WebUI

        backend = WebUI(a1111, source)
    else:
        from .servers.comfyui import Comfy

        backend = Comfy(source, servers or ["http://127.0.0.1:8188"], output_node)
    with contextlib.closing(backend):
        return tune(backend, _judge(backend, device, reference, clip), texts, **options)


def _judge(backend, device, reference, clip):
    """CLIP, or for the demo model in ComfyUI the networks that know it: no weights are needed then."""
    if getattr(backend, "shows_emoji", False):
        from .judges.emoji import EmojiJudge

        return EmojiJudge(device, reference)
    from .judges.clip import ClipJudge

    return ClipJudge(device, reference, clip)


def tune(
    backend,
    judge,
    prompts,
    out,
    trials=40,
    images=64,
    seed=0,
    name=None,
    storage=None,
    save=None,
    language="en",
    dry_run=False,
    sampler="ehvi",
):
    """Search, confirm, write confirmed.json and report.html to `out`; returns what confirmed.json holds, or None.

    backend: see `servers/backend.py`; judge: `EmojiJudge` or `ClipJudge` of `judges/`; prompts: [text]. save: `NAME` or
    `NAME=best-2`. None is returned for a dry run, and where another process confirms. Raises UserError before any image
    is rendered for what cannot be.
    """
    preset, which = _parse_save(save)
    judge.check(prompts)
    plan = study.make_plan(name or _name(backend), prompts, trials, images, seed)
    if dry_run:
        print("\n".join(plain(line) for line in _describe(plan, backend, judge)))
        return None
    out = output_folder(out)
    url = storage or f"sqlite:///{out.resolve() / 'study.db'}"
    with sole_use(out):
        goal = objectives.goal(judge, backend.sigmas is not None)
        with View(goal) as view:
            search = study.Search(plan, backend, judge, study.open_storage(url), out, view, sampler)
            search.run()
            if not _is_ours(search, view):
                return None
            chosen = confirm.choose(search)
            view.phase("confirming", (len(chosen) + 1) * len(plan.confirm) * objectives.SEEDS)
            with _must_render():
                measured = confirm.confirm(search, out)
        found = confirm.report(search, out, measured)
        print(table(found, printed), "", *findings(found), sep="\n")
        from .report.report import write_report

        print(f"\nwrote {confirm.CONFIRMED} and {Path(write_report(out, language=language)).name} to {out}")
        if preset:
            _save(found, preset, which)
    return found


def _name(backend):
    """A study's name from where its images come from."""
    return "a1111" if "://" in backend.source else Path(backend.source).stem


def _is_ours(search, view):
    """Whether this process confirms: the one whose folder has the baseline, which began the study."""
    baseline = next(t for t in search.trials() if t.user_attrs.get("label") == study.BASELINE and t.values)
    owner = baseline.user_attrs["folder"]
    if owner == search.mine:
        return True
    host, _, folder = owner.partition(":")
    view.say(
        f"the search is done. The process that started it, on {host} with --out {folder}, confirms the best settings "
        "and writes the report; if it has ended, run its command there again"
    )
    return False


def _parse_save(save):
    """`(name, id)`, or `(None, None)` without one; raises UserError for what could not be saved after the work."""
    if save is None:
        return None, None
    from .. import presets

    name, _, which = save.partition("=")
    presets.check_name(name)
    if (which := which or confirm.BEST[0]) not in confirm.BEST:
        raise UserError(f"--save {save!r}: unknown ID: {quoted(which)}; a study confirms {', '.join(confirm.BEST)}")
    presets.check_writable()
    return name, which


def _save(found, name, which):
    from .. import presets

    setting = next((s for s in found["settings"] if s["id"] == which), None)
    if setting is None:
        ids = [s["id"] for s in found["settings"] if s["id"] != "baseline"]
        raise UserError(f"--save {name}={which}: unknown ID: {which!r}; the study confirmed {', '.join(ids) or 'none'}")
    if _setting(setting).conditional_only:
        other = confirm.BEST[which == confirm.BEST[0]]
        raise UserError(
            f"--save {name}: {which} is {CONDITIONAL_ONLY}, which is no interval, so no preset is saved: set cfg to 1 "
            f"in your sampler. For another setting run the command again with --save {name}={other}"
        )
    base, kept = found["settings"][0], {k: v for k, v in setting["confirmed"].items() if v["difference"]}
    goal = found["objective"]
    wanted = objectives.wanted(goal["minimize"], goal["maximize"])
    said = [f"{objectives.word(k)} {v['verdict']} ({v['difference'][0]:+.3g})" for k, v in kept.items()]
    entry = {
        "model": found["source"],
        "sigma_lo": setting["sigma_lo"],
        "sigma_hi": math.inf if setting["sigma_hi"] is None else setting["sigma_hi"],
        "weight": setting["weight"],
        "weight_everywhere": base["weight"],
        "study": found["name"],
        "date": found["created"][:10],
        "objective": f"{wanted}; {goal['bound']['metric']} at most {goal['bound']['margin']:g} lower",
        "said": "against the baseline: " + ", ".join(said),
        "value": {k: [v for v in c["value"]] for k, c in kept.items()},
        "difference": {k: [v for v in c["difference"]] for k, c in kept.items()},
    }
    file = presets.save_mine(name, entry)
    print(f"saved {setting['id']} as the preset {name!r} in {file}: reload ComfyUI's page, or restart Automatic1111")


# ----------------------------------------------------------------------------
# What a person reads.


def _describe(plan, backend, judge):
    share, screened, raced, confirmed = (
        n * objectives.SEEDS for n in (plan.share, plan.stages[0], plan.stages[-1], len(plan.confirm))
    )
    goal = objectives.goal(judge, backend.sigmas is not None)
    most = plan.most * objectives.SEEDS + 5 * confirmed
    lines = [*backend.describe(), f"goal: {goal}", ""]
    ranges, speed = study.space(backend), _speed(backend, plan)
    lines.append(
        "search: " + ", ".join(f"{k} {lo:.3g} to {hi:.3g}" for k, (lo, hi) in ranges.items()) + " (log scales)"
    )
    for label, setting, _ in study.first_trials(backend, ranges):
        lines.append(f"  first: {label}" + (f", {setting}" if label != str(setting) else ""))
    lines += [
        f"  {plan.trials} trials of {screened} to {raced} images; what is left of {share} for each goes to settings "
        f"that may be on the front, up to {study.MORE * share} each",
        f"confirmation: the best three, the baseline and conditional only, {confirmed} images each, "
        + ("of prompts that the search does not use" if plan.fresh_prompts else
           f"of the same prompts with fresh seeds (of {study.AT_LEAST} prompts or more, half would be kept for it)"),
        f"at most {most:,} images" + (f", about {duration(most / speed)} at {speed:.2g} a second" if speed else ""),
        "prompts of the search: " + "; ".join(dict.fromkeys(plain(b.text, 100) for b in plan.search[:PREVIEW])) + "; …",
    ]  # fmt: skip
    return lines


@contextlib.contextmanager
def _must_render():
    """Where nothing goes on without the images: what the host refuses ends the command."""
    try:
        yield
    except Refused as e:
        raise UserError(f"the host refuses to render ({e}); what is done is kept: run the command again") from e


def _speed(backend, plan):
    """Images a second, from the first few of the search. What is loaded for the first one is left out."""
    spare, jobs = backend.workers, []  # The first of each.
    for block in (*plan.search, *plan.confirm):
        jobs += [job for _, job in block.jobs(everywhere(backend.weight))]
        if len(jobs) >= max(2 * objectives.SEEDS, 2 * spare):
            break
    with _must_render():
        times = [time.monotonic(), *(time.monotonic() for _ in backend.render(jobs))]
    timed = times[min(spare, len(jobs) - 1) :]
    return (len(timed) - 1) / (timed[-1] - timed[0]) if timed[-1] > timed[0] else None


def table(found, form=aligned):
    """The confirmed numbers, with those of the search, as a Markdown table or in another form."""
    kept = found["metrics"]
    head = ["setting", *[objectives.word(m["key"]) for m in kept]]
    body = []
    for s in found["settings"]:
        label = "" if s["label"] in (s["id"], str(_setting(s))) else f" ({s['label']})"
        body.append([
            f"{s['id']}: {_setting(s)}{label}",
            *[_cell(s["confirmed"][m["key"]], m["digits"]) for m in kept],
        ])  # fmt: skip
        if s["id"] != "baseline":
            found_there = [s["search"].get(m["key"]) for m in kept]
            body.append(["  in the search", *["" if v is None else f"{v[0]:.{m['digits']}f}" for v, m in
                                              zip(found_there, kept, strict=True)]])  # fmt: skip
    return form(head, body)


def _cell(confirmed, digits):
    value, change = confirmed["value"], confirmed["difference"]
    if value is None:
        return ""
    text = f"{value[0]:.{digits}f}"
    if change is not None:
        text += f" ({change[0]:+.{digits}f} [{change[1]:+.{digits}f}, {change[2]:+.{digits}f}])"
    return text


def _setting(entry):
    return study.from_json([entry["sigma_lo"], entry["sigma_hi"], entry["weight"]])


def findings(found):
    """What the confirmation says, a sentence for each setting."""
    names = {m["key"]: m for m in found["metrics"]}
    bound = found["objective"]["bound"]
    keys = [*found["objective"]["minimize"], *found["objective"]["maximize"], bound["metric"]]
    lines = []
    for s in found["settings"][1:]:
        parts = []
        for key in keys:
            change, verdict = s["confirmed"][key]["difference"], s["confirmed"][key]["verdict"]
            if change is not None:
                same = change[0] == change[1] == change[2] == 0
                parts.append(f"{objectives.word(key)} {'the same' if same else verdict}"
                             + ("" if same else f" ({change[0]:+.{names[key]['digits']}f})"))  # fmt: skip
        lost = s["confirmed"][bound["metric"]]["difference"][2] < -bound["margin"]
        warning = f"; its {bound['metric']} is surely lower than the margin allows" if lost else ""
        lines.append(f"{s['id']}, {_setting(s)}, against the baseline on fresh images: {', '.join(parts)}{warning}.")
    return lines


# ----------------------------------------------------------------------------
# What a person gives.


def read_prompts(path):
    """The prompts of a text file, one on a line; raises UserError, naming the file, without any."""
    try:
        lines = content_of(path, "--prompts", LONGEST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"--prompts {path!r} is not text in UTF-8; give a text file, a prompt on a line") from e
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"--prompts {path!r} holds no prompt; write one on each line, {study.AT_LEAST} or more")
    return prompts

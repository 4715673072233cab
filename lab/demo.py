"""The main job: what guidance in a limited interval buys, on a model that ships, in tables and three pictures."""

import json
import math
import platform
from dataclasses import asdict, dataclass, replace

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..errors import UserError, user_input
from ..files import aligned, atomic_path, output_folder, printed, sole_use
from ..interval_text import CONDITIONAL_ONLY
from ..sampler_patch import GuidanceInterval
from ..toy import data, model
from ..toy.sampling import BATCH, Guidance, Samples, check_weight, get_sampler, karras_sigmas, sample
from . import compare, plots
from .scores import Scores, judge_samples, strata

SHARE = 5  # Settings beside the two that compete sample this part of the images.


@dataclass(frozen=True)
class Defaults:
    """What the demo does with a model unless told otherwise.

    How sampler, interval, weight and cfg_weight were chosen: docs/design.md. strong: a weight as people use it. shown:
    the classes in grid.png.
    """

    sampler: str
    steps: int
    interval: GuidanceInterval
    weight: float
    cfg_weight: float
    strong: float
    shown: tuple


DEFAULTS = {
    "emoji": Defaults(
        "dpmpp_sde", 8, GuidanceInterval(0.1, 3.5), 3.0, 1.75, 4.0,
        ("face-neutral-skeptical", "body-parts", "person-role", "animal-bird", "food-sweet", "food-asian",
         "light-video", "transport-ground", "time", "country-flag"),
    ),
    "digits": Defaults("dpmpp_2m", 16, GuidanceInterval(0.1, 2.5), 2.0, 1.25, 4.0, tuple("0123456789")),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One setting: its Samples, of which the images that are shown are kept, their Scores and what moves those."""

    setting: Guidance
    drawn: Samples
    scores: Scores
    influence: torch.Tensor | None = None

    @property
    def judged(self):
        return self.scores, self.influence


def run(out, samples, seed, device, name="emoji", sampler=None, steps=None, weight=None, cfg_weight=None,
        sigma_lo=None, sigma_hi=None):  # fmt: skip
    """Sample every setting, write the pictures and report.json, print the tables and the findings; return the report.

    None stands for the model's own `Defaults`. Raises UserError, before anything is sampled, for an unknown model or
    sampler, an interval or a weight that makes no sense, and a folder that cannot be written to or that another run is
    writing to.
    """
    if name not in DEFAULTS:
        raise UserError(f"model must be one of {', '.join(DEFAULTS)}, got {name!r}")
    own = DEFAULTS[name]
    with user_input():
        interval = GuidanceInterval(
            own.interval.sigma_lo if sigma_lo is None else sigma_lo,
            own.interval.sigma_hi if sigma_hi is None else sigma_hi,
        )
    weight, cfg_weight, sampler, steps = (
        getattr(own, key) if given is None else given
        for key, given in dict(weight=weight, cfg_weight=cfg_weight, sampler=sampler, steps=steps).items()
    )
    check_weight(weight)
    check_weight(cfg_weight, "cfg_weight")
    get_sampler(sampler)
    out = output_folder(out)
    with sole_use(out):
        lab = model.load(model.shipped()[name], device)
        sigmas = karras_sigmas(steps)
        interval.warn_if_unused(sigmas[:-1])
        settings = dict(
            none=Guidance(CONDITIONAL_ONLY, 1.0),
            cfg=Guidance(f"CFG everywhere, w={cfg_weight:g}", cfg_weight),
            strong=Guidance(f"CFG everywhere, w={own.strong:g}", own.strong),
            limited=Guidance(f"interval {interval}, w={weight:g}", weight, interval),
        )
        for part, widened in (
            ("low", GuidanceInterval(0, interval.sigma_hi)),
            ("high", GuidanceInterval(interval.sigma_lo)),
        ):
            if widened != interval:
                settings[part] = Guidance(f"… {part} part on: {widened}", weight, widened)
        few, many = measure_all(lab, settings, shown(lab, own.shown), samples, sampler, steps, seed)
        real = real_images(lab, few["cfg"].drawn.num, seed)
        found = findings(lab, few, many)
        runs = [*few.values(), *(many.values() if many["cfg"] is not few["cfg"] else ())]
        titles = own.shown if name == "emoji" else ()
        plots.grid(out / "grid.png", [real, *few.values()], lab.config["pixel_mean"], lab.config["pixel_std"], titles)
        plots.tradeoff(out / "tradeoff.png", list(few.values()), real)
        plots.schedule(out / "schedule.png", sigmas, interval)
        report = dict(
            settings=[describe(r) for r in runs],
            real={k: v for k, v in asdict(real.scores).items() if not math.isnan(v)},
            findings=found,
            arguments=dict(
                model=name, samples=samples, sampler=sampler, steps=steps, seed=seed, device=str(device), weight=weight,
                cfg_weight=cfg_weight, sigma_lo=interval.sigma_lo, sigma_hi=_or_null(interval.sigma_hi),
            ),
            sigmas=sigmas.tolist(),
            model=dict(file=model.shipped()[name].name, config=lab.config, record=lab.record),
            versions=versions(),
        )  # fmt: skip
        with atomic_path(out / "report.json") as tmp:
            tmp.write_text(json.dumps(report, indent=2) + "\n")
    print(table(runs if math.isnan(real.scores.fd) else [real, *runs], printed), "", *found, sep="\n")
    print(f"\nwrote grid.png, tradeoff.png, schedule.png and report.json to {out}")
    return report


def measure_all(lab, settings, index, samples, sampler, steps, seed):
    """`({key: Result}, {key: Result})`: every setting on the first few of the seeds, and the two that compete on all.

    index: which samples are shown.
    """
    few = min(samples, -(-samples // (SHARE * BATCH)) * BATCH)  # Whole batches: the noise of the first is the same.
    shorter, longer = {}, {}
    with tqdm(total=2 * samples + (len(settings) - 2) * few, unit="image") as bar:
        for key, setting in settings.items():
            bar.set_description(setting.name)
            competes = key in ("cfg", "limited")
            drawn = sample(lab, setting, samples if competes else few, sampler, steps, seed, bar.update)
            part = drawn if drawn.num == few else drawn.first(few)
            shorter[key] = _judged(lab, setting, part, index(part.labels))
            if competes:
                longer[key] = shorter[key] if drawn.num == few else _judged(lab, setting, drawn, index(drawn.labels))
        bar.set_description("done")
    return shorter, longer


def _judged(lab, setting, drawn, index):
    scores, influence = judge_samples(lab, drawn.x, drawn.labels)
    return Result(setting, replace(drawn, x=drawn.x[index].clone()), scores, influence)


def shown(lab, names):
    """A function of labels [N]: the index of the images that are shown, the first ones of each class in turn."""
    classes = lab.config.get("classes", [str(c) for c in range(lab.config["num_classes"])])
    wanted = [classes.index(name) for name in names]

    def index(labels):
        # Where the images are so few that a class has none, its place shows the first one.
        found = [f if len(f) else torch.arange(1) for f in ((labels == c).nonzero()[:, 0].cpu() for c in wanted)]
        return torch.cat([f[torch.arange(plots.COLUMNS // len(wanted)) % len(f)] for f in found])

    return index


def real_images(lab, num, seed):
    """Real images as a `Result`: of the digits as many, whose distance is the floor; of the emoji those to be shown."""
    setting = Guidance("real images", 1.0)
    if "thumbnails" not in lab.reference:
        drawn = real_digits(lab, num, seed)
        return _judged(lab, setting, drawn, shown(lab, "0123456789")(drawn.labels))
    x = data.to_model(lab.reference["thumbnails"], lab.config["pixel_mean"], lab.config["pixel_std"])
    index = shown(lab, DEFAULTS["emoji"].shown)(torch.arange(len(x)))
    x = x[index.repeat_interleave(plots.COLUMNS // len(index))]
    return Result(setting, Samples(x, index, 0.0, 0.0), Scores(*[math.nan] * 5))


def real_digits(lab, num, seed):
    """As many real images (of the 5,000 there are) as `Samples`, their classes in turn: the floor of the distance."""
    images, labels = map(torch.as_tensor, data.load_digits())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == c][: -(-num // data.NUM_CLASSES)] for c in range(data.NUM_CLASSES)]
    index = torch.stack(classes, dim=1).flatten()[:num]
    x = data.to_model(images[index], lab.config["pixel_mean"], lab.config["pixel_std"])
    device = lab.reference["mean"].device
    return Samples(x.to(device), labels[index].to(device), 0.0, 0.0)


def findings(lab, few, many):
    """What these runs say of the paper's claims, each with its uncertainty: a list of sentences."""
    lines, num = [], many["cfg"].drawn.num
    cfg, limited = many["cfg"], many["limited"]
    points = 100 * (limited.scores.accuracy - cfg.scores.accuracy)
    lines.append(
        f"Interval against CFG, {num:,} images of the same seeds: the distance is {_ratios(lab, limited, cfg)}. "
        f"Accuracy {points:+.1f} points, rows {change(limited.drawn.rows, cfg.drawn.rows)}."
    )
    lines.append(f"Interval against conditional only, {few['none'].drawn.num:,} images: the distance is "
                 f"{_ratios(lab, few['limited'], few['none'])}.")  # fmt: skip
    for part in ("low", "high"):
        if part in few:
            wider, limited = few[part], few["limited"]
            lines.append(
                f"Guidance in the {part} part as well, {wider.drawn.num:,} images: the distance is "
                f"{_ratios(lab, wider, limited)}, rows {change(wider.drawn.rows, limited.drawn.rows)}."
            )
    return lines


def _ratios(lab, a, b):
    """The ratio of two distances by each judge, in words."""
    names = {"fd": "by the ruler", "class_fd": "by the classifier"} if not math.isnan(a.scores.class_fd) else {"fd": ""}
    said = []
    for judge, name in names.items():
        r = compare.ratio(a.judged, b.judged, judge, strata(lab, a.drawn.labels))
        verdict = {"yes": "lower", "no": "higher", "unclear": "unclear"}[r.below]
        said.append(f"{r} {name} ({verdict})".replace("  ", " "))
    return ", ".join(said)


def change(value, base):
    """How much more or less than `base` a value is, in words."""
    ratio = value / base
    if abs(ratio - 1) < 0.0005:
        return "the same"
    if ratio >= 2:
        return f"{ratio:.1f} times as much"
    return f"{abs(ratio - 1):.1%} {'higher' if ratio > 1 else 'lower'}"


def table(runs, form=aligned):
    """The runs as a table, Markdown or of another form, such as `files.printed`."""
    judges = 1 if all(math.isnan(r.scores.class_fd) for r in runs) else 2
    head = [
        "setting",
        "images",
        "1000 FD [95 % CI]",
        "by the classifier",
        "accuracy",
        "variety",
        "NFE",
        "seconds",
    ]
    body = []
    for r in runs:
        s, drawn = r.scores, r.drawn
        body.append([
            r.setting.name, f"{drawn.num:,}", _with_ends(s.fd, s.fd_low, s.fd_high),
            _with_ends(s.class_fd, s.class_fd_low, s.class_fd_high),
            "" if math.isnan(s.accuracy) else f"{s.accuracy:.1%}", "" if math.isnan(s.variety) else f"{s.variety:.3f}",
            f"{drawn.rows:.1f}" if drawn.rows else "", f"{drawn.seconds:.1f}" if drawn.rows else "",
        ])  # fmt: skip
    if judges == 1:
        head, body = head[:3] + head[4:], [row[:3] + row[4:] for row in body]
    note = "The fewer the images, the higher a distance is, whatever the setting: compare rows of as many images."
    return form(head, body) + ("\n" + note if len({r.drawn.num for r in runs}) > 1 else "")


def _with_ends(value, low, high):
    return f"{1000 * value:.2f} [{1000 * low:.2f}, {1000 * high:.2f}]"


def describe(run):
    """One run as JSON; an open end of an interval is null, and so is what was not measured."""
    setting, bounds = run.setting, None
    if setting.interval is not None:
        bounds = [setting.interval.sigma_lo, _or_null(setting.interval.sigma_hi)]
    return dict(
        name=setting.name,
        weight=setting.weight,
        interval=bounds,
        images=run.drawn.num,
        rows_per_sample=run.drawn.rows,
        seconds=round(run.drawn.seconds, 3),
        **{k: None if math.isnan(v) else v for k, v in asdict(run.scores).items()},
    )


def _or_null(bound):
    return None if bound == float("inf") else bound


def versions():
    from importlib import metadata

    return dict(
        guidance_interval=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        k_diffusion=metadata.version("k-diffusion"),
    )

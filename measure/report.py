"""Folders of images against a reference: distances, fidelity, variety, adherence, and what shows in the pixels.

Features come from `folder.Folder`, numbers from `metrics`, and both are kept beside the folders: a second run
computes what has changed and nothing else.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

matplotlib.use("Agg")  # No window, no display needed.

from matplotlib import pyplot as plt

from .. import __version__
from ..errors import UserError
from ..files import atomic_path, content_of, output_folder, printed
from . import metrics
from .features import Pixels
from .folder import CORRUPT, FORMAT, SUFFIXES, UNREADABLE, Folder, Rows, decode, first_line

K = 5  # Neighbours, as Naeem et al. 2020 have it.
TITLES = {
    "fd": "FD",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "vendi": "Vendi",
    "distance": "distance",
    "accuracy": "accuracy",
    "clip_score": "CLIP score",
    "saturation": "saturation",
    "contrast": "contrast",
    "clipped": "clipped",
}
# What a table shows side by side: against the reference, of the set itself, of its pixels.
TABLES = [list(TITLES)[:6], list(TITLES)[6:10], list(TITLES)[10:]]


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95 % confidence interval, by bootstrap over the images, the reference held fixed."""

    value: float
    low: float
    high: float


def run(images, reference, extractors, prompts=None, out="out/measure", cache=None):
    """Measure each folder of `images` against `reference`, print tables, write report.json and measure.png.

    extractors: as `features.get_extractor` returns them, each once; prompts: a JSON file {name of an image: its
    prompt}, beside the `.txt` files that may lie next to the images. Returns the report. Raises UserError for what
    cannot be measured, before any image is read where that can be told; images that cannot be read are listed and left
    out. Memory holds the features of the reference and of one folder.
    """
    folders = [Folder(path, cache) for path in (reference, *images)]
    _check_apart(folders, Path(out))
    if len({folder.label for folder in folders}) < len(folders):
        for folder, path in zip(folders, (reference, *images), strict=True):
            folder.label = str(path)
    for folder in folders:
        folder.label = _shown(folder.label)
    names = [e.name for e in extractors]
    if len(set(names)) < len(names):
        raise UserError(f"features {' '.join(names)} name one twice; name each once")
    for folder in folders:
        if len(folder.files) < 2:
            raise UserError(_too_few(folder, len(folder.files)))
    given = _read_prompts(prompts, extractors, folders)
    out, pixels = output_folder(out), Pixels()

    found, wanted = [], []
    for folder in folders:
        with tqdm(desc=folder.label, unit="image", total=0) as bar:
            folder.compute(pixels, extractors, bar)
        if len(folder.names) < 2:
            raise UserError(_too_few(folder, len(folder.names)))
        found.append({})
        wanted.append({e.name: _texts(folder, e, given) for e in (pixels, *extractors)})
        for extractor in tqdm((pixels, *extractors), desc=f"{folder}, scores", leave=False):
            scores = _kept_scores(folder, folders[0], extractor, wanted[-1][extractor.name])
            found[-1][extractor.name] = {name: Estimate(*scores[name]) for name in TITLES if name in scores}
        if folder is not folders[0]:
            folder.release(*extractors)

    said = {}
    for extractor in (pixels, *extractors):
        for folder, results, texts in zip(folders, found, wanted, strict=True):
            kind = extractor.name
            for metric, sentence in _caveats(folder, folders[0], extractor, results[kind], texts[kind]):
                said.setdefault(sentence, {}).setdefault(f"{folder}, {kind}", []).append(metric)
    notes = []
    for sentence, places in said.items():  # Each once, for all that it holds for.
        where = "; ".join(f"{place}: {', '.join(names)}" for place, names in places.items())
        notes.append(f"{where}: {sentence}")
    for folder in folders:
        if given and folder is not folders[0] and not any(name in given for name in folder.names):
            notes.append(f"{folder}: --prompts names none of its images")
        if len(folder.keys) < 100:
            notes.append(f"{folder}: with {len(folder.keys)} images the intervals too are uncertain; take 100 or more")
        notes += [
            f"{folder}: {_shown(name)} cannot be read ({reason}); left out" for name, reason in folder.unreadable[:10]
        ]
        if more := len(folder.unreadable[10:]):
            notes.append(f"{folder}: {more:,} more files cannot be read; report.json names them")
        if copies := len(folder.keys) - len(set(folder.keys)):
            notes.append(f"{folder}: {copies:,} of {len(folder.keys):,} images are exact copies of others")

    _say(tables(folders, found, extractors))
    if notes:
        _say("\n" + "\n".join(f"- {note}" for note in notes))
    report = dict(
        reference=_describe(folders[0], found[0]),
        images=[_describe(*pair) for pair in zip(folders[1:], found[1:], strict=True)],
        notes=notes,
        features={e.name: e.identity for e in extractors},
        neighbours=K,
        version=__version__,
    )
    with atomic_path(out / "report.json") as tmp:
        tmp.write_text(json.dumps(report, indent=2) + "\n")
    picture(out / "measure.png", folders, found, pixels)
    _say(f"\nwrote report.json and measure.png to {_shown(str(out))}")
    return report


# ----------------------------------------------------------------------------
# What is asked for.


def _check_apart(folders, out):
    """Raise UserError when one folder is given twice, or holds another one or `out`, whose images it would count."""
    real = lambda path: Path(os.path.realpath(path))  # noqa: E731 (`resolve` raises where links lead in a circle)
    for i, a in enumerate(folders):
        x = real(a.path)
        for b in folders[i + 1 :]:
            y = real(b.path)
            if x == y:
                raise UserError(f"{str(b.path)!r} is given twice; name a folder once, and another one as --reference")
            if x in y.parents or y in x.parents:
                inner, outer = (b, a) if x in y.parents else (a, b)
                raise UserError(f"{str(inner.path)!r} lies in {str(outer.path)!r}, which would count its images too")
        if x in (real(out), *real(out).parents):
            raise UserError(
                f"output folder {str(out)!r} lies in {str(a.path)!r}, where the next run would count measure.png as an "
                "image; choose another --out"
            )


def _too_few(folder, readable):
    text = f"{str(folder.path)!r} holds {readable} readable images and {len(folder.unreadable)} others"
    first = f", the first being {folder.unreadable[0][0]} ({folder.unreadable[0][1]})" if folder.unreadable else ""
    return f"{text}{first}; give a folder with 2 or more of {', '.join(SUFFIXES)}"


PROMPTS = '{"a/0001.png": "a prompt", ...}'  # As a message shows it.


def _read_prompts(path, extractors, folders):
    """`{name: prompt}` of a JSON file; raises UserError for one of another form, or of no use."""
    if path is None:
        return {}
    if not any(e.name == "clip" for e in extractors):
        raise UserError("--prompts has no effect without --features clip; add clip, or leave --prompts out")
    content = content_of(path, "prompts")
    try:
        prompts = json.loads(content.decode())
    except (ValueError, RecursionError) as e:  # Of JSON, or of the encoding.
        raise UserError(f"prompts {str(path)!r} is not JSON in UTF-8 ({first_line(e)}); write {PROMPTS}") from e
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise UserError(f"prompts {str(path)!r} must be one JSON object of texts; write {PROMPTS}")
    if not any(name in prompts for folder in folders for name in folder.files):
        like = folders[-1].files[0]
        raise UserError(
            f"prompts {str(path)!r} names no image of any folder; their names are like {json.dumps(like)}, relative "
            f"to the folder: write {PROMPTS}"
        )
    return prompts


def _texts(folder, extractor, given):
    """What each image of a folder was to show, or None: prompts for `clip`, class names for a classifier."""
    if extractor.name == "clip":
        texts = [given.get(name) or _caption(folder.path / name) for name in folder.names]
    elif extractor.classes:
        texts = [Path(name).parent.name for name in folder.names]
        texts = [t if t in extractor.classes else None for t in texts]
    else:
        texts = [None] * len(folder.names)
    return texts


def _caption(path):
    """The text beside an image, as training tools keep it, or None."""
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


# ----------------------------------------------------------------------------
# Scores.


def _kept_scores(folder, reference, extractor, texts):
    """`score`'s results as JSON holds them, from beside the folder if they are of these very images."""
    parts = [FORMAT, extractor.identity, __version__, metrics.VERSION, K, folder.keys, texts]
    parts.append(reference.keys if folder is not reference else None)
    if extractor.name == "clip" and any(texts):
        parts.append(extractor.text_identity)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = folder.cache(f"{extractor.name}.scores.json")
    if path.exists():
        try:
            kept = json.loads(path.read_text())
            if kept["key"] == key:
                return {name: _estimate(*bounds) for name, bounds in kept["scores"].items()}
        except CORRUPT as e:
            print(f"note: {path} cannot be read ({first_line(e)}); computing it anew", file=sys.stderr)
    scores = score(folder, reference, extractor, texts)
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(dict(key=key, scores=scores)))
    return scores


def _estimate(value, low, high):
    """Three numbers as they were written; raises TypeError for anything else."""
    return value + 0.0, low + 0.0, high + 0.0


def score(folder, reference, extractor, texts):
    """`{metric: (value, low, high)}` of one folder; those against the reference unless it is the reference."""
    rows = folder.rows(extractor)
    values = {}
    if extractor.name == "pixels":
        for i, name in enumerate(TABLES[2]):
            values[name] = _mean(rows[:, i])
        return _with_intervals(values, None)

    features = rows[:, : extractor.dim]
    if folder is reference:
        near = _statistics(reference, extractor)["near"]
    else:
        near, known = metrics.neighbours(features, K), _statistics(reference, extractor)
        values["fd"] = metrics.frechet_distance(features, known["mean"], known["cov"], influence=True)
        other = reference.rows(extractor)[:, : extractor.dim]
        if extractor.name == "clip":
            values["cmmd"] = metrics.cmmd(features, other, influence=True, y_kernel=known["kernel"])
        if min(len(features), len(other)) >= K + 2:
            value, influence = metrics.prdc(other, features, K, True, known["near"], near)
            values |= {k: (v, i) for k, v, i in zip(value._fields, value, influence, strict=True)}
    values["vendi"] = metrics.vendi(features, influence=True)
    values["distance"] = metrics.mean_distance(features, influence=True, near=near)

    labels = None
    if extractor.classes and all(texts):
        labels = torch.tensor([extractor.classes.index(t) for t in texts])
        values["accuracy"] = _mean(rows[:, extractor.dim :].argmax(1) == labels)
    scores = _with_intervals(values, labels)
    if extractor.name == "clip" and any(texts):
        has = torch.tensor([t is not None for t in texts])
        text = _text_rows(folder, extractor, [t for t in texts if t is not None])
        scores |= _with_intervals({"clip_score": _mean(metrics.clip_score(features[has], text))}, None)
    return scores


def _statistics(reference, extractor):
    """What every folder is compared with, kept so that a folder that changes costs nothing here."""

    def compute():
        features = reference.rows(extractor)[:, : extractor.dim]
        mean, cov = metrics.gaussian(features)
        kernel = {"kernel": metrics.kernel_mean(features)} if extractor.name == "clip" else {}
        return dict(mean=mean, cov=cov, **kernel, **metrics.neighbours(features, K)._asdict())

    kept = reference.statistics(extractor, [metrics.VERSION, K], compute)
    return {**kept, "near": metrics.Neighbours(*(kept[name] for name in metrics.Neighbours._fields))}


def _mean(values):
    values = values.double()
    return values.mean(), values - values.mean()


def _with_intervals(values, labels):
    return {
        name: (value.item(), *metrics.influence_interval(value, influence, labels))
        for name, (value, influence) in values.items()
    }


def _text_rows(folder, extractor, texts):
    """Embeddings of the prompts, kept as the images' are."""
    keys = [hashlib.sha256(t.encode(errors="surrogatepass")).hexdigest() for t in texts]
    rows = Rows(folder.cache(f"{extractor.name}-text.safetensors"), extractor.text_identity, extractor.dim)
    todo = [(k, t) for k, t in dict(zip(keys, texts, strict=True)).items() if k not in rows]
    for start in tqdm(range(0, len(todo), 64), desc=f"{folder}, prompts", leave=False, disable=not todo):
        some, prompts = zip(*todo[start : start + 64], strict=True)
        rows.add(some, extractor.text_rows(list(prompts)))
    rows.keep(keys)
    rows.save()
    return rows.get(keys)


def _caveats(folder, reference, extractor, scores, texts):
    """Yield (metric, sentence) on what so few images cannot bear, or what was not measured."""
    prompts = sum(t is not None for t in texts)
    for name, estimate in scores.items():
        num = prompts if name == "clip_score" else len(folder.keys)
        if sentence := metrics.caveat(name, estimate.value, num, len(reference.keys), extractor.dim, K):
            yield TITLES[name], sentence
    if extractor.name != "pixels" and folder is not reference and "recall" not in scores:
        yield "precision, recall, density, coverage", f"these need {K + 2} images or more on both sides"
    if "clip_score" in scores and prompts < len(texts):
        yield TITLES["clip_score"], f"of the {prompts:,} of {len(texts):,} images that have a prompt"


# ----------------------------------------------------------------------------
# What a person sees.


def _shown(name):
    """A name of a file as text: the bytes that are not UTF-8 in hexadecimal."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _say(text):
    """Print what a terminal without some of the characters can show too."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace(" ±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    print(text)


def show(estimate):
    """`0.953 ±0.012`: half of the interval to two digits, and the value as far."""
    half = (estimate.high - estimate.low) / 2
    if not 0 < half < math.inf:
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{estimate.value:.{digits}f} ±{half:.{digits}f}"


def tables(folders, found, extractors):
    """What is printed of all metrics: one row per folder, the reference first."""
    lines = []
    for kind in (*[e.name for e in extractors], "pixels"):
        for table in TABLES:
            columns = [c for c in table if any(c in results[kind] for results in found)]
            body = [
                [str(folder), f"{len(folder.keys):,}", *[_cell(results[kind], found[0][kind], c) for c in columns]]
                for folder, results in zip(folders, found, strict=True)
                if any(c in results[kind] for c in columns)
            ]
            if body:
                lines += ["", printed([kind, "images", *(TITLES[c] for c in columns)], body)]
    return "\n".join(lines[1:])


def _cell(scores, reference, metric):
    if metric not in scores:
        return ""
    text = show(scores[metric])
    if metric in TABLES[2] and scores is not reference and reference[metric].value > 0:  # What counts is the drift.
        text += f" ({scores[metric].value / reference[metric].value - 1:+.0%})"
    return text


def _describe(folder, results):
    return dict(
        folder=_shown(str(folder.path)),
        images=len(folder.keys),
        unreadable=[[_shown(name), reason] for name, reason in folder.unreadable],
        metrics={kind: {name: asdict(e) for name, e in scores.items()} for kind, scores in results.items()},
    )


def picture(path, folders, found, pixels, columns=16):
    """Images of every folder, how saturation, contrast and clipping are spread, and the metrics with intervals."""
    colours = ["#222222", *(plt.get_cmap("tab10")(i % 10) for i in range(1, len(folders)))]
    kinds = [kind for kind in found[1] if kind != "pixels"]
    shown = {kind: [m for m in TITLES if any(m in results[kind] for results in found)] for kind in kinds}
    heights = [0.82 * len(folders), 2.2, *[0.6 + 0.28 * len(folders)] * len(kinds)]
    fig = plt.figure(figsize=(13, sum(heights) + 0.4 * len(heights)), layout="constrained")
    parts = np.atleast_1d(fig.subfigures(len(heights), 1, height_ratios=heights))

    labels = [str(folder).replace("$", r"\$") for folder in folders]  # No formula.
    for ax, folder, name, colour in zip(
        parts[0].subplots(len(folders), 1, squeeze=False)[:, 0], folders, labels, colours, strict=True
    ):
        strip = Image.new("RGB", (96 * columns, 96), "white")
        chosen = np.linspace(0, len(folder.names) - 1, min(columns, len(folder.names))).astype(int)
        for i, index in enumerate(chosen):
            with contextlib.suppress(*UNREADABLE):  # Gone since it was measured.
                image = decode(Image.open(folder.path / folder.names[index]))
                strip.paste(ImageOps.fit(image, (94, 94)), (96 * i, 1))
        ax.imshow(strip)
        ax.set_axis_off()
        ax.set_title(f"{name} · {len(folder.names):,} images", fontsize=9, color=colour, loc="left", pad=2)

    rows = [folder.rows(pixels) for folder in folders]
    for i, (ax, name) in enumerate(zip(parts[1].subplots(1, 3), TABLES[2], strict=True)):
        edges = torch.linspace(0, max(1e-3, torch.cat(rows)[:, i].max().item()), 41).numpy()
        for label, values, colour in zip(labels, rows, colours, strict=True):
            weights = np.full(len(values), 1 / len(values))
            ax.hist(values[:, i].numpy(), edges, weights=weights, histtype="step", color=colour, label=label)
            ax.axvline(values[:, i].mean().item(), color=colour, lw=0.8, ls=":")
        ax.set_title({"clipped": "share of clipped pixels"}.get(name, name) + " per image; dotted: mean", fontsize=9)
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)

    for part, kind in zip(parts[2:], kinds, strict=True):
        axes = part.subplots(1, len(shown[kind]), sharey=True, squeeze=False)[0]
        for ax, metric in zip(axes, shown[kind], strict=True):
            for y, (results, colour) in enumerate(zip(found, colours, strict=True)):
                if e := results[kind].get(metric):
                    error = [[max(0, e.value - e.low)], [max(0, e.high - e.value)]]
                    ax.errorbar(e.value, y, xerr=error, fmt="o", ms=4, capsize=3, color=colour)
            ax.set_title(TITLES[metric], fontsize=9)
            ax.set_ylim(len(folders) - 0.5, -0.5)
            ax.locator_params(axis="x", nbins=3)
            ax.tick_params(labelsize=7)
            ax.grid(axis="x", alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_yticks(range(len(folders)), labels, fontsize=8)
        axes[0].set_ylabel(kind, fontsize=9)
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", dpi=110, facecolor="white")
    plt.close(fig)

"""Folders of images against a reference: distances, fidelity, variety, adherence, and what shows in the pixels.

Features come from `folder.Folder`, numbers from `metrics`, and both are kept beside the folders: a second run
computes what has changed and nothing else.
"""

import hashlib
import json
import math
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
from ..files import aligned, atomic_path, output_folder
from . import metrics
from .features import Pixels
from .folder import SUFFIXES, Folder, Rows

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
    """A metric's value and its 95 % bootstrap interval over the images, the reference held fixed."""

    value: float
    low: float
    high: float


def run(images, reference, extractors, prompts=None, out="out/measure", cache=None):
    """Measure each folder of `images` against `reference`, print tables, write report.json and measure.png.

    extractors: as `features.get_extractor` returns them, each once; prompts: a JSON file {name of an image: its
    prompt}, beside the `.txt` files that may lie next to the images. Returns the report. Raises ValueError,
    OSError or ImportError for what cannot be measured, before any image is read; images that cannot be read are
    listed and left out.
    """
    folders = [Folder(path, cache) for path in (reference, *images)]
    _check_apart(folders)
    if len({folder.label for folder in folders}) < len(folders):
        for folder, path in zip(folders, (reference, *images), strict=True):
            folder.label = str(path)
    given = _read_prompts(prompts)
    names = [e.name for e in extractors]
    if len(set(names)) < len(names):
        raise ValueError(f"features {' '.join(names)} hold one twice; name each once")
    out, pixels = output_folder(out), Pixels()

    for folder in folders:
        with tqdm(desc=str(folder), unit="image", total=0) as bar:
            folder.compute(pixels, extractors, bar)
        if len(folder.names) < 2:
            raise ValueError(_too_few(folder))

    said, found = {}, [{} for _ in folders]
    for extractor in (pixels, *extractors):
        wanted = [_texts(folder, extractor, given) for folder in folders]
        for folder, results, text in tqdm(
            list(zip(folders, found, wanted, strict=True)), desc=f"scores, {extractor.name}", leave=False
        ):
            scores = _kept_scores(folder, folders[0], extractor, text)
            results[extractor.name] = {name: Estimate(*scores[name]) for name in TITLES if name in scores}
            for metric, sentence in _caveats(folder, folders[0], extractor, results[extractor.name], text):
                said.setdefault(sentence, {}).setdefault(f"{folder}, {extractor.name}", []).append(metric)
    notes = []
    for sentence, places in said.items():  # Each once, for all that it holds for.
        where = "; ".join(f"{place}: {', '.join(names)}" for place, names in places.items())
        notes.append(f"{where}: {sentence}")
    for folder in folders:
        if len(folder.keys) < 100:
            notes.append(f"{folder}: with {len(folder.keys)} images the intervals too are uncertain; take 100 or more")
        notes += [f"{folder}: {name} cannot be read ({reason}); left out" for name, reason in folder.unreadable[:10]]
        if more := len(folder.unreadable[10:]):
            notes.append(f"{folder}: {more:,} more files cannot be read; report.json names them")
        if copies := len(folder.keys) - len(set(folder.keys)):
            notes.append(f"{folder}: {copies:,} of {len(folder.keys):,} images are exact copies of others")

    print(tables(folders, found, extractors))
    if notes:
        print("\n" + "\n".join(f"- {note}" for note in notes))
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
    print(f"\nwrote report.json and measure.png to {out}")
    return report


# ----------------------------------------------------------------------------
# What is asked for.


def _check_apart(folders):
    """Raise ValueError when one folder is given twice, or holds another one, whose images it would count as its own."""
    for i, a in enumerate(folders):
        for b in folders[i + 1 :]:
            x, y = a.path.resolve(), b.path.resolve()
            if x == y:
                raise ValueError(f"{str(b.path)!r} is given twice; name a folder once, and another one as --reference")
            if x in y.parents or y in x.parents:
                inner, outer = (b, a) if x in y.parents else (a, b)
                raise ValueError(f"{str(inner.path)!r} lies in {str(outer.path)!r}, which would count its images too")


def _too_few(folder):
    text = f"{str(folder.path)!r} holds {len(folder.names)} readable images and {len(folder.unreadable)} others"
    first = f", the first being {folder.unreadable[0][0]} ({folder.unreadable[0][1]})" if folder.unreadable else ""
    return f"{text}{first}; give a folder with 2 or more of {', '.join(SUFFIXES)}"


def _read_prompts(path):
    """`{name: prompt}` of a JSON file; raises ValueError for one of another form."""
    if path is None:
        return {}
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"prompts {str(path)!r} is no JSON ({e}); write {{'a/0001.png': 'a prompt', ...}}") from e
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError(f"prompts {str(path)!r} is no object of strings; write {{'a/0001.png': 'a prompt', ...}}")
    return prompts


def _texts(folder, extractor, given):
    """What each image of a folder was to show, or None: prompts for `clip`, class names for a classifier."""
    if extractor.name == "clip":
        texts = [given.get(name) or _caption(folder.path / name) for name in folder.names]
        if given and not any(name in given for name in folder.names) and not any(texts):
            raise ValueError(
                f"none of the prompts is for an image of {str(folder.path)!r}; its names are like {folder.names[0]!r}"
            )
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
    parts = [
        extractor.identity,
        __version__,
        K,
        folder.keys,
        texts,
        reference.keys if folder is not reference else None,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = folder.cache(f"{extractor.name}.scores.json")
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # As good as none.
    scores = score(folder, None if folder is reference else reference, extractor, texts)
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(dict(key=key, scores=scores)))
    return scores


def score(folder, reference, extractor, texts):
    """`{metric: (value, low, high)}` of one folder; those against the reference if there is one."""
    rows = folder.rows(extractor)
    values = {}
    if extractor.name == "pixels":
        for i, name in enumerate(TABLES[2]):
            values[name] = _mean(rows[:, i])
        return _with_intervals(values, None)

    features = rows[:, : extractor.dim]
    if reference is not None:
        other = reference.rows(extractor)[:, : extractor.dim]
        values["fd"] = metrics.frechet_distance(features, *metrics.gaussian(other), influence=True)
        if extractor.name == "clip":
            values["cmmd"] = metrics.cmmd(features, other, influence=True)
        if min(len(features), len(other)) >= K + 2:
            value, influence = metrics.prdc(other, features, K, influence=True)
            values |= {k: (v, i) for k, v, i in zip(value._fields, value, influence, strict=True)}
    values["vendi"] = metrics.vendi(features, influence=True)
    values["distance"] = metrics.mean_distance(features, influence=True)

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
    keys = [hashlib.sha256(t.encode()).hexdigest() for t in texts]
    rows = Rows(folder.cache(f"{extractor.name}-text.safetensors"), extractor.identity)
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


def show(estimate):
    """`0.953 ±0.012`: half of the interval to two digits, and the value as far."""
    half = (estimate.high - estimate.low) / 2
    if not 0 < half < math.inf:
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{estimate.value:.{digits}f} ±{half:.{digits}f}"


def tables(folders, found, extractors):
    """Markdown tables, which read well in a terminal too: one row per folder, the reference first."""
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
                lines += ["", aligned([kind, "images", *(TITLES[c] for c in columns)], body)]
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
        folder=str(folder.path),
        images=len(folder.keys),
        unreadable=[list(u) for u in folder.unreadable],
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

    for ax, folder, colour in zip(
        parts[0].subplots(len(folders), 1, squeeze=False)[:, 0], folders, colours, strict=True
    ):
        strip = Image.new("RGB", (96 * columns, 96), "white")
        chosen = np.linspace(0, len(folder.names) - 1, min(columns, len(folder.names))).astype(int)
        for i, index in enumerate(chosen):
            with Image.open(folder.path / folder.names[index]) as image:
                strip.paste(ImageOps.fit(image.convert("RGB"), (94, 94)), (96 * i, 1))
        ax.imshow(strip)
        ax.set_axis_off()
        ax.set_title(f"{folder} · {len(folder.names):,} images", fontsize=9, color=colour, loc="left", pad=2)

    rows = [folder.rows(pixels) for folder in folders]
    for i, (ax, name) in enumerate(zip(parts[1].subplots(1, 3), TABLES[2], strict=True)):
        edges = torch.linspace(0, max(1e-3, torch.cat(rows)[:, i].max().item()), 41).numpy()
        for folder, values, colour in zip(folders, rows, colours, strict=True):
            weights = np.full(len(values), 1 / len(values))
            ax.hist(values[:, i].numpy(), edges, weights=weights, histtype="step", color=colour, label=str(folder))
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
        axes[0].set_yticks(range(len(folders)), [str(f) for f in folders], fontsize=8)
        axes[0].set_ylabel(kind, fontsize=9)
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", dpi=110, facecolor="white")
    plt.close(fig)

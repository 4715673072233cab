"""Colour emoji to train on: `guidance-interval emoji` draws them from packages of the npm registry.

Six sets of openly licensed drawings, as Iconify publishes them, and the Unicode names and subgroups of emojibase:
the versions are pinned, so that the file is the same wherever it is made. Needs npm, and the extra `[train]`.
Skin tones are left out, and so are drawings whose name is not a Unicode label or a common short name.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..errors import UserError
from ..files import atomic_path, output_file, output_folder

IMAGE_SIZE = 32
NAMES = "emojibase-data@17.0.0"  # MIT; the Unicode data in it is under the Unicode licence.
SETS = {  # Style: (package, licence, author)
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0", "Google"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC BY 4.0", "Twitter and contributors"),
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "MIT", "Microsoft"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Microsoft"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC BY 4.0", "Emoji One"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Mozilla"),
}
SOURCE = "; ".join(f"{package} ({licence}, {author})" for package, licence, author in SETS.values())
SHORT_NAMES = ("cldr", "emojibase", "github", "joypixels")
AT_LEAST = 8  # Images of a subgroup; smaller ones (skin tones, hair styles) are left out.
PER_IMAGE = {"images", "labels", "names", "styles", "held_out"}  # Arrays; the others are of classes and names.
HELD_OUT = 10  # Each tenth name, whoever drew it, is kept out of training.


def draw(out, folder=None):
    """Fetch the packages, draw every emoji that has a name and a subgroup, and write the .npz file `out`.

    It holds images uint8 [N, 3, 32, 32] on white, labels int64 [N] into classes (subgroups), names int64 [N] into
    name_list, styles int64 [N] into `SETS`, and held_out bool [N]. Raises UserError without npm, and
    CalledProcessError when npm cannot fetch a package.
    """
    import resvg_py

    if shutil.which("npm") is None:
        raise UserError("npm is not on the PATH; the emoji are fetched with it (Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(folder or scratch)
        data = folder / fetch(NAMES, folder)
        slugs, subgroups, class_names = unicode_names(data)
        found = []
        for style, (package, *_) in enumerate(SETS.values()):
            icons = json.loads((folder / fetch(package, folder) / "icons.json").read_text())
            drawn = set()
            for icon, entry in tqdm(icons["icons"].items(), desc=package, unit="emoji"):
                label = slugs.get(slug(icon))
                if label is None or label in drawn or entry.get("hidden"):
                    continue
                drawn.add(label)
                left, top = (entry.get(k, icons.get(k, 0)) for k in ("left", "top"))
                width, height = (entry.get(k, icons.get(k, 16)) for k in ("width", "height"))
                found.append((label, style, render(resvg_py, entry["body"], (left, top, width, height))))
    sizes = Counter(subgroups[label] for label, *_ in found)
    found = sorted((f for f in found if sizes[subgroups[f[0]]] >= AT_LEAST), key=lambda f: f[:2])
    name_list = sorted({label for label, *_ in found})
    used = sorted({subgroups[label] for label in name_list})
    # The names in an order that has nothing to do with the alphabet, for the tenth that is held out.
    order = np.random.default_rng(0).permutation(len(name_list))
    kept_out = {name_list[i] for i in order[: len(name_list) // HELD_OUT]}
    arrays = dict(
        images=np.stack([image for *_, image in found]),
        labels=np.array([used.index(subgroups[label]) for label, *_ in found]),
        names=np.array([name_list.index(label) for label, *_ in found]),
        styles=np.array([style for _, style, _ in found]),
        held_out=np.array([label in kept_out for label, *_ in found]),
        classes=np.array([class_names[c] for c in used]),
        name_list=np.array(name_list),
    )
    with atomic_path(out) as tmp, open(tmp, "wb") as f:
        np.savez_compressed(f, **arrays)
    return arrays


def fetch(package, folder):
    """The name, in `folder`, of the folder of an npm package, fetched and unpacked."""
    name = re.sub(r"\W+", "-", package)
    if not (folder / name).exists():
        command = ["npm", "pack", "--silent", package]
        archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(folder / archive) as tar:
            tar.extractall(folder / name, filter="data")
    return f"{name}/package"


def unicode_names(folder):
    """`({slug: label}, {label: subgroup}, {subgroup: name})` of the emoji that have a subgroup."""
    meta = json.loads((folder / "meta/groups.json").read_text())
    labels, short = {}, {}
    for entry in json.loads((folder / "en/data.json").read_text()):
        if "subgroup" in entry:
            labels[entry["hexcode"]] = entry
    slugs = {slug(entry["label"]): entry["label"] for entry in labels.values()}
    for kind in SHORT_NAMES:
        for code, names in json.loads((folder / f"en/shortcodes/{kind}.json").read_text()).items():
            if code in labels:
                for name in [names] if isinstance(names, str) else names:
                    short.setdefault(slug(name), labels[code]["label"])
    subgroups = {entry["label"]: entry["subgroup"] for entry in labels.values()}
    return short | slugs, subgroups, {int(k): v for k, v in meta["subgroups"].items()}


def slug(name):
    """A name without case, accents, spaces and signs; "flag for x" is "flag x"."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", plain.replace("flag-for-", "flag-"))


def render(resvg_py, body, box):
    """One drawing as uint8 [3, 32, 32] on white: twice as large, then averaged over 2 x 2 pixels."""
    left, top, width, height = box
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{2 * IMAGE_SIZE}" height="{2 * IMAGE_SIZE}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32)
    pixels = pixels.reshape(IMAGE_SIZE, 2, IMAGE_SIZE, 2, 3).mean((1, 3))
    return pixels.round().astype(np.uint8).transpose(2, 0, 1)


def load(path):
    """The arrays that `draw` wrote, as a dict. Raises UserError, naming the command, if there are none."""
    draw = f"draw the emoji with: guidance-interval emoji --out {path}"
    if not os.path.isfile(path):
        raise UserError(f"{str(path)!r} {'is no file' if os.path.exists(path) else 'does not exist'}; {draw}")
    try:
        with np.load(path) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{str(path)!r} is not what that command writes ({e or type(e).__name__}); {draw}") from e
    if missing := (PER_IMAGE | {"classes", "name_list"}) - found.keys():
        raise UserError(f"{str(path)!r} lacks {', '.join(sorted(missing))}; {draw}")
    num, *shape = found["images"].shape or (0,)
    if shape != [3, IMAGE_SIZE, IMAGE_SIZE] or any(found[key].shape[:1] != (num,) for key in PER_IMAGE):
        raise UserError(f"{str(path)!r} holds no images of {IMAGE_SIZE} by {IMAGE_SIZE} with their labels; {draw}")
    return found


def run(out, packages=None):
    """Draw them and write the file `out`; packages: the folder where npm's are kept."""
    out, packages = output_file(out), packages and output_folder(packages)
    arrays = draw(out, packages)
    print(f"wrote {len(arrays['images']):,} images of {len(arrays['name_list']):,} emoji in "
          f"{len(arrays['classes'])} subgroups to {out}")  # fmt: skip

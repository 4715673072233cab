"""The report of a study: one HTML file that needs no network, with a blind vote before the numbers.

It is made of confirmed.json and the images beside it, again at any time: `guidance-interval report FOLDER`. The page is
in `page/`; here the data is checked, the images are embedded, and both are put together.

What tells which image is which is sealed, so that neither the source of the page nor its inspector betrays it to
someone who votes: the images lie in random order without names or metadata, and the rest is enciphered with a key
that is in the page. That keeps an honest voter honest, and nobody else.
"""

import base64
import hashlib
import html
import io
import json
import random
from pathlib import Path

from PIL import Image

from ...errors import UserError
from ...files import atomic_path
from ...measure.folder import UNREADABLE, decode, first_line
from .. import LANGUAGES

PAGE = Path(__file__).parent / "page"
SCRIPTS = "statistics.js", "votes.js", "figures.js", "page.js"

SMALL = 128  # Images of at most so many pixels a side stay exact and are shown enlarged.
LONGEST, QUALITY = 1024, 88  # Of larger ones, which become JPEG.
BUDGET = 24 * 2**20  # Bytes of all JPEGs together: a file that opens at once and goes by mail.


def write_report(folder, language="en"):
    """Write report.html into a study's folder and return its path.

    language: in which the page opens, "en" or "ja"; a reader can change it. Raises UserError, naming the file and what
    is wrong, where confirmed.json or one of its images is missing or damaged; an older report stays then.
    """
    if language not in LANGUAGES:
        raise UserError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    folder = Path(folder)
    study = read_study(folder)
    path = folder / "report.html"
    text = page(study, folder, language)
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return path


def page(study, folder, language):
    """The page's HTML."""
    paths = [folder / name for setting in study["settings"] for name in setting["images"]]
    images, note = embed(paths)
    study = {**study, "id": identity(study, paths), "shown": note}
    order = list(range(len(images)))
    random.Random(study["id"]).shuffle(order)  # The same whenever the report is made again.
    place = {image: i for i, image in enumerate(order)}
    settings, first = [], 0
    for setting in study["settings"]:
        pool = [place[first + i] for i in range(len(setting["images"]))]
        codes = [code(study["id"], setting["id"], i) for i in range(len(setting["images"]))]
        settings.append({**setting, "images": pool, "codes": codes})
        first += len(pool)
    study["settings"] = settings
    strings = {name: json.loads((PAGE / f"{name}.json").read_text(encoding="utf-8")) for name in LANGUAGES}
    parts = {
        "language": language,
        "title": html.escape(study["name"]),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "strings": in_script(json.dumps(strings, ensure_ascii=False)),
        "images": in_script(json.dumps([images[i] for i in order])),
        "sealed": seal(json.dumps(study, ensure_ascii=False).encode()),
        "plotly": plotly(),
        "scripts": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    pieces = (PAGE / "report.html").read_text(encoding="utf-8").split("@@")  # Text, name, text, name, …
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


# ----------------------------------------------------------------------------
# What the search left.


def read_study(folder):
    """What confirmed.json of a folder holds; raises UserError for one that is missing, damaged or incomplete."""
    path = folder / "confirmed.json"
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(
            f"{str(folder)!r} holds no confirmed.json; give the --out folder of a `guidance-interval tune` that ended"
        ) from e
    except OSError as e:
        raise UserError(f"{str(path)!r} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{str(path)!r} is not JSON in UTF-8 ({first_line(e)}); run `tune` again") from e
    try:
        num = len(study["prompts"]) * len(study["seeds"])
        known = {metric["key"] for metric in study["metrics"]}
        for key in ("name", "created", "source", "host", "versions", "seed", "objective", "trials"):
            study[key]
        for setting in study["settings"]:
            for key in ("label", "sigma_lo", "sigma_hi", "weight", "search", "paste"):
                setting[key]
            if len(setting["images"]) != num:
                size = f"{len(study['prompts'])} prompts by {len(study['seeds'])} seeds are {num}"
                raise ValueError(f"setting {setting['id']!r} has {len(setting['images'])} images where {size}")
            if unknown := sorted(setting["confirmed"].keys() - known):
                raise ValueError(f"setting {setting['id']!r} has values of unknown metrics: {', '.join(unknown)}")
        if not study["settings"]:
            raise ValueError("it has no settings")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"{str(path)!r} is not what `guidance-interval tune` writes ({reason}); run it again") from e
    return study


def identity(study, paths):
    """What votes are bound to: the study's name, its settings, prompts and seeds, and the very images."""
    parts = [study["name"], study["prompts"], study["seeds"], [s["id"] for s in study["settings"]]]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def code(study, setting, index):
    """A name for an image in votes that does not say which setting it is of."""
    return hashlib.sha256(f"{study}/{setting}/{index}".encode()).hexdigest()[:10]


# ----------------------------------------------------------------------------
# Images.


def embed(paths):
    """`([[data URI, width, height]], {"format", "side", "longest"})` of images, encoded anew and alike.

    Anew, because a PNG of ComfyUI or A1111 tells its whole workflow. Up to `SMALL` pixels a side they are PNG and
    exact. Larger ones are JPEG of at most `LONGEST` pixels a side, fewer where all together would exceed `BUDGET`.
    """
    longest = max(max(opened(path, header=True).size) for path in paths)
    if longest <= SMALL:
        return [encoded(opened(path), None) for path in paths], {"format": "PNG", "side": longest, "longest": longest}
    side = min(LONGEST, longest)
    few = paths[:: -(-len(paths) // 16)]  # Their mean stands for all.
    while side > SMALL:
        size = sum(len(encoded(opened(path), side)[0]) for path in few) / len(few) * len(paths)
        if size <= BUDGET:
            break
        side = int(side * max(0.5, min(0.95, (BUDGET / size) ** 0.5)))
    return [encoded(opened(path), side) for path in paths], {"format": "JPEG", "side": side, "longest": longest}


def opened(path, header=False):
    """An image of the study in RGB and upright, or its header only; raises UserError, naming the path, for no image."""
    try:
        with Image.open(path) as image:
            return image if header else decode(image)
    except UNREADABLE as e:
        reason = getattr(e, "strerror", None) or first_line(e)
        raise UserError(
            f"image {str(path)!r} of the study cannot be read ({reason}); run `guidance-interval tune` again, which "
            "renders what is missing"
        ) from e


def encoded(image, side):
    """`[data URI, width, height]`; side: the most pixels of a JPEG's side, or None for PNG."""
    image = Image.frombytes("RGB", image.size, image.tobytes())  # Nothing but pixels: no text, profile or date.
    file = io.BytesIO()
    if side is None:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file, "JPEG", quality=QUALITY, optimize=True)
    kind = "png" if side is None else "jpeg"
    return [f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", *image.size]


# ----------------------------------------------------------------------------
# Parts of the page.


def seal(data):
    """Bytes in base64, enciphered with xorshift32 (Marsaglia 2003) from a start that is the first four bytes."""
    state = int.from_bytes(hashlib.sha256(data).digest()[:4], "little") | 1
    sealed, out = bytearray(state.to_bytes(4, "little")), bytearray(data)
    for i in range(len(out)):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        out[i] ^= state & 0xFF
    return base64.b64encode(bytes(sealed + out)).decode()


def in_script(text):
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def plotly():
    """plotly.js, which the page runs when the figures are asked for."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")

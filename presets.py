"""Published guidance intervals, each with its source, and the user's own, from the file that `tune --save` writes.

An interval without a source does not belong here; of the user's own it is the study that measured it.
"""

import contextlib
import logging
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10.
    try:
        import tomli as tomllib  # type: ignore[no-redef]
    except ImportError:
        tomllib = None  # type: ignore[assignment]  # The user's own are not listed then.

from .errors import UserError, quoted
from .files import atomic_path, output_folder
from .noise_level import rescale_sigma
from .sampler_patch import GuidanceInterval

PAPER = "Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724"
REPO = "https://github.com/kynkaat/guidance-interval"


@dataclass(frozen=True)
class Preset:
    """A published interval.

    sigma_lo, sigma_hi: as published, for data of standard deviation `sigma_data`.
    weight: the guidance weight (cfg) chosen with the interval.
    weight_everywhere: the best weight without an interval, or None where the source names none.
    metric: what they were chosen by, if the source says. source: where it is published, and for what sampling.
    """

    name: str
    model: str
    sigma_lo: float
    sigma_hi: float
    sigma_data: float
    weight: float
    weight_everywhere: float | None
    metric: str | None
    source: str

    def interval(self, sigma_data: float = 1.0) -> GuidanceInterval:
        """The GuidanceInterval for a model whose data has standard deviation `sigma_data` (1 for SD and SDXL)."""
        bounds = (rescale_sigma(s, self.sigma_data, sigma_data) for s in (self.sigma_lo, self.sigma_hi))
        return GuidanceInterval(*bounds)


def _edm2(name, steps, sigma_lo, sigma_hi, weight, weight_everywhere, metric):
    # The authors name the first and the last guided step of 32 from 80 to 0.002; the bounds, in this form and
    # rounded to two digits, guide those same steps.
    return Preset(
        name=name,
        model="EDM2-XXL, ImageNet-512",
        sigma_lo=sigma_lo,
        sigma_hi=sigma_hi,
        sigma_data=0.5,
        weight=weight,
        weight_everywhere=weight_everywhere,
        metric=metric,
        source=f"{PAPER}; {REPO} generate_zip.py: steps {steps} of 32",
    )


PRESETS = {
    p.name: p
    for p in (
        Preset(
            name="sdxl",
            model="Stable Diffusion XL",
            sigma_lo=0.28,
            sigma_hi=5.42,
            sigma_data=1.0,
            weight=16.0,  # With other samplers, schedules and fine-tunes a matter of taste again.
            weight_everywhere=None,
            metric="visual inspection",
            source=f"{PAPER}, section 4.3: 32 steps of Heun's method from sigma 14.61",
        ),
        #                           steps       interval     weight, without   chosen by
        _edm2("edm2-xxl-fid",       "[17, 22]", 0.19, 1.61,  2.0, 1.2,         "FID: 1.40, without the interval 1.81"),
        _edm2("edm2-xxl-fd-dinov2", "[13, 19]", 0.60, 5.00,  2.9, 1.7,         "FD_DINOv2"),
    )
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The preset of that name, published or the user's own; raises ValueError, with those there are, for another."""
    mine, left_out = _my_presets()
    known = PRESETS | {f"{key}{MARK}": preset for key, preset in mine.items()}
    by_name = {key.casefold(): preset for key, preset in known.items()}
    for key in (str(name).casefold(), f"{name}{MARK}".casefold()):
        if key in by_name:
            return by_name[key]
    told = [f"unknown preset {quoted(name)}; there are {', '.join(known)}"]
    told += [left_out[key] for key in dict.fromkeys(("", str(name).casefold().removesuffix(MARK))) if key in left_out]
    raise ValueError("; ".join(told))


def all_presets() -> dict[str, Preset]:
    """`{name as lists show it: Preset}`: the published ones, then the user's own, which are marked."""
    return PRESETS | my_presets()


# ----------------------------------------------------------------------------
# The user's own, each with the study that measured it. Names that differ in case alone are one name.

DEFAULT = "sdxl"  # Where nobody has chosen.
MARK = " (measured by you)"
NAME = re.compile(r"[\w.+-]+( [\w.+-]+)*")
NUMBERS = ("sigma_lo", "sigma_hi", "weight", "weight_everywhere")
TEXTS = ("model", "objective", "study", "date", "said")
MAX_NAME, MAX_TEXT, MAX_FILE = 60, 1000, 2**18
WAIT = 10  # Seconds, for another process that saves.
log = logging.getLogger(__name__)
_told: set[str] = set()


def my_file() -> Path:
    """Where they are: GUIDANCE_INTERVAL_PRESETS, or a file of the user's configuration."""
    if chosen := os.environ.get("GUIDANCE_INTERVAL_PRESETS"):
        return Path(chosen)
    windows = os.environ.get("APPDATA") if os.name == "nt" else None
    folder = windows or os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(folder) / "guidance-interval" / "presets.toml"


def my_presets() -> dict[str, Preset]:
    """`{marked name: Preset}`; what is invalid is logged once and skipped: a host goes on without it."""
    mine, left_out = _my_presets()
    for why in left_out.values():
        if why not in _told:
            log.warning("Guidance Interval: %s", why)
            _told.add(why)
    return {f"{name}{MARK}": preset for name, preset in mine.items()}


def check_name(name: str) -> str:
    """Return `name` if a preset of the user's may have it; raises UserError."""
    try:
        _check_name(name)
    except ValueError as e:
        raise UserError(f"--save {e}") from e
    if tomllib is None:
        raise UserError("--save needs the package tomli under Python 3.10; run: pip install tomli")
    return name


def check_writable() -> None:
    """Raise UserError unless `save_mine` could write now: to be asked before work that takes long."""
    with _own_file():
        pass


def save_mine(name: str, entry: Mapping[str, Any]) -> Path:
    """Add the preset `name` to the user's file, in place of one of that name in any case, and return the file.

    entry: model, sigma_lo, sigma_hi, weight and weight_everywhere, and whatever else tells where they come from, of
    what TOML holds. All else in the file stays as it is; two processes that save take turns. Raises UserError when the
    entry is invalid, or the file cannot be read or written; it is then as it was.
    """
    entry = {k: _printable(v) if isinstance(v, str) else v for k, v in entry.items()}
    try:
        _preset(check_name(name), entry)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"the preset {name!r} cannot be saved: {e}") from e
    with _own_file() as (file, document):
        for same in [key for key in document if key.casefold() == name.casefold()]:
            del document[same]
        document[name] = entry
        with atomic_path(file) as tmp:
            tmp.write_text(document.as_string(), encoding="utf-8")
    return my_file()


@contextlib.contextmanager
def _own_file():
    """(path, tomlkit's document) of the user's file, which no other process writes meanwhile."""
    import filelock
    import tomlkit

    file = Path(os.path.realpath(my_file()))  # Where it is a link, what it leads to is written.
    output_folder(file.parent, "folder of presets", "set GUIDANCE_INTERVAL_PRESETS to a file elsewhere")
    try:
        lock = filelock.FileLock(file.with_name(f".{file.name}.lock")).acquire(timeout=WAIT)
    except (filelock.Timeout, NotImplementedError, OSError) as e:
        why = "another process writes it" if isinstance(e, filelock.Timeout) else e
        raise UserError(
            f"the presets file {str(my_file())!r} cannot be locked ({why}); try again, or set GUIDANCE_INTERVAL_PRESETS"
        ) from e
    with lock:
        try:
            document = tomlkit.parse(_read())
        except (UserError, RecursionError, ValueError) as e:
            raise _unreadable(e) from e
        yield file, document


def _read():
    """The text of the user's file, "" where there is none; raises UserError."""
    file = my_file()
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE:
            raise ValueError(f"it is no file of at most {MAX_FILE:,} bytes")
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as e:
        raise _unreadable(e) from e


def _unreadable(error):
    """The UserError for what reading the user's file raised."""
    if isinstance(error, UserError):
        return error
    why = error.strerror if isinstance(error, OSError) else _why(error)
    return UserError(f"the presets file {str(my_file())!r} cannot be read ({why}); fix it, or remove it")


def _why(error):
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _my_presets():
    """`{name: Preset}` of those that do, and of the others `{name without case: why not}`, "" for the whole file."""
    try:
        tables, broken = _tables(_read())
    except UserError as e:
        return {}, {"": str(e)}
    mine = {}
    for name, table in tables.items():
        try:
            _check_name(name)
            if name.casefold() in map(str.casefold, mine):
                raise ValueError("the file has that name already, if case is left aside")
            mine[name] = _preset(name, table)
        except ValueError as e:
            broken[name] = str(e)
    where = f"in {str(my_file())!r} is skipped"
    return mine, {
        name.casefold(): f"the preset {quoted(name)} {where} ({why}); fix it, or remove it"
        for name, why in broken.items()
    }


def _tables(text):
    """`{name: value}` of a file in TOML, and `{name: why}` of what cannot be read, which hides only itself."""
    if not text.strip():
        return {}, {}
    if tomllib is None:
        raise UserError(f"{str(my_file())!r} is not read: under Python 3.10 that needs the package tomli")
    with contextlib.suppress(RecursionError, ValueError):
        return tomllib.loads(text), {}
    parts, tables, broken = {}, {}, {}
    for part in re.split(r"^(?=[ \t]*\[)", text, flags=re.MULTILINE):
        name = part.partition("\n")[0].strip()
        with contextlib.suppress(RecursionError, ValueError):
            (name,) = tomllib.loads(name)  # Of "mine" and of "mine.difference".
        parts[name] = parts.get(name, "") + part
    for name, part in parts.items():
        try:
            tables |= tomllib.loads(part)
        except (RecursionError, ValueError) as e:
            broken[name] = _why(e)
    return tables, broken


def _check_name(name):
    """Raise ValueError unless a preset of the user's may be called so."""
    if name.casefold() in PRESETS:
        raise ValueError(f"{quoted(name)} is a published one; take another name")
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ValueError(
            f"{quoted(name)} is no name for a preset; take letters, digits, . + - _ and single spaces, at most "
            f"{MAX_NAME} of them, such as mine"
        )


def _preset(name, entry):
    """The Preset of an entry of the user's file; raises ValueError, which says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"it must be a table of model, {', '.join(NUMBERS)}, got {quoted(entry)}")
    if missing := [key for key in ("model", *NUMBERS) if key not in entry]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    lo, hi, weight, everywhere = (_number(key, entry[key]) for key in NUMBERS)
    GuidanceInterval(lo, hi)
    for key, value in zip(NUMBERS[2:], (weight, everywhere), strict=True):
        if not 0 < value < math.inf:
            raise ValueError(f"{key} must be a number above 0, got {value:g}")
    told = {key: _text(key, entry[key]) for key in TEXTS if key in entry}
    where = [f"study {told['study']!r}"] if "study" in told else []
    where += [told[key] for key in ("date", "said") if key in told]
    source = ["measured by you", *([", ".join(where)] if where else [])]
    return Preset(
        name=name, model=told["model"], sigma_lo=lo, sigma_hi=hi, sigma_data=1.0, weight=weight,
        weight_everywhere=everywhere, metric=told.get("objective"), source=": ".join(source),
    )  # fmt: skip


def _number(key, value):
    with contextlib.suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    raise ValueError(f"{key} must be a number, got {quoted(value)}")


def _text(key, value):
    text = str(value) if isinstance(value, (str, date)) else ""
    if not text or len(text) > MAX_TEXT or not text.isprintable():
        raise ValueError(f"{key} must be text of at most {MAX_TEXT} characters on one line, got {quoted(value)}")
    return text


def _printable(text):
    """A text of others, such as a file's name, as `_text` takes it."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT]) or "?"

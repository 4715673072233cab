"""Published guidance intervals, each with its source, and the user's own, from the file that `tune --save` writes.

An interval without a source does not belong here; of the user's own it is the study that measured it.
"""

import errno
import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10.
    try:
        import tomli as tomllib
    except ImportError:
        tomllib = None  # The user's own are not listed then.

from .errors import UserError
from .files import atomic_path
from .noise_level import rescale_sigma
from .sampler_patch import GuidanceInterval

PAPER = "Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724"
REPO = "https://github.com/kynkaat/guidance-interval"


@dataclass(frozen=True)
class Preset:
    """A published interval.

    sigma_lo, sigma_hi: as published, for data of standard deviation `sigma_data`.
    weight: the guidance weight (cfg) chosen with the interval, or None where the source names none.
    weight_everywhere: the best weight without an interval, likewise.
    metric: what they were chosen by, if the source says. source: where it is published, and for what sampling.
    """

    name: str
    model: str
    sigma_lo: float
    sigma_hi: float
    sigma_data: float
    weight: float | None
    weight_everywhere: float | None
    metric: str | None
    source: str

    def interval(self, sigma_data=1.0):
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


def get_preset(name):
    """The preset of that name, published or the user's own; raises ValueError, with those there are, for another."""
    known = all_presets()
    by_name = {key.casefold(): preset for key, preset in known.items()}  # X/Y/Z plot's are in any case.
    for key in (str(name).casefold(), f"{name}{MARK}".casefold()):
        if key in by_name:
            return by_name[key]
    raise ValueError(f"unknown preset {name!r}; there are {', '.join(known)}")


def all_presets():
    """`{name as lists show it: Preset}`: the published ones, then the user's own, which are marked."""
    return PRESETS | my_presets()


# ----------------------------------------------------------------------------
# The user's own, each with the study that measured it.

MARK = " (measured by you)"
NAME = re.compile(r"[\w.+-]+( [\w.+-]+)*")
FIELDS = {"model": str, "sigma_lo": float, "sigma_hi": float, "weight": float, "weight_everywhere": float}
log = logging.getLogger(__name__)


def my_file():
    """Where they are: GUIDANCE_INTERVAL_PRESETS, or a file of the user's configuration."""
    if chosen := os.environ.get("GUIDANCE_INTERVAL_PRESETS"):
        return Path(chosen)
    windows = os.environ.get("APPDATA") if os.name == "nt" else None
    folder = windows or os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "guidance-interval" / "presets.toml"


def my_presets():
    """`{marked name: Preset}`; what cannot be read is told in the log and left out: a host goes on without it."""
    try:
        return {f"{name}{MARK}": _mine(name, entry) for name, entry in _read_mine().items()}
    except UserError as e:
        log.warning("Guidance Interval: %s", e)
        return {}


def check_name(name):
    """Return `name` if a preset of the user's may have it; raises UserError."""
    if not NAME.fullmatch(name) or name in PRESETS:
        why = "is a published one" if name in PRESETS else "is no name for a preset"
        raise UserError(f"--save {name!r} {why}; take letters, digits, . + - _ and single spaces, such as mine")
    if tomllib is None:
        raise UserError("--save needs the package tomli under Python 3.10; run: pip install tomli")
    return name


def check_file():
    """Raise UserError if `save_mine` could not read or write the user's file: to know before hours of work."""
    _read_mine()
    file = my_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as e:
        reason = "its folder is a file" if isinstance(e, FileExistsError) else e.strerror
        raise UserError(f"{str(file)!r} cannot be written ({reason}); set GUIDANCE_INTERVAL_PRESETS") from e


def save_mine(name, entry):
    """Add or replace the preset `name` in the user's file, and return the file.

    entry: model, sigma_lo, sigma_hi, weight and weight_everywhere, and whatever else tells where they come from, of
    strings, numbers, lists of numbers and one level of tables of them. Raises UserError when the file cannot be read or
    written; it is then as it was.
    """
    _mine(check_name(name), entry)
    known = _read_mine() | {name: entry}
    file = my_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{str(file)!r} cannot be written ({e.strerror}); set GUIDANCE_INTERVAL_PRESETS") from e
    with atomic_path(file) as tmp:
        tmp.write_text("\n".join(_toml([key], table) for key, table in known.items()), encoding="utf-8")
    return file


def _read_mine():
    file = my_file()
    if not file.is_file():
        return {}
    if tomllib is None:
        raise UserError(f"{str(file)!r} is not read: under Python 3.10 that needs the package tomli")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"the presets file {str(file)!r} cannot be read ({e}); put it right, or remove it") from e


def _mine(name, entry):
    try:
        values = {key: kind(entry[key]) for key, kind in FIELDS.items()}
        GuidanceInterval(values["sigma_lo"], values["sigma_hi"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"the preset {name!r} in {str(my_file())!r} does not do ({e}); put it right, or remove it"
        ) from e
    metric, told = entry.get("objective"), [f"study {entry['study']!r}"] if "study" in entry else []
    told += [str(entry[key]) for key in ("date", "said") if key in entry]
    return Preset(name=name, sigma_data=1.0, metric=metric, source="measured by you: " + ", ".join(told), **values)


def _toml(path, table):
    """A table in TOML. JSON's strings, numbers and lists of numbers are also TOML's, but for infinity."""
    head = "[" + ".".join(json.dumps(part, ensure_ascii=False) for part in path) + "]\n"
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False).replace('Infinity', 'inf')}\n"
             if not isinstance(v, str) else f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False)}\n"
             for k, v in plain.items()]  # fmt: skip
    inner = [_toml([*path, k], v) for k, v in table.items() if isinstance(v, dict)]
    return head + "".join(lines) + "".join(inner)

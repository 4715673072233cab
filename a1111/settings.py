"""What the user asked for: the controls' values, X/Y/Z axes and infotext, with no web UI needed to read them."""

import itertools
import math
import re
from dataclasses import dataclass
from decimal import Decimal

from ..presets import MARK, all_presets, get_preset
from ..sampler_patch import GuidanceInterval

TITLE = "Guidance Interval"
CUSTOM = "custom"
CONDITIONAL_ONLY = "conditional only"
PRESETS = all_presets()  # The published ones, and the user's own.
PRESET_NAMES = [*PRESETS, CONDITIONAL_ONLY, CUSTOM]
DEFAULT_PRESET = "sdxl"

BOTH_PASSES = "Both passes"
FIRST_PASS = "First pass only"
PASSES = [BOTH_PASSES, FIRST_PASS]

CONTROLS = ("preset", "sigma_lo", "sigma_hi", "passes")  # In their order in the UI and in the API.

# The keys in an image's parameters.
INTERVAL_KEY = "Guidance interval"
PASSES_KEY = "Guidance interval passes"
KEYS = (INTERVAL_KEY, PASSES_KEY)


@dataclass(frozen=True)
class Settings:
    """What one generation is to do.

    interval: a GuidanceInterval, or None for the conditional prediction everywhere.
    passes: BOTH_PASSES, or FIRST_PASS to leave the second pass of hires fix to the host.
    """

    interval: GuidanceInterval | None
    passes: str = BOTH_PASSES

    def guides_any(self, sigma):
        """Whether an evaluation whose rows have these noise levels, a tensor [rows], is guided."""
        return self.interval is not None and any(self.interval.guided_rows(sigma))

    def covers(self, hires_pass):
        """Whether the settings hold in this pass."""
        return not (hires_pass and self.passes == FIRST_PASS)

    def infotext(self, hires):
        """The entries for the image's parameters; `hires`: whether the generation has a second pass.

        None where the interval says what the host's CFG does without us.
        """
        if self.interval == GuidanceInterval():
            return {}
        text = {INTERVAL_KEY: CONDITIONAL_ONLY if self.interval is None else format_interval(self.interval)}
        if hires and self.passes != BOTH_PASSES:
            text[PASSES_KEY] = self.passes
        return text


# ----------------------------------------------------------------------------
# Controls.


def from_controls(preset, sigma_lo, sigma_hi, passes):
    """The Settings of the values of CONTROLS; raises ValueError in plain words.

    A preset wins over the two numbers; "custom" takes the numbers.
    """
    if preset not in PRESET_NAMES and f"{preset}{MARK}" not in PRESET_NAMES:
        raise ValueError(f"preset must be one of {', '.join(PRESET_NAMES)}, got {preset!r}")
    if passes not in PASSES:
        raise ValueError(f"passes must be {' or '.join(map(repr, PASSES))}, got {passes!r}")
    if preset == CUSTOM:
        return Settings(bounds(sigma_lo, sigma_hi), passes)
    return Settings(None if preset == CONDITIONAL_ONLY else get_preset(preset).interval(), passes)


def bounds(sigma_lo, sigma_hi):
    """The GuidanceInterval of two numbers as the controls give them: a sigma_hi of 0 or "inf" has no upper limit."""
    if sigma_hi is None or (isinstance(sigma_hi, bool | str) and str(sigma_hi).strip().casefold() != "inf"):
        raise ValueError(f'sigma_hi must be a number, or 0 or "inf" for no upper limit, got {sigma_hi!r}')
    if sigma_hi == 0 or isinstance(sigma_hi, str):
        sigma_hi = math.inf
    try:
        return GuidanceInterval(sigma_lo, sigma_hi)
    except TypeError as e:  # An empty number box gives None.
        raise ValueError(str(e)) from e


def slider(sigma_hi):
    """`sigma_hi` as the slider shows it, which has no inf."""
    return 0.0 if math.isinf(sigma_hi) else sigma_hi


def preset_of(sigma_lo, sigma_hi):
    """The name of the preset with these bounds, or "custom"."""
    for name in PRESETS:
        interval = get_preset(name).interval()
        if (sigma_lo, sigma_hi) == (interval.sigma_lo, interval.sigma_hi):
            return name
    return CUSTOM


# ----------------------------------------------------------------------------
# Infotext: "Guidance interval: 0.28-5.42".


def format_interval(interval):
    """`sigma_lo-sigma_hi`, exact and without exponents, whose minus would read as the dash."""
    return "-".join(_format_number(s) for s in (interval.sigma_lo, interval.sigma_hi))


def _format_number(value):
    if math.isinf(value):
        return "inf"
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_interval(text):
    """The GuidanceInterval of `0.28-5.42`, or None for "conditional only"; raises ValueError for anything else."""
    plain = str(text).strip().casefold()
    if plain == CONDITIONAL_ONLY:
        return None
    try:
        sigma_lo, sigma_hi = (float(part) for part in re.split("[-\N{EN DASH}\N{EM DASH}]", plain.strip("([])")))
    except ValueError as e:
        raise ValueError(
            f"{text!r} is not an interval; write it as sigma_lo-sigma_hi, like 0.28-5.42 or 0.28-inf"
        ) from e
    return GuidanceInterval(sigma_lo, sigma_hi)


def paste(params):
    """The controls' values `(enabled, preset, sigma_lo, sigma_hi, passes)` that an image's parameters call for.

    None stands for "leave the control as it is". Without our key the accordion is off, as it was when the
    image was made; an entry that cannot be read is treated as absent.
    """
    try:
        interval = parse_interval(params[INTERVAL_KEY])
    except (KeyError, ValueError):
        return False, None, None, None, None
    passes = params.get(PASSES_KEY)
    passes = passes if passes in PASSES else BOTH_PASSES
    if interval is None:
        return True, CONDITIONAL_ONLY, None, None, passes
    preset = preset_of(interval.sigma_lo, interval.sigma_hi)
    return True, preset, interval.sigma_lo, slider(interval.sigma_hi), passes


# ----------------------------------------------------------------------------
# X/Y/Z axes: the value of a cell stands on the processing object and overrides the accordion, on or off.

OFF = "off"
AXES = {  # Name of the axis: (type of its values, choices or None)
    "sigma_lo": (float, None),
    "sigma_hi": (float, None),
    "interval": (str, None),
    "preset": (str, [*PRESETS, CONDITIONAL_ONLY, OFF]),
}


def axis_label(name):
    """The axis as X/Y/Z plot lists it."""
    return f"[{TITLE}] {name}"


def check_axis(name, values):
    """Raise ValueError for the first value that an axis cannot take, before anything is rendered."""
    for value in values:
        apply_axes({name: value}, Settings(GuidanceInterval()))


def check_grid(grid, settings):
    """Raise ValueError if a cell of `{axis: values}` has no interval, `settings` being those of the accordion."""
    impossible = []
    for cell in itertools.product(*grid.values()):
        try:
            apply_axes(dict(zip(grid, cell, strict=True)), settings)
        except ValueError:
            impossible.append(" with ".join(f"{name} {value}" for name, value in zip(grid, cell, strict=True)))
    if impossible:
        more = f" and {len(impossible) - 3} more" if len(impossible) > 3 else ""
        others = "" if {"sigma_lo", "sigma_hi"} <= grid.keys() else f" (the accordion has {describe(settings)})"
        raise ValueError(
            f"X/Y/Z plot has cells in which sigma_lo is not below sigma_hi: {'; '.join(impossible[:3])}{more}{others}. "
            f"Leave those values out, or list the intervals that you want on the axis {axis_label('interval')}"
        )


def describe(settings):
    """The interval of `settings` in words."""
    return CONDITIONAL_ONLY if settings.interval is None else str(settings.interval)


def apply_axes(axes, settings):
    """The Settings of a cell, from `{axis: value}` and those of the accordion; None is the host's own CFG."""
    interval = settings.interval
    for name in ("preset", "interval"):
        value = axes.get(name, "").strip().casefold()
        if value == OFF:
            return None
        if value == CONDITIONAL_ONLY:
            interval = None
        elif value:
            interval = get_preset(value).interval() if name == "preset" else parse_interval(value)
    if "sigma_lo" in axes or "sigma_hi" in axes:
        base = interval or GuidanceInterval()
        interval = bounds(axes.get("sigma_lo", base.sigma_lo), axes.get("sigma_hi", base.sigma_hi))
    return Settings(interval, settings.passes)

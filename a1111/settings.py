"""What the user asked for: the controls' values, X/Y/Z axes and infotext, with no web UI needed to read them."""

import math
from dataclasses import dataclass
from decimal import Decimal

from ..presets import PRESETS, get_preset
from ..sampler_patch import GuidanceInterval

TITLE = "Guidance Interval"
CUSTOM = "custom"
PRESET_NAMES = [*PRESETS, CUSTOM]
DEFAULT_PRESET = "sdxl"

BOTH_PASSES = "Both passes"
FIRST_PASS = "First pass only"
PASSES = [BOTH_PASSES, FIRST_PASS]

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

    def guides(self, sigma):
        """Whether an evaluation whose rows have these noise levels (tensor) is guided."""
        return self.interval is not None and bool(self.interval.mask(sigma).any())

    def covers(self, hires_pass):
        """Whether the settings hold in this pass."""
        return not (hires_pass and self.passes == FIRST_PASS)

    def infotext(self, hires):
        """The entries for the image's parameters; `hires`: whether the generation has a second pass.

        None where the interval says what the host's CFG does without us, or what a CFG scale of 1 says.
        """
        if self.interval in (None, GuidanceInterval()):
            return {}
        text = {INTERVAL_KEY: format_interval(self.interval)}
        if hires and self.passes != BOTH_PASSES:
            text[PASSES_KEY] = self.passes
        return text


def from_controls(preset, sigma_lo, sigma_hi, passes):
    """The Settings of the controls, in their order in the UI and in the API; raises ValueError in plain words.

    A preset wins over the two numbers; "custom" takes the numbers.
    """
    if preset not in PRESET_NAMES:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESET_NAMES)}")
    if passes not in PASSES:
        raise ValueError(f"unknown choice of passes {passes!r}; there are {', '.join(PASSES)}")
    if preset != CUSTOM:
        return Settings(get_preset(preset).interval(), passes)
    try:
        return Settings(GuidanceInterval(sigma_lo, sigma_hi), passes)
    except TypeError as e:  # An empty number box gives None.
        raise ValueError(str(e)) from e


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
    """The GuidanceInterval of `0.28-5.42`; raises ValueError for anything else."""
    try:
        sigma_lo, sigma_hi = (float(part) for part in str(text).strip().strip("([])").split("-"))
    except ValueError as e:
        raise ValueError(f"{text!r} is not an interval; write it as sigma_lo-sigma_hi, like 0.28-5.42") from e
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
    return (
        True,
        preset_of(interval.sigma_lo, interval.sigma_hi),
        interval.sigma_lo,
        interval.sigma_hi,
        passes if passes in PASSES else BOTH_PASSES,
    )


# ----------------------------------------------------------------------------
# X/Y/Z axes: the value of a cell stands on the processing object and overrides the accordion, on or off.

OFF = "off"
AXES = {  # Name of the axis: (type of its values, choices or None)
    "sigma_lo": (float, None),
    "sigma_hi": (float, None),
    "interval": (str, None),
    "preset": (str, [*PRESETS, OFF]),
}


def check_axis(name, values):
    """Raise ValueError for the first value that an axis cannot take, before anything is rendered."""
    for value in values:
        apply_axes({name: value}, Settings(GuidanceInterval()))


def apply_axes(axes, settings):
    """The Settings of a cell, from `{axis: value}` and those of the accordion; None is the host's own CFG."""
    interval = settings.interval
    for name in ("preset", "interval"):
        value = axes.get(name)
        if value is None:
            continue
        if value == OFF:
            return None
        interval = get_preset(value).interval() if name == "preset" else parse_interval(value)
    if "sigma_lo" in axes or "sigma_hi" in axes:
        bounds = axes.get("sigma_lo", interval.sigma_lo), axes.get("sigma_hi", interval.sigma_hi)
        interval = GuidanceInterval(*bounds)
    return Settings(interval, settings.passes)

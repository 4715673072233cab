"""What the user asked for: the controls' values, X/Y/Z axes and infotext, with no web UI needed to read them."""

import itertools
import math
import re
from dataclasses import dataclass

from ..interval_text import (
    AROUND,
    BOTH_PASSES,
    CONDITIONAL_ONLY,
    CUSTOM,
    FIRST_PASS,
    INTERVAL_KEY,
    PASSES_KEY,
    TITLE,
    format_interval,
    is_interval,
    parse_interval,
    within_reach,
)
from ..presets import MARK, all_presets, get_preset
from ..sampler_patch import GuidanceInterval

PRESETS = all_presets()  # The published ones, and the user's own.
PRESET_NAMES = [*PRESETS, CONDITIONAL_ONLY, CUSTOM]

PASSES = [BOTH_PASSES, FIRST_PASS]
CONTROLS = ("preset", "sigma_lo", "sigma_hi", "passes")  # In their order in the UI and in the API.

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
        return within_reach(GuidanceInterval(sigma_lo, sigma_hi))
    except TypeError as e:  # An empty number box gives None.
        raise ValueError(str(e)) from e


def number_box(sigma_hi):
    """`sigma_hi` as its box shows it, which has no inf."""
    return 0.0 if math.isinf(sigma_hi) else sigma_hi


def preset_of(sigma_lo, sigma_hi):
    """The name of the preset with these bounds, sigma_hi as in its box or inf, or "custom"."""
    for name in PRESETS:
        interval = get_preset(name).interval()
        if (sigma_lo, sigma_hi or math.inf) == (interval.sigma_lo, interval.sigma_hi):
            return name
    return CUSTOM


# ----------------------------------------------------------------------------
# Infotext: "Guidance interval: 0.28-5.42".

# The host ends a value at its first comma. This one ends where another entry begins, or the text.
_ENTRY = re.compile(
    rf'(?:^|[,\s"])(?P<key>{"|".join(map(re.escape, KEYS))})\s*:\s*(?P<value>.*?)\s*(?=,\s*"?\w[\w /-]*:|,?$)'
)


class Entry(str):
    """The last value of a key in an infotext, whole; `values` are all that it has."""

    values = ()


def entries(infotext):
    """`{key: Entry}` of our keys in the last line of an infotext, where the host reads them."""
    found = {}
    for match in _ENTRY.finditer(infotext.rstrip().rpartition("\n")[2]):
        values = (*getattr(found.get(match["key"]), "values", ()), match["value"])
        found[match["key"]] = entry = Entry(match["value"])
        entry.values = values
    return found


@dataclass(frozen=True)
class Pasted:
    """What an image's parameters call for.

    enabled, preset, sigma_lo, sigma_hi, passes: of the controls; None stands for "leave it as it is".
    said: what could not be read, for the user, or "".
    """

    enabled: bool | None = None
    preset: str | None = None
    sigma_lo: float | None = None
    sigma_hi: float | None = None
    passes: str | None = None
    said: str = ""


def paste(params):
    """The Pasted of an image's parameters, our keys of which may be of `entries`.

    Without our key the accordion is off, as it was when the image was made. What cannot be read changes nothing.
    """
    text = params.get(INTERVAL_KEY)
    if text is None:
        return Pasted(enabled=False)
    said = []
    if len(set(getattr(text, "values", ()))) > 1:
        said.append(f"The text has more than one {INTERVAL_KEY!r}; the last one, {text}, was taken.")
    try:
        interval = _pasted_interval(text)
    except ValueError as e:
        return Pasted(said=f"{INTERVAL_KEY!r} of the pasted text was not taken, and nothing was changed: {e}.")
    passes = params.get(PASSES_KEY, BOTH_PASSES).strip(AROUND)
    if passes not in PASSES:
        said.append(f"{PASSES_KEY!r} must be {' or '.join(PASSES)}, got {passes!r}; {BOTH_PASSES} was taken.")
        passes = BOTH_PASSES
    said = " ".join(said)
    if interval is None:
        return Pasted(True, CONDITIONAL_ONLY, None, None, passes, said)
    preset = preset_of(interval.sigma_lo, interval.sigma_hi)
    return Pasted(True, preset, interval.sigma_lo, number_box(interval.sigma_hi), passes, said)


def _pasted_interval(text):
    """`parse_interval`; where that fails, of what stands before a comma and a space, as the host has it."""
    try:
        return parse_interval(text)
    except ValueError:
        before, comma, _ = text.partition(", ")
        if not comma or not is_interval(before):
            raise
        return parse_interval(before)


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

"""How a guidance interval is written and read: as text, "0.28-5.42", and under which names hosts hold it."""

import math
import re
import unicodedata
from decimal import Decimal

from .sampler_patch import GuidanceInterval

TITLE = "Guidance Interval"

# What may stand in the place of an interval.
CONDITIONAL_ONLY = "conditional only"
CUSTOM = "custom"

# The passes of a hires fix that an interval is for.
BOTH_PASSES = "Both passes"
FIRST_PASS = "First pass only"

# The keys in an image's parameters.
INTERVAL_KEY = "Guidance interval"
PASSES_KEY = "Guidance interval passes"

# ComfyUI's nodes, as prompts name them. Those that patch a model stand first.
SIGMA_NODE = "GuidanceInterval"
PERCENT_NODE = "GuidanceIntervalPercent"
STEPS_NODE = "GuidanceIntervalSteps"
PRESET_NODE = "GuidanceIntervalPreset"
GUIDER_NODE = "GuidanceIntervalGuider"
COMPARE_NODE = "GuidanceIntervalCompare"
DEMO_MODEL_NODE = "GuidanceIntervalDemoModel"
PATCH_NODES = (SIGMA_NODE, PERCENT_NODE, STEPS_NODE, PRESET_NODE)
LIMITING_NODES = (*PATCH_NODES, GUIDER_NODE)
# Where its server is asked what a prompt's run will be.
FORECAST_PATH = "/guidance_interval/forecast"

# Of a bound: models are trained from about 0.002 up; 1e6 is t = 1 - 1e-6 of flow matching.
SMALLEST, LARGEST = 1e-9, 1e6

_SAME = str.maketrans(
    dict.fromkeys("\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}\N{WAVE DASH}~", "-") | {"\N{INFINITY}": "inf"}
)
_NUMBER = r"(-?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[-+]?\d+)?|inf(?:inity)?)"
_INTERVAL = re.compile(rf"{_NUMBER}(?:\s*(?:-|;|to|\.\.+)\s*|\s*,\s+){_NUMBER}")
AROUND = "()[]\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK} \t"


def format_interval(interval: GuidanceInterval) -> str:
    """`sigma_lo-sigma_hi`, exact and without exponents, whose minus would read as the dash."""
    return "-".join(_format_number(s) for s in (interval.sigma_lo, interval.sigma_hi))


def _format_number(value):
    if math.isinf(value):
        return "inf"
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_interval(text: str) -> GuidanceInterval | None:
    """The GuidanceInterval of `0.28-5.42`, or None for "conditional only"; raises ValueError for anything else.

    Read too: decimal commas, exponents, other dashes and "to" in between, two numbers apart by a comma and a space,
    and brackets or quotes around.
    """
    if _plain(text) == CONDITIONAL_ONLY:
        return None
    found = _read(text)
    if not found:
        raise ValueError(f"{text!r} is not an interval; write it as sigma_lo-sigma_hi, like 0.28-5.42 or 0.28-inf")
    return within_reach(GuidanceInterval(*(float(number.replace(",", ".")) for number in found.groups())))


def is_interval(text: str) -> bool:
    """Whether `text` is written as an interval is, whatever its bounds are."""
    return _read(text) is not None


def _read(text):
    return _INTERVAL.fullmatch(_plain(text))


def _plain(text):
    """Without what stands around, and with one kind of letters, spaces and dashes."""
    plain = " ".join(unicodedata.normalize("NFKC", str(text)).casefold().translate(_SAME).strip(AROUND).split())
    return re.sub(r"(\.\d+),(?=\d*\.)", r"\1, ", plain)  # Both have a point: this comma stands between them.


def within_reach(interval: GuidanceInterval) -> GuidanceInterval:
    """Return `interval`, unless it has a bound that no model's noise reaches; raises ValueError."""
    for name, value in (("sigma_lo", interval.sigma_lo), ("sigma_hi", interval.sigma_hi)):
        if not (SMALLEST <= value <= LARGEST or value in (0, math.inf)):
            opened = '0 or "inf" for no upper limit' if name == "sigma_hi" else "0"
            raise ValueError(f"{name} must be between {SMALLEST:g} and {LARGEST:g}, or {opened}, got {value!r}")
    return interval

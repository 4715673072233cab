"""What one generation needs of the running web UI, and what is said to its user."""

import math

from fastapi import HTTPException
from modules import scripts, shared

from . import settings as st
from .patch import ATTRIBUTE, Generation

AXES_ATTRIBUTE = "guidance_interval_axes"
SETTINGS_ATTRIBUTE = "guidance_interval_settings"
ROWS_ATTRIBUTE = "guidance_interval_rows"


class GuidanceIntervalError(HTTPException, ValueError):
    """What was asked for cannot be: shown under the gallery, and by the API as 422 with the same sentence."""

    def __init__(self, message):
        super().__init__(status_code=422, detail=message)

    def __str__(self):
        return self.detail


def say(p, text):
    """One message, on the console and under the generated image."""
    text = f"{st.TITLE}: {text}"
    print(text)
    if hasattr(p, "comment"):
        p.comment(text)


# ----------------------------------------------------------------------------
# One generation.


def begin(p, enabled, *controls):
    """Put a Generation on `p` if the dropdown, an axis or the accordion asks for one; called before it is processed."""
    end(p)
    for key in st.KEYS:  # X/Y/Z plot's cells share these parameters.
        p.extra_generation_params.pop(key, None)
    try:
        settings = chosen(p, enabled, controls)
    except ValueError as e:
        refuse(p, e)
        return
    if settings is None:
        return
    setattr(p, ATTRIBUTE, Generation(settings))
    p.extra_generation_params.update(settings.infotext(getattr(p, "enable_hr", False)))


def chosen(p, enabled, controls):
    """The Settings for `p`, or None for the host's own CFG; raises ValueError."""
    if hasattr(p, SETTINGS_ATTRIBUTE):
        return getattr(p, SETTINGS_ATTRIBUTE)
    if not isinstance(enabled, bool):
        raise ValueError(f"the first argument, on or off, must be true or false, got {enabled!r}")
    axes = getattr(p, AXES_ATTRIBUTE, {})
    if not enabled and not axes:
        return None
    settings = checked(p, controls)
    return st.apply_axes(axes, settings) if axes else settings


def checked(p, controls):
    """`settings.from_controls`, and whether the API can answer: its JSON has no NaN and no infinity."""
    if getattr(p, "is_api", False):
        for name, value in zip(st.CONTROLS, controls, strict=False):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f'{name} must be a finite number (as text, "inf" leaves sigma_hi open), got {value}')
    return st.from_controls(*controls)


def refuse(p, error):
    """Have the host stop before it samples: it goes on after an error of a script, but not after one of `p.init`."""

    def init(*args, **kwargs):
        raise GuidanceIntervalError(str(error))

    init.refuses = True
    p.init = init


def check(p):
    """Say once if the web UI evaluates its model in an unknown way.

    Called after a batch was sampled and before the host sets its count of steps back.
    """
    generation = getattr(p, ATTRIBUTE, None)
    if generation is None or (generation.calls and generation.unknown is None):
        return
    if generation.unknown is None and not shared.state.sampling_step:
        return  # Nothing was sampled: interrupted or skipped before, or DDIM with one step.
    reason = generation.unknown or "it announced no denoiser call"
    say(p, f"this web UI or sampler is not supported ({reason}). The image has the web UI's own CFG.")
    for key in st.KEYS:
        p.extra_generation_params.pop(key, None)
    end(p)


def end(p):
    """Take off `p` what `begin` put there; the count of rows stays."""
    if hasattr(p, ATTRIBUTE):
        setattr(p, ROWS_ATTRIBUTE, getattr(p, ATTRIBUTE).rows)
        delattr(p, ATTRIBUTE)
    if hasattr(vars(p).get("init"), "refuses"):
        del p.init


# ----------------------------------------------------------------------------
# The dropdown.


def from_script(p, script, args):
    """`(Settings, whether to compare)` from the arguments of the dropdown `script`; raises GuidanceIntervalError."""
    wanted = script.args_to - script.args_from
    given = wanted + len(p.script_args) - len(p.scripts.inputs)
    try:
        if given != wanted:  # The host puts the arguments of other scripts in the place of those that are missing.
            raise ValueError(f"the script takes {wanted} arguments, got {given}")
        if p.script_args[accordion_of(p).args_from]:
            raise ValueError("it is on twice: choose the script in the dropdown or the accordion, not both")
        *controls, compared = args
        if not isinstance(compared, bool):
            raise ValueError(f"the last argument, whether to compare, must be true or false, got {compared!r}")
        return checked(p, controls), compared
    except ValueError as e:
        raise GuidanceIntervalError(str(e)) from e


def accordion_of(p):
    """Our accordion among the scripts of `p`."""
    return next(s for s in p.scripts.alwayson_scripts if s.title() == st.TITLE)


# ----------------------------------------------------------------------------
# X/Y/Z plot.


def add_axes():
    """Offer the axes to X/Y/Z plot, which is the script with a list `axis_options`; once per load of it."""
    for module in {data.module for data in scripts.scripts_data}:
        options = getattr(module, "axis_options", None)
        if not isinstance(options, list) or not hasattr(module, "AxisOption"):
            continue
        labels = {option.label for option in options}
        options += [axis for axis in _axes(module.AxisOption) if axis.label not in labels]


def _axes(AxisOption):
    for name, (kind, choices) in st.AXES.items():

        def apply(p, x, xs, name=name):
            _check_grid(p, xs)
            setattr(p, AXES_ATTRIBUTE, {**getattr(p, AXES_ATTRIBUTE, {}), name: x})  # New: cells are shallow copies.

        def confirm(p, xs, name=name):
            try:
                st.check_axis(name, xs)
            except ValueError as e:
                raise GuidanceIntervalError(str(e)) from e

        offered = None if choices is None else (lambda choices=choices: choices)
        yield AxisOption(st.axis_label(name), kind, apply, confirm=confirm, choices=offered)


def _check_grid(p, xs):
    """Raise GuidanceIntervalError, which ends the run at its first cell, if any cell can have no interval.

    X/Y/Z plot confirms one axis at a time, and shows a cell that fails as an empty one. xs: the values of one of
    our axes, by which a run is told from an earlier one.
    """
    axes = [getattr(shared.state, f"xyz_plot_{letter}", None) for letter in "xyz"]
    if not any(a is not None and a.values is xs for a in axes):
        return
    names = {st.axis_label(name): name for name in st.AXES}
    grid = {names[a.axis.label]: a.values for a in axes if a.axis.label in names}
    accordion = accordion_of(p)
    try:
        _, *controls = p.script_args[accordion.args_from : accordion.args_to]
        st.check_grid(grid, st.from_controls(*controls))
    except ValueError as e:
        raise GuidanceIntervalError(str(e)) from e

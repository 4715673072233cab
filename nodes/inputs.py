"""What the nodes' declarations share: inputs, checks of their values, and the patch."""

import reprlib

from comfy_api.latest import io

from ..interval_text import CONDITIONAL_ONLY, LARGEST
from ..presets import DEFAULT, get_preset
from . import model_patch
from .live import events
from .model_patch import OPEN, to_interval

DEFAULT_INTERVAL = get_preset(DEFAULT).interval()
ALIASES = ["guidance interval", "guidance limiter", "cfg limiter", "limited interval", "skip uncond"]
SIGMA_TIP = (
    "Noise relative to the image, as k-diffusion and EDM count it; the same numbers mean the same for every model."
)


def schema(**kwargs):
    if "search_aliases" in io.Schema.__dataclass_fields__:  # Newer hosts.
        kwargs["search_aliases"] = ALIASES
    return io.Schema(category="sampling/guidance interval", **kwargs)


LIVE = [io.Hidden.unique_id, io.Hidden.prompt]  # By which the page is told of a run.


def advanced(node_input):
    node_input.extra_dict["advanced"] = True  # Older hosts have no parameter for it.
    return node_input


def model(tooltip="The model to limit. Other patches may come before or after this node."):
    return io.Model.Input("model", tooltip=tooltip)


def patched_model():
    return io.Model.Output(display_name="model", tooltip="The model, guided inside the interval alone.")


def _sigma(name, default, tip):
    # The front end keeps as many decimals of what is typed as the step has.
    tip = f"{tip} {SIGMA_TIP}"
    return io.Float.Input(name, default=default, min=OPEN, max=LARGEST, step=0.001, round=False, tooltip=tip)


def sigma_lo():
    tip = "Guidance ends at this noise level: the last, low-noise steps run without it. 0 or -1: no lower bound."
    return _sigma("sigma_lo", DEFAULT_INTERVAL.sigma_lo, tip)


def sigma_hi():
    tip = "Guidance begins at this noise level: the first, noisiest steps run without it. -1: no upper bound."
    return _sigma("sigma_hi", DEFAULT_INTERVAL.sigma_hi, tip)


def units():
    return advanced(
        io.Combo.Input(
            "units",
            options=["edm", "model"],
            default="edm",
            optional=True,
            tooltip="edm: noise relative to the image, the same for every model. model: the model's own sigma, which "
            "for flow models (SD3, Flux, Wan, ...) is a time from 0 to 1.",
        )
    )


def outside():
    return advanced(
        io.Combo.Input(
            "outside",
            options=list(model_patch.OUTSIDE),
            default=CONDITIONAL_ONLY,
            optional=True,
            tooltip="conditional only: outside the interval nothing but the positive prompt's prediction counts, and "
            "other guidance (PAG, SLG, APG, ...) is limited too. keep other patches: they go on outside, with CFG off.",
        )
    )


def limited(node, model, sigma_lo, sigma_hi, units, outside):
    in_units = model_patch.in_edm_units if units == "edm" else model_patch.in_model_units
    return patched(node, model, in_units(to_interval(sigma_lo, sigma_hi)), outside)


def patched(node, model, resolve, outside=CONDITIONAL_ONLY):
    return model_patch.patch_model(model, resolve, outside, events.teller(node, model), events.stages(node))


CFG_TIP = "Guidance weight inside the interval; the best one is usually higher than without."


def cfg(tooltip=CFG_TIP):
    return io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def check(node, rule, **values):
    """True, or what is wrong with the values, for `validate_inputs`; a linked input is None until it runs.

    The host leaves the limits of inputs that `validate_inputs` names to it, and hands on what it could not convert.
    rule(*values) raises what else is wrong.
    """
    inputs = {i.id: i for i in node.define_schema().inputs}
    for name, value in values.items():
        low, high = getattr(inputs[name], "min", None), getattr(inputs[name], "max", None)
        if value is None or low is None:
            continue
        if not isinstance(value, (int, float)):
            return _Told(f"{name} must be a number, got {reprlib.repr(value)}")
        if not low <= value <= high:  # NaN fails too.
            return _Told(f"{name} must lie between {low:.7g} and {high:.7g}, got {reprlib.repr(value)}")
    if None in values.values():
        return True
    try:
        rule(*values.values())
    except (TypeError, ValueError) as error:
        return _Told(error)
    return True


class _Told(str):
    """What is wrong, told in full once: the host asks for it again for each input that was checked with the first."""

    asked = False

    def __str__(self):
        text, self.asked = "as told above" if self.asked else super().__str__(), True
        return text


def refuse(verdict):
    """Raise what a `validate_inputs` found, for inputs that are linked and so known only when the node runs."""
    if verdict is not True:
        raise ValueError(str(verdict))

"""The controls, built once for the dropdown script and for the accordion; Gradio 3 and 4."""

import math

import gradio as gr
from modules.infotext_utils import PasteField

from . import host, picture
from . import settings as st

# The host's own components that decide the schedule, by elem_id without the tab.
SCHEDULE = {
    "txt2img": ("sampling", "scheduler", "steps"),
    "img2img": ("sampling", "scheduler", "steps", "denoising_strength"),
}
_seen = {"txt2img": {}, "img2img": {}}


def remember(component, elem_id):
    """Note a component of the host from which the picture reads the schedule; called for each one created."""
    tab, _, name = (elem_id or "").partition("_")
    if name in SCHEDULE.get(tab, ()):
        _seen[tab][name] = component


def controls(tab, name, opened=None):
    """Build preset, sigma_lo, sigma_hi and passes, which are returned in this order, and the picture.

    tab: "txt2img" or "img2img"; name: begins the elem_ids, so that dropdown and accordion have their own;
    opened: a component whose change draws the picture anew, for the model may have been loaded since.
    """

    def elem_id(item):
        return f"{tab}_{name}_{item}"

    interval = st.get_preset(st.DEFAULT_PRESET).interval()
    with gr.Row():
        preset = gr.Dropdown(
            st.PRESET_NAMES,
            value=st.DEFAULT_PRESET,
            label="Preset",
            info="Published intervals; 'custom' takes the two numbers.",
            elem_id=elem_id("preset"),
        )
        passes = gr.Radio(
            st.PASSES, value=st.BOTH_PASSES, label="Hires fix", elem_id=elem_id("passes"), visible=tab == "txt2img"
        )
    with gr.Row():
        sigma_lo = gr.Slider(
            0, 10, value=interval.sigma_lo, step=0.01, label="sigma_lo: guidance ends", elem_id=elem_id("sigma_lo")
        )
        sigma_hi = gr.Slider(
            0, 20, value=interval.sigma_hi, step=0.01, label="sigma_hi: guidance begins", elem_id=elem_id("sigma_hi")
        )
    names = [n for n in SCHEDULE[tab] if n in _seen[tab]]
    schedule = [_seen[tab][n] for n in names]

    def draw(lo, hi, *values):
        return picture_of(lo, hi, dict(zip(names, values, strict=True)))

    first = draw(interval.sigma_lo, interval.sigma_hi, *[c.value for c in schedule])
    html = gr.HTML(first, elem_id=elem_id("picture"))

    def choose(name, lo, hi):
        if name == st.CUSTOM:
            return lo, hi
        chosen = st.get_preset(name).interval()
        return chosen.sigma_lo, chosen.sigma_hi

    bounds = [sigma_lo, sigma_hi]
    preset.change(choose, [preset, *bounds], bounds, show_progress=False)
    for bound in bounds:
        bound.change(st.preset_of, bounds, preset, show_progress=False)
    for component in [*bounds, *schedule, *([] if opened is None else [opened])]:
        component.change(draw, [*bounds, *schedule], html, show_progress=False)
    return [preset, sigma_lo, sigma_hi, passes]


def picture_of(sigma_lo, sigma_hi, schedule):
    """The picture's HTML, or in its place the reason why there is none."""
    try:
        interval = st.GuidanceInterval(sigma_lo, sigma_hi)
    except (TypeError, ValueError) as e:
        return f"<div>{e}</div>"
    sigmas, note = host.step_sigmas(
        schedule.get("sampling"),
        schedule.get("scheduler"),
        schedule.get("steps", 20),
        schedule.get("denoising_strength", 1.0),
    )
    return picture.draw(sigmas, interval, note)


def paste_fields(enabled, components):
    """infotext_fields of the accordion: what "read generation parameters" sets each control to."""

    def field(component, index):
        def value(params):
            pasted = st.paste(params)[index]
            if pasted is None or (isinstance(pasted, float) and math.isinf(pasted)):
                return gr.update()
            return pasted

        return PasteField(component, value)

    return [field(c, i) for i, c in enumerate([enabled, *components])]

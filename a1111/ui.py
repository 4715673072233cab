"""The controls, built once for the dropdown script and for the accordion; Gradio 3 and 4."""

import gradio as gr
from modules import shared
from modules.infotext_utils import PasteField

from . import evaluations, picture
from . import settings as st

# The host's own components that decide what is evaluated: {tab: {elem_id: name in evaluations.passes}}.
CONTROLS = {
    "txt2img": {
        "txt2img_prompt": "prompt",
        "txt2img_styles": "styles",
        "txt2img_sampling": "sampler",
        "txt2img_scheduler": "scheduler",
        "txt2img_steps": "steps",
        "txt2img_cfg_scale": "cfg_scale",
        "txt2img_hr-checkbox": "hires",
        "txt2img_hires_steps": "hires_steps",
        "txt2img_denoising_strength": "hires_denoising_strength",
        "txt2img_hr_cfg": "hires_cfg_scale",
        "hr_sampler": "hires_sampler",
        "hr_scheduler": "hires_scheduler",
        "hires_prompt": "hires_prompt",
    },
    "img2img": {
        "img2img_prompt": "prompt",
        "img2img_styles": "styles",
        "img2img_sampling": "sampler",
        "img2img_scheduler": "scheduler",
        "img2img_steps": "steps",
        "img2img_cfg_scale": "cfg_scale",
        "img2img_image_cfg_scale": "image_cfg_scale",
        "img2img_denoising_strength": "denoising_strength",
    },
}
_seen = {"txt2img": {}, "img2img": {}}  # {tab: {name: component}}
_redraw = {"txt2img": [], "img2img": []}  # Of each of our pictures: the arguments of `component.change`.


def remember(component, elem_id):
    """Note a component of the host that the picture depends on; called for each one created."""
    for tab, names in CONTROLS.items():
        if elem_id in names:
            _seen[tab][names[elem_id]] = component
        elif elem_id == f"html_log_{tab}":  # Changes when an image is done; by then a model is loaded.
            for redraw in _redraw[tab]:
                component.change(**redraw)


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
            0,
            20,
            value=interval.sigma_hi,
            step=0.01,
            label="sigma_hi: guidance begins (0: no upper limit)",
            elem_id=elem_id("sigma_hi"),
        )
    hosts = _seen[tab]
    names = list(hosts)
    ours = [preset, sigma_lo, sigma_hi, passes]

    def draw(*values):
        return picture_of(values[: len(ours)], dict(zip(names, values[len(ours) :], strict=True)))

    html = gr.HTML(draw(*[c.value for c in [*ours, *hosts.values()]]), elem_id=elem_id("picture"))

    def choose(name, lo, hi):
        if name not in st.PRESETS:
            return lo, hi
        chosen = st.get_preset(name).interval()
        return chosen.sigma_lo, chosen.sigma_hi

    bounds = [sigma_lo, sigma_hi]
    preset.change(choose, [preset, *bounds], bounds, show_progress=False)
    for bound in bounds:
        bound.change(st.preset_of, bounds, preset, show_progress=False)
    redraw = {"fn": draw, "inputs": [*ours, *hosts.values()], "outputs": html, "show_progress": False}
    _redraw[tab].append(redraw)
    for component in [*ours, *([] if opened is None else [opened])]:
        component.change(**redraw)
    for name, component in hosts.items():
        (component.blur if "prompt" in name else component.change)(**redraw)
    return ours


def picture_of(ours, hosts):
    """The picture's HTML, or in its place the reason why there is none.

    ours: the values of our controls; hosts: of the host's, by the names in CONTROLS.
    """
    try:
        settings = st.from_controls(*ours)
        passes = evaluations.passes(hosts, settings)
    except (ValueError, evaluations.Unknown) as e:
        return f"<div>{e}</div>"
    savers = shared.opts.data.get("skip_early_cond", 0) or shared.opts.data.get("s_min_uncond", 0)
    return picture.draw(passes, hosts["steps"], "NGMS or Skip Early CFG is on and may save more." if savers else "")


def paste_fields(enabled, components):
    """infotext_fields of the accordion: what "read generation parameters" sets each control to."""

    def field(component, index):
        def value(params):
            pasted = st.paste(params)[index]
            return gr.update() if pasted is None else pasted

        return PasteField(component, value)

    return [field(c, i) for i, c in enumerate([enabled, *components])]

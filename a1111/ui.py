"""The controls, built once for the dropdown script and for the accordion; Gradio 3 and 4."""

import gradio as gr
from modules import shared
from modules.infotext_utils import PasteField

from ..presets import DEFAULT, get_preset
from . import evaluations, picture
from . import settings as st
from .generation import GuidanceIntervalError

# The host's own components that decide what is evaluated: {tab: {elem_id: name in evaluations.passes}}.
CONTROLS = {
    "txt2img": {
        "txt2img_prompt": "prompt",
        "txt2img_styles": "styles",
        "txt2img_sampling": "sampler",
        "txt2img_scheduler": "scheduler",
        "txt2img_steps": "steps",
        "txt2img_cfg_scale": "cfg_scale",
        "txt2img_width": "width",
        "txt2img_height": "height",
        "txt2img_hr-checkbox": "hires",
        "txt2img_hr_scale": "hr_scale",
        "txt2img_hr_resize_x": "hr_resize_x",
        "txt2img_hr_resize_y": "hr_resize_y",
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
        "img2img_width": "width",
        "img2img_height": "height",
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
        # Changes when an image is done; by then a model is loaded. (Gradio 4 fires html_log_* without end.)
        elif elem_id == f"generation_info_{tab}":
            for redraw in _redraw[tab]:
                component.change(**redraw)


def controls(tab, name, opened=None):
    """Build preset, sigma_lo, sigma_hi and passes, which are returned in this order, and the picture.

    tab: "txt2img" or "img2img"; name: begins the elem_ids, so that dropdown and accordion have their own;
    opened: a component whose change draws the picture anew, for the model may have been loaded since.
    """

    def elem_id(item):
        return f"{tab}_{name}_{item}"

    interval = get_preset(DEFAULT).interval()
    with gr.Row():
        preset = gr.Dropdown(
            st.PRESET_NAMES,
            value=DEFAULT,
            label="Preset",
            info="Published intervals; 'custom' takes the two numbers.",
            elem_id=elem_id("preset"),
        )
        passes = gr.Radio(
            st.PASSES, value=st.BOTH_PASSES, label="Hires fix", elem_id=elem_id("passes"), visible=tab == "txt2img"
        )
    with gr.Row():  # From high noise to low, as in the picture and in time.
        sigma_hi = gr.Number(
            value=interval.sigma_hi,
            step=0.01,
            label="Guidance begins (sigma_hi)",
            info="Noise level; 0: from the start.",
            elem_id=elem_id("sigma_hi"),
        )
        sigma_lo = gr.Number(
            value=interval.sigma_lo,
            step=0.01,
            label="Guidance ends (sigma_lo)",
            info="Noise level; 0: at the end.",
            elem_id=elem_id("sigma_lo"),
        )
    hosts = _seen[tab]
    names = list(hosts)
    ours = [preset, sigma_lo, sigma_hi, passes]

    def draw(*values):
        *values, shown = values
        return picture_of(values[: len(ours)], dict(zip(names, values[len(ours) :], strict=True)), shown)

    def drawn_at_first():
        """For each page that is opened, with the values that its controls begin with."""
        return draw(*[c.value for c in [*ours, *hosts.values()]], None)

    html = gr.HTML(drawn_at_first, elem_id=elem_id("picture"))

    def choose(name):
        if name not in st.PRESETS:
            return gr.update(), gr.update()  # Not as they were: the user may have typed on since.
        chosen = st.get_preset(name).interval()
        return chosen.sigma_lo, st.number_box(chosen.sigma_hi)

    bounds = [sigma_lo, sigma_hi]
    preset.change(choose, preset, bounds, show_progress=False)
    for bound in bounds:  # By the user alone: pasting sets the preset itself.
        bound.input(st.preset_of, bounds, preset, show_progress=False)
    redraw = {"fn": draw, "inputs": [*ours, *hosts.values(), html], "outputs": html, "show_progress": False}
    _redraw[tab].append(redraw)
    for component in [*ours, *([] if opened is None else [opened])]:
        component.change(**redraw)
    for name, component in hosts.items():
        (component.blur if "prompt" in name else component.change)(**redraw)
    return ours


def picture_of(ours, hosts, shown=None):
    """The picture's HTML, or in its place the reason why there is none.

    ours: the values of our controls; hosts: of the host's, by the names in CONTROLS; shown: the HTML there is.
    """
    try:
        settings = st.from_controls(*ours)
    except ValueError as e:
        return picture.warning(str(e))
    try:
        passes = evaluations.passes(hosts, settings)
    except evaluations.Busy as e:
        return picture.outdated(shown, str(e))
    except evaluations.Unknown as e:
        return picture.note(str(e))
    savers = shared.opts.data.get("skip_early_cond", 0) or shared.opts.data.get("s_min_uncond", 0)
    return picture.draw(passes, hosts["steps"], "NGMS or Skip Early CFG is on and may save more." if savers else "")


# ----------------------------------------------------------------------------
# Pasting: "read generation parameters", the gallery's "Send to", the API's `infotext`.


def on_infotext_pasted(infotext, params):
    """Give our entries of `params` whole, which the host has cut at their first comma."""
    params.update({key: entry for key, entry in st.entries(infotext).items() if key in params})


class _Field(str):
    """A paste field's name, by which the gallery's "Send to" knows it, and the function that reads parameters."""

    def __new__(cls, name, function):
        field = super().__new__(cls, name)
        field.function = function
        return field

    def __call__(self, params):
        return self.function(params)


FIELDS = {  # Name of the field: what it is of `settings.Pasted`, in the order of the accordion and its controls.
    st.INTERVAL_KEY: "enabled",
    f"{st.INTERVAL_KEY} preset": "preset",
    f"{st.INTERVAL_KEY} sigma_lo": "sigma_lo",
    f"{st.INTERVAL_KEY} sigma_hi": "sigma_hi",
    st.PASSES_KEY: "passes",
}
NOTE_FIELD = f"{st.INTERVAL_KEY} note"


def note(tab):
    """Where it is said, above the accordion, which may be closed, what of a pasted text could not be read."""
    return gr.HTML("", visible=False, elem_id=f"{tab}_guidance_interval_note")


def paste_fields(enabled, components, note):
    """infotext_fields of the accordion: what pasting sets each control to, and what the note says."""
    for component in components[:3]:  # What the user does by hand has the last word.
        component.input(lambda: gr.update(visible=False), None, note, show_progress=False)

    def field(component, name, attribute):
        def value(params):
            skipped = getattr(shared.opts, "infotext_skip_pasting", ())
            pasted = st.paste(params)
            if pasted.said and not isinstance(params[st.INTERVAL_KEY], st.Entry):  # The API, which shows no note.
                raise GuidanceIntervalError(pasted.said)
            value = getattr(pasted, attribute)
            return gr.update() if value is None or name in skipped or st.INTERVAL_KEY in skipped else value

        return PasteField(component, _Field(name, value))

    def say(params):
        said = st.paste(params).said
        return gr.update(value=picture.warning(said) if said else "", visible=bool(said))

    controls = [field(c, *item) for c, item in zip([enabled, *components], FIELDS.items(), strict=True)]
    return [*controls, PasteField(note, _Field(NOTE_FIELD, say))]

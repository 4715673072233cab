"""Guidance Interval for Automatic1111 and the Forges: a dropdown script and an accordion over one patch."""

import importlib
import importlib.util
import sys
from pathlib import Path

import gradio as gr
from modules import processing, script_callbacks, scripts
from modules.ui_components import InputAccordion

ROOT = Path(__file__).resolve().parents[1]


def load_package():
    """The extension's folder as a package, by path: extensions share sys.modules, where a bare import may meet another.

    Loaded anew with each load of this script: "Reload UI" is how an update takes effect.
    """
    for name in ("guidance_interval", "guidance_interval_extension"):
        loaded = sys.modules.get(name)
        if loaded is None or Path(loaded.__file__ or "").resolve().parent == ROOT:
            break
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_name = load_package().__name__
generation, patch, settings, ui, compare = (
    importlib.import_module(f"{_name}.a1111.{module}")
    for module in ("generation", "patch", "settings", "ui", "compare")
)


class Accordion(scripts.Script):
    """Always visible, for X/Y/Z plot, other scripts and the API, which finds the first script of a title."""

    def title(self):
        return settings.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def after_component(self, component, **kwargs):
        ui.remember(component, kwargs.get("elem_id"))

    def ui(self, is_img2img):
        tab = "img2img" if is_img2img else "txt2img"
        note = ui.note(tab)
        with InputAccordion(False, label=settings.TITLE, elem_id=f"{tab}_guidance_interval") as enabled:
            components = ui.controls(tab, "guidance_interval", enabled)
        self.infotext_fields = ui.paste_fields(enabled, components, note)
        self.paste_field_names = [*ui.FIELDS, ui.NOTE_FIELD]
        return [enabled, *components]

    def process(self, p, *args):
        generation.begin(p, *args)

    def post_sample(self, p, *args):
        generation.check(p)

    def postprocess(self, p, processed, *args):
        generation.end(p)


class Dropdown(scripts.Script):
    """The same from the list of scripts, with the comparison."""

    def title(self):
        return settings.TITLE

    def ui(self, is_img2img):
        tab = "img2img" if is_img2img else "txt2img"
        components = ui.controls(tab, "guidance_interval_script")
        compared = gr.Checkbox(
            False,
            label="Compare: CFG everywhere, interval, conditional only",
            elem_id=f"{tab}_guidance_interval_script_compare",
        )
        return [*components, compared]

    def run(self, p, *args):
        chosen, compared = generation.from_script(p, self, args)
        if compared:
            return compare.run(p, chosen)
        setattr(p, generation.SETTINGS_ATTRIBUTE, chosen)
        return processing.process_images(p)


script_callbacks.on_cfg_denoiser(patch.on_cfg_denoiser)
script_callbacks.on_before_ui(generation.add_axes)
script_callbacks.on_infotext_pasted(ui.on_infotext_pasted)

"""In a real web UI: "Reload UI", which is how an update takes effect."""

import sys

import pytest

pytestmark = [pytest.mark.a1111, pytest.mark.forge]


def test_reload_ui_takes_the_new_code_and_doubles_nothing(webui, generate):
    from guidance_interval.a1111 import patch as old
    from modules import script_callbacks, scripts, shared, ui

    on = [True, "custom", 0.28, 5.42, "Both passes"]
    _, before = generate(accordion=on)
    old.updated = False
    scripts.load_scripts()  # What "Reload UI" does, in its order.
    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    from guidance_interval.a1111 import generation, patch

    assert not hasattr(patch, "updated") and patch is not old
    assert {id(m) for n, m in sys.modules.items() if n == "guidance_interval.a1111.patch"} == {id(patch)}
    registered = script_callbacks.callback_map["callbacks_cfg_denoiser"]
    ours = [c.callback for c in registered if "guidance_interval" in c.callback.__module__]
    assert ours == [patch.on_cfg_denoiser]
    accordions = [s for s in scripts.scripts_txt2img.alwayson_scripts if s.title() == "Guidance Interval"]
    used = type(accordions[0]).process.__globals__["generation"]
    assert len(accordions) == 1 and sys.modules[used.__name__] is generation
    plot = next(s for s in scripts.scripts_txt2img.selectable_scripts if s.title() == "X/Y/Z plot")
    assert [o.label for o in plot.current_axis_options].count("[Guidance Interval] interval") == 1
    _, after = generate(accordion=on)
    assert [i.tobytes() for i in after.images] == [i.tobytes() for i in before.images]
    assert after.infotexts == before.infotexts

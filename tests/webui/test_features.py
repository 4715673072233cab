"""What holds in every web UI: passes, models, infotext, X/Y/Z plot, comparison, API, off and on."""

import json
import math

import pytest

pytestmark = [pytest.mark.a1111, pytest.mark.forge]

CONTROLS = ["custom", 0.28, 5.42, "Both passes"]
FIRST = ["custom", 0.5, 2.0, "First pass only"]
NARROW = ["custom", 0.5, 2.0, "Both passes"]  # So that img2img begins outside.
ON = [True, *CONTROLS]
KEY = "Guidance interval: 0.28-5.42"


@pytest.fixture
def st(webui):
    from guidance_interval.a1111 import settings

    return settings


def pixels(processed):
    return [image.tobytes() for image in processed.images]


# ----------------------------------------------------------------------------
# Passes and models.


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DDIM"])
def test_img2img(judge, generate, st, report, image, sampler):
    judged = judge(st.from_controls(*NARROW))
    generate(accordion=[True, *NARROW], image=image, sampler_name=sampler)
    report(sampler, "img2img", judged)
    judged.check(both=True)


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DDIM"])
@pytest.mark.parametrize("soft", [False, True])
def test_inpaint(judge, generate, st, report, image, mask, sampler, soft):
    from modules import scripts

    judged = judge(st.from_controls(*NARROW))
    found = [s for s in scripts.scripts_img2img.alwayson_scripts if s.title().lower() == "soft inpainting"]
    values = {} if not soft else {"others": [(found[0], [True])]}
    generate(accordion=[True, *NARROW], image=image, mask=mask, sampler_name=sampler, inpainting_fill=1, **values)
    report(sampler, "soft inpaint" if soft else "inpaint", judged)
    judged.check(both=True)


@pytest.mark.parametrize("controls", [NARROW, FIRST])
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM"])
def test_hires_fix(judge, generate, st, report, sampler, controls):
    judged = judge(st.from_controls(*controls))
    from modules.processing import StableDiffusionProcessingTxt2Img

    known = StableDiffusionProcessingTxt2Img.__dataclass_fields__
    more = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 7.0}
    more = {name: value for name, value in more.items() if name in known}
    _, processed = generate(
        accordion=[True, *controls], sampler_name=sampler, enable_hr=True, hr_scale=2, hr_upscaler="Latent",
        denoising_strength=0.7, **more,
    )  # fmt: skip
    report(sampler, "hires" if controls is NARROW else "hires, first pass", judged)
    judged.check()
    hires = [c["guided"] for c in judged.calls if c["hires"]]
    assert hires and all(hires) == (controls is FIRST)
    assert ("Guidance interval passes: First pass only" in processed.infotexts[0]) == (controls is FIRST)


def test_refiner(webui, judge, generate, st, report):
    if webui.host == "forge":
        pytest.skip("one tiny checkpoint is made for Forge")
    judged = judge(st.from_controls(*NARROW))
    _, processed = generate(accordion=[True, *NARROW], refiner_checkpoint="refiner.ckpt", refiner_switch_at=0.3)
    report("DPM++ 2M", "refiner", judged)
    judged.check()
    assert "Refiner:" in processed.infotexts[0]
    assert {c["guided"] for c in judged.calls} == {True, False}


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DDIM"])
def test_inpainting_model(webui, judge, generate, st, report, image, mask, checkpoint, sampler):
    if webui.host == "forge":
        pytest.skip("one tiny checkpoint is made for Forge")
    checkpoint("inpainting")
    judged = judge(st.from_controls(*NARROW))
    generate(accordion=[True, *NARROW], image=image, mask=mask, sampler_name=sampler)
    report(sampler, "inpainting model", judged)
    judged.check(both=True)


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DDIM"])
def test_instruct_pix2pix(webui, judge, generate, st, report, image, checkpoint, sampler):
    if webui.host == "forge":
        pytest.skip("Forge has no InstructPix2Pix")
    checkpoint("pix2pix")
    judged = judge(st.from_controls(*NARROW))
    generate(accordion=[True, *NARROW], image=image, image_cfg_scale=1.5, sampler_name=sampler, batch_size=2)
    report(sampler, "InstructPix2Pix", judged)
    judged.check(both=True)
    rows, stock = judged.total
    guided = sum(c["guided"] for c in judged.calls)
    assert stock == 6 * len(judged.calls) and rows == 2 * len(judged.calls) + 4 * guided


# ----------------------------------------------------------------------------
# On, off, and in between.


def test_off_is_stock_and_writes_nothing(generate):
    from guidance_interval.a1111 import patch
    from modules import script_callbacks

    _, off = generate(accordion=[False, *CONTROLS])
    ours = [c for c in script_callbacks.callback_map["callbacks_cfg_denoiser"] if c.callback is patch.on_cfg_denoiser]
    assert len(ours) == 1
    script_callbacks.callback_map["callbacks_cfg_denoiser"].remove(ours[0])
    script_callbacks.ordered_callbacks_map.clear()
    try:
        _, stock = generate()
    finally:
        script_callbacks.callback_map["callbacks_cfg_denoiser"].append(ours[0])
        script_callbacks.ordered_callbacks_map.clear()
    assert pixels(off) == pixels(stock) and off.infotexts == stock.infotexts
    assert "uidance" not in off.infotexts[0]


def test_an_interval_over_everything_is_stock(generate):
    everywhere = [True, "custom", 0.0, math.inf, "Both passes"]
    assert pixels(generate(accordion=everywhere)[1]) == pixels(generate()[1])


def test_settings_never_leak(generate):
    _, before = generate()
    _, on = generate(accordion=ON)
    _, narrow = generate(accordion=[True, "custom", 1.0, 2.0, "Both passes"])
    _, again = generate(accordion=ON)
    _, after = generate()
    assert pixels(before) == pixels(after) != pixels(on) == pixels(again) != pixels(narrow)
    assert KEY in on.infotexts[0] and "Guidance interval: 1-2" in narrow.infotexts[0]
    assert "uidance interval" not in after.infotexts[0]


@pytest.mark.parametrize("how", ["interrupted", "skipped", "error"])
def test_an_interrupt_a_skip_and_an_error_leave_nothing(generate, how):
    from modules import script_callbacks, shared

    _, before = generate()
    _, fine = generate(accordion=ON)
    calls = []

    def stop(params):
        calls.append(params)
        if len(calls) == 3:
            if how == "error":
                params.text_cond = None  # The host fails on it.
            else:
                setattr(shared.state, how, True)

    script_callbacks.on_cfg_denoiser(stop, name="stop")
    try:
        if how == "error":
            with pytest.raises((AttributeError, TypeError)):
                generate(accordion=ON)
        else:
            generate(accordion=ON)
    finally:
        script_callbacks.remove_callbacks_for_function(stop)
        script_callbacks.ordered_callbacks_map.clear()
        shared.state.interrupted = shared.state.skipped = False
    assert 3 <= len(calls) < 8
    assert pixels(generate()[1]) == pixels(before)
    assert pixels(generate(accordion=ON)[1]) == pixels(fine)


def test_an_invalid_interval_is_said_and_gives_stock(generate):
    _, stock = generate()
    _, processed = generate(accordion=[True, "custom", 5.0, 1.0, "Both passes"])
    assert pixels(processed) == pixels(stock)
    assert "swap them" in processed.comments and "uidance interval:" not in processed.infotexts[0]


def test_an_unknown_web_ui_gets_one_message_and_stock(generate, monkeypatch):
    from guidance_interval.a1111 import patch

    _, stock = generate()
    monkeypatch.setattr(patch, "_patch_for", lambda params: None)
    _, processed = generate(accordion=ON, n_iter=2)
    assert pixels(processed)[0] in pixels(stock) + pixels(processed)
    assert processed.comments.count("not supported") == 1
    assert "Guidance interval" not in processed.infotexts[0]


def test_importing_changes_no_module_of_the_host(webui):
    """No function or class of the host comes from our files."""
    import sys

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("modules", "k_diffusion", "ldm", "backend", "modules_forge", "ldm_patched"):
            for key, value in list(vars(module).items()):
                assert "guidance_interval" not in str(getattr(value, "__module__", "")), f"{name}.{key}"


# ----------------------------------------------------------------------------
# Infotext, X/Y/Z plot, dropdown, API.


def test_infotext_round_trip(generate, webui):
    from modules import infotext_utils, scripts

    _, processed = generate(accordion=[True, "sdxl", 0.0, 1.0, "Both passes"])
    assert KEY in processed.infotexts[0]
    params = infotext_utils.parse_generation_parameters(processed.infotexts[0])
    found = next(s for s in scripts.scripts_txt2img.alwayson_scripts if s.title() == "Guidance Interval")

    def paste(params):
        return [f(params) if callable(f) else params.get(f) for _, f in found.infotext_fields]

    assert paste(params) == [True, "sdxl", 0.28, 5.42, "Both passes"]
    assert [c.label for c, _ in found.infotext_fields] == [c.label for c in found.controls]
    assert "Guidance interval" in scripts.scripts_txt2img.paste_field_names
    _, plain = generate()
    assert paste(infotext_utils.parse_generation_parameters(plain.infotexts[0]))[0] is False


def test_neighbours_keep_their_own_fields(generate):
    _, processed = generate(accordion=ON)
    assert "NGMS" not in processed.infotexts[0] and "Skip Early" not in processed.infotexts[0]


AXES = {
    "sigma_lo": ("0.28, 1", ["Guidance interval: 0.28-5.42", "Guidance interval: 1-5.42"]),
    "sigma_hi": ("5.42, 3", ["Guidance interval: 0.28-5.42", "Guidance interval: 0.28-3"]),
    "interval": ("0.28-5.42, off, 1-2", [KEY, None, "Guidance interval: 1-2"]),
    "preset": ("sdxl, off", [KEY, None]),
}


@pytest.mark.parametrize("axis", AXES)
def test_xyz_plot(generate, webui, axis):
    from modules import scripts

    found = next(s for s in scripts.scripts_txt2img.selectable_scripts if s.title() == "X/Y/Z plot")
    index = [o.label for o in found.current_axis_options].index(f"[Guidance Interval] {axis}")
    values, expected = AXES[axis]
    names = [c.label for c in found.controls]
    arguments = [c.value for c in found.controls]
    arguments[names.index("X type")] = index
    arguments[names.index("X values")] = values
    for name in ("Y type", "Z type"):
        arguments[names.index(name)] = 0
    arguments[names.index("Include Sub Images")] = True
    arguments[names.index("Use text inputs instead of dropdowns")] = True
    for i, name in enumerate(names):
        if name in ("Y values", "Z values"):
            arguments[i] = ""
    _, processed = generate(accordion=[False, *CONTROLS], xyz=arguments)
    texts = processed.infotexts[-len(expected) :]
    for text, part in zip(texts, expected, strict=True):
        assert (part in text) if part else ("Guidance interval" not in text), text
    cells = processed.images[-len(expected) :]
    alone = [generate(accordion=[bool(e), "custom", *_bounds(e), "Both passes"])[1].images[0] for e in expected]
    assert [c.tobytes() for c in cells] == [a.tobytes() for a in alone]


def _bounds(text):
    return [float(s) for s in text.rpartition(" ")[2].split("-")] if text else [0.28, 5.42]


def test_dropdown_is_the_accordion(generate):
    _, script = generate(script=[*CONTROLS, False])
    _, accordion = generate(accordion=ON)
    assert pixels(script) == pixels(accordion) and script.infotexts == accordion.infotexts


def test_both_at_once_are_refused(generate):
    with pytest.raises(ValueError, match="on twice"):
        generate(accordion=ON, script=[*CONTROLS, False])


def test_comparison(generate, judge, st):
    _, everywhere = generate(batch_size=2)
    _, interval = generate(batch_size=2, accordion=ON)
    _, processed = generate(batch_size=2, script=[*CONTROLS, True])
    grid, *cells = processed.images
    assert len(cells) == 6 and grid.width >= 3 * 64 and grid.height > 2 * 64
    assert [c.tobytes() for c in cells[:2]] == [i.tobytes() for i in everywhere.images[-2:]]
    assert [c.tobytes() for c in cells[2:4]] == [i.tobytes() for i in interval.images[-2:]]
    assert "CFG everywhere" in processed.comments and "32 rows" in processed.comments
    assert "16 rows" in processed.comments
    assert ["Guidance interval" in text for text in processed.infotexts[1:]] == [False] * 2 + [True] * 2 + [False] * 2
    assert "CFG scale: 1" in processed.infotexts[-1]


def test_api(webui, generate):
    body = {"prompt": "a photo of a cat", "negative_prompt": "blurry", "seed": 1, "steps": 8, "cfg_scale": 7,
            "width": 64, "height": 64, "sampler_name": "DPM++ 2M"}  # fmt: skip

    def info(**more):
        response = webui.api.post("/sdapi/v1/txt2img", json={**body, **more})
        assert response.status_code == 200, response.text
        return response.json()["images"], json.loads(response.json()["info"])["infotexts"][0]

    images, text = info(alwayson_scripts={"Guidance Interval": {"args": [True, "custom", 0.28, 5.42]}})
    assert KEY in text
    assert info(alwayson_scripts={"Guidance Interval": {"args": [True]}}) == (images, text), "the defaults are sdxl's"
    assert info(script_name="Guidance Interval", script_args=[*CONTROLS, False]) == (images, text)
    assert "Guidance interval" not in info()[1]
    assert len(info(script_name="Guidance Interval", script_args=[*CONTROLS, True])[0]) == 4
    known = webui.api.get("/sdapi/v1/script-info").json()
    ours = [s for s in known if s["name"] == "guidance interval" and not s["is_img2img"]]
    assert [s["is_alwayson"] for s in ours] == [True, False]
    assert [a["label"] for a in ours[0]["args"]][1:] == [a["label"] for a in ours[1]["args"]][:-1]


def test_the_picture_reads_the_hosts_schedule(webui):
    from guidance_interval.a1111 import host, ui

    sigmas, note = host.step_sigmas("DPM++ 2M", "Karras", 20)
    assert len(sigmas) == 20 and sigmas[0] == pytest.approx(14.61, abs=0.05) and not note
    assert sum(0.28 < s <= 5.42 for s in sigmas) == 9
    assert len(host.step_sigmas("DDIM", "Automatic", 20)[0]) == 20
    assert len(host.step_sigmas("DPM++ 2M", "Karras", 20, denoising=0.5)[0]) == 11
    html = ui.picture_of(0.28, 5.42, {"sampling": "DPM++ 2M", "scheduler": "Karras", "steps": 20})
    assert "9 of 20 steps are guided" in html and "29 network rows per image instead of 40" in html
    assert "swap them" in ui.picture_of(5, 1, {})

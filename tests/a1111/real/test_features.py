"""What holds in every web UI: passes, models, infotext, X/Y/Z plot, comparison, API, off and on."""

import json

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
def test_hires_fix(judge, generate, st, report, hires, sampler, controls):
    judged = judge(st.from_controls(*controls))
    _, processed = generate(
        accordion=[True, *controls], sampler_name=sampler, **hires(hr_scale=2, denoising_strength=0.7)
    )
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
    everywhere = [True, "custom", 0.0, 0.0, "Both passes"]
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


@pytest.mark.parametrize("how", ["interrupted", "skipped"])
def test_stopped_before_the_first_denoiser_call(generate, monkeypatch, how):
    """That image keeps its parameters, nothing is called unsupported, and the run goes on in the interval."""
    from modules import sd_samplers_common, shared

    _, fine = generate(accordion=ON, n_iter=2)
    launch = sd_samplers_common.Sampler.launch_sampling
    begun = []

    def stopped_at_once(sampler, steps, func):
        begun.append(sampler)
        if len(begun) == 1:
            setattr(shared.state, how, True)
        return launch(sampler, steps, func)

    monkeypatch.setattr(sd_samplers_common.Sampler, "launch_sampling", stopped_at_once)
    try:
        _, processed = generate(accordion=ON, n_iter=2)
    finally:
        shared.state.interrupted = shared.state.skipped = False
    assert "not supported" not in (processed.comments or "") and KEY in processed.infotexts[-1]
    assert len(begun) == (2 if how == "skipped" else 1)
    if how == "skipped":
        assert pixels(processed)[-1] == pixels(fine)[-1]


@pytest.fixture
def calls(webui):
    """The denoiser calls so far."""
    from modules import script_callbacks

    seen = []

    def count(params):
        seen.append(params)

    script_callbacks.on_cfg_denoiser(count, name="count")
    yield seen
    script_callbacks.remove_callbacks_for_function(count)
    script_callbacks.ordered_callbacks_map.clear()


def test_an_invalid_interval_is_refused_before_anything_is_sampled(generate, calls):
    with pytest.raises(ValueError, match="swap them"):
        generate(accordion=[True, "custom", 5.0, 1.0, "Both passes"])
    assert not calls
    generate(accordion=ON)
    assert len(calls) == 8


def test_an_unknown_web_ui_gets_one_message_and_stock(generate, monkeypatch):
    from guidance_interval.a1111 import patch

    _, stock = generate()
    monkeypatch.setattr(patch, "_patch_for", lambda *args: None)
    _, processed = generate(accordion=ON, n_iter=2)
    assert pixels(processed)[0] in pixels(stock) + pixels(processed)
    assert processed.comments.count("not supported") == 1
    assert "Guidance interval" not in processed.infotexts[0]


def test_a_web_ui_that_announces_no_call_gets_one_message(generate, monkeypatch):
    from guidance_interval.a1111 import patch

    monkeypatch.setattr(patch.Generation, "calls", property(lambda self: 0, lambda self, value: None), raising=False)
    _, processed = generate(accordion=ON)
    assert "announced no denoiser call" in processed.comments
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

    assert paste(params)[:5] == [True, "sdxl", 0.28, 5.42, "Both passes"]
    assert [c.label for c, _ in found.infotext_fields][:5] == [c.label for c in found.controls]
    assert "Guidance interval" in scripts.scripts_txt2img.paste_field_names
    _, plain = generate()
    assert paste(infotext_utils.parse_generation_parameters(plain.infotexts[0]))[0] is False


@pytest.mark.parametrize(
    "ours", [["custom", 0.28, 0.0, "Both passes"], ["conditional only", 0.28, 5.42, "Both passes"]]
)
def test_open_and_conditional_only_survive_pasting(generate, ours):
    from modules import infotext_utils, scripts

    _, processed = generate(accordion=[True, *ours])
    found = next(s for s in scripts.scripts_txt2img.alwayson_scripts if s.title() == "Guidance Interval")
    params = infotext_utils.parse_generation_parameters(processed.infotexts[0])
    pasted = [f(params) if callable(f) else params.get(f) for _, f in found.infotext_fields]
    # What is no value, an update of nothing, leaves the control as it is.
    again = [p if isinstance(p, bool | str | float) else o for p, o in zip(pasted[:5], [True, *ours], strict=True)]
    assert again == [True, *ours]
    assert pixels(generate(accordion=again)[1]) == pixels(processed)


TEXT = "a cat\nSteps: 8, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Guidance interval: {}, Version: v1.9"


@pytest.fixture
def pasted(webui):
    """`pasted(infotext, callback=True)`: what the host makes of it, `[value of each of our fields]`."""
    from modules import infotext_utils, script_callbacks, scripts

    found = next(s for s in scripts.scripts_txt2img.alwayson_scripts if s.title() == "Guidance Interval")

    def paste(infotext, callback=True):
        params = infotext_utils.parse_generation_parameters(infotext)
        if callback:  # The page's, not the API's.
            script_callbacks.infotext_pasted_callback(infotext, params)
        return [f(params) for _, f in found.infotext_fields]

    return paste


@pytest.mark.parametrize("value", ["0,28-5,42", "0.28-5,42", "(0.28, 5.42]", '0.28-5.42"', "0.28 to 5.42"])
def test_an_odd_interval_is_read(pasted, value):
    assert pasted(TEXT.format(value))[:5] == [True, "sdxl", 0.28, 5.42, "Both passes"]


@pytest.mark.parametrize("value", ["5.42-0.28", "0.28--1", "much", "1e300-1e308"])
def test_an_interval_that_cannot_be_read_changes_nothing_and_is_told(pasted, value):
    *controls, note = pasted(TEXT.format(value))
    assert not any("value" in update for update in controls)
    assert note["visible"] and "was not taken" in note["value"]
    assert pasted(TEXT.format("1-2"))[-1]["visible"] is False


def test_the_apis_infotext(post, webui):
    """Automatic1111's and Forge's: parameters that fill the arguments that are not given."""
    try:
        post(infotext="Steps: 8, Sampler: Euler, CFG scale: 7")
    except TypeError as e:
        pytest.skip(f"this host's API cannot read any infotext: {e}")
    answer = post(infotext=TEXT.format("0.28-5.42").partition("\n")[2])
    assert answer.status_code == 200
    assert KEY in json.loads(answer.json()["info"])["infotexts"][0]
    answer = post(infotext=TEXT.format("5.42-0.28"))
    assert answer.status_code == 422 and "swap them" in answer.json()["detail"]


def test_every_send_to_takes_the_interval(webui):
    """The buttons under the gallery pair the fields of two tabs; all others read an image's parameters."""
    from modules import shared

    ours = [
        "guidance_interval-checkbox",
        *(f"guidance_interval_{c}" for c in ("preset", "sigma_lo", "sigma_hi", "passes")),
    ]
    config = shared.demo.get_config_file()
    names = {c["id"]: c["props"].get("elem_id") or "" for c in config["components"]}
    paired = read = 0
    for dependency in config["dependencies"]:
        inputs, outputs = ([names[i] for i in dependency[kind]] for kind in ("inputs", "outputs"))
        for tab in ("txt2img", "img2img"):
            if not {f"{tab}_prompt", f"{tab}_steps"} <= set(outputs):
                continue
            assert {f"{tab}_{name}" for name in ours} <= set(outputs)
            if "txt2img_steps" not in inputs:
                read += 1
                continue
            paired += 1
            for name in ours:
                assert inputs.index(f"txt2img_{name}") == outputs.index(f"{tab}_{name}"), name
    assert paired >= 2 and read >= 4  # To img2img and inpaint; pasting in two tabs, PNG Info to three.


def test_neighbours_keep_their_own_fields(generate):
    _, processed = generate(accordion=ON)
    assert "NGMS" not in processed.infotexts[0] and "Skip Early" not in processed.infotexts[0]


AXES = {
    "sigma_lo": ("0.28, 1", ["Guidance interval: 0.28-5.42", "Guidance interval: 1-5.42"]),
    "sigma_hi": ("5.42, 3", ["Guidance interval: 0.28-5.42", "Guidance interval: 0.28-3"]),
    "interval": ("0.28-5.42, Off, 1 \N{EN DASH} 2", [KEY, None, "Guidance interval: 1-2"]),
    "preset": ("sdxl, off", [KEY, None]),
}


@pytest.fixture
def plot(generate):
    """`plot({"sigma_lo": "0, 3"}, ...)`: the Processed of X/Y/Z plot with our axes, in this order, on x, y and z."""
    from modules import scripts

    def run(axes, accordion=(False, *CONTROLS), **kwargs):
        found = next(s for s in scripts.scripts_txt2img.selectable_scripts if s.title() == "X/Y/Z plot")
        labels = [o.label for o in found.current_axis_options]
        arguments = {c.label: c.value for c in found.controls}
        values = dict(axes)
        for letter, axis in zip("XYZ", [*values, None, None, None], strict=False):
            arguments[f"{letter} type"] = 0 if axis is None else labels.index(f"[Guidance Interval] {axis}")
            arguments[f"{letter} values"] = values.get(axis, "")
        arguments |= {"Include Sub Images": True, "Use text inputs instead of dropdowns": True}
        names = [c.label for c in found.controls]
        given = [arguments[n] for n in names]
        for letter in "XYZ":  # Of the two controls of this name, the second is the dropdown.
            first = names.index(f"{letter} values")
            given[names.index(f"{letter} values", first + 1)] = []
        return generate(accordion=list(accordion), xyz=given, **kwargs)[1]

    return run


@pytest.mark.parametrize("axis", AXES)
def test_xyz_plot(generate, plot, axis):
    values, expected = AXES[axis]
    processed = plot({axis: values})
    texts = processed.infotexts[-len(expected) :]
    for text, part in zip(texts, expected, strict=True):
        assert (part in text) if part else ("Guidance interval" not in text), text
    cells = processed.images[-len(expected) :]
    alone = [generate(accordion=[bool(e), "custom", *_bounds(e), "Both passes"])[1].images[0] for e in expected]
    assert [c.tobytes() for c in cells] == [a.tobytes() for a in alone]


def test_an_axis_reaches_open_and_conditional_only(generate, plot):
    processed = plot({"interval": "0.28-INF, Conditional only"})
    assert "Guidance interval: 0.28-inf" in processed.infotexts[-2]
    assert "Guidance interval: conditional only" in processed.infotexts[-1]
    alone = generate(accordion=[True, "conditional only", 0, 0, "Both passes"])[1].images[0]
    assert processed.images[-1].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"sigma_lo": "0.28, 6"}, r"sigma_lo 6.0 \(the accordion has \(0.28, 5.42\]\)"),
        ({"sigma_lo": "0, 3, 6", "sigma_hi": "2, 6"}, "sigma_lo 3.0 with sigma_hi 2.0; sigma_lo 6.0 with sigma_hi 2.0"),
        ({"sigma_hi": "2, 6", "sigma_lo": "0, 3, 6"}, "sigma_hi 6.0 with sigma_lo 6.0"),
        ({"interval": "1-2, 5-1"}, "swap them"),
        ({"interval": "1-2, much"}, "is not an interval"),
        ({"preset": "sdxl, sd9"}, "unknown preset"),
    ],
)
def test_xyz_plot_is_refused_before_anything_is_sampled(plot, calls, axes, said):
    with pytest.raises(ValueError, match=said):
        plot(axes)
    assert not calls
    processed = plot({"sigma_lo": "0, 3", "sigma_hi": "5, 6"})
    assert len(calls) == 4 * 8 and len(processed.images) >= 4


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
    assert "CFG everywhere" in processed.comments and "32 network evaluations" in processed.comments
    assert "16 network evaluations" in processed.comments
    assert ["Guidance interval" in text for text in processed.infotexts[1:]] == [False] * 2 + [True] * 4


COMPARED = {
    "plain": {},
    "AND": {"prompt": "a cat AND a dog"},
    "weight": {"prompt": "a cat :0.5"},
    "hires, first pass": {},
}


@pytest.mark.parametrize("kind", [*COMPARED, "InstructPix2Pix"])
def test_each_column_of_the_comparison_can_be_made_again(webui, generate, hires, image, checkpoint, kind):
    """By what stands in its parameters; conditional only is what the interval does outside."""
    from guidance_interval.a1111 import settings as st
    from modules import infotext_utils

    kwargs = hires() if "hires" in kind else dict(COMPARED.get(kind, {}))
    if kind == "InstructPix2Pix":
        if webui.host == "forge":
            pytest.skip("Forge has no InstructPix2Pix")
        checkpoint("pix2pix")
        kwargs |= {"image": image, "image_cfg_scale": 1.5}
    controls = [*CONTROLS[:3], "First pass only" if "hires" in kind else "Both passes"]
    _, processed = generate(script=[*controls, True], **kwargs)
    for text, cell in zip(processed.infotexts[1:], processed.images[1:], strict=True):
        found = st.paste(infotext_utils.parse_generation_parameters(text))
        controls = [found.preset or "custom", found.sigma_lo or 0, found.sigma_hi or 0, found.passes or "Both passes"]
        _, again = generate(accordion=[found.enabled, *controls], **kwargs)
        assert again.images[-1].tobytes() == cell.tobytes(), text
    assert "Guidance interval: conditional only" in processed.infotexts[-1]


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


BODY = {"prompt": "a photo of a cat", "negative_prompt": "blurry", "seed": 1, "steps": 8, "cfg_scale": 7,
        "width": 64, "height": 64, "sampler_name": "DPM++ 2M"}  # fmt: skip
REFUSED = {
    "a number as text": ([True, "custom", "1", 5.42, "Both passes"], "sigma_lo must be a number, got '1'"),
    "reversed": ([True, "custom", 5.42, 0.28, "Both passes"], "swap them"),
    "null": ([True, "custom", 0.28, None, "Both passes"], 'or 0 or "inf" for no upper limit, got None'),
    "null below": ([True, "custom", None, 5.42, "Both passes"], "sigma_lo must be a number, got None"),
    "negative": ([True, "custom", -1, 5.42, "Both passes"], "sigma_lo must not be negative"),
    "unknown preset": ([True, "sd9", 0.28, 5.42, "Both passes"], "preset must be one of sdxl"),
    "unknown passes": ([True, "sdxl", 0.28, 5.42, "third"], "passes must be 'Both passes' or 'First pass only'"),
    "NaN": ([True, "custom", float("nan"), 5.42, "Both passes"], "sigma_lo must be a finite number"),
    "NaN beside a preset": ([True, "sdxl", 0.28, float("nan"), "Both passes"], "sigma_hi must be a finite number"),
    "infinity": ([True, "custom", 0.28, float("inf"), "Both passes"], '"inf" leaves sigma_hi open), got inf'),
}
SCRIPT_REFUSED = {
    "too few": (CONTROLS, "takes 5 arguments, got 4"),
    "too many": ([*CONTROLS, False, 1], "takes 5 arguments, got 6"),
    "compare as text": ([*CONTROLS, "false"], "whether to compare, must be true or false, got 'false'"),
}


@pytest.fixture
def post(webui):
    """`post(**body)`: the answer to txt2img; NaN and Infinity are sent as Python and JavaScript clients may."""

    def send(**more):
        content = json.dumps({**BODY, **more})
        return webui.api.post("/sdapi/v1/txt2img", content=content, headers={"Content-Type": "application/json"})

    return send


def refused(response, said, calls, post):
    assert response.status_code == 422, response.text[:500]
    assert said in response.json()["detail"]
    assert not calls
    following = post(alwayson_scripts={"Guidance Interval": {"args": ON}})
    assert following.status_code == 200 and len(calls) == 8


@pytest.mark.parametrize("bad", REFUSED)
def test_the_api_refuses_bad_arguments_of_the_accordion(post, calls, bad):
    args, said = REFUSED[bad]
    refused(post(alwayson_scripts={"Guidance Interval": {"args": args}}), said, calls, post)


@pytest.mark.parametrize("on", ["false", "true", 1, None])
def test_on_is_true_or_false(post, calls, on):
    args = [on, *CONTROLS]
    refused(post(alwayson_scripts={"Guidance Interval": {"args": args}}), "must be true or false", calls, post)


@pytest.mark.parametrize("bad", [*REFUSED, *SCRIPT_REFUSED])
def test_the_api_refuses_bad_arguments_of_the_script(post, calls, bad):
    args, said = SCRIPT_REFUSED[bad] if bad in SCRIPT_REFUSED else ([*REFUSED[bad][0][1:], False], REFUSED[bad][1])
    refused(post(script_name="Guidance Interval", script_args=args), said, calls, post)


@pytest.mark.parametrize("hi", [0, "inf", "Inf"])
def test_the_api_takes_an_open_interval(post, hi):
    response = post(alwayson_scripts={"Guidance Interval": {"args": [True, "custom", 0.28, hi]}})
    assert response.status_code == 200
    assert "Guidance interval: 0.28-inf" in json.loads(response.json()["info"])["infotexts"][0]


def test_the_web_page_shows_why(webui, generate):
    """What the host's wrapper of the Generate button makes of a refusal."""
    from modules import call_queue

    def button():
        generate(accordion=[True, "custom", 5.0, 1.0, "Both passes"])

    *_, html = call_queue.wrap_gradio_call(button, extra_outputs=[None, "", ""])()
    assert "GuidanceIntervalError: sigma_lo must be below sigma_hi, got sigma_lo=5.0" in html

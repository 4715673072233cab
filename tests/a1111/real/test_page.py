"""In a real web UI: the page in a real browser. What the picture asks for, and what pasting and typing do."""

import contextlib
import importlib.util
import os
import re
import socket
from pathlib import Path

import pytest

pytestmark = [pytest.mark.a1111, pytest.mark.forge]

spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "browser.py")
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

PICTURE = "#txt2img_guidance_interval_picture"
OPEN = "#txt2img_guidance_interval .label-wrap"
TEXT = "a cat\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Guidance interval: {}, Version: v1.9"
IDLE_MS = 5000


@pytest.fixture(scope="module")
def address(webui):
    """The page of the web UI, served as its own `webui.py` does."""
    path = browser.chromium()
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    from modules import initialize_util, progress, script_callbacks, scripts, shared, ui, ui_extra_networks

    allowed = [os.getcwd(), *shared.cmd_opts.gradio_allowed_path]
    with contextlib.suppress(ImportError):  # Of the Forges with Gradio 4.
        from modules_forge.forge_canvas.canvas import canvas_js_root_path

        allowed.append(canvas_js_root_path)
    script_callbacks.script_unloaded_callback()  # The page anew, as "Reload UI" makes it: reForge's ids, too.
    scripts.load_scripts()
    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    shared.demo.queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app, url, _ = shared.demo.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, allowed_paths=allowed
    )
    app.user_middleware = [m for m in app.user_middleware if m.cls.__name__ != "CORSMiddleware"]
    initialize_util.setup_middleware(app)
    progress.setup_progress_api(app)
    ui.setup_ui_api(app)
    ui_extra_networks.add_pages_to_demo(app)
    script_callbacks.app_started_callback(shared.demo, app)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium, url
        chromium.close()
    shared.demo.server.force_exit = True  # Else it waits for pages that it has not seen go.
    shared.demo.close()


@pytest.fixture
def page(address):
    """A page that has just been opened, with the accordion open and the picture drawn."""
    chromium, url = address
    page = chromium.new_page(viewport={"width": 1600, "height": 1400})
    page.set_default_timeout(60000)
    page.asked = []  # What the page has asked the server to compute.
    page.on("request", lambda r: page.asked.append(r.url) if re.search("/(queue/join|run/)", r.url) else None)
    page.on("websocket", lambda w: page.asked.append(w.url))
    page.goto(url)
    page.wait_for_function("() => typeof gradioApp === 'function' && gradioApp().querySelector('#txt2img_generate')")
    page.locator(OPEN).click()
    page.wait_for_selector(f"{PICTURE} svg")
    yield page
    page.close()


def box(page, name, tab="txt2img"):
    return page.locator(f"#{tab}_guidance_interval_{name} input").first


def number(page, name, tab="txt2img"):
    return float(box(page, name, tab).input_value())


def enabled(page, tab="txt2img"):
    return page.evaluate(f"() => gradioApp().querySelector('#{tab}_guidance_interval-checkbox input').checked")


def wait_for_number(page, name, value, tab="txt2img"):
    selector = f"#{tab}_guidance_interval_{name} input"
    page.wait_for_function(
        "([selector, value]) => Number(gradioApp().querySelector(selector).value) === value",
        arg=[selector, value],
        polling=200,
    )


def paste(page, value):
    page.locator("#txt2img_prompt textarea").fill(TEXT.format(value))
    page.locator("#txt2img_tools #paste, #paste").first.click()


def small(page):
    """An image that takes no time."""
    for name, value in (("steps", 2), ("width", 64), ("height", 64)):
        field = page.locator(f"#txt2img_{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")


def opaque(page):
    """Whether nothing dims the picture, as Gradio does while it waits for an answer."""
    return page.evaluate(
        """(selector) => {
            let opacity = 1;
            for (let e = gradioApp().querySelector(selector); e; e = e.parentElement)
                opacity *= Number(getComputedStyle(e).opacity);
            return opacity;
        }""",
        f"{PICTURE} svg",
    )


def settled(page):
    """Wait until the page has stopped asking: nothing for half a second, at most ten seconds."""
    for _ in range(20):
        before = len(page.asked)
        page.wait_for_timeout(500)
        if len(page.asked) == before:
            return
    raise AssertionError(f"the page goes on asking: {page.asked[-5:]}")


def test_an_idle_page_asks_for_nothing(page):
    settled(page)
    before = len(page.asked)
    page.wait_for_timeout(IDLE_MS)  # What is measured.
    assert len(page.asked) == before, page.asked[before:]
    assert opaque(page) == 1


def test_an_image_draws_the_picture_once_more_and_then_all_is_quiet(page, monkeypatch):
    from guidance_interval.a1111 import ui

    small(page)
    settled(page)
    drawn = []

    def picture_of(*args):
        drawn.append(args)
        return f'<div><svg width="9" height="9"></svg>drawn {len(drawn)}</div>'

    monkeypatch.setattr(ui, "picture_of", picture_of)
    page.locator("#txt2img_generate").click()
    page.wait_for_function(f"() => gradioApp().querySelector('{PICTURE}').textContent.includes('drawn')")
    settled(page)
    before = len(page.asked), len(drawn)
    page.wait_for_timeout(IDLE_MS)
    assert (len(page.asked), len(drawn)) == before
    assert opaque(page) == 1 and len(drawn) <= 4  # Accordion and script, in the tab of the image.


def test_the_bars_stay_while_an_image_is_made(page):
    from modules import call_queue

    with call_queue.queue_lock:
        field = page.locator("#txt2img_steps input[type=number]")
        field.fill("33")
        field.press("Tab")
        page.wait_for_function(
            f"() => gradioApp().querySelector('{PICTURE}').textContent.includes('An image is being made')"
        )
        assert page.locator(f"{PICTURE} svg rect").count() > 1
        assert opaque(page) < 1


def test_begins_stands_left_of_ends_as_in_the_picture(page):
    begins, ends = (page.locator(f"#txt2img_guidance_interval_{n}").bounding_box() for n in ("sigma_hi", "sigma_lo"))
    assert begins["x"] < ends["x"] and begins["y"] == ends["y"]
    for name in ("sigma_hi", "sigma_lo"):
        label = page.locator(f"#txt2img_guidance_interval_{name} label span").first.bounding_box()
        assert label["height"] < 40, "on one line"


def test_a_high_noise_level_can_be_typed(page):
    field = box(page, "sigma_hi")
    field.fill("30")
    field.press("Tab")
    page.wait_for_function(f"() => gradioApp().querySelector('{PICTURE}').textContent.match(/\\(1 to/)")
    assert number(page, "sigma_hi") == 30
    assert box(page, "preset").input_value() == "custom"


def test_what_is_wrong_is_in_the_themes_colour_of_errors(page):
    field = box(page, "sigma_lo")
    plain = page.locator(PICTURE).last.evaluate("(e) => getComputedStyle(e).color")
    field.fill("9")
    field.press("Tab")
    warning = page.locator(f"{PICTURE} [role=alert]")
    warning.wait_for()
    assert "swap them" in warning.inner_text()
    assert warning.evaluate("(e) => getComputedStyle(e).color") != plain


def test_a_pasted_interval_is_read_or_its_fault_is_told(page):
    note = page.locator("#txt2img_guidance_interval_note").first  # Gradio 3 gives the id to what is in it, too.
    paste(page, "1,5-80,8")
    wait_for_number(page, "sigma_hi", 80.8)
    wait_for_number(page, "sigma_lo", 1.5)
    assert enabled(page) and not note.is_visible()
    paste(page, "5.42-0.28")
    note.wait_for()
    assert "swap them" in note.inner_text()
    assert enabled(page) and number(page, "sigma_hi") == 80.8, "nothing was changed"
    field = box(page, "sigma_hi")
    field.fill("4")
    field.press("Tab")
    note.wait_for(state="hidden")


def test_conditional_only_is_pasted_and_stays(page):
    paste(page, "conditional only")
    page.wait_for_function(f"() => gradioApp().querySelector('{PICTURE}').textContent.includes('None of the')")
    settled(page)
    assert box(page, "preset").input_value() == "conditional only"


def test_send_to_img2img_takes_the_interval(page):
    small(page)
    for name, value in (("sigma_hi", 7), ("sigma_lo", 2)):
        field = box(page, name)
        field.fill(str(value))
        field.press("Tab")
    page.locator("#txt2img_generate").click()
    page.wait_for_selector("#txt2img_gallery img")
    settled(page)
    page.locator("#txt2img_send_to_img2img").click()
    wait_for_number(page, "sigma_hi", 7, tab="img2img")
    wait_for_number(page, "sigma_lo", 2, tab="img2img")
    assert enabled(page, "img2img")
    settled(page)
    assert box(page, "preset", "img2img").input_value() == "custom"

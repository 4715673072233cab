"""The web UIs as a backend: one that does as it should, and one that answers wrongly."""

import base64
import http.server
import io
import itertools
import json
import threading
import time

import pytest
from broken_server import BIG, ENDS, GIANT, SMALL, WRONG, check, png, silent, told
from guidance_interval.a1111 import settings as a1111_settings
from guidance_interval.errors import UserError
from guidance_interval.tune.servers import webui
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Refused, Setting, everywhere
from PIL import Image


class FakeWebUI(http.server.BaseHTTPRequestHandler):
    scripts, error, seen = ["guidance interval"], None, []

    def do_GET(self):
        answers = {
            "/sdapi/v1/scripts": {"txt2img": self.scripts, "img2img": []},
            "/sdapi/v1/options": {"sd_model_checkpoint": "sd.safetensors [abc]"},
            "/sdapi/v1/progress": {"progress": 0.5, "state": {"sampling_step": 3}},
        }
        path = self.path.partition("?")[0]
        self.answer(200 if path in answers else 404, answers.get(path, {"detail": "Not Found"}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/sdapi/v1/png-info":
            has = b"Steps" in base64.b64decode(body["image"].partition(",")[2])
            parameters = {"Steps": "12", "Sampler": "Euler", "CFG scale": "5.5", "Size-1": "256", "Size-2": "320"}
            return self.answer(200, {"info": "", "parameters": parameters if has else {}})
        self.seen.append(body)
        if self.error:
            return self.answer(500, self.error)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (body["seed"] % 256, 0, 0)).save(buffer, "PNG")
        return self.answer(200, {"images": [base64.b64encode(buffer.getvalue()).decode()], "info": "{}"})

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def web_ui(monkeypatch):
    handler = type("Handler", (FakeWebUI,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(webui, "POLL", 0.02)
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_a_web_ui_renders_what_the_accordion_takes(web_ui):
    url, handler = web_ui
    backend = webui.WebUI(url)
    jobs = [Job(s, "a cat", 9) for s in (Setting(0.28, 5.42, 9.0), everywhere(7.0), CONDITIONAL)]
    found = dict(backend.render(jobs))
    assert [found[i].image.getpixel((0, 0)) for i in range(3)] == [(9, 0, 0)] * 3
    assert found[0].seconds is None and found[1].seconds > 0
    for job, sent in zip(jobs, handler.seen, strict=True):
        enabled, *controls = sent["alwayson_scripts"]["Guidance Interval"]["args"]
        settings = a1111_settings.from_controls(*controls)
        assert enabled is True
        assert settings.interval == (None if job.setting.conditional_only else job.setting.interval)
        assert (sent["prompt"], sent["seed"], sent["steps"], sent["scheduler"]) == ("a cat", 9, 20, "Karras")
    assert [sent["cfg_scale"] for sent in handler.seen] == [9.0, 7.0, 7.0]


def test_a_picture_gives_its_parameters(web_ui, tmp_path):
    (tmp_path / "a.png").write_bytes(b"Steps: 12")
    backend = webui.WebUI(web_ui[0], tmp_path / "a.png")
    assert backend.weight == 5.5 and backend.source == "a.png"
    assert (backend.parameters["steps"], backend.parameters["sampler_name"]) == (12, "Euler")
    assert (backend.parameters["width"], backend.parameters["scheduler"]) == (256, "Automatic")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b.png' holds no parameters"):
        webui.WebUI(web_ui[0], tmp_path / "b.png")


def test_a_web_uis_errors_are_told_in_its_words(web_ui):
    url, handler = web_ui
    backend = webui.WebUI(url)
    handler.error = {"error": "OutOfMemoryError", "detail": "", "errors": "CUDA out of memory."}
    with pytest.raises(Refused, match=r"OutOfMemoryError: CUDA out of memory\."):
        list(backend.render([Job(CONDITIONAL, "a", 1)]))
    handler.scripts = ["x/y/z plot"]
    with pytest.raises(UserError, match="lacks the extension Guidance Interval"):
        webui.WebUI(url)
    with pytest.raises(UserError, match=r"no web UI with an API there .*--api"):
        webui.WebUI("http://127.0.0.1:9")


def test_a_web_ui_that_goes_away_is_waited_for(web_ui, monkeypatch):
    backend = webui.WebUI(web_ui[0])
    original, fails = backend._image, itertools.count()

    def render(job):
        if next(fails) < 2:
            raise webui.Gone("it does not answer")
        return original(job)

    monkeypatch.setattr(backend, "_image", render)
    monkeypatch.setattr(webui, "FAILURES", 3)
    assert len(list(backend.render([Job(CONDITIONAL, "a", 1)]))) == 1
    monkeypatch.setattr(backend, "_image", lambda _: (_ for _ in ()).throw(webui.Gone("no")))
    monkeypatch.setattr(backend, "_is_there", lambda: False)
    monkeypatch.setattr(webui, "ALONE", 0.05)
    with pytest.raises(UserError, match=r"does not answer any more .no.; what is done is kept"):
        list(backend.render([Job(CONDITIONAL, "a", 1)]))


# ----------------------------------------------------------------------------
# One that answers wrongly.


def render_web_ui(server, picture=None, limits=SMALL):
    backend = None
    try:
        backend = webui.WebUI(server.url, picture, limits)
        return list(backend.render([Job(CONDITIONAL, "a dog", i) for i in range(2)])), None
    except (UserError, Refused) as e:
        return [], str(e)
    finally:
        if backend:
            backend.close()


@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize("part", ["scripts", "options", "png-info", "progress", "txt2img"])
def test_a_web_ui_answers_wrongly(server, workflow, capsys, part, mode):
    server.broken[part], begin = WRONG[mode], time.monotonic()
    images, said = render_web_ui(server, workflow if part == "png-info" else None)
    check(server, images, said, capsys, begin, 2)
    harmless = part == "progress" or (part == "options" and mode == "a dict of others")
    assert harmless or said
    refused = part == "txt2img" and mode in ("escape codes", "a deep error")
    assert said is None or refused or server.url in said or "holds no parameters" in said


def test_a_web_ui_that_answers_and_only_fails_is_not_waited_for(server):
    server.broken["txt2img"] = told(None)
    assert f"--a1111 {server.url} failed 2 times (" in render_web_ui(server)[1]
    assert server.asked.count("txt2img") == webui.FAILURES


def test_a_web_ui_that_starts_anew_is_waited_for(server, capsys, monkeypatch):
    monkeypatch.setattr(webui, "ALONE", ENDS)
    times = iter(range(2 * webui.FAILURES))  # Only failures of one that answers in between are counted.
    server.broken |= {
        "txt2img": lambda h: next(times, None) is not None or h.good("txt2img", b""),
        "progress": lambda h: None,
    }
    images, said = render_web_ui(server)
    assert said is None and len(images) == 2 and capsys.readouterr().err.count("is waited for") == 1


def test_a_web_ui_that_hangs_is_given_up(server, capsys):
    server.broken["txt2img"], begin = silent, time.monotonic()
    images, said = render_web_ui(server)
    assert not images and "has made no progress for 0.4 s" in said and time.monotonic() - begin < ENDS


@pytest.mark.parametrize("content", [b"<html>", BIG, png()[:-30], b"", GIANT])
def test_a_web_uis_image_that_is_none(server, content):
    server.broken["txt2img"] = told({"images": [base64.b64encode(content).decode()]})
    assert f"{server.url} gave no image to use" in render_web_ui(server)[1]


def test_a_web_ui_that_takes_longer_than_any_answer_may(server):
    def slow(handler):
        for step in range(10):
            server.broken["progress"] = told({"progress": step})
            server.over.wait(0.1)
        handler.good("txt2img", b"")

    server.broken["txt2img"] = slow
    assert len(render_web_ui(server)[0]) == 2  # One second, of `total` 0.3: its progress tells that it goes on.

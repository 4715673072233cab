"""The tuner against servers that answer wrongly: each of its requests with each kind of wrong answer.

Whatever comes, it ends soon, takes no more than its limits, and is told in one line that names the server. The server
here speaks just enough of ComfyUI and of a web UI, so that one part of it can be broken and the rest goes on.
"""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
from guidance_interval.errors import UserError
from guidance_interval.tune import sampler, study
from guidance_interval.tune.servers import comfyui, webui
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Refused, Setting
from guidance_interval.tune.servers.client import Client, Gone, Limits
from PIL import Image

MB = 2**20
SMALL = Limits(quiet=0.15, total=0.3, json=MB, image=MB, message=MB // 8, pixels=10**6)
MOST_SENT = 16 * MB  # What the system's buffers take beside the limits.
ENDS = 60  # Seconds, on a machine that is busy with other things: what does not end would take for ever.


# ----------------------------------------------------------------------------
# Wrong answers: each writes to the connection.


def answer(body, code=200, kind="application/json", **headers):
    def write(handler):
        told = {"Content-Type": kind, "Content-Length": str(len(body)), **headers}
        lines = [f"HTTP/1.1 {code} Whatever", *(f"{k.replace('_', '-')}: {v}" for k, v in told.items())]
        handler.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return write


def told(value, code=200):
    return answer(json.dumps(value).encode(), code)


def for_ever(head, piece, pause=0.0):
    def write(handler):
        handler.send(head)
        while not handler.server.over.wait(pause):
            handler.send(piece)

    return write


def silent(handler):
    handler.server.over.wait()


def to_another_host(handler):
    answer(b"", 307, Location=f"http://127.0.0.1:{handler.server.elsewhere}/stolen")(handler)


def to_itself(handler):
    answer(b"", 302, Location=handler.path)(handler)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\n\u202eevil"
WRONG = {
    "null": told(None),
    "a list": told([]),
    "a number": told(7),
    "a dict of others": told({"other": [1], "error": 0, "status": 1, "images": "no", "txt2img": 3}),
    "nothing": answer(b""),
    "a login page": answer(b"<html><title>Sign in</title></html>", kind="text/html"),
    "not UTF-8": answer(b'"\xff\xfe'),
    "400 and a list": told(["error"], 400),
    "500 and a page": answer(b"<html>Internal Server Error", 500, "text/html"),
    "500 and null": told(None, 500),
    "escape codes": answer(json.dumps({"error": {"message": ESCAPES}, "detail": ESCAPES}).encode(), 500),
    "escape codes in the body": answer(ESCAPES.encode()),
    "escape codes in the status": lambda h: h.send(b"HTTP/1.1 502 \x1b[2J\r\nContent-Length: 0\r\n\r\n"),
    "401": told({"detail": "Not authenticated"}, 401),
    "deep JSON": answer(b"[" * 200_000 + b"]" * 200_000),
    "a deep error": answer(b'{"error": ' * 900 + b"1" + b"}" * 900, 400),
    "an endless body": for_ever(OK, b" " * 2**16),
    "an endless chunked body": for_ever(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 2**16 + b"\r\n"
    ),
    "a length of a terabyte": for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", b" " * 2**16),
    "compressed": answer(gzip.compress(b"[" + b" " * 2**26 + b"]"), Content_Encoding="gzip"),
    "a byte now and then": for_ever(OK, b" ", 0.05),
    "a header now and then": for_ever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05),
    "headers without end": for_ever(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 2**12 + b"\r\n"),
    "silence": silent,
    "silence after the headers": for_ever(OK, b"", 1),
    "an end at once": lambda h: None,
    "an end in the middle": lambda h: h.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
    "no HTTP": lambda h: h.send(b"SSH-2.0-OpenSSH\r\n\x00\x1b[2J"),
    "another host": to_another_host,
    "itself": to_itself,
    "no address": answer(b"", 302, Location="http://[::1"),
    "another scheme": answer(b"", 302, Location="file:///etc/passwd"),
}


# ----------------------------------------------------------------------------
# A server, one part of which is broken.


def declared(output=(), output_node=False, **inputs):
    spec = {k: v if isinstance(v, list) else [v, {}] for k, v in inputs.items()}
    return {"input": {"required": spec}, "output": list(output), "output_node": output_node}


INFO = {
    "Loader": declared(["MODEL"]),
    "Text": declared(["CONDITIONING"], text="STRING"),
    "KSampler": declared(["LATENT"], model="MODEL", positive="CONDITIONING", seed="INT", cfg="FLOAT"),
    "Decode": declared(["IMAGE"], samples="LATENT"),
    "SaveImage": declared([], True, images="IMAGE"),
    "GuidanceInterval": declared(["MODEL"], model="MODEL"),
}
GRAPH = {
    "1": {"class_type": "Loader", "inputs": {}},
    "2": {"class_type": "Text", "inputs": {"text": "a cat"}},
    "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], "seed": 1, "cfg": 7.0}},
    "4": {"class_type": "Decode", "inputs": {"samples": ["3", 0]}},
    "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}},
}


def png(size=(8, 8), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def history(**change):
    """A handler of /history: a job that is done, but for `change`."""

    def write(handler):
        job = handler.path.rpartition("/")[2]
        entry = {"status": {"messages": [], "completed": True}, "outputs": {"5": {"images": [{"filename": "a.png"}]}}}
        told({job: {k: v for k, v in (entry | change).items() if v != "missing"}})(handler)

    return write


def frame(data, opcode=1, length=None):
    length = len(data) if length is None else length
    head = bytes([0x80 | opcode])
    return head + (bytes([length]) if length < 126 else b"\x7f" + struct.pack("!Q", length)) + data


def upgraded(*frames, pause=None):
    """A handler of /ws: the handshake and frames, the last of them for ever if there is a `pause`."""

    def write(handler):
        key = handler.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        handler.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        for one in frames:
            handler.send(one)
        if pause is None:
            handler.connection.recv(1)  # The client says goodbye.
            return
        while not handler.server.over.wait(pause):
            handler.send(frames[-1])

    return write


class Handler(http.server.BaseHTTPRequestHandler):
    """A good ComfyUI and a good web UI, but for `server.broken`, `{part: how it answers}`."""

    def part(self):
        parts = [p for p in self.path.partition("?")[0].split("/") if p not in ("", "sdapi", "v1")]
        return parts[0] if parts else ""

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        part = self.part()
        with self.server.lock:
            self.server.asked.append(part)
        with contextlib.suppress(OSError):  # The client has had enough.
            self.server.broken.get(part, lambda h: h.good(part, body))(self)
        self.close_connection = True

    do_POST = do_GET

    def send(self, data):
        self.wfile.write(data)
        with self.server.lock:
            self.server.sent += len(data)

    def good(self, part, body):
        if part == "prompt":
            return told({"prompt_id": f"job-{len(self.server.asked)}"})(self)
        image = base64.b64encode(png()).decode()
        good = {
            "object_info": told(INFO),
            "history": history(),
            "view": answer(png(), kind="image/png"),
            "ws": upgraded(),
            "queue": told({"queue_running": [], "queue_pending": []}),
            "scripts": told({"txt2img": ["guidance interval"]}),
            "options": told({"sd_model_checkpoint": "sd.safetensors"}),
            "progress": told({"progress": 0.5, "state": {"sampling_step": 3}}),
            "png-info": told({"parameters": {"Steps": "12", "CFG scale": "5"}}),
            "txt2img": told({"images": [image]}),
        }
        good.get(part, told({}))(self)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
    ):
        server.daemon_threads, server.block_on_close = True, False
        server.broken, server.asked, server.sent, server.lock = {}, [], 0, threading.Lock()
        server.over, server.elsewhere = threading.Event(), elsewhere.getsockname()[1]
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):  # Nobody was sent there.
            elsewhere.accept()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """No test waits for more than it must."""
    for module in (comfyui, webui):
        for name, value in {"SILENCE": 0.4, "ALONE": 1.0, "FAILURES": 2, "RETRY": 0.01, "LOOK": 0.05}.items():
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(webui, "POLL", 0.02)


@pytest.fixture
def workflow(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(GRAPH))
    return tmp_path / "w.json"


def render_comfy(server, workflow, limits=SMALL, count=3):
    """`(images, what was said of it or None)` of a ComfyUI."""
    backend = None
    try:
        backend = comfyui.Comfy(workflow, [server.url], limits=limits)
        return list(backend.render([Job(CONDITIONAL, "a dog", i) for i in range(count)])), None
    except (UserError, Refused) as e:
        return [], str(e)
    finally:
        if backend:
            backend.close()


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


def check(server, images, said, capsys, begin, count):
    """What holds of every answer: all images or one line that is fit to be read; soon; and little was taken."""
    assert (said is None) == (len(images) == count)
    lines = [*capsys.readouterr().err.splitlines(), *([said] if said else [])]
    assert all(line.isprintable() and len(line) < 700 for line in lines), lines
    assert time.monotonic() - begin < ENDS
    assert server.sent < MOST_SENT or "ws" in server.broken  # Whose library reads on, and keeps nothing.
    assert not {"stolen", "passwd"} & set(server.asked)


# ----------------------------------------------------------------------------
# ComfyUI.

HARMLESS = {("queue", mode) for mode in WRONG}  # It is asked for jobs that run when they are not waited for any more.


@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize("part", ["object_info", "prompt", "history", "view", "ws", "queue"])
def test_comfyui_answers_wrongly(server, workflow, capsys, part, mode):
    server.broken[part], begin = WRONG[mode], time.monotonic()
    images, said = render_comfy(server, workflow)
    check(server, images, said, capsys, begin, 3)
    assert (part, mode) in HARMLESS or said
    refused = mode in ("escape codes", "a deep error") and part in ("object_info", "prompt", "history")
    assert said is None or refused or server.url in said
    if said and "out for good" in said:
        redirects = SMALL.redirects + 1 if mode == "itself" else 1
        assert server.asked.count("prompt") <= comfyui.FAILURES * comfyui.AHEAD * redirects
        assert "What is done is kept" in said


@pytest.mark.parametrize("change", [
    {"status": "missing"}, {"status": None}, {"status": []}, {"status": {"messages": None}},
    {"status": {"messages": [["a"]]}}, {"status": {"messages": [[[], 1]]}}, {"outputs": "missing"}, {"outputs": []},
])  # fmt: skip
def test_a_history_that_is_made_otherwise(server, workflow, capsys, change):
    server.broken["history"], begin = history(**change), time.monotonic()
    images, said = render_comfy(server, workflow)
    check(server, images, said, capsys, begin, 3)
    assert "/history/job" in said and "which is not what it should be" in said and server.url in said


@pytest.mark.parametrize("outputs", [{}, {"5": None}, {"5": {"images": None}}, {"5": {"images": {}}}])
def test_a_job_without_an_image_is_refused(server, workflow, outputs):
    server.broken["history"] = history(outputs=outputs)
    assert render_comfy(server, workflow)[1] == "the workflow gave no image at node 5"


@pytest.mark.parametrize("stamps", [("a", 1), (1, None), (10**400, 1), (5, 1), (float("inf"), 1), (True, 5)])
def test_times_that_are_none_are_not_told(server, workflow, stamps):
    names = ("execution_start", "execution_success")
    messages = [[name, {"timestamp": t}] for name, t in zip(names, stamps, strict=True)]
    server.broken["history"] = history(status={"messages": messages})
    images, _ = render_comfy(server, workflow)
    assert [r.seconds for _, r in images] == [None] * 3


def chunk(data):
    return struct.pack("!I", len(data) - 4) + data + struct.pack("!I", zlib.crc32(data))


BIG = png((1100, 1000), "1")
HEADER = struct.pack("!IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
GIANT = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + HEADER) + chunk(b"IDAT" + zlib.compress(bytes(9999)))
PICTURES = {
    "50,000 x 50,000": (GIANT, "50000 x 50000 pixels|decompression bomb"),
    "a few too many": (BIG, "1100 x 1000 pixels, more than 1 million"),
    "truncated": (png((64, 64))[:-30], "that is no image to use"),
    "a header alone": (png()[:8], "of no format that is known, or damaged"),
    "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "of no format that is known"),
    "16 bits of grey": (png(mode="I;16"), "mode I;16"),
    "a page": (b"<html>Sign in</html>", "image/png that is no image to use .of no format that is known, or damaged."),
}


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_no_image_to_use(server, workflow, capsys, name):
    content, message = PICTURES[name]
    server.broken["view"], begin = answer(content, kind="image/png"), time.monotonic()
    images, said = render_comfy(server, workflow)
    check(server, images, said, capsys, begin, 3)
    assert said.startswith(f"{server.url} is out for good: it failed 2 times") and re.search(message, said)
    assert server.asked.count("view") == comfyui.FAILURES


def of_job(kind, node=None):
    return json.dumps({"type": kind, "data": {"prompt_id": "job-3", "node": node}}).encode()


FRAMES = {  # What is sent over a WebSocket, and whether images come all the same: they are asked for, too.
    "text that is no JSON": ([frame(b"hello \x1b[2J")], 0.01, True),
    "JSON of other things": ([frame(v) for v in (b"[1]", b'{"data": 1}', b'{"data": {"prompt_id": []}}')], 1, True),
    "a deep one": ([frame(b"[" * 50_000)], 0.05, True),
    "previews without end": ([frame(b"x" * 1000, 2)], 0.0, True),
    "pings without end": ([frame(b"x", 9)], 0.0, True),
    "an end that is none": ([frame(of_job("executing"))], 0.01, True),
    "a frame of a terabyte": ([frame(b"x", length=2**40), b"x" * 2**16], 0.0, None),
    "fragments without end": ([b"\x01\x01x", b"\x00\x7d" + b"x" * 125], 0.0, None),
    "a byte now and then": ([frame(b"x", length=1000), b"x"], 0.05, True),
    "not UTF-8": ([frame(b"\xff\xfe")], 0.01, None),
    "an opcode that is none": ([frame(b"x", 5)], 0.01, None),
    "a masked frame": ([b"\x81\x81xxxxx"], 0.01, None),
    "goodbye": ([frame(b"\x03\xe8", 8)], 0.01, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_a_websocket_that_says_odd_things(server, workflow, capsys, name):
    frames, pause, fine = FRAMES[name]
    server.broken["ws"], begin = upgraded(*frames, pause=pause), time.monotonic()
    waiting = threading.Event()  # Until it was heard, no job is done.

    def later(handler):
        waiting.wait(0.4)
        waiting.set()
        handler.good("history", b"")

    server.broken["history"] = later
    images, said = render_comfy(server, workflow)
    check(server, images, said, capsys, begin, 3)
    assert fine is None or (said is None) == fine


def test_a_job_that_never_ends_is_given_up(server, workflow, capsys):
    server.broken["history"] = told({})
    images, said = render_comfy(server, workflow)
    assert not images and "has made no progress for 0.4 s" in said and "out for good" in said


def test_two_jobs_of_one_number_are_not_taken_for_one(server, workflow):
    server.broken |= {"prompt": told({"prompt_id": "always"}), "history": told({})}
    assert "gives two jobs the number always" in render_comfy(server, workflow)[1]


def test_a_part_that_fails_now_and_then_costs_nothing(server, workflow, capsys):
    """Whatever was rendered in between: only failures without an image count."""
    count = iter(range(100))

    def view(handler):
        (answer(b"<html>", 502) if next(count) % 2 else answer(png(), kind="image/png"))(handler)

    server.broken["view"] = view
    images, said = render_comfy(server, workflow, count=6)
    assert said is None and sorted(i for i, _ in images) == [*range(6)]
    assert "is left out for now" in capsys.readouterr().err


def test_the_others_go_on_without_one_that_is_out_for_good(server, workflow, capsys, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as second:
        second.daemon_threads, second.block_on_close = True, False
        second.broken, second.asked, second.sent, second.lock = {}, [], 0, threading.Lock()
        second.over, second.url = threading.Event(), f"http://127.0.0.1:{second.server_port}"
        threading.Thread(target=second.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        second.broken["view"] = answer(b"<html>", 502)
        server.broken["view"] = lambda h: (time.sleep(0.02), answer(png(), kind="image/png")(h))
        backend = comfyui.Comfy(workflow, [second.url, server.url], limits=SMALL)
        for _ in range(2):
            found = dict(backend.render([Job(CONDITIONAL, "a dog", i) for i in range(12)]))
            assert sorted(found) == [*range(12)]
        told_ = capsys.readouterr().err
        assert told_.count("is out for good") == 1 and second.url in told_
        asked = second.asked.count("prompt")
        assert list(backend.render([Job(CONDITIONAL, "a dog", 1)])) and second.asked.count("prompt") == asked
        backend.close()
        second.over.set()
        second.shutdown()


def test_one_that_comes_back_is_used_again(server, workflow, capsys, monkeypatch):
    monkeypatch.setattr(comfyui, "FAILURES", 3)
    gone, times = threading.Event(), iter(range(1, 11))  # While it is away, what fails is not counted.

    def view(handler):
        if not gone.is_set():
            gone.set()
            server.broken["queue"] = lambda h: next(times, None) or server.broken.pop("queue", None)
            return
        answer(png(), kind="image/png")(handler)

    server.broken["view"] = view
    images, said = render_comfy(server, workflow)
    err = capsys.readouterr().err
    assert said is None and len(images) == 3 and "is left out for now" in err and "is back" in err


# ----------------------------------------------------------------------------
# Which noise levels an image goes through.


@pytest.fixture
def two_passes(server, tmp_path):
    """A workflow of two samplers, on a server that can tell a schedule."""
    two = declared(["LATENT"], model="MODEL", positive="CONDITIONING", seed="INT", cfg="FLOAT", latent="LATENT")
    told_of = {"KSampler": two,
               "BasicScheduler": declared(["SIGMAS"]), "PreviewAny": declared([], True),
               "GuidanceIntervalSchedule": declared(["IMAGE", "STRING"])}  # fmt: skip
    server.broken["object_info"] = told(INFO | told_of)
    first = GRAPH["3"]["inputs"] | {"scheduler": "karras", "steps": 3}
    second = first | {"latent": ["3", 0], "denoise": 0.5}
    graph = GRAPH | {
        "3": {"class_type": "KSampler", "inputs": first},
        "6": {"class_type": "KSampler", "inputs": second},
        "4": {"class_type": "Decode", "inputs": {"samples": ["6", 0]}},
    }
    (tmp_path / "two.json").write_text(json.dumps(graph))
    return tmp_path / "two.json"


def table_of(*levels):
    return {"text": ["a head\n" + "\n".join(f"{i} {sigma} {sigma} yes" for i, sigma in enumerate(levels))]}


def test_of_two_passes_all_levels_are_counted_and_told(server, two_passes):
    server.broken["history"] = history(
        outputs={"probe-0-table": table_of("inf", 8.0, 2.0), "probe-1-table": table_of(4.0, 1.0, 0.5)}
    )
    with contextlib.closing(comfyui.Comfy(two_passes, [server.url], limits=SMALL)) as backend:
        assert backend.sigmas.tolist() == [float("inf"), 8.0, 4.0, 2.0, 1.0, 0.5]
        assert "  node 3 (KSampler) goes through 3 steps, sigma inf to 2" in backend.describe()
        assert "  node 6 (KSampler) goes through 3 steps, sigma 4 to 0.5" in backend.describe()
        setting, ranges = Setting(0.9, 5.0, 7.0), study.space(backend)
        start, end, _ = sampler.coordinates(setting, ranges, backend.sigmas)
        assert setting.rows(backend.sigmas) == 9 == pytest.approx(6 * (1 + end - start))  # As the search predicts them.


@pytest.mark.parametrize("outputs", [
    {}, {"probe-0-table": None}, {"probe-0-table": {"text": 3}}, {"probe-0-table": {"text": [1]}},
    {"probe-0-table": {"text": ["no table \x1b[2J"]}, "probe-1-table": table_of(1.0)},
    {"probe-0-table": table_of("x", 1), "probe-1-table": table_of(1.0)}, {"probe-0-table": table_of("nan", -1)},
])  # fmt: skip
def test_a_schedule_that_is_not_told_costs_no_study(server, two_passes, capsys, outputs):
    server.broken["history"] = history(outputs=outputs)
    with contextlib.closing(comfyui.Comfy(two_passes, [server.url], limits=SMALL)) as backend:
        assert backend.sigmas is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the schedule cannot be told (") and line.isprintable()


@pytest.mark.parametrize("level", ["inf", 0.0])
def test_a_schedule_without_a_level_to_bound_is_none(server, two_passes, level):
    server.broken["history"] = history(outputs={f"probe-{i}-table": table_of(level) for i in (0, 1)})
    with contextlib.closing(comfyui.Comfy(two_passes, [server.url], limits=SMALL)) as backend:
        assert backend.sigmas is None and study.space(backend)


def test_a_server_that_was_never_reached_is_told(workflow):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"^--server http://{address}: no ComfyUI there .*does not answer"):
        comfyui.Comfy(workflow, [address])


# ----------------------------------------------------------------------------
# A web UI.


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


# ----------------------------------------------------------------------------
# The client.


def client(server, words=lambda status, told: None, limits=SMALL, url=None):
    return contextlib.closing(Client("--server", url or server.url, "http://127.0.0.1:8188", words, limits))


def test_a_websocket_leads_to_no_other_host(server):
    server.broken["ws"] = answer(b"", 307, Location=f"ws://127.0.0.1:{server.elsewhere}/stolen")
    with client(server) as one, pytest.raises(Gone, match=f"{server.url} takes no WebSocket"), one.listen("/ws"):
        pass


def test_what_is_compressed_is_not_unpacked(server):
    server.broken["queue"] = WRONG["compressed"]
    with client(server) as one, pytest.raises(Gone, match="/queue answers in the encoding gzip, which"):
        one.get("/queue")


@pytest.mark.parametrize("mode", ["a byte now and then", "a header now and then"])
def test_an_answer_must_be_whole_in_time_however_often_something_comes(server, mode):
    server.broken["queue"], begin = WRONG[mode], time.monotonic()
    late = pytest.raises(Gone, match=f"^{server.url}/queue has not answered to its end within 0.3 s$")
    with client(server, limits=Limits(quiet=20, total=0.3)) as one, late:
        one.get("/queue")
    assert time.monotonic() - begin < ENDS


def test_an_answer_may_be_as_long_as_its_limit_and_no_longer(server):
    server.broken |= {"queue": answer(b"[" + b" " * 98 + b"]"), "view": answer(png(), kind="image/png")}
    for limits, fine in ((Limits(json=100, image=len(png())), True), (Limits(json=99, image=len(png()) - 1), False)):
        with client(server, limits=limits) as one:
            for ask in (lambda c=one: c.get("/queue"), lambda c=one: c.image("/view")):
                with contextlib.nullcontext() if fine else pytest.raises(Gone, match="answers more than"):
                    ask()


def test_a_redirect_on_the_same_host_is_followed(server):
    server.broken["old"] = answer(b"", 302, Location="/queue")
    with client(server) as one:
        assert one.get("/old")[0] == {"queue_running": [], "queue_pending": []}


def test_a_name_and_password_are_sent_and_never_shown(server, capsys):
    server.broken["queue"] = lambda h: told([h.headers["Authorization"]])(h)
    with client(server, url=server.url.replace("//", "//me:secret@")) as one:
        assert one.get("/queue")[0] == ["Basic " + base64.b64encode(b"me:secret").decode()]
        with pytest.raises(Gone, match="which is no JSON") as e:
            server.broken["queue"] = answer(b"<html>")
            one.get("/queue")
        assert "secret" not in f"{one} {e.value}"
    with pytest.raises(UserError, match="is not an address") as e:
        Client("--server", "http://me:secret@[::1", "http://a", None)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("url", ["", "//", "http://", "http://[::1", "http://a:99999", "file:///etc", "http://\x1b[2J"])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match=r"^--server .* is not an address; give one like http://a$") as e:
        Client("--server", url, "http://a", None)
    assert str(e.value).isprintable()


def test_a_proxy_that_cannot_be_used_is_told(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(UserError, match="--server http://a cannot be asked by the proxy that is set"):
        Client("--server", "http://a", "http://a", None)


def test_after_it_was_closed_nothing_is_waited_for(server):
    server.broken["queue"] = silent
    one = Client("--server", server.url, "http://a", lambda *_: None, Limits())
    future = one.start_post("/queue", {})
    while "queue" not in server.asked:
        threading.Event().wait(0.01)
    one.close()
    with pytest.raises(Gone, match="is not waited for any more"):
        one.answer_of("/queue", future)


def test_the_limits_as_they_are_hold_the_memory(server):
    """Of a process of its own: an endless answer, one of brackets, and a picture of 121 megapixels."""
    server.broken["endless"] = for_ever(OK, b" " * 2**16)
    server.broken["brackets"] = answer(b"[" + b"[]," * (3 * MB) + b"[]]")
    server.broken["view"] = answer(png((11_000, 11_000), "1"), kind="image/png")
    server.broken["ws"] = for_ever(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 2**16)
    server.broken["frames"] = upgraded(frame(b"x", length=2**40), b"x" * 2**16, pause=0.0)
    code = f"""
import pathlib, re, resource
from guidance_interval.tune.servers.client import Client, Gone, Limits
from PIL import Image
client = Client("--server", {server.url!r}, "", lambda *_: None, Limits(quiet=0.5))
def at_most(megabytes):
    now = int(re.search("VmSize: *([0-9]+)", pathlib.Path("/proc/self/status").read_text().replace("\\t", " "))[1])
    resource.setrlimit(resource.RLIMIT_AS, (now * 1024 + megabytes * 2**20, resource.RLIM_INFINITY))
def listen(path):
    with client.listen(path) as socket:
        try:
            socket.recv(timeout=0.5)
        except Exception as e:
            raise Gone(type(e).__name__)
at_most(500)
for ask in (
    lambda: client.get("/endless"),
    lambda: client.image("/view"),
    lambda: listen("/ws"),
    lambda: listen("/frames"),
):
    try:
        ask()
    except Gone as e:
        print(e)
print(len(client.get("/brackets")[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    endless, picture, no_socket, _, brackets = done.stdout.splitlines()
    assert "answers more than 32 MB" in endless
    assert "11000 x 11000 pixels, more than 67.1 million" in picture and "takes no WebSocket" in no_socket
    assert brackets == str(3 * MB + 1)

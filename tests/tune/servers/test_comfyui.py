"""ComfyUI servers that answer wrongly: each request of the tuner with each kind of wrong answer."""

import http.server
import json
import queue
import re
import socket
import threading
import time

import pytest
from broken_server import (
    BIG,
    ENDS,
    GIANT,
    SMALL,
    WRONG,
    Handler,
    answer,
    check,
    frame,
    history,
    png,
    told,
    upgraded,
)
from guidance_interval.errors import UserError
from guidance_interval.tune.servers import comfyui
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Refused


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


# It is asked for jobs that run when they are not waited for any more, and for levels that it need not know.
HARMLESS = {(part, mode) for mode in WRONG for part in ("queue", "guidance_interval")}


@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize("part", ["object_info", "guidance_interval", "prompt", "history", "view", "ws", "queue"])
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
    return json.dumps({"type": kind, "data": {"prompt_id": "job-1", "node": node}}).encode()


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


def test_what_runs_for_others_is_not_interrupted(server, workflow):
    interrupted = []

    def interrupt(handler):
        interrupted.append(json.loads(handler.body)["prompt_id"])
        told({})(handler)

    running = {"queue_running": [[0, "job-1", {}, {}, []], [1, "of-another", {}, {}, []]], "queue_pending": []}
    server.broken |= {"history": told({}), "queue": told(running), "interrupt": interrupt}
    assert "has made no progress" in render_comfy(server, workflow)[1]
    assert set(interrupted) == {"job-1"}


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
    assert "is skipped for now" in capsys.readouterr().err


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
    assert said is None and len(images) == 3 and "is skipped for now" in err and "is back" in err


def test_one_that_is_out_for_good_does_not_wait_for_one_that_is_away(server, workflow):
    """One server under two names: by the second one it goes away, by the first one it answers and only fails."""
    names = server.url, server.url.replace("127.0.0.1", "localhost")
    server.broken |= {
        "view": answer(b"<html>", 502),
        "queue": lambda h: None if h.headers["Host"].startswith("localhost") else h.good("queue", b""),
    }
    backend, said = comfyui.Comfy(workflow, names, limits=SMALL), queue.Queue()

    def render():
        try:
            said.put(list(backend.render([Job(CONDITIONAL, "a dog", i) for i in range(4)])))
        except UserError as e:
            said.put(str(e))

    threading.Thread(target=render, daemon=True).start()
    assert "no server answers any more" in said.get(timeout=ENDS)
    assert [bool(one.out) for one in backend.servers] == [True, False]
    backend.close()


def test_one_that_is_away_ends_nothing_while_another_works(server, workflow, monkeypatch):
    """One server under two names: by the second one it goes away, by the first one it takes its time."""
    monkeypatch.setattr(comfyui, "SILENCE", ENDS)
    monkeypatch.setattr(comfyui, "ALONE", 0.1)
    names, begin = (server.url, server.url.replace("127.0.0.1", "localhost")), time.monotonic()

    def gone(part):
        return lambda h: None if h.headers["Host"].startswith("localhost") else h.good(part, h.body)

    server.broken |= {"prompt": gone("prompt"), "queue": gone("queue")}
    server.broken["history"] = lambda h: told({})(h) if time.monotonic() - begin < 2.5 else h.good("history", b"")
    backend = comfyui.Comfy(workflow, names, limits=SMALL)
    assert len(list(backend.render([Job(CONDITIONAL, "a dog", i) for i in range(2)]))) == 2
    assert [one.away for one in backend.servers] == [False, True]
    backend.close()


def test_a_server_that_was_never_reached_is_told(workflow):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"^--server http://{address}: no ComfyUI there .*does not answer"):
        comfyui.Comfy(workflow, [address])

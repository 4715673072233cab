"""The client: limits of size and time, redirects, passwords, proxies."""

import base64
import contextlib
import subprocess
import sys
import threading
import time

import pytest
from broken_server import ENDS, MB, OK, SMALL, WRONG, answer, for_ever, frame, png, silent, told, upgraded
from guidance_interval.errors import UserError
from guidance_interval.tune.servers.client import Client, Gone, Limits


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


def test_an_answer_that_may_take_its_time_must_be_whole_in_time_once_it_begins(server):
    server.broken["queue"] = WRONG["a byte now and then"]
    with client(server) as one:
        error = one.start_post("/queue", {}).exception(timeout=ENDS)
    assert isinstance(error, Gone) and "/queue has not answered to its end within 0.3 s" in str(error)


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

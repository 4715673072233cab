"""A server that speaks just enough of ComfyUI and of a web UI: one part of it can be broken, and the rest goes on.

`check` says what holds whatever it answers: it ends soon, takes no more than its limits, and is told in one line.
"""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import struct
import time
import zlib

from guidance_interval.tune.servers.client import Limits
from PIL import Image

MB = 2**20
SMALL = Limits(quiet=0.15, total=0.3, json=MB, image=MB, message=MB // 8, pixels=10**6)
MOST_SENT = 64 * MB  # What the buffers of a few connections take, up to 10 MB each, while the client is busy.
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


def chunk(data):
    return struct.pack("!I", len(data) - 4) + data + struct.pack("!I", zlib.crc32(data))


# ----------------------------------------------------------------------------
# The server, and what is asked of it.


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


BIG = png((1100, 1000), "1")
HEADER = struct.pack("!IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
GIANT = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + HEADER) + chunk(b"IDAT" + zlib.compress(bytes(9999)))


def history(**change):
    """A handler of /history: a job that is done, but for `change`."""

    def write(handler):
        job = handler.path.rpartition("/")[2]
        entry = {"status": {"messages": [], "completed": True}, "outputs": {"5": {"images": [{"filename": "a.png"}]}}}
        told({job: {k: v for k, v in (entry | change).items() if v != "missing"}})(handler)

    return write


def forecast(levels, **change):
    """A handler of the forecast: `{sampler: its levels}`, and of the answer what is to be otherwise, or "missing"."""

    def write(handler):
        n = json.loads(handler.body).get("sampler", next(iter(levels), None))
        answer = {"sigmas": levels.get(n), "samplers": list(levels), "notes": []} | change
        told({k: v for k, v in answer.items() if v != "missing"})(handler)

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
        self.body = body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
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
            return told({"prompt_id": f"job-{self.server.asked.count(part)}"})(self)
        image = base64.b64encode(png()).decode()
        good = {
            "object_info": told(INFO),
            "guidance_interval": forecast({"3": [8.0, 2.0]}),
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


def check(server, images, said, capsys, begin, count):
    """What holds of every answer: all images or one line that is fit to be read; soon; and little was taken."""
    assert (said is None) == (len(images) == count)
    lines = [*capsys.readouterr().err.splitlines(), *([said] if said else [])]
    assert all(line.isprintable() and len(line) < 700 for line in lines), lines
    assert time.monotonic() - begin < ENDS
    assert server.sent < MOST_SENT or "ws" in server.broken  # Whose library reads on, and keeps nothing.
    assert not {"stolen", "passwd"} & set(server.asked)

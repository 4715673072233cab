"""A server for each test, one part of which it may break; nothing waits for long."""

import http.server
import json
import socket
import threading

import pytest
from broken_server import GRAPH, Handler
from guidance_interval.tune.servers import comfyui, webui


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

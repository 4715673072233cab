"""ComfyUI servers as workers: each takes jobs while it has little to do, and what one does not finish another renders.

A thread for each server holds a WebSocket, by which the server tells what is done, and fetches the images over HTTP.
A server that goes away, or is silent for too long, costs its jobs only: they go back, and it is asked again from time
to time. A server that answers "no" (out of memory, an invalid value) is told in its own words.
"""

import collections
import contextlib
import io
import json
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import torch
from PIL import Image

from ..errors import UserError
from . import backends, workflow
from .backends import Refused, Rendered

AHEAD = 2  # Jobs that a server has at a time: one at work and one waiting.
TIMEOUT = 30  # Seconds for an answer over HTTP.
SILENCE = 600  # Seconds without a word of a job's progress until its server counts as hanging.
RETRY = 2  # Seconds until a server that went away is asked again.
ALONE = 120  # Seconds without any server until the command ends.


class Gone(Exception):
    """A server does not answer, or not as one does."""


class Server:
    """One ComfyUI over HTTP. Raises Gone where it does not answer, and Refused for its errors."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--server {url!r} is not an address; give one like http://127.0.0.1:8188")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.client, self.warm, self.away = uuid.uuid4().hex, False, False

    def __str__(self):
        return self.url

    def get(self, path, **query):
        return self._json(path + ("?" + urllib.parse.urlencode(query) if query else ""))

    def post(self, path, body):
        return self._json(path, json.dumps(body).encode())

    def _json(self, path, data=None):
        answer = self._open(path, data)
        try:
            return json.loads(answer) if answer else None
        except ValueError as e:
            raise Gone(f"{self.url}{path} answers, but not as ComfyUI does") from e

    def _open(self, path, data=None):
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as e:
            with contextlib.suppress(OSError, ValueError):
                body = json.loads(e.read())
                if "error" in body:
                    raise Refused(_words(body)) from e
            raise Gone(f"{self.url}{path} answers {e.code} {e.reason}") from e
        except (OSError, ValueError) as e:  # Of http.client some are ValueErrors.
            raise Gone(f"{self.url} does not answer ({getattr(e, 'reason', None) or e})") from e
        except Exception as e:  # http.client's own: an answer that breaks off.
            raise Gone(f"{self.url} broke off ({e})") from e

    def queue(self, graph):
        return self.post("/prompt", {"prompt": graph, "client_id": self.client})["prompt_id"]

    def finished(self, job):
        """What the history says of a job: `(outputs, seconds)`, or None while it is under way."""
        entry = (self.get(f"/history/{job}") or {}).get(job)
        if entry is None:
            return None
        told = {name: detail for name, detail in entry["status"]["messages"]}
        for name in ("execution_error", "execution_interrupted"):
            if name in told:
                raise Refused(_words(told[name]) if name == "execution_error" else "it was interrupted at the server")
        if not entry["status"].get("completed", True):
            return None
        times = [told.get(n, {}).get("timestamp") for n in ("execution_start", "execution_success")]
        return entry["outputs"], None if None in times else (times[1] - times[0]) / 1000

    def image(self, entry):
        query = {k: entry.get(k, "") for k in ("filename", "subfolder", "type")}
        content = self._open("/view?" + urllib.parse.urlencode(query))
        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except (OSError, ValueError, SyntaxError) as e:
            raise Gone(f"{self.url} sent an image that cannot be read ({e})") from e

    def connect(self):
        import websocket

        try:
            return websocket.create_connection(
                f"ws{self.url.removeprefix('http')}/ws?clientId={self.client}", timeout=TIMEOUT
            )
        except (OSError, websocket.WebSocketException) as e:
            raise Gone(f"{self.url} takes no WebSocket ({e})") from e

    def drop(self, jobs):
        """Take back jobs that nobody waits for any more."""
        with contextlib.suppress(Gone, Refused):
            self.post("/queue", {"delete": list(jobs)})
            running = {entry[1] for entry in self.get("/queue")["queue_running"]}
            for job in running & set(jobs):
                self.post("/interrupt", {"prompt_id": job})


def _words(told):
    """An error of the server, as it says it."""
    if "exception_message" in told:
        return f"{told.get('node_type', 'a node')}: {str(told['exception_message']).strip()}"
    errors = [
        f"{node.get('class_type', 'a node')}: {e.get('details') or e.get('message')}"
        for node in (told.get("node_errors") or {}).values()
        for e in node.get("errors", [])
    ]
    error = told["error"]
    return "; ".join(errors) or (error if isinstance(error, str) else error.get("message", str(error)))


class Comfy:
    """A backend: a workflow, on the servers at `urls`.

    Raises UserError when one of them does not answer, or lacks what the workflow needs, before anything is rendered.
    """

    host, prompts = "ComfyUI", None

    def __init__(self, path, urls):
        graph = workflow.read(path)
        self.servers = list({s.url: s for s in map(Server, urls)}.values())
        self.workers = len(self.servers)
        lacking, types = [], None
        for server in self.servers:
            try:
                here = workflow.Types(server.get("/object_info"))
            except (Gone, Refused) as e:
                raise UserError(f"--server {server}: no ComfyUI there ({e}); start it, or give another address") from e
            if not isinstance(here.info, dict) or "KSampler" not in here:
                raise UserError(f"--server {server} is no ComfyUI: it knows no KSampler; give another address")
            if found := workflow.missing(graph, here):
                lacking.append(f"{server} lacks {', '.join(found)}")
            types = types or here
        if lacking:
            raise UserError(f"workflow {str(path)!r} cannot run: {'; '.join(lacking)}")
        self.workflow = workflow.Workflow(path, graph, types)
        self.source, self.weight = Path(path).name, self.workflow.weight
        self.identity = {"workflow": _digest(self.workflow)}
        self.shows_emoji = any(n["class_type"] == "GuidanceIntervalDemoModel" for n in graph.values())
        self.sigmas = self._probe()

    def _probe(self):
        """The noise levels of an image's steps, as our schedule node tells them, or None."""
        probe = self.workflow.probe()
        if probe is None:
            return None
        graph, ids = probe
        server = self.servers[0]
        try:
            job = server.queue(graph)
            begin = time.monotonic()
            while (found := server.finished(job)) is None:
                if time.monotonic() - begin > SILENCE:
                    return None
                time.sleep(0.2)
            levels = [s for n in ids for text in found[0][n]["text"] for s in workflow.schedule_levels(text)]
        except (Gone, Refused, KeyError) as e:
            print(f"note: the schedule cannot be told ({e}); seconds are the cost", file=sys.stderr)
            return None
        return torch.tensor(levels) if levels else None

    def render(self, jobs):
        work = _Work(self, jobs)
        threads = [threading.Thread(target=work.serve, args=(s,), daemon=True) for s in self.servers]
        for thread in threads:
            thread.start()
        try:
            for _ in jobs:
                yield work.next()
        finally:
            work.stop.set()
            for server, thread in zip(self.servers, threads, strict=True):
                if not server.away:
                    thread.join(timeout=5)

    def describe(self):
        return [
            f"workflow: {self.workflow.path}, cfg {self.weight:g}",
            *[f"  {change}" for change in self.workflow.changes],
            *[f"  prompts go to {key} of node {n}" for n, key in self.workflow.texts],
            f"  seeds go to {', '.join(f'{key} of node {n}' for n, key in self.workflow.seeds)}",
            f"servers: {', '.join(map(str, self.servers))}",
        ]

    paste = staticmethod(backends.paste)

    def close(self):
        """The servers go on."""


def _digest(made):
    """What of a workflow moves its images, beside what is set for each."""
    import hashlib

    graph = made.graph(backends.CONDITIONAL, "", 0)
    for n, key in made.weight_inputs:
        graph[n]["inputs"][key] = 0
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:12]


class _Work:
    """The jobs of one `render`, shared by the threads of the servers."""

    def __init__(self, backend, jobs):
        self.backend, self.jobs = backend, jobs
        self.todo, self.done, self.stop = collections.deque(range(len(jobs))), queue.Queue(), threading.Event()
        self.there = {s: time.monotonic() for s in backend.servers}  # When each last did something.
        self.alone = None  # Since when no server answers.
        self.given, self.lock = set(), threading.Lock()

    def next(self):
        """The next `(index, Rendered)`; raises what a thread met."""
        while True:
            try:
                found = self.done.get(timeout=1)
            except queue.Empty:
                now = time.monotonic()
                self.alone = (self.alone or now) if all(s.away for s in self.there) else None
                if self.alone is not None and now - self.alone > ALONE:
                    raise UserError(
                        f"no server answers any more ({', '.join(map(str, self.there))}); what is done is kept: start "
                        "one and run the command again"
                    ) from None
                continue
            if isinstance(found, Exception):
                raise found
            if found[0] not in self.given:
                self.given.add(found[0])
                return found

    def take(self):
        with self.lock:
            return self.todo.popleft() if self.todo else None

    def serve(self, server):
        """Render jobs on one server until all is to stop."""
        while not self.stop.is_set():
            at_work = {}
            try:
                if server.away:  # It is asked without a job in its hands: one that hangs would keep it.
                    server.get("/queue")
                    server.away = False
                    print(f"{server} is back", file=sys.stderr)
                self._serve(server, at_work)
                return
            except Gone as e:
                self._back(at_work)
                if not server.away:
                    print(f"{server} is left out for now: {e}", file=sys.stderr)
                server.away = True
                self.stop.wait(RETRY)
            except Exception as e:  # Refused, or a bug: the whole trial is off.
                self._back(at_work)
                server.drop(at_work)
                self.done.put(e)
                return

    def _back(self, at_work):
        with self.lock:
            self.todo.extendleft(at_work.values())

    def _serve(self, server, at_work):
        socket = None
        try:
            while not self.stop.is_set():
                while len(at_work) < AHEAD and (i := self.take()) is not None:
                    job = self.jobs[i]
                    try:
                        number = server.queue(self.backend.workflow.graph(job.setting, job.prompt, job.seed))
                    except Exception:
                        at_work[f"not queued {i}"] = i
                        raise
                    at_work[number] = i
                if not at_work:
                    self.there[server] = time.monotonic()
                    self.stop.wait(0.2)  # Another server may give its jobs back.
                    continue
                if socket is None:
                    socket = server.connect()
                    self._collect(server, at_work)  # What was done before it listened.
                else:
                    self._listen(server, socket, at_work)
            server.drop(at_work)
        finally:
            if socket is not None:
                with contextlib.suppress(Exception):
                    socket.close()

    def _listen(self, server, socket, at_work):
        """Wait for one message, and collect what is done."""
        import websocket

        socket.settimeout(2)
        try:
            message = socket.recv()
        except websocket.WebSocketTimeoutException:
            message = None
        except (OSError, websocket.WebSocketException) as e:
            raise Gone(f"{server} broke off ({e})") from e
        if message == "":
            raise Gone(f"{server} closed the connection")
        if message is None:
            self._collect(server, at_work)  # Also tells whether it answers.
            if time.monotonic() - self.there[server] > SILENCE:
                server.drop(at_work)
                raise Gone(f"{server} has made no progress for {SILENCE} s")
            return
        if isinstance(message, bytes):  # A preview.
            self.there[server] = time.monotonic()
            return
        told = json.loads(message)
        about = told.get("data", {}).get("prompt_id")
        if about not in at_work:
            return
        self.there[server] = time.monotonic()
        ended = told["type"] == "executing" and told["data"].get("node") is None
        if ended or told["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            self._collect(server, at_work)

    def _collect(self, server, at_work):
        for number, i in list(at_work.items()):
            found = server.finished(number)
            if found is None:
                continue
            outputs, seconds = found
            shown = outputs.get(self.backend.workflow.output, {}).get("images") or []
            if not shown:
                raise Refused(f"the workflow gave no image at node {self.backend.workflow.output}")
            image = server.image(shown[0])
            del at_work[number]
            self.there[server] = time.monotonic()
            job = self.jobs[i]
            # The first of a server also loads the model.
            seconds = seconds if server.warm else None
            server.warm = True
            self.done.put((i, Rendered(image, job.setting.rows(self.backend.sigmas), seconds)))

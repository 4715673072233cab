"""ComfyUI servers as workers: each takes jobs while it has little to do, and what one does not finish another renders.

A thread for each server holds a WebSocket, by which the server tells what is done, and fetches the images over HTTP.
A server that goes away, or is silent for too long, costs its jobs only: they go back, and it is asked again from time
to time. One that answers, but fails again and again, is out for good. A server that answers "no" (out of memory, an
invalid value) is told in its own words.
"""

import collections
import contextlib
import json
import math
import queue
import sys
import threading
import time
import uuid
from pathlib import Path

import torch

from ...errors import UserError, plain
from ...interval_text import DEMO_MODEL_NODE, FORECAST_PATH
from . import schedule, workflow
from .backend import CONDITIONAL, Refused, Rendered, paste
from .client import ALONE, FAILURES, SILENCE, Client, Gone

AHEAD = 2  # Jobs that a server has at a time: one at work and one waiting.
LOOK = 2  # Seconds until it is asked what is done, if it does not tell.
RETRY = 2  # Seconds until a server that went away is asked again.


class Server:
    """One ComfyUI. Raises Gone where it does not answer, or not as one does, and Refused for its errors.

    failures: since its last image; out: why it is out for good, or None.
    """

    def __init__(self, url, limits=None):
        self.client = Client("--server", url, "http://127.0.0.1:8188", _refusal, limits)
        self.id, self.warm, self.away, self.failures, self.out = uuid.uuid4().hex, False, False, 0, None

    def __str__(self):
        return str(self.client)

    def object_info(self):
        answer = self.client.get("/object_info")
        return self.client.read("/object_info", answer, lambda told: workflow.Types(told))

    def queue(self, graph):
        """Give it a job; returns its number there."""
        answer = self.client.post("/prompt", {"prompt": graph, "client_id": self.id})
        return self.client.read("/prompt", answer, lambda told: _is(str, told["prompt_id"]))

    def is_there(self):
        """Raise Gone unless it answers."""
        self.client.get("/queue")

    def finished(self, job):
        """What the history says of a job: `({node: output}, seconds)`, or None while it is under way."""

        def ended(told):
            if not told or job not in told:
                return None
            entry = _is(dict, told[job])
            status, outputs = _is(dict, entry["status"]), _is(dict, entry["outputs"])
            return {name: detail for name, detail in status["messages"]}, status.get("completed", True), outputs

        path = f"/history/{job}"
        found = self.client.read(path, self.client.get(path), ended)
        if found is None:
            return None
        told, completed, outputs = found
        for name in ("execution_error", "execution_interrupted"):
            if name in told:
                raise Refused(_error(told[name]) if name == "execution_error" else "it was interrupted at the server")
        if not completed:
            return None
        begin, end = (_dict(told.get(n)).get("timestamp") for n in ("execution_start", "execution_success"))
        timed = all(type(t) in (int, float) for t in (begin, end)) and 0 <= end - begin < math.inf
        return outputs, (end - begin) / 1000 if timed else None

    def wait(self, job):
        """What `finished` says of a job in the end."""
        begin = time.monotonic()
        while (found := self.finished(job)) is None:
            if time.monotonic() - begin > SILENCE:
                self.drop([job])
                raise Gone(f"{self} has not rendered an image in {SILENCE} s")
            time.sleep(0.2)
        return found

    def forecast(self, graph, node, sampler=None):
        """What our nodes there forecast of a prompt: the `schedule.Forecast` of an interval node's sampler."""
        question = {"prompt": graph, "node": node, "client": self.id} | ({"sampler": sampler} if sampler else {})
        answer = self.client.post(FORECAST_PATH, question)
        if words := _refusal(200, answer[0]):
            raise Refused(words)
        return self.client.read(FORECAST_PATH, answer, lambda told: schedule.read(told, graph))

    def image(self, entry):
        query = {k: str(entry.get(k, "")) for k in ("filename", "subfolder", "type")}
        return self.client.image("/view", **query)

    def listen(self):
        """A context: its WebSocket."""
        return self.client.listen(f"/ws?clientId={self.id}")

    def drop(self, jobs):
        """Take back jobs that nobody waits for any more."""
        with contextlib.suppress(Gone, Refused):
            self.client.post("/queue", {"delete": list(jobs)})
            answer = self.client.get("/queue")
            running = self.client.read("/queue", answer, lambda told: {entry[1] for entry in told["queue_running"]})
            for job in running & set(jobs):
                self.client.post("/interrupt", {"prompt_id": job})


def _is(kind, value):
    """`value`, if it is of that type; raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"it is no {kind.__name__}")
    return value


def _dict(value):
    return value if isinstance(value, dict) else {}


def _error(told):
    """An error while it rendered, as it says it."""
    told = _dict(told)
    return f"{told.get('node_type', 'a node')}: {str(told.get('exception_message', 'it failed')).strip()}"


def _refusal(status, told):
    """An error of the server, as it says it, or None if it is no such answer."""
    error = _dict(told).get("error")
    if not error:
        return None
    errors = [
        f"{node.get('class_type', 'a node')}: {_dict(e).get('details') or _dict(e).get('message')}"
        for node in map(_dict, _dict(told.get("node_errors")).values())
        for e in (node.get("errors") if isinstance(node.get("errors"), list) else [])
    ]
    return "; ".join(errors) or str(_dict(error).get("message") or error)


class Comfy:
    """A backend: a workflow, on the servers at `urls`.

    Raises UserError when one of them does not answer, or lacks what the workflow needs, before anything is rendered.
    """

    host, prompts = "ComfyUI", None

    def __init__(self, path, urls, output=None, limits=None):
        graph = workflow.read(path)
        self.servers = list({str(s): s for s in (Server(url, limits) for url in urls)}.values())
        self.workers = len(self.servers)
        try:
            self.workflow = workflow.Workflow(path, graph, self._types(path, graph), output)
        except BaseException:
            self.close()
            raise
        self.source, self.weight = Path(path).name, self.workflow.weight
        self.identity = {"workflow": _digest(self.workflow)}
        self.shows_emoji = any(n["class_type"] == DEMO_MODEL_NODE for n in graph.values())
        self.schedules = []
        self.sigmas = self._levels()

    def _types(self, path, graph):
        """What the first server knows of its nodes; raises UserError unless all have what the workflow needs."""
        lacking, types = [], None
        for server in self.servers:
            try:
                here = server.object_info()
            except (Gone, Refused) as e:
                raise UserError(f"--server {server}: no ComfyUI there ({e}); start it, or give another address") from e
            if "KSampler" not in here:
                raise UserError(f"--server {server} is not a ComfyUI (unknown node: KSampler); give another address")
            if found := workflow.missing(graph, here):
                lacking.append(f"{server} lacks {', '.join(found)}")
            types = types or here
        if lacking:
            raise UserError(f"workflow {str(path)!r} cannot run: {'; '.join(lacking)}")
        return types

    def _levels(self):
        """The noise levels of all evaluations of an image, or None."""
        try:
            levels = schedule.levels(self.servers[0], self.workflow)
        except (Gone, Refused, schedule.Unsure) as e:
            print(f"note: the schedule cannot be told ({plain(e)}); seconds are the cost", file=sys.stderr)
            return None
        self.schedules = [f"  {self.workflow.named(n)}: {_counted(of)}" for n, of in levels.items()]
        # Of several passes one falling row: what an interval guides of it is then one piece.
        every = sorted((sigma for of in levels.values() for sigma in of), reverse=True)
        return torch.tensor(every) if any(0 < sigma < math.inf for sigma in every) else None

    def render(self, jobs):
        work = _Work(self, jobs)
        threads = {s: threading.Thread(target=work.serve, args=(s,), daemon=True) for s in self.servers if not s.out}
        for thread in threads.values():
            thread.start()
        try:
            for _ in jobs:
                yield work.next()
        finally:
            work.stop.set()
            for server, thread in threads.items():
                if not server.away:
                    thread.join(timeout=5)

    def describe(self):
        return [
            f"workflow: {self.workflow.path}, cfg {self.weight:g}",
            *[f"  {change}" for change in self.workflow.changes],
            *[f"  prompts go to {key} of node {n}" for n, key in self.workflow.texts],
            f"  seeds go to {', '.join(f'{key} of node {n}' for n, key in self.workflow.seeds)}",
            *self.schedules,
            f"servers: {', '.join(map(str, self.servers))}",
        ]

    paste = staticmethod(paste)

    def close(self):
        """The servers go on."""
        for server in self.servers:
            server.client.close()


def _counted(levels):
    """Noise levels in words."""
    told = f"{len(levels)} evaluation{'s' * (len(levels) != 1)}"
    return told + (f", sigma {max(levels):.3g} to {min(levels):.3g}" if levels else "")


def _digest(made):
    """What of a workflow moves its images, beside what is set for each."""
    import hashlib

    graph = made.graph(CONDITIONAL, "", 0)
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
                found = None
            if found is None:  # Or a server is out.
                self._check_servers()
                continue
            if isinstance(found, Exception):
                raise found
            if found[0] not in self.given:
                self.given.add(found[0])
                return found

    def _check_servers(self):
        """Raise UserError when no server is left, or none has answered for a while."""
        if all(s.out for s in self.there):
            told = "; ".join(s.out for s in self.there)
            raise UserError(f"{told}. What is done is kept: fix it and run the command again")
        now = time.monotonic()
        self.alone = (self.alone or now) if all(s.away or s.out for s in self.there) else None
        if self.alone is not None and now - self.alone > ALONE:
            raise UserError(
                f"no server answers any more ({', '.join(map(str, self.there))}); what is done is kept: start one and "
                "run the command again"
            )

    def take(self):
        with self.lock:
            return self.todo.popleft() if self.todo else None

    def serve(self, server):
        """Render jobs on one server until all is to stop, or it is out."""
        while not self.stop.is_set():
            at_work, was_away = {}, server.away
            try:
                if server.away:  # It is asked without a job in its hands: one that hangs would keep it.
                    server.is_there()
                    server.away = was_away = False
                    print(f"{server} is back", file=sys.stderr)
                self._serve(server, at_work)
                return
            except Gone as e:
                self._back(at_work)
                if not was_away and self._failed(server, e):
                    return
                server.away = True
                self.stop.wait(RETRY)
            except Exception as e:  # Refused, or a bug: the whole trial is off.
                self._back(at_work)
                server.drop(at_work)
                self.done.put(e)
                return

    def _failed(self, server, error):
        """Count a failure of a server that had answered; whether it is out now, since it only ever fails."""
        server.failures += 1
        if server.failures >= FAILURES:
            server.out = f"{server} is out for good: it failed {FAILURES} times without an image, at last since {error}"
            print(server.out, file=sys.stderr)
            self.done.put(None)
        else:
            print(f"{server} is skipped for now: {error}", file=sys.stderr)
        return server.out is not None

    def _back(self, at_work):
        with self.lock:
            self.todo.extendleft(at_work.values())

    def _serve(self, server, at_work):
        with contextlib.ExitStack() as stack:
            socket, looked = None, 0.0
            while not self.stop.is_set():
                while len(at_work) < AHEAD and (i := self.take()) is not None:
                    job = self.jobs[i]
                    try:
                        number = server.queue(self.backend.workflow.graph(job.setting, job.prompt, job.seed))
                        if number in at_work:
                            raise Gone(f"{server} gives two jobs the number {number}")
                    except Exception:
                        at_work[f"not queued {i}"] = i
                        raise
                    at_work[number] = i
                if not at_work:
                    self.there[server] = time.monotonic()
                    self.stop.wait(0.2)  # Another server may give its jobs back.
                    continue
                if socket is None:
                    socket = stack.enter_context(server.listen())  # What was done before is seen below.
                elif not self._ended(server, socket, at_work) and time.monotonic() - looked < LOOK:
                    continue
                looked = time.monotonic()
                self._collect(server, at_work)  # Also tells whether it answers.
                if at_work and time.monotonic() - self.there[server] > SILENCE:
                    server.drop(at_work)
                    raise Gone(f"{server} has made no progress for {SILENCE} s")
            server.drop(at_work)

    def _ended(self, server, socket, at_work):
        """Wait for a message; whether it tells of a job's end."""
        from websockets.exceptions import ConnectionClosed

        try:
            message = socket.recv(timeout=LOOK)
        except TimeoutError:
            return False
        except (OSError, ConnectionClosed) as e:
            raise Gone(f"{server} closed its WebSocket ({e})") from e
        if isinstance(message, bytes):  # A preview.
            self.there[server] = time.monotonic()
            return False
        try:
            told = _dict(json.loads(message))
        except (ValueError, RecursionError):  # Not of ComfyUI itself; what is done is asked for all the same.
            return False
        data = _dict(told.get("data"))
        if not isinstance(data.get("prompt_id"), str) or data["prompt_id"] not in at_work:
            return False
        self.there[server] = time.monotonic()
        ended = told.get("type") == "executing" and data.get("node") is None
        return ended or told.get("type") in ("execution_success", "execution_error", "execution_interrupted")

    def _collect(self, server, at_work):
        for number, i in list(at_work.items()):
            found = server.finished(number)
            if found is None:
                continue
            outputs, seconds = found
            shown = _dict(outputs.get(self.backend.workflow.output)).get("images")
            if not isinstance(shown, list) or not shown:
                raise Refused(f"the workflow gave no image at node {self.backend.workflow.output}")
            image = server.image(_dict(shown[0]))
            del at_work[number]
            self.there[server], server.failures = time.monotonic(), 0
            job = self.jobs[i]
            # The first of a server also loads the model.
            seconds = seconds if server.warm else None
            server.warm = True
            self.done.put((i, Rendered(image, job.setting.rows(self.backend.sigmas), seconds)))

"""The server's side of the live picture: a route that says what a prompt's run will be, and an event after the run."""

import asyncio
import logging
import sys

import torch

from . import forecast, weightless
from .prompt_graph import Graph

EVENT = "guidance_interval.run"
PATH = "/guidance_interval/forecast"

log = logging.getLogger(__name__)
_registered = []


def register_route():
    """Add the route to ComfyUI's server, once; without a running server nothing happens."""
    server = _server()
    if server is None or server in _registered:
        return
    from aiohttp import web

    async def answer(request):
        try:
            body = await request.json()
            prompt, node_id = body["prompt"], str(body["node"])
            if not isinstance(prompt, dict):
                raise TypeError("prompt must be an object of nodes")
        except (ValueError, KeyError, TypeError) as error:
            message = f'send {{"prompt": {{node id: node}}, "node": id of an interval node}}: {error!r}'
            return web.json_response({"error": message}, status=400)
        loop = asyncio.get_running_loop()
        return web.json_response(await loop.run_in_executor(None, describe, prompt, node_id))

    server.routes.post(PATH)(answer)
    _registered.append(server)


def describe(prompt, node_id):
    """The chart of the interval node's run, or {"error": what is wrong with the node's own values}."""
    try:
        with torch.inference_mode():
            return forecast.chart(forecast.forecast(prompt, node_id))
    except ValueError as error:
        return {"error": str(error)}
    except Exception as error:  # Of any kind: a picture is not worth a stack trace for each change of a graph.
        log.debug("Guidance Interval: no forecast", exc_info=True)
        return {"error": f"{type(error).__name__}: {error}", "failed": True}


def teller(node, model):
    """A function that tells the page of a run that `node` has limited, or None without a page. model: its input.

    node: the class that executes, with its hidden inputs.
    """
    hidden = getattr(node, "hidden", None)
    node_id, prompt = getattr(hidden, "unique_id", None), getattr(hidden, "prompt", None)
    if node_id is None:
        return None
    if prompt:
        try:
            graph, doubts = Graph(prompt, str(node_id)), []
            path, _ = graph.path(graph.model_link(str(node_id)), doubts)
            if path and not doubts:
                weightless.remember(graph.digest(path[0]), model)
        except Exception:  # Of any kind: what a graph remembers is no reason to stop it.
            log.debug("Guidance Interval: nothing remembered", exc_info=True)

    def tell(report):
        server = _server()
        if getattr(server, "client_id", None) is not None:  # Not to all pages, for a prompt that none has sent.
            server.send_sync(EVENT, {"node": str(node_id), "workflow": _workflow(server), **report}, server.client_id)

    return tell


def _workflow(server):
    """The id of the workflow that is running, or None. A node that is cached was executed for another one, perhaps."""
    try:
        (entry,) = server.prompt_queue.currently_running.values()
        return entry[3]["extra_pnginfo"]["workflow"]["id"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _server():
    module = sys.modules.get("server")  # Not imported: in a running ComfyUI it is there.
    return getattr(getattr(module, "PromptServer", None), "instance", None)

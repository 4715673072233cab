"""What a run tells the page that it was, and what a node remembers of the graph that it ran in."""

import logging
import sys

from . import forecast, weightless
from .prompt_graph import Graph

EVENT = "guidance_interval.run"

log = logging.getLogger(__name__)


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
            links = graph.model_links(str(node_id))
            path, _ = graph.path(links[0] if links else None, doubts)
            if path and not doubts:
                weightless.remember(graph.digest(path[0]), model)
        except Exception:  # Of any kind: what a graph remembers is no reason to stop it.
            log.debug("Guidance Interval: nothing remembered", exc_info=True)

    def tell(report):
        server = running_server()
        if getattr(server, "client_id", None) is not None:  # Not to all pages, for a prompt that none has sent.
            # What is executing is the sampler, in one run or, for tiles and the like, in several.
            place = {"node": str(node_id), "sampler": getattr(server, "last_node_id", None)}
            place["prompt"] = getattr(server, "last_prompt_id", None)
            server.send_sync(EVENT, {**place, "workflow": _workflow(server), **report}, server.client_id)

    return tell


def stages(node):
    """A function that says whether any sampler of the running prompt has steps in an interval, or None if unknown.

    node: the class that executes, with its hidden inputs.
    """
    given = getattr(getattr(node, "hidden", None), "prompt", None)

    def guided():
        try:
            return forecast.guides_a_stage(_running(running_server(), 2) or given)
        except Exception:  # Of any kind: then what is said is of the one run alone.
            log.debug("Guidance Interval: stages unknown", exc_info=True)
            return False

    return guided if given else None


def _workflow(server):
    """The id of the workflow that is running, or None. A node that is cached was executed for another one, perhaps."""
    try:
        return _running(server, 3)["extra_pnginfo"]["workflow"]["id"]
    except (KeyError, TypeError):
        return None


def _running(server, index):
    """A part of the host's entry for the prompt that is running: 2, the prompt; 3, what came with it. Or None."""
    try:
        (entry,) = server.prompt_queue.currently_running.values()
        return entry[index]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def running_server():
    module = sys.modules.get("server")  # Not imported: in a running ComfyUI it is there.
    return getattr(getattr(module, "PromptServer", None), "instance", None)

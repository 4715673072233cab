"""The route by which the page, or the tuner, asks what a prompt's run will be."""

import codecs
import collections
import hashlib
import json
import logging
import os

import torch

from ... import presets
from ...interval_text import FORECAST_PATH as PATH
from . import chart, desk, forecast, weightless
from .events import running_server
from .prompt_graph import TooLong

FORM = (
    'send {"prompt": {node id: node}, "node": id of an interval node}, and, to choose one of its samplers, '
    '"sampler": id'
)
LARGEST = 2**22  # Bytes of a question: prompts without what is heavy have a hundredth of it.
KEEP = 64

log = logging.getLogger(__name__)
_registered = []


def register():
    """Add the route to ComfyUI's server, once; without a running server nothing happens."""
    server = running_server()
    if server is None or server in _registered:
        return
    from aiohttp import web

    questions, answers = desk.Desk(_answer), Answers()

    async def answer(request):
        def refuse(status, why):
            return web.json_response({"error": why, "failed": True}, status=status)

        try:
            client, *question = parse(await _read(request), request.charset)
        except OverflowError as error:
            return refuse(413, str(error))
        except ValueError as error:
            return refuse(400, f"{error}: {FORM}")
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).digest()
        text = answers.get(key)
        if text is None:
            try:
                node_id, prompt, sampler_id = question
                text, stamp = await questions.ask(
                    (client, node_id, sampler_id),
                    key,
                    (prompt, node_id, sampler_id),
                    lambda: request.transport is not None,
                )
            except desk.Replaced:
                return refuse(409, "a newer question of this node has taken the place of this one")
            except desk.Full:
                return refuse(503, "too many forecasts are waiting")
            answers.put(key, text, stamp)
        return web.Response(text=text, content_type="application/json")

    server.routes.post(PATH)(answer)
    _registered.append(server)


async def _read(request):
    data = bytearray()
    async for part in request.content.iter_any():
        data += part
        if len(data) > LARGEST:
            raise OverflowError(f"a question of more than {LARGEST} bytes is not read")
    return bytes(data)


def parse(data, charset=None):
    """(client, node id, prompt, sampler id) of a question; raises ValueError, with what is wrong, for what is none.

    client: which page asks, "" where it does not say. sampler id: None for the first of the interval node's.
    """
    try:
        if charset is not None and codecs.lookup(charset).name not in ("utf-8", "ascii"):
            raise LookupError(charset)
        body = json.loads(data.decode(), parse_constant=_no_number)
        prompt, node_id, client, sampler_id = body["prompt"], body["node"], body.get("client", ""), body.get("sampler")
        json.dumps(prompt)  # What is nested too deep to be handed on.
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except LookupError as error:
        raise ValueError(f"the charset {charset!r:.50} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deep") from error
    except (AttributeError, TypeError) as error:
        raise ValueError("the JSON is no object") from error
    except ValueError as error:
        raise ValueError(f"this is no JSON ({error!s:.200})") from error
    if not isinstance(prompt, dict):
        raise ValueError("prompt is no object of nodes")
    if not isinstance(node_id, str | int) or not isinstance(client, str) or len(client) > 100:
        raise ValueError("node is no id of a node, or client no short text")
    if sampler_id is not None and (not isinstance(sampler_id, str | int) or isinstance(sampler_id, bool)):
        raise ValueError("sampler is no id of a node")
    return client, str(node_id), prompt, None if sampler_id is None else str(sampler_id)


def _no_number(name):
    raise ValueError(f"{name} is no number of JSON")


class Answers:
    """The last answers, each for as long as all that it was made from is the same."""

    def __init__(self):
        self._kept = collections.OrderedDict()

    def get(self, key):
        text, stamp = self._kept.get(key, (None, None))
        if text is None or stamp != _stamp([file[:2] for file in stamp[2]]):
            return None
        self._kept.move_to_end(key)
        return text

    def put(self, key, text, stamp):
        """stamp: None for an answer that is not to be kept."""
        if stamp is not None:
            self._kept[key] = text, stamp
            while len(self._kept) > KEEP:
                self._kept.popitem(last=False)


def _stamp(names):
    """What answers depend on, besides the question: what runs have told, the user's presets, and models' files."""
    try:
        stat = os.stat(presets.my_file())
        mine = stat.st_mtime_ns, stat.st_size
    except (OSError, RuntimeError):  # No file; no home.
        mine = None
    return weightless.changes, mine, [(folder, name, weightless.file_of(folder, name)) for folder, name in names]


def _answer(prompt, node_id, sampler_id):
    """(JSON, what it depends on, or None where it may be another next time)."""
    changes, mine, _ = _stamp([])
    with weightless.looked_up() as files:
        answer = describe(prompt, node_id, sampler_id)
    lasting = not answer.pop("hurried", False) and not answer.get("failed")
    return json.dumps(answer), (changes, mine, files) if lasting else None


def describe(prompt, node_id, sampler_id=None):
    """The chart of the interval node's run, or {"error": what is wrong with the node's own values, or the sampler}."""
    try:
        with torch.inference_mode():
            return chart.chart(forecast.forecast(prompt, node_id, sampler_id))
    except TooLong as error:
        return {"error": str(error), "hurried": True}
    except ValueError as error:
        return {"error": str(error)}
    except Exception as error:  # Of any kind: a picture is not worth a stack trace for each change of a graph.
        log.debug("Guidance Interval: no forecast", exc_info=True)
        return {"error": f"{type(error).__name__}: {error}", "failed": True}

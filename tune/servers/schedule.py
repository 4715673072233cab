"""The noise levels at which the network is evaluated for an image, as our nodes on the server forecast them.

The server knows what start and end steps leave of a schedule, and how often a sampler evaluates. What it has to assume
is not used: then the levels are unknown.
"""

from dataclasses import dataclass

from .backend import everywhere

MOST = 20_000  # Levels of a sampler: as many as the server's forecast traces.
BEYOND = 1e30  # No noise level is as high, short of infinity.

# Notes of a forecast that leave its noise levels as they are (nodes/live/forecast.py and prompt_graph.py write them):
# which of several samplers it is of, and another interval node behind this one; how many rows a guided evaluation has,
# and whether there is guidance at all. Every other one says that the schedule, the sampler or the model is unknown, or
# that something is assumed of it. "model" is settled by a run.
HARMLESS = {"samplers", "replaced", "unknown_guider", "cfg_unknown"}
UNKNOWN_MODEL = "model"


class Unsure(Exception):
    """The server does not know the noise levels of an image."""


@dataclass(frozen=True)
class Forecast:
    """sigmas: the level of each evaluation, or None; samplers: ids; notes: `[(code, value)]`, what is not known."""

    sigmas: list | None
    samplers: list
    notes: list


def read(told, nodes):
    """The Forecast in an answer in JSON, of a prompt of these nodes; raises as `Client.read` expects."""
    sigmas = told["sigmas"]
    if sigmas is not None:
        sigmas = [_level(sigma) for sigma in sigmas]
        if len(sigmas) > MOST:
            raise ValueError(f"more than {MOST} levels")
    samplers = [n for n in dict.fromkeys(told["samplers"]) if n in nodes]
    return Forecast(sigmas, samplers, [(str(code), str(value)) for code, value in told["notes"]])


def _level(sigma):
    if sigma is None:  # JSON has no infinity.
        return float("inf")
    if type(sigma) not in (int, float) or not 0 <= sigma < BEYOND:
        raise ValueError("no noise level")
    return float(sigma)


def levels(server, workflow):
    """`{sampler: noise levels of its evaluations}` of an image; raises Unsure, and Gone and Refused as the server does.

    A model that the server has not loaded before is unknown: then one image is rendered first.
    """
    graph = workflow.graph(everywhere(workflow.weight))
    found = _ask(server, workflow, graph)
    if any(UNKNOWN_MODEL in dict(forecast.notes) for forecast in found.values()):
        server.wait(server.queue(graph))
        found = _ask(server, workflow, graph)
    for n, forecast in found.items():
        _check(server, workflow, n, forecast, HARMLESS)
    return {n: forecast.sigmas for n, forecast in found.items()}


def _ask(server, workflow, graph):
    """`{sampler: Forecast}` of all of the workflow's; raises Unsure where more is unknown than a model."""
    found = {}
    for node in workflow.limits:
        for n in server.forecast(graph, node).samplers:
            if n not in found:
                found[n] = server.forecast(graph, node, n)
                _check(server, workflow, n, found[n], HARMLESS | {UNKNOWN_MODEL})
    if missing := workflow.unforeseen(found):
        raise Unsure(f"{server} does not see how {workflow.named(missing[0])} samples")
    return found


def _check(server, workflow, n, forecast, harmless):
    for code, value in forecast.notes:
        if code not in harmless:
            raise Unsure(f"{server} is not sure of {workflow.named(n)}: {code.replace('_', ' ')} {value}")
    if forecast.sigmas is None:
        raise Unsure(f"{server} tells no levels of {workflow.named(n)}")

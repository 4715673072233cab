"""What a run of a prompt will be: the schedule that its sampler follows, and which evaluations an interval guides.

Nodes of the host that make a schedule or a sampler are executed, on a model without weights; which, is in `pure_nodes`.
What is unknown is assumed and said.
"""

import math
from dataclasses import dataclass, field

import comfy.samplers
import torch

from ...interval_text import GUIDER_NODE, LIMITING_NODES, PERCENT_NODE, PRESET_NODE, STEPS_NODE
from ...noise_level import steps_to_interval
from ...presets import DEFAULT, get_preset
from .. import model_patch
from . import pure_nodes, trace
from .prompt_graph import ASSUMED, SAMPLERS, Graph, Unknown
from .prompt_node import ANY, PLAIN, is_link

ROWS_GUIDED = {"DualCFGGuider": 3, "PerpNegGuider": 3}  # Network rows per image of a guided evaluation; others: 2.
# Guiders for which a weight of 1, of all of these inputs, leaves nothing to guide.
GUIDERS = {
    "CFGGuider": ("cfg",),
    GUIDER_NODE: ("cfg",),
    "DualModelGuider": ("cfg",),
    "LTXVDualCFGGuider": ("video_cfg", "audio_cfg"),
}


@dataclass
class Forecast:
    """What a sampler will do.

    levels: 1-D, the model's own noise levels; the last is where the run ends. evaluated: the level of each evaluation,
    or None where that depends on the image. rows_guided: rows per image of a guided evaluation. nothing: why
    nothing is guided, whatever the interval ("cfg", "guider" or "steps"), or None. counted: the levels whose steps the
    interval counts. node: the interval node's class and inputs. sampler_id: the node that samples, or None; samplers:
    all that sample what the interval node gives. hurried: another time there may be time for more. notes:
    [[code, value]], what is assumed or missing.
    """

    model: object
    levels: torch.Tensor
    evaluated: list | None
    rows_guided: int
    nothing: str | None
    sampler: str
    scheduler: str
    interval: object
    counted: torch.Tensor
    node: dict
    sampler_id: str | None = None
    samplers: list = field(default_factory=list)
    hurried: bool = False
    notes: list = field(default_factory=list)


def forecast(prompt, node_id, sampler_id=None):
    """The Forecast of the interval node `node_id` of `prompt`, by one of its samplers, or else the first.

    ValueError: its own values are wrong, or it is not what that sampler samples.
    """
    graph = Graph(prompt, node_id)
    if node_id not in graph.nodes or graph.type_of(node_id) not in LIMITING_NODES:
        raise ValueError(f"node {node_id!r} of this prompt is no guidance interval")
    notes = []
    samplers = graph.samplers(notes)
    if sampler_id is None:
        sampler_id = next(iter(samplers), None)
        if len(samplers) > 1:
            notes.append(["samplers", f"{graph.type_of(sampler_id)} #{sampler_id}"])
    elif sampler_id not in samplers:
        raise ValueError(f"node {sampler_id!r:.50} samples nothing that node {node_id!r:.50} limits")
    parts, counted, interval = _limited(graph, sampler_id, notes)
    evaluated, hurried = None, False
    try:
        if not pure_nodes.is_host_sampler(parts.sampler):
            raise ValueError("a sampler of a node pack")
        evaluated = trace.evaluations(parts.sampler, parts.levels, parts.model, key=parts.key)
        if evaluated is None:
            notes.append(["adaptive", parts.name])
    except Exception as error:  # Of any kind: one that wants a model of its own kind, or takes too long.
        evaluated = parts.levels[:-1].tolist()
        notes.append(["one_evaluation", parts.name])
        hurried = isinstance(error, trace.TooLong)
    return Forecast(
        model=parts.model,
        levels=parts.levels,
        evaluated=evaluated,
        rows_guided=parts.rows_guided,
        nothing=parts.nothing,
        sampler=parts.name,
        scheduler=parts.scheduler,
        interval=interval,
        counted=counted,
        node=graph.nodes[node_id],
        sampler_id=sampler_id,
        samplers=samplers,
        hurried=hurried,
        notes=[note for i, note in enumerate(notes) if note not in notes[:i]],
    )


def guides_a_stage(prompt):
    """Whether any sampler of `prompt` has steps in the interval of a node before it. What is unknown is assumed."""
    ours = [key for key, node in Graph(prompt).nodes.items() if node["class_type"] in LIMITING_NODES]
    for graph in (Graph(prompt, node_id) for node_id in ours):
        for sampler_id in graph.samplers([]):
            parts, _, interval = _limited(graph, sampler_id, [])
            if parts.nothing is None and interval.mask(parts.levels[:-1]).any():
                return True
    return False


# ----------------------------------------------------------------------------
# What a sampler does.


def _limited(graph, sampler_id, notes):
    """(_Parts of the run, the levels that the interval node counts steps in, its GuidanceInterval)."""
    node_id = graph.toward
    parts = _sampling(graph, sampler_id, notes)
    counted = parts.levels
    if graph.type_of(node_id) == STEPS_NODE and graph.inputs_of(node_id).get("sigmas") is not None:
        given = _levels(graph, graph.inputs_of(node_id)["sigmas"], notes)
        counted = parts.levels if given is None else given
    return parts, counted, _interval(graph, node_id, parts.model, counted, notes)


@dataclass
class _Parts:
    model: object
    levels: torch.Tensor
    sampler: object
    name: str
    scheduler: str
    rows_guided: int
    nothing: str | None
    key: str


def _sampling(graph, sampler_id, notes):
    inputs = {} if sampler_id is None else graph.inputs_of(sampler_id)
    if sampler_id is not None:
        _note_kind(graph, sampler_id, notes)
    model = graph.model(graph.sampled(sampler_id), notes)
    scheduler, levels = ASSUMED["scheduler"], None
    if sampler_id is None:
        sampler, name, key = _by_name(ASSUMED["sampler"])
    elif "sigmas" in inputs or graph.type_of(sampler_id).startswith("SamplerCustom"):
        levels = _levels(graph, inputs.get("sigmas"), notes)
        scheduler = scheduler if levels is None else _scheduler_name(graph, inputs["sigmas"])
        sampler, name, key = _sampler(graph, inputs.get("sampler"), notes)
    else:
        name = graph.value(inputs, "sampler_name", ASSUMED["sampler"], notes, _is_sampler_name, needed=True)
        scheduler = graph.value(
            inputs, "scheduler", ASSUMED["scheduler"], notes, pure_nodes.host_scheduler, needed=True
        )
        levels = _ksampler_levels(graph, model, name, scheduler, inputs, notes)
        sampler, name, key = _by_name(name)
    if levels is None:
        levels = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), ASSUMED["scheduler"], ASSUMED["steps"]
        )
    rows, nothing = _rows_guided(graph, sampler_id, name, notes)
    if len(levels) < 2:
        nothing = "steps"
    return _Parts(model, levels.float().cpu(), sampler, name, scheduler, rows, nothing, f"{key} {_sampling_key(model)}")


def _note_kind(graph, sampler_id, notes):
    """Note that a sampler of another pack is read as if it were the host's, and what of it is not."""
    kind = graph.type_of(sampler_id)
    if kind in SAMPLERS and pure_nodes.host_class(kind, SAMPLERS[kind]) is not None:
        return
    notes.append(["read_as", kind])
    sampled = graph.sampled(sampler_id)
    for name, value in graph.inputs_of(sampler_id).items():
        if is_link(value) and value != sampled and name not in ("sigmas", "guider"):
            taken = graph.input_type(sampler_id, name)
            if taken == "SIGMAS" or (taken is not None and taken not in PLAIN and taken not in ANY):
                notes.append(["also", name])


def _rows_guided(graph, sampler_id, sampler_name, notes):
    """(rows per image of a guided evaluation, why nothing is guided or None)."""
    guider_id = graph.guider_of(sampler_id)
    if sampler_id is None:
        if graph.type_of(graph.toward) != GUIDER_NODE:
            return 2, None
        guider_id = graph.toward
    inputs = graph.inputs_of(guider_id or sampler_id)
    kind = graph.type_of(guider_id) if guider_id else None
    if kind == "BasicGuider":
        return 1, "guider"
    if kind in ROWS_GUIDED:
        return ROWS_GUIDED[kind], None
    known = kind in GUIDERS if guider_id else "guider" not in inputs
    if not known:
        notes.append(["unknown_guider", kind or "?"])
    weights = [_weight(graph, inputs, name, notes) for name in GUIDERS.get(kind, ("cfg",))]
    if any(weight is None or not math.isclose(weight, 1.0) for weight in weights) or "_cfg_pp" in sampler_name:
        return 2, None  # Samplers of CFG++ ask for uncond at any cfg.
    return 1, "cfg"


def _weight(graph, inputs, name, notes):
    try:
        weight = pure_nodes.number(graph.resolve(inputs.get(name)))
        source = f"{name} = {inputs.get(name)!r:.50}" if name in inputs else name
    except Unknown as unknown:
        weight, source = None, str(unknown)
    if weight is None:
        notes.append(["cfg_unknown", source])
    return weight


def _ksampler_levels(graph, model, name, scheduler, inputs, notes):
    steps = graph.value(inputs, "steps", ASSUMED["steps"], notes, "INT", 1, needed=True)
    denoise = graph.value(inputs, "denoise", ASSUMED["denoise"], notes, "FLOAT", 0, 1)
    pure_nodes.check_size(steps, denoise)
    made = comfy.samplers.KSampler(model, steps, torch.device("cpu"), name, scheduler, denoise)
    levels = made.sigmas
    # As KSampler.sample does with them.
    start = graph.value(inputs, "start_at_step", None, notes, "INT", 0)
    end = graph.value(inputs, "end_at_step", None, notes, "INT", 0)
    if end is not None and end < len(levels) - 1:
        levels = levels[: end + 1].clone()
        if graph.value(inputs, "return_with_leftover_noise", "enable", notes, _is_text) == "disable":
            levels[-1] = 0
    if start is not None:
        levels = levels[start:] if start < len(levels) - 1 else levels[:0]
    return levels


def _levels(graph, link, notes):
    """The schedule that a link gives, or None, which is noted."""
    try:
        levels = graph.resolve(link, notes)
    except Unknown as unknown:
        notes.append(["unknown_sigmas", str(unknown)])
        return None
    if isinstance(levels, torch.Tensor) and levels.ndim == 1 and bool((levels.isfinite() & (levels >= 0)).all()):
        if len(levels) > pure_nodes.MOST_STEPS + 1:
            raise ValueError(f"schedules of more than {pure_nodes.MOST_STEPS} steps are not drawn")
        return levels
    notes.append(["unknown_sigmas", _source(graph, link)])
    return None


def _source(graph, link):
    return graph.type_of(str(link[0])) if is_link(link) and str(link[0]) in graph.nodes else "sigmas"


def _scheduler_name(graph, link):
    for key in graph.upstream(str(link[0])):
        name = graph.inputs_of(key).get("scheduler")
        if isinstance(name, str):
            return name
    return _source(graph, graph.origin(link))


def _sampler(graph, link, notes):
    try:
        link = graph.origin(link)
        sampler = graph.resolve(link, notes)
    except Unknown as unknown:
        notes.append(["unknown_sampler", str(unknown)])
        return _by_name(ASSUMED["sampler"])
    if not hasattr(sampler, "sample"):
        notes.append(["unknown_sampler", "sampler"])
        return _by_name(ASSUMED["sampler"])
    key = str(link[0])
    name = graph.value(graph.inputs_of(key), "sampler_name", graph.type_of(key), [], _is_text)
    return sampler, name, graph.digest(key)


def _by_name(name):
    return comfy.samplers.sampler_object(name), name, name


def _is_sampler_name(name):
    try:
        return isinstance(name, str) and name in comfy.samplers.KSampler.SAMPLERS and bool(_by_name(name))
    except AttributeError:  # A name that a pack has put on the list, without a function.
        return False


def _is_text(value):
    return isinstance(value, str)


def _sampling_key(model):
    sampling = model.get_model_object("model_sampling")
    return f"{[cls.__name__ for cls in type(sampling).__mro__]} {float(sampling.sigma_max)} {float(sampling.sigma_min)}"


def _interval(graph, node_id, model, counted, notes):
    """The GuidanceInterval in the model's own noise levels; raises ValueError for bounds that are none."""
    kind, inputs = graph.type_of(node_id), graph.inputs_of(node_id)
    sampling = model.get_model_object("model_sampling")

    def value(name, default, kind="FLOAT"):
        return graph.value(inputs, name, default, notes, kind)

    if kind == PERCENT_NODE:
        start, end = value("start_percent", 0.186), value("end_percent", 0.928)
        if start >= end:
            raise ValueError(f"start_percent must be below end_percent, got {start} and {end}")
        return model_patch.in_percent(start, end)(sampling)
    if kind == STEPS_NODE:
        first, last = value("first_step", 0, "INT"), value("last_step", -1, "INT")
        return model_patch.NOWHERE if len(counted) < 2 else steps_to_interval(counted, first, last)
    if kind == PRESET_NODE:
        preset = get_preset(value("preset", DEFAULT, _is_text))
        return model_patch.in_edm_units(preset.interval())(sampling)
    default = get_preset(DEFAULT).interval()
    interval = model_patch.to_interval(value("sigma_lo", default.sigma_lo), value("sigma_hi", default.sigma_hi))
    own = value("units", "edm", _is_text) == "model"
    return (model_patch.in_model_units if own else model_patch.in_edm_units)(interval)(sampling)

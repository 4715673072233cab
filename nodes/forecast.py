"""What a run of a prompt will be: the schedule that its sampler follows, and which evaluations an interval guides.

A prompt is what the front end sends to be executed: {node id: {"class_type": ..., "inputs": {name: value or link}}},
a link being [node id, output]. Nodes of the host that make a schedule or a sampler are executed, on a model without
weights; those of others are not, and what is unknown is assumed and said.
"""

import bisect
import json
import math
from dataclasses import dataclass, field

import comfy.samplers
import nodes as host_nodes  # ComfyUI's own, which this folder does not hide: imports here are relative.
import torch

from ..noise_level import steps_to_interval
from ..presets import get_preset
from . import model_patch, trace, weightless

ASSUMED = {"sampler": "euler", "scheduler": "normal", "steps": 20, "denoise": 1.0}
MOST_STEPS = 1000
ROWS_GUIDED = {"DualCFGGuider": 3, "PerpNegGuider": 3}  # Network rows per image of a guided evaluation; others: 2.
OURS = ("GuidanceInterval", "GuidanceIntervalPercent", "GuidanceIntervalSteps", "GuidanceIntervalPreset")
GUIDER = "GuidanceIntervalGuider"
LIMITING = (*OURS, GUIDER)
COMPARE = "GuidanceIntervalCompare"


class Unknown(Exception):
    """A value that is known only when the graph runs, or never to us: the node that it comes from."""


@dataclass
class Run:
    """What a sampler will do.

    levels: 1-D, the model's own noise levels; the last is where the run ends. evaluated: the level of each evaluation,
    or None where that depends on the image. rows_guided: network rows per image of a guided evaluation, 1 where there
    is nothing to limit. counted: the levels whose steps the interval counts. notes: [[code, value]], what is assumed or
    missing.
    """

    model: object
    levels: torch.Tensor
    evaluated: list | None
    rows_guided: int
    sampler: str
    scheduler: str
    interval: object
    counted: torch.Tensor
    notes: list = field(default_factory=list)


def forecast(prompt, node_id):
    """The Run that the interval node `node_id` of `prompt` will limit. ValueError: its own values are wrong."""
    graph = Graph(prompt)
    if node_id not in graph.nodes or graph.nodes[node_id]["class_type"] not in LIMITING:
        raise ValueError(f"node {node_id!r} of this prompt is no guidance interval")
    notes = []
    sampler_id = graph.find_sampler(node_id, notes)
    parts = graph.sampling(sampler_id, node_id, notes)
    if len(parts.levels) > MOST_STEPS + 1:
        raise ValueError(f"schedules of more than {MOST_STEPS} steps are not drawn")
    interval = graph.interval(node_id, parts)
    try:
        evaluated = trace.evaluations(parts.sampler, parts.levels, parts.model, key=parts.key)
    except Exception:  # Of any kind: samplers of node packs, or one that wants a model of its own kind.
        evaluated = parts.levels[:-1].tolist()
        notes.append(["one_evaluation", parts.sampler_name])
    if evaluated is None:
        notes.append(["adaptive", parts.sampler_name])
    return Run(
        model=parts.model,
        levels=parts.levels,
        evaluated=evaluated,
        rows_guided=parts.rows_guided,
        sampler=parts.sampler_name,
        scheduler=parts.scheduler,
        interval=interval,
        counted=graph.counted(node_id, parts),
        notes=[note for i, note in enumerate(notes) if note not in notes[:i]],
    )


@dataclass
class _Parts:
    model: object
    levels: torch.Tensor
    sampler: object
    sampler_name: str
    scheduler: str
    rows_guided: int
    key: str


class Graph:
    def __init__(self, prompt):
        self.nodes = {str(key): node for key, node in prompt.items() if isinstance(node, dict) and "class_type" in node}
        self.consumers = {}
        for key, node in self.nodes.items():
            for name, value in node.get("inputs", {}).items():
                if _is_link(value):
                    self.consumers.setdefault(str(value[0]), []).append((key, name, value[1]))

    def type_of(self, node_id):
        return self.nodes[node_id]["class_type"]

    # ------------------------------------------------------------------------
    # Down to the sampler.

    def find_sampler(self, node_id, notes):
        """The id of the sampler that samples what `node_id` gives, or None."""
        found, seen, front = [], {node_id}, [node_id]
        while front:
            for key, name, slot in sorted(self.consumers.get(front.pop(0), ()), key=lambda c: _number(c[0])):
                if key in seen or name == "model_negative":
                    continue
                given = self._carries(key, name, slot)
                if given is None:
                    continue
                seen.add(key)
                kind = self.type_of(key)
                if kind in (*LIMITING, COMPARE):
                    notes.append(["replaced", kind])
                elif self._is_sampler(key):
                    found.append(key)
                else:
                    front.append(key)
        if not found:
            if not any(code == "replaced" for code, _ in notes):
                notes.append(["no_sampler", ASSUMED["steps"]])
            return None
        if len(found) > 1:
            notes.append(["samplers", len(found)])
        return found[0]

    def _carries(self, key, name, slot):
        """Whether a link into input `name` carries a model or a guider."""
        kind = _input_types(self.type_of(key)).get(name)
        if kind is None:  # A node that this server does not have, or an input that grew on it.
            kind = name.upper() if name in ("model", "guider") else None
        return kind if kind in ("MODEL", "GUIDER") else None

    def _is_sampler(self, key):
        inputs = self.nodes[key]["inputs"]
        if "guider" in inputs:
            return "sigmas" in inputs
        return "model" in inputs and (
            ("sigmas" in inputs and "sampler" in inputs) or {"steps", "scheduler", "sampler_name"} <= inputs.keys()
        )

    # ------------------------------------------------------------------------
    # What a sampler does.

    def sampling(self, sampler_id, node_id, notes):
        inputs = {} if sampler_id is None else self.nodes[sampler_id]["inputs"]
        guider_id = None
        if _is_link(inputs.get("guider")):
            guider_id = str(inputs["guider"][0])
        elif sampler_id is None and self.type_of(node_id) == GUIDER:
            guider_id = node_id
        model = self.model(self._model_link(guider_id or sampler_id, node_id), notes)
        cfg = self._value(self.nodes[guider_id]["inputs"] if guider_id else inputs, "cfg", None, [])
        rows = self._rows_guided(guider_id, cfg)
        scheduler = ""
        if "sigmas" in inputs:
            levels = self._sigmas(inputs["sigmas"], notes)
            if levels is None:
                levels, scheduler = self._assumed_levels(model), ASSUMED["scheduler"]
            elif _is_link(inputs["sigmas"]):
                scheduler = self._scheduler_name(inputs["sigmas"])
            sampler, name, key = self._sampler(inputs.get("sampler"), notes)
        elif sampler_id is None:
            levels, scheduler = self._assumed_levels(model), ASSUMED["scheduler"]
            sampler, name, key = _by_name(ASSUMED["sampler"])
        else:
            value = {k: self._value(inputs, k, v, notes) for k, v in ASSUMED.items() if k != "sampler"}
            name = self._value(inputs, "sampler_name", ASSUMED["sampler"], notes)
            if (
                name not in comfy.samplers.KSampler.SAMPLERS
                or value["scheduler"] not in comfy.samplers.KSampler.SCHEDULERS
            ):
                notes.append(["unknown", f"{name}, {value['scheduler']}"])
                name = name if name in comfy.samplers.KSampler.SAMPLERS else ASSUMED["sampler"]
                if value["scheduler"] not in comfy.samplers.KSampler.SCHEDULERS:
                    value["scheduler"] = ASSUMED["scheduler"]
            scheduler = value["scheduler"]
            levels = self._ksampler_levels(model, name, value, inputs, notes)
            sampler, name, key = _by_name(name)
        if rows == 1 and math.isclose(cfg or 0.0, 1.0) and "_cfg_pp" in name:
            rows = 2  # Samplers of CFG++ ask for uncond at any cfg.
        if rows == 1:
            notes.append(["nothing_to_limit", ""])
        return _Parts(model, levels.float().cpu(), sampler, name, scheduler, rows, f"{key} {_sampling_key(model)}")

    def _rows_guided(self, guider_id, cfg):
        kind = self.type_of(guider_id) if guider_id else None
        if kind == "BasicGuider":
            return 1
        if kind in (None, "CFGGuider", GUIDER) and cfg is not None and math.isclose(cfg, 1.0):
            return 1
        return ROWS_GUIDED.get(kind, 2)

    def _ksampler_levels(self, model, name, value, inputs, notes):
        if value["steps"] > MOST_STEPS:
            raise ValueError(f"schedules of more than {MOST_STEPS} steps are not drawn")
        made = comfy.samplers.KSampler(
            model, value["steps"], torch.device("cpu"), name, value["scheduler"], value["denoise"]
        )
        levels = made.sigmas
        # As KSampler.sample does with them.
        start = self._value(inputs, "start_at_step", None, notes)
        end = self._value(inputs, "end_at_step", None, notes)
        if end is not None and end < len(levels) - 1:
            levels = levels[: end + 1].clone()
            if inputs.get("return_with_leftover_noise") == "disable" and len(levels):
                levels[-1] = 0
        if start is not None:
            levels = levels[start:] if start < len(levels) - 1 else levels[:0]
        return levels

    def _assumed_levels(self, model):
        sampling = model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, ASSUMED["scheduler"], ASSUMED["steps"])

    def _sigmas(self, link, notes):
        try:
            levels = self.output(link, notes)
        except Unknown as unknown:
            notes.append(["unknown_sigmas", str(unknown)])
            return None
        return levels if isinstance(levels, torch.Tensor) and levels.ndim == 1 else None

    def _scheduler_name(self, link):
        for key in self._upstream(str(link[0])):
            name = self.nodes[key]["inputs"].get("scheduler")
            if isinstance(name, str):
                return name
        return self.type_of(str(link[0])) if str(link[0]) in self.nodes else ""

    def _upstream(self, key):
        seen, front = [], [key]
        while front:
            key = front.pop(0)
            if key in self.nodes and key not in seen:
                seen.append(key)
                front += [str(v[0]) for v in self.nodes[key]["inputs"].values() if _is_link(v)]
        return seen

    def _sampler(self, link, notes):
        try:
            sampler = self.output(link, notes) if _is_link(link) else None
        except Unknown as unknown:
            notes.append(["unknown_sampler", str(unknown)])
            sampler = None
        if sampler is None or not hasattr(sampler, "sample"):
            return _by_name(ASSUMED["sampler"])
        node = self.nodes[str(link[0])]
        name = node["inputs"].get("sampler_name")
        key = json.dumps([self.nodes[k] for k in self._upstream(str(link[0]))], sort_keys=True, default=str)
        return sampler, name if isinstance(name, str) else node["class_type"], key

    # ------------------------------------------------------------------------
    # Up to the model.

    def _model_link(self, key, node_id):
        """The link to the model that is sampled; without a sampler, what the interval node gives."""
        if key is None:
            return [node_id, 0]
        inputs = self.nodes[key]["inputs"]
        links = [v for k, v in inputs.items() if _is_link(v) and self._carries(key, k, 0) == "MODEL"]
        return inputs["model"] if _is_link(inputs.get("model")) else (links[0] if links else None)

    def model(self, link, notes):
        """A weightless ModelPatcher with the sampling of the model that `link` gives; the assumed one if unknown."""
        path = []
        while _is_link(link) and str(link[0]) in self.nodes and str(link[0]) not in path:
            path.append(str(link[0]))
            link = self._model_link(path[-1], path[-1])
            if link == [path[-1], 0]:
                break
        model, patches = None, []
        for i, key in enumerate(path):
            node = self.nodes[key]
            model = weightless.remembered(self.path_key(path[i:]))
            if model is None and i == len(path) - 1:
                values = {k: self._value(node["inputs"], k, None, []) for k in node["inputs"]}
                model = weightless.loaded_by(node["class_type"], values)
            if model is not None:
                break
            if node["class_type"].startswith("ModelSampling"):
                patches.append(key)
        known = model is not None
        model = model if known else weightless.assumed()
        for key in reversed(patches):
            try:
                model, known = self._execute(key, notes, model=model)[0], True  # Which sets all that is drawn.
            except Unknown as unknown:
                notes.append(["unknown_patch", str(unknown)])
        if not known:
            notes.append(["model", self.type_of(path[-1]) if path else ""])
        return model

    def path_key(self, path):
        """What leads to a model: the nodes of `path`, with their own values."""
        return json.dumps(
            [
                [
                    self.type_of(key),
                    {k: v for k, v in self.nodes[key]["inputs"].items() if isinstance(v, (str, int, float))},
                ]
                for key in path
            ],
            sort_keys=True,
        )

    def model_path(self, node_id):
        """The nodes from the one that gives `node_id` its model to the one that loads it."""
        path, link = [], self._model_link(node_id, node_id)
        while _is_link(link) and str(link[0]) in self.nodes and str(link[0]) not in path:
            path.append(str(link[0]))
            link = self._model_link(path[-1], path[-1])
        return path

    # ------------------------------------------------------------------------
    # Values.

    def _value(self, inputs, name, default, notes):
        """The value of an input, that of the host's node that it is linked to, or `default`."""
        value = inputs.get(name, default)
        if not _is_link(value):
            return default if value is None else value
        try:
            return self.output(value, notes)
        except Unknown:
            if default is not None:
                notes.append(["linked", f"{name} = {default}"])
            return default

    def output(self, link, notes):
        """What a node of the host gives at `link`; raises Unknown for others, and where something is missing."""
        key = str(link[0])
        if key not in self.nodes:
            raise Unknown(key)
        return self._execute(key, notes)[link[1]]

    def _execute(self, key, notes, model=None):
        kind = self.type_of(key)
        cls = host_nodes.NODE_CLASS_MAPPINGS.get(kind)
        module = getattr(cls, "RELATIVE_PYTHON_MODULE", "nodes")
        if cls is None or not (module == "nodes" or module.startswith("comfy_extras.")):
            raise Unknown(kind)
        if not set(_output_types(cls)) <= {"SIGMAS", "SAMPLER", "MODEL", "INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"}:
            raise Unknown(kind)
        types, inputs = _input_types(kind), self.nodes[key]["inputs"]
        required = cls.INPUT_TYPES().get("required", {})
        values = {}
        for name, value in inputs.items():
            if _is_link(value):
                if types.get(name) == "MODEL":
                    value = model if model is not None else self.model(value, notes)
                else:
                    try:
                        value = self.output(value, notes)
                    except Unknown:
                        if name in required:
                            raise
                        notes.append(["linked", name])
                        continue
            values[name] = value
        if isinstance(values.get("steps"), int) and values["steps"] > MOST_STEPS:
            raise ValueError(f"schedules of more than {MOST_STEPS} steps are not drawn")
        try:
            if hasattr(cls, "define_schema"):
                out = cls.execute(**values)
                return tuple(out.args) if hasattr(out, "args") else tuple(out)
            return tuple(getattr(cls(), cls.FUNCTION)(**values))
        except Exception as error:  # Of any kind: its values may be wrong, which its own run will say.
            raise Unknown(kind) from error

    # ------------------------------------------------------------------------
    # The interval.

    def counted(self, node_id, parts):
        """The schedule that an interval node is given, or else the sampler's."""
        link = self.nodes[node_id]["inputs"].get("sigmas")
        sigmas = self._sigmas(link, []) if _is_link(link) else None
        return parts.levels if sigmas is None else sigmas

    def interval(self, node_id, parts):
        """The GuidanceInterval in the model's own noise levels; raises ValueError for bounds that are none."""
        kind, inputs = self.type_of(node_id), self.nodes[node_id]["inputs"]
        sampling = parts.model.get_model_object("model_sampling")

        def value(name, default):
            return self._value(inputs, name, default, [])

        if kind == "GuidanceIntervalPercent":
            start, end = value("start_percent", 0.186), value("end_percent", 0.928)
            if start >= end:
                raise ValueError(f"start_percent must be below end_percent, got {start} and {end}")
            return model_patch.in_percent(start, end)(sampling)
        if kind == "GuidanceIntervalSteps":
            return steps_to_interval(self.counted(node_id, parts), value("first_step", 0), value("last_step", -1))
        if kind == "GuidanceIntervalPreset":
            return model_patch.in_edm_units(get_preset(value("preset", "sdxl")).interval())(sampling)
        interval = model_patch.to_interval(value("sigma_lo", 0.28), value("sigma_hi", 5.42))
        in_units = model_patch.in_model_units if value("units", "edm") == "model" else model_patch.in_edm_units
        return in_units(interval)(sampling)


def _is_link(value):
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and isinstance(value[0], (str, int))
    )


def _number(key):
    return [int(part) if part.isdigit() else 0 for part in key.split(":")]


def _by_name(name):
    return comfy.samplers.sampler_object(name), name, name


def _sampling_key(model):
    sampling = model.get_model_object("model_sampling")
    return f"{[cls.__name__ for cls in type(sampling).__mro__]} {float(sampling.sigma_max)} {float(sampling.sigma_min)}"


def _input_types(class_type):
    cls = host_nodes.NODE_CLASS_MAPPINGS.get(class_type)
    if cls is None:
        return {}
    types = cls.INPUT_TYPES()
    fields = {**types.get("required", {}), **types.get("optional", {})}
    return {name: spec[0] for name, spec in fields.items() if isinstance(spec[0], str)}


def _output_types(cls):
    return [kind if isinstance(kind, str) else "COMBO" for kind in cls.RETURN_TYPES]


# ----------------------------------------------------------------------------
# A picture of it, in coordinates from 0 to 1: the front end draws, and knows nothing of noise.

GRID = 200


def chart(run, node):
    """What the front end draws of a Run, as JSON holds it. node: the interval node's entry in the prompt."""
    sampling = run.model.get_model_object("model_sampling")
    own = run.levels.tolist()
    steps = len(own) - 1
    guided = run.interval.mask(run.levels).tolist()
    levels = [model_patch.from_model_sigma(s, sampling) for s in own]
    axis = _Axis(levels[:-1])
    points = [[i / max(steps, 1), axis(s), g, True] for i, (s, g) in enumerate(zip(levels[:-1], guided, strict=False))]
    result = {
        "steps": steps,
        "guided": sum(guided[:-1]),
        "sampler": run.sampler,
        "scheduler": run.scheduler,
        "notes": run.notes,
        "band": [
            axis(model_patch.from_model_sigma(s, sampling)) for s in (run.interval.sigma_lo, run.interval.sigma_hi)
        ],
        "bounds": [
            _finite(model_patch.from_model_sigma(s, sampling)) for s in (run.interval.sigma_lo, run.interval.sigma_hi)
        ],
        "ticks": axis.ticks(),
        "end": axis(levels[-1]) if steps > 0 else 0,
    }
    if run.evaluated is not None and steps > 0:
        mask = run.interval.mask(torch.tensor(run.evaluated)).tolist()
        rows_everywhere = run.rows_guided * len(mask)
        rows = sum(run.rows_guided if g else 1 for g in mask)
        result |= {
            "evaluations": len(mask),
            "evaluations_guided": sum(mask),
            "rows": rows,
            "rows_everywhere": rows_everywhere,
            "saved": round(100 * (1 - rows / rows_everywhere)),
        }
        places = set(own[:-1])
        falling = sorted(own)
        for s, g in zip(run.evaluated, mask, strict=True):
            if s not in places:
                places.add(s)
                points.append([_between(s, falling, steps), axis(model_patch.from_model_sigma(s, sampling)), g, False])
    result["points"] = points
    result["edges"] = _edges(run, node, axis, sampling)
    return result


def _finite(value):
    return value if math.isfinite(value) else None


def _between(s, rising, steps):
    """Where along a falling schedule a noise level lies, 0 to 1."""
    i = min(max(bisect.bisect_left(rising, s), 1), len(rising) - 1)
    low, high = rising[i - 1], rising[i]
    share = (high - s) / (high - low) if high > low else 0.0
    return min(max((len(rising) - 1 - i + share) / steps, 0.0), 1.0)


class _Axis:
    """Noise levels (data of unit scale) on a logarithmic axis: 0 below all of the schedule, 1 above."""

    def __init__(self, levels):
        finite = sorted(s for s in levels if 0 < s < math.inf) or [0.1, 10.0]
        self.low, self.high = math.log(finite[0] / 1.5), math.log(finite[-1] * 1.5)

    def __call__(self, sigma):
        if sigma <= 0:
            return 0.0
        return min(max((math.log(min(sigma, 1e30)) - self.low) / (self.high - self.low), 0.0), 1.0)

    def sigma(self, y):
        return math.exp(self.low + y * (self.high - self.low))

    def ticks(self):
        """[[y, sigma]]: powers of ten, with 2 and 5 where they are few."""
        for factors in ((1,), (1, 3), (1, 2, 5)):
            values = [f * 10.0**e for e in range(-6, 7) for f in factors]
            ticks = [[self(v), v] for v in values if 0.02 < self(v) < 0.98]
            if len(ticks) >= 3:
                break
        return ticks


def _edges(run, node, axis, sampling):
    """{"lo", "hi": {"widget", "y", "value", "stops": [[y, value]]}}, from the bottom up; None: not to be dragged."""
    kind, inputs = node["class_type"], node["inputs"]
    low, high = (model_patch.from_model_sigma(s, sampling) for s in (run.interval.sigma_lo, run.interval.sigma_hi))

    def edge(widget, y, stops):
        if _is_link(inputs.get(widget)):
            return None
        return {"widget": widget, "y": y, "value": inputs.get(widget), "stops": stops}

    if kind in ("GuidanceInterval", GUIDER):
        flow = inputs.get("units") == "model"

        def typed(y):
            sigma = axis.sigma(y)
            value = model_patch.to_model_sigma(sigma, sampling) if flow else sigma
            return max(round(value, 3), 0.001) if value < 1 else float(f"{value:.3g}")

        inside = [[i / GRID, typed(i / GRID)] for i in range(1, GRID)]
        return {
            "lo": edge("sigma_lo", axis(low), [[0.0, 0.0], *inside]),
            "hi": edge("sigma_hi", axis(high), [*inside, [1.0, model_patch.OPEN]]),
        }
    if kind == "GuidanceIntervalPercent":
        stops = []
        for i in range(GRID, -1, -1):  # From the end of the process, which is the bottom.
            y = axis(model_patch.from_model_sigma(float(sampling.percent_to_sigma(i / GRID)), sampling))
            if stops and y <= stops[-1][0]:
                if y < 1:
                    stops[-1] = [y, i / GRID]
                continue
            stops.append([y, i / GRID])
        lows = [[y, p] if y > 0 else [0.0, 1.0] for y, p in stops]
        highs = [[y, p] if y < 1 else [1.0, 0.0] for y, p in stops]
        return {"lo": edge("end_percent", axis(low), lows), "hi": edge("start_percent", axis(high), highs)}
    if kind == "GuidanceIntervalSteps":
        levels = [axis(model_patch.from_model_sigma(s, sampling)) for s in run.counted.tolist()]
        steps = len(levels) - 1

        def index(i, widget):
            value = inputs.get(widget)
            return i - steps if isinstance(value, int) and value < 0 else i

        return {
            "lo": edge(
                "last_step", axis(low), [[levels[i + 1], index(i, "last_step")] for i in reversed(range(steps))]
            ),
            "hi": edge("first_step", axis(high), [[levels[i], index(i, "first_step")] for i in reversed(range(steps))]),
        }
    return {"lo": None, "hi": None}

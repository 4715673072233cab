"""A prompt as a graph: from an interval node down to its sampler, up to its model, and the values in between.

Nothing is executed but what `pure_nodes` lists, and each node once; what is unknown is noted, as
[code, value], for the picture to say.
"""

import contextlib
import functools
import hashlib
import json
import math
import time

import torch

from ...interval_text import COMPARE_NODE, LIMITING_NODES, PRESET_NODE
from ...presets import get_preset
from . import pure_nodes, weightless
from .prompt_node import HEAVY, NOT_SENT, SWITCHES, declared_types, is_link, is_node, may_carry, read_node

SAMPLERS = {
    "KSampler": "nodes",
    "KSamplerAdvanced": "nodes",
    "SamplerCustom": "nodes_custom_sampler",
    "SamplerCustomAdvanced": "nodes_custom_sampler",
}

ASSUMED = {"sampler": "euler", "scheduler": "normal", "steps": 20, "denoise": 1.0}

MOST_NODES = 5000
MOST_EXECUTED = 300
MOST_SECONDS = 3.0
MOST_DEPTH = 50  # Nodes that wait for each other's values.

# Nodes that hand on one of their inputs: the host's switches, and rgthree's, whose first input that is there counts.
FIRST = ("Any Switch (rgthree)",)
CONTEXTS = ("Context (rgthree)", "Context Big (rgthree)")
CONTEXT_SWITCHES = ("Context Switch (rgthree)", "Context Switch Big (rgthree)")
CONTEXT_MERGES = ("Context Merge (rgthree)", "Context Merge Big (rgthree)")
CONTEXT_FIELDS = (  # By output; the small ones have the first nine.
    *("base_ctx", "model", "clip", "vae", "positive", "negative", "latent", "images", "seed"),
    *("steps", "step_refiner", "cfg", "ckpt_name", "sampler", "scheduler", "clip_width", "clip_height"),
    *("text_pos_g", "text_pos_l", "text_neg_g", "text_neg_l", "mask", "control_net", "denoise"),
)

# Values per token of the latents that a schedule may depend on: the nodes that make them, and the size's divisors.
LATENTS = {
    "EmptyLTXVLatentVideo": (8, 32),
    "LTXVImgToVideo": (8, 32),
    "EmptyLatentImage": (None, 8),
    "EmptySD3LatentImage": (None, 8),
}


class Unknown(Exception):
    """A value that is known only when the graph runs, or never to us: the node that it comes from."""


class TooLong(ValueError):
    def __init__(self):
        super().__init__(f"reading this graph takes more than {MOST_SECONDS:g} seconds: no picture")


class Graph:
    """toward: the interval node in question. A choice that is made only when the graph runs is taken to lead there."""

    def __init__(self, prompt, toward=None):
        self.toward = toward
        if len(prompt) > MOST_NODES:
            raise ValueError(f"graphs of more than {MOST_NODES} nodes are not read")
        self.nodes = {str(key): read_node(node) for key, node in prompt.items() if is_node(node)}
        self.consumers = {}
        for key, node in self.nodes.items():
            for name, value in node["inputs"].items():
                if is_link(value):
                    self.consumers.setdefault(str(value[0]), []).append((key, name, value[1]))
        self._types, self._outputs, self._models, self._digests, self._active = {}, {}, {}, {}, set()
        self._fields = {}
        self._executed, self._end = 0, time.monotonic() + MOST_SECONDS

    def type_of(self, node_id):
        return self.nodes[node_id]["class_type"]

    def inputs_of(self, node_id):
        return self.nodes[node_id]["inputs"]

    # ------------------------------------------------------------------------
    # Types.

    def _declared(self, kind):
        """({input: type}, [type of each output]) of a class of this server, or (None, None)."""
        if kind not in self._types:
            self._types[kind] = declared_types(kind)
        return self._types[kind]

    def input_type(self, key, name):
        """The type of an input, or None where nothing tells."""
        inputs, _ = self._declared(self.type_of(key))
        found = (inputs or {}).get(name)
        return found if found is not None else self.nodes[key]["types"][0].get(name)

    def output_type(self, key, slot):
        outputs = self._declared(self.type_of(key))[1]
        outputs = self.nodes[key]["types"][1] if outputs is None else outputs
        return outputs[slot] if slot < len(outputs) else None

    def _hands_on(self, source, slot, key, name):
        """Whether a link may carry the model or the guider, by itself or among other things."""
        given = self.output_type(source, slot)
        if name == "model_negative" or not may_carry(given):
            return False
        return self._might_take(key, name) or (given is not None and self.input_type(key, name) is None)

    def _might_take(self, key, name):
        """Whether an input may take a model or a guider; where nothing tells its type, its name does."""
        taken = self.input_type(key, name)
        if taken is not None:
            return may_carry(taken)
        return any(word in name.lower() for word in ("model", "guider", "pipe", "ctx", "context", "any"))

    # ------------------------------------------------------------------------
    # Down to the sampler.

    def samplers(self, notes):
        """The ids of the samplers that sample what the interval node gives; notes say why there is none."""
        node_id = self.toward
        found, ends, seen, front = [], [], {node_id}, [node_id]
        replaced = None
        while front:
            source = front.pop(0)
            taken = False
            for key, name, slot in sorted(self.consumers.get(source, ()), key=lambda c: _place(c[0])):
                if source == node_id and slot != 0:  # The preset's weight, and its source.
                    continue
                if not self._hands_on(source, slot, key, name):
                    continue
                taken = True
                if key in seen:
                    continue
                seen.add(key)
                kind = self.type_of(key)
                if kind in (*LIMITING_NODES, COMPARE_NODE):
                    replaced = kind
                    continue
                if self._is_sampler(key):
                    found.append(key)
                front.append(key)
            if not taken and source != node_id and source not in found:
                ends.append(source)
        samples, elsewhere = [], None
        for key in found:
            other = self._takes_another(key, seen)
            samples += [key] * (other is None)
            elsewhere = elsewhere or other
        if replaced:
            notes.append(["replaced", replaced])
        if samples:
            return samples
        blind = [self.type_of(key) for key in ends if not self._gives_a_model(key)]
        if elsewhere:
            notes.append(["switched_off", elsewhere])
        elif blind and not replaced:
            notes.append(["unfollowed", blind[0]])
        elif not replaced:
            notes.append(["no_sampler", ASSUMED["steps"]])
        return []

    def _gives_a_model(self, key):
        """Whether a node has an output for the model, so that a sampler could come after it."""
        outputs = self._declared(self.type_of(key))[1]
        return any(kind is not None and may_carry(kind) for kind in outputs or self.nodes[key]["types"][1])

    def _is_sampler(self, key):
        inputs = self.inputs_of(key)
        if self.type_of(key) in SAMPLERS:  # Whatever of its inputs is not there.
            return True
        if "guider" in inputs:
            return "sigmas" in inputs
        if {"steps", "scheduler", "sampler_name"} <= inputs.keys():
            return True
        return "model" in inputs and "sigmas" in inputs and "sampler" in inputs

    def _takes_another(self, sampler_id, behind):
        """The node that hands a sampler another model than the interval node's, or None. behind: those after it."""
        passed = []
        path, known = self.path(self.sampled(sampler_id), [], passed)
        if not known or self.toward in path or self.toward == self.guider_of(sampler_id):
            return None
        return next((self.type_of(key) for key in reversed(passed) if key in behind), None)

    # ------------------------------------------------------------------------
    # Links, through nodes that hand on what they are given.

    def origin(self, link, notes=None, passed=None):
        """The link, or value, that `link` stands for, through switches and contexts; None: nothing is connected.

        Without notes a choice that is made only when the graph runs raises Unknown. passed: takes the nodes on the way.
        """
        field = None
        for _ in range(MOST_NODES):
            if not is_link(link) or str(link[0]) not in self.nodes:
                return link
            key, slot = str(link[0]), link[1]
            kind, inputs = self.type_of(key), self.inputs_of(key)
            self._hurry()
            if passed is not None:
                passed.append(key)
            if kind in SWITCHES:
                link = self._switched(key, notes)
            elif kind in FIRST:
                link = _first(inputs, "any_")
            elif kind in (*CONTEXTS, *CONTEXT_SWITCHES, *CONTEXT_MERGES):
                field = field or (CONTEXT_FIELDS[slot] if 0 < slot < len(CONTEXT_FIELDS) else None)
                if field is None:
                    return link  # The context as a whole.
                if kind in CONTEXTS:
                    own = inputs.get(field)
                    link, field = (inputs.get("base_ctx"), field) if own is None else (own, None)
                elif kind in CONTEXT_SWITCHES:
                    link = _first(inputs, "ctx_")
                else:
                    link, field = self._merged(inputs, field)
            elif field is not None:
                raise Unknown(kind)  # Another pack's context.
            else:
                return link
        raise Unknown("")

    def _switched(self, key, notes):
        inputs = self.inputs_of(key)
        off, on = inputs.get("on_false"), inputs.get("on_true")
        if self.type_of(key) == "ComfySoftSwitchNode" and (off is None or on is None):
            return on if off is None else off
        try:
            return on if self.resolve(inputs.get("switch")) else off
        except Unknown:
            if notes is None:
                raise
            notes.append(["choice", self.type_of(key)])
            return self._likely([off, on])

    def _likely(self, links):
        """Of links, the first that comes from the interval node, or else the first."""
        links = [link for link in links if is_link(link)]
        return next((link for link in links if str(link[0]) in self._after), (links or [None])[0])

    @functools.cached_property
    def _after(self):
        """The interval node, and all that its outputs lead to."""
        front = {self.toward: None}
        for key in (waiting := [self.toward]):
            new = [k for k, _, _ in self.consumers.get(key, ()) if k not in front]
            front |= dict.fromkeys(new)
            waiting += new
        return front.keys()

    def _merged(self, inputs, field):
        """The last of merged contexts that has the field, as (link, what is left to look up)."""
        for name in sorted((n for n in inputs if n.startswith("ctx_")), reverse=True):
            if is_link(inputs[name]):
                own = self._field(inputs[name], field)
                if own is not None:
                    return own, None
        return None, None

    def _field(self, link, field):
        at = (str(link[0]), field)
        if at not in self._fields:
            with self._deeper(at):
                self._fields[at] = self.origin([link[0], CONTEXT_FIELDS.index(field)])
        return self._fields[at]

    def _hurry(self):
        if time.monotonic() > self._end:
            raise TooLong

    @contextlib.contextmanager
    def _deeper(self, what):
        """While `what` waits for other values; raises Unknown in a circle, and when it gets too deep."""
        if what in self._active or len(self._active) > MOST_DEPTH:
            raise Unknown("")
        self._active.add(what)
        try:
            yield
        finally:
            self._active.discard(what)

    def upstream(self, key):
        """The nodes that lead to one, itself first."""
        seen, front = {}, [key]
        for key in front:
            if key in self.nodes and key not in seen:
                seen[key] = None
                front += [str(v[0]) for v in self.inputs_of(key).values() if is_link(v)]
        return list(seen)

    # ------------------------------------------------------------------------
    # Up to the model.

    def guider_of(self, sampler_id):
        """The node that makes a sampler's guider, or None."""
        link = self.inputs_of(sampler_id).get("guider") if sampler_id else None
        try:
            link = self.origin(link)
        except Unknown:
            return None
        return str(link[0]) if is_link(link) and str(link[0]) in self.nodes else None

    def sampled(self, sampler_id):
        """The link to the model that a sampler samples, or None; without a sampler, what the interval node gives."""
        key = self.guider_of(sampler_id) or sampler_id
        return [self.toward, 0] if key is None else next(iter(self.model_links(key)), None)

    def model_links(self, key):
        """The link by which a node is given its model, or those that may hold it."""
        inputs = self.inputs_of(key)
        if is_link(inputs.get("model")):
            return [inputs["model"]]
        names = sorted(name for name, value in inputs.items() if is_link(value))
        own = [inputs[name] for name in names if self.input_type(key, name) in ("MODEL", "GUIDER")]
        return own[:1] or [inputs[name] for name in names if self._might_take(key, name)]

    def path(self, link, notes, passed=None):
        """([node, ...] from the one that gives a model at `link` to the one that loads it, whether it is known).

        passed: takes these nodes, and the switches between them.
        """
        path, seen = [], set()
        passed = [] if passed is None else passed
        while True:
            try:
                link = self.origin(link, notes, passed)
            except Unknown as unknown:
                notes.append(["choice", str(unknown)])
                return path, False
            key = str(link[0]) if is_link(link) else None
            if key not in self.nodes or key in seen:
                return path, bool(path)
            seen.add(key)
            path.append(key)
            links = self.model_links(key)
            if len(links) > 1:  # Another pack's switch.
                notes.append(["choice", self.type_of(key)])
            link = self._likely(links)

    def model(self, link, notes):
        """A weightless ModelPatcher with the sampling of the model that `link` gives; the assumed one if unknown."""
        at = tuple(map(str, link)) if is_link(link) else None
        if at not in self._models:
            own = []
            with self._deeper(("model", at)):
                self._models[at] = self._model(link, own), own
        model, own = self._models[at]
        notes += own
        return model

    def _model(self, link, notes):
        path, _ = self.path(link, notes)
        model, patches = None, []
        for i, key in enumerate(path):
            kind = self.type_of(key)
            model = weightless.remembered(self.digest(key))
            if model is None and i == len(path) - 1:
                names = {name: self._quietly(self.inputs_of(key), name) for name in weightless.FILES}
                model = weightless.loaded_by(kind, names)
            if model is not None:
                break
            if kind in pure_nodes.PATCHES or kind.startswith("ModelSampling") or kind == "CFGOverride":
                patches.append(key)
        known = model is not None
        model = model if known else weightless.assumed()
        for key in reversed(patches):
            try:
                model, known = self._execute(key, notes, model=model)[0], True  # Which sets all that is drawn.
            except Unknown as unknown:
                notes.append(["without", str(unknown)])
        if not known:
            notes.append(["model", self.type_of(path[-1]) if path else ""])
        return model

    def _quietly(self, inputs, name):
        try:
            return self.resolve(inputs.get(name))
        except Unknown:
            return None

    def digest(self, key):
        """What leads to a node, as the page sends it: a digest of its values and of the nodes before it."""
        waiting = [key]
        while waiting:
            at = waiting[-1]
            links = {} if self._digests.get(at) else self._light(at)
            self._digests.setdefault(at, "")  # While it waits: in a circle it counts for nothing.
            missing = [k for k, _ in links.values() if k in self.nodes and k not in self._digests]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if not self._digests[at]:
                own = {k: v for k, v in self.inputs_of(at).items() if not is_link(v) and k not in NOT_SENT}
                before = {name: [self._digests.get(k), slot] for name, (k, slot) in links.items()}
                text = json.dumps([self.type_of(at), own, before], sort_keys=True)
                self._digests[at] = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        return self._digests[key]

    def _light(self, key):
        """{input: (node, output)} of the links that the page sends."""
        links = {name: value for name, value in self.inputs_of(key).items() if is_link(value) and name not in NOT_SENT}
        outputs = self._declared(self.type_of(key))[1] or self.nodes[key]["types"][1]
        heavy = HEAVY - {"LATENT"} if {"MODEL", "SIGMAS"} & set(outputs) else HEAVY  # Whose size may count.
        return {n: (str(v[0]), v[1]) for n, v in links.items() if self.input_type(key, n) not in heavy}

    # ------------------------------------------------------------------------
    # Values.

    def value(self, inputs, name, default, notes, kind=None, low=-math.inf, high=math.inf, needed=False):
        """An input's value, through its link; `default`, noted, where it is unknown or not what the node takes.

        needed: also where there is none. kind: "INT" or "FLOAT", within the limits, or a function that says whether the
        value will do.
        """
        given = inputs.get(name)
        if given is None:
            if needed:
                notes.append(["linked", f"{name} = {default}"])
            return default
        try:
            value = self.resolve(given)
        except Unknown as unknown:
            if default is None:
                notes.append(["without", f"{name} ({unknown})"])
            else:
                notes.append(["linked", f"{name} = {default} ({unknown})"])
            return default
        if isinstance(kind, str):
            value = pure_nodes.number(value, kind, low, high)
        elif kind is not None and not kind(value):
            notes.append(["unknown", f"{name} = {value!r:.50}"])
            return default
        if value is None:
            notes.append(["unknown", name])
            return default
        return value

    def resolve(self, value, notes=None):
        """What a value, or a link, stands for; raises Unknown for what nodes give that are not executed."""
        value = self.origin(value)
        if not is_link(value):
            return value
        key, slot = str(value[0]), value[1]
        if key not in self.nodes:
            raise Unknown(key)
        out = self._execute(key, [] if notes is None else notes)
        if slot >= len(out):
            raise Unknown(self.type_of(key))
        return out[slot]

    def _execute(self, key, notes, model=None):
        """The outputs of a node, each executed once; raises Unknown for those that are not."""
        kind = self.type_of(key)
        if model is None and key in self._outputs:
            out = self._outputs[key]
        else:
            self._executed += 1
            own = []
            self._hurry()
            try:
                if self._executed > MOST_EXECUTED:
                    raise Unknown(kind)
                with self._deeper(key):
                    out = self._run(key, own, model), own
            except Unknown as unknown:
                out = unknown
            except TooLong:
                raise
            except Exception:  # Of any kind: its values may be wrong, which its own run will say.
                out = Unknown(kind)
            if model is None:
                self._outputs[key] = out
        if isinstance(out, Unknown):
            raise out
        notes += out[1]
        return out[0]

    def _run(self, key, notes, model):
        kind, inputs = self.type_of(key), self.inputs_of(key)
        if kind == pure_nodes.EXPRESSION:
            if pure_nodes.host_class(kind, "nodes_math") is None:
                raise Unknown(kind)
            values = {n.partition(".")[2]: self.resolve(v) for n, v in inputs.items() if n.startswith("values.")}
            return pure_nodes.calculate(self.resolve(inputs.get("expression")), values)
        if kind == PRESET_NODE:  # Its outputs but for the model.
            preset = get_preset(self.resolve(inputs.get("preset")))
            return None, preset.weight, preset.source
        cls = pure_nodes.pure_class(kind)
        if cls is None:
            raise Unknown(kind)
        required = cls.INPUT_TYPES().get("required", {})
        values = {}
        for name, value in inputs.items():
            taken = self.input_type(key, name)
            try:
                if taken == "MODEL":
                    value = model if model is not None else self.model(value, notes)
                elif taken == "LATENT":
                    value = self._latent(value)
                else:
                    value = self.resolve(value, notes)
            except Unknown as unknown:
                if name in required:
                    raise
                notes.append(["without", f"{name} ({unknown})"])
                continue
            values[name] = value
        return pure_nodes.execute(cls, values)

    def _latent(self, link):
        """A latent of the size that a node makes, without values, for nodes that count its tokens."""
        link = self.origin(link)
        kind = self.type_of(str(link[0])) if is_link(link) and str(link[0]) in self.nodes else ""
        if kind not in LATENTS:
            raise Unknown(kind)
        inputs, (in_time, in_space) = self.inputs_of(str(link[0])), LATENTS[kind]
        size = [pure_nodes.number(self.resolve(inputs.get(n)), "INT", 16, 2**14) for n in ("height", "width")]
        length = pure_nodes.number(self.resolve(inputs.get("length")), "INT", 1, 2**14) if in_time else 1
        if None in (*size, length):
            raise Unknown(kind)
        frames = [(length - 1) // in_time + 1] if in_time else []
        return {"samples": torch.empty([1, 1, *frames, *(side // in_space for side in size)], device="meta")}


# ----------------------------------------------------------------------------


def _first(inputs, start):
    names = sorted(name for name in inputs if name.startswith(start))
    return next((inputs[name] for name in names if is_link(inputs[name])), None)


def _place(key):
    return [int(part) if part.isdecimal() and len(part) < 20 else 0 for part in key.split(":")]

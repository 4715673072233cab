"""A ComfyUI workflow in API form: read, and made to render a setting, a prompt and a seed.

What is what in a graph is told by the server's /object_info: the types of inputs and outputs, not the names of nodes,
so that samplers of other packs are found too.
"""

import copy
import json
import math
from pathlib import Path

from PIL import Image

from ..errors import UserError
from .backends import paste_comfyui

PATCHES = {"GuidanceInterval", "GuidanceIntervalPercent", "GuidanceIntervalSteps", "GuidanceIntervalPreset"}
GUIDER, COMPARE = "GuidanceIntervalGuider", "GuidanceIntervalCompare"
PROBE = ("GuidanceIntervalSchedule", "BasicScheduler", "PreviewAny")  # What tells a schedule.
WEIGHTS = ("cfg", "cfg_conds")
SEEDS = ("seed", "noise_seed")
TEXTS = ("text", "prompt", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "subgroup", "string", "value")
HERE = "{prompt}"
EXPORT = "open it in ComfyUI, choose Workflow > Export (API), and give that file"


def read(path):
    """The graph `{id: {"class_type", "inputs"}}` in a .json or .png; raises UserError, naming the file, without one."""
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"workflow {str(path)!r} cannot be read ({e.strerror})") from e
    if content.startswith(b"\x89PNG"):
        content = _from_png(path)
    try:
        graph = json.loads(content)
    except ValueError as e:
        raise UserError(f"workflow {str(path)!r} is neither JSON nor a PNG that ComfyUI saved; {EXPORT}") from e
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict):
        graph = graph["prompt"]
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise UserError(f"workflow {str(path)!r} is in the editor's form, without what the API needs; {EXPORT}")
    nodes = list(graph.values()) if isinstance(graph, dict) else []
    if not nodes or not all(isinstance(n, dict) and "class_type" in n and "inputs" in n for n in nodes):
        raise UserError(f"workflow {str(path)!r} is no workflow of ComfyUI; {EXPORT}")
    return {str(k): {"class_type": n["class_type"], "inputs": dict(n["inputs"])} for k, n in graph.items()}


def _from_png(path):
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"workflow {str(path)!r} is a PNG that cannot be read ({e})") from e
    if "prompt" not in text:
        raise UserError(f"image {str(path)!r} holds no workflow: give one that ComfyUI itself saved, or {EXPORT}")
    return text["prompt"]


def is_link(value):
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))


class Types:
    """What a server's /object_info says of its nodes."""

    def __init__(self, info):
        self.info = info

    def __contains__(self, name):
        return name in self.info

    def inputs(self, name):
        """`{input: type}`; of a choice its type is the list of choices."""
        found = {}
        for kind in ("required", "optional"):
            for key, spec in (self.info.get(name, {}).get("input", {}).get(kind) or {}).items():
                options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
                choices = options.get("options") if spec[0] == "COMBO" else None
                found[key] = choices if choices is not None else spec[0]
        return found

    def outputs(self, name):
        return self.info.get(name, {}).get("output", [])

    def is_output(self, name):
        return bool(self.info.get(name, {}).get("output_node"))


class Workflow:
    """A graph made ready: `graph(setting, prompt, seed)` renders one image on any server that has its nodes.

    types: of the nodes. Raises UserError, naming the file and what is wrong, if it has no sampler with a guidance
    weight, no prompt or seed that can be set, or no image.
    """

    def __init__(self, path, graph, types):
        self.path, self.types, self.nodes = str(path), types, copy.deepcopy(graph)
        self.changes = []
        self.samplers = self._samplers()
        self.output = self._output()
        self.samplers = [n for n in self.samplers if n in self._ancestors(self.output) | {self.output}]
        if not self.samplers:
            self._refuse("has no sampler whose image is saved")
        self.weight = self._weight()
        self._cut()
        self.limits = self._insert()
        self.texts = self._texts()
        self.seeds = [
            (n, key)
            for n, node in self.nodes.items()
            for key in SEEDS
            if key in node["inputs"] and self.types.inputs(node["class_type"]).get(key) == "INT"
        ]
        if not self.seeds:
            self._refuse("has no seed that can be set: no node has an input seed or noise_seed")

    def _refuse(self, what):
        raise UserError(f"workflow {self.path!r} {what}")

    def _named(self, n):
        return f"node {n} ({self.nodes[n]['class_type']})"

    # ------------------------------------------------------------------------
    # What is what.

    def _samplers(self):
        """Nodes that guide: they take a model, have a weight, and give no model."""
        found, without = [], []
        for n, node in self.nodes.items():
            name, inputs = node["class_type"], self.types.inputs(node["class_type"])
            models = [k for k, kind in inputs.items() if kind == "MODEL"]
            if not models or "MODEL" in self.types.outputs(name) or name == COMPARE:
                continue
            if any(k in inputs for k in WEIGHTS):
                found.append(n)
            elif "GUIDER" in self.types.outputs(name):
                without.append(n)
        if not found:
            if without:
                self._refuse(
                    f"has no guidance to limit: {self._named(without[0])} has no cfg. Models that were distilled run "
                    "without an unconditional pass"
                )
            self._refuse("has no sampler: no node takes a model and a cfg")
        return sorted(found, key=_order)

    def _ancestors(self, n):
        found, todo = set(), [n]
        while todo:
            for value in self.nodes[todo.pop()]["inputs"].values():
                if is_link(value) and str(value[0]) in self.nodes and str(value[0]) not in found:
                    found.add(str(value[0]))
                    todo.append(str(value[0]))
        return found

    def _output(self):
        """The node that saves what the samplers made: a SaveImage before a preview before others."""
        found = []
        for n, node in self.nodes.items():
            inputs = self.types.inputs(node["class_type"])
            takes = any(inputs.get(k) == "IMAGE" and is_link(v) for k, v in node["inputs"].items())
            if takes and self.types.is_output(node["class_type"]) and self._ancestors(n) & set(self.samplers):
                rank = {"SaveImage": 0, "PreviewImage": 1}.get(node["class_type"], 2)
                found.append((rank, _order(n), n))
        if not found:
            self._refuse("saves no image that a sampler made: add a Save Image node")
        return min(found)[2]

    def _weight(self):
        """The guidance weight of its samplers; those that have 1 do not guide, and are left alone."""
        found = {}
        for n in self.samplers:
            key = next(k for k in WEIGHTS if k in self.types.inputs(self.nodes[n]["class_type"]))
            value = self._literal(self.nodes[n]["inputs"].get(key))
            if value is None:
                self._refuse(f"has a cfg at {self._named(n)} that another node computes: type a number there")
            found[n] = key, float(value)
        self.samplers = [n for n in self.samplers if found[n][1] > 1]
        self.weight_inputs = [(n, found[n][0]) for n in self.samplers]
        weights = sorted({found[n][1] for n in self.samplers})
        if not weights:
            self._refuse("has no guidance to limit: the cfg of its samplers is 1")
        if len(weights) > 1:
            self._refuse(
                f"has samplers of different cfg ({', '.join(f'{w:g}' for w in weights)}): give all that guide the same"
            )
        return weights[0]

    def _literal(self, value):
        """A number, or the one that a node of constants hands on."""
        if not is_link(value):
            return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        node = self.nodes.get(str(value[0]), {"inputs": {}})
        if node.get("class_type") == "GuidanceIntervalPreset":
            from ..presets import get_preset

            try:
                weight = get_preset(node["inputs"].get("preset")).weight
            except ValueError:
                return None
            return weight or node["inputs"].get("cfg")
        numbers = [v for v in node["inputs"].values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        return numbers[0] if len(numbers) == 1 else None

    def _texts(self):
        """`[(node, input)]` of the prompt: where it says {prompt}, or the one text that the samplers' positive has."""
        marked = [
            (n, k) for n, node in self.nodes.items() for k, v in node["inputs"].items()
            if isinstance(v, str) and HERE in v
        ]  # fmt: skip
        if marked:
            return marked
        found = {}
        for n in self.samplers:
            for name, value in self.nodes[n]["inputs"].items():
                if name in ("positive", "cond1", "conditioning") and is_link(value):
                    found.update(self._texts_above(value))
        if len(found) != 1:
            where = ", ".join(self._named(n) for n in sorted(found, key=_order))
            self._refuse(
                f"has {len(found)} nodes with text for the positive prompt{': ' + where if where else ''}: write "
                f"{HERE} where the prompts are to go"
            )
        (n, keys) = next(iter(found.items()))
        return [(n, k) for k in keys]

    def _texts_above(self, link, seen=()):
        """`{node: [inputs]}` of the texts that a conditioning comes from."""
        n, slot = str(link[0]), link[1]
        if n not in self.nodes or n in seen:
            return {}
        node, kinds = self.nodes[n], self.types.inputs(self.nodes[n]["class_type"])
        own = [k for k in TEXTS if isinstance(node["inputs"].get(k), str)]
        if own:
            return {n: own}
        linked = {k: v for k, v in node["inputs"].items() if is_link(v)}
        by_text = {k: v for k, v in linked.items() if k in TEXTS and kinds.get(k) in ("STRING", "*")}
        if by_text:
            ways = by_text
        elif "positive" in linked and "negative" in linked:
            ways = {"side": linked["negative" if slot == 1 else "positive"]}
        else:
            ways = {k: v for k, v in linked.items() if kinds.get(k) in ("CONDITIONING", "STRING", None)}
        found = {}
        for value in ways.values():
            found |= self._texts_above(value, (*seen, n))
        return found

    # ------------------------------------------------------------------------
    # What is changed.

    def _cut(self):
        """Leave out what does not lead to the image, and the files of an evening in the server's output folder."""
        keep = self._ancestors(self.output) | {self.output}
        for n in [n for n in self.nodes if n not in keep]:
            if self.types.is_output(self.nodes[n]["class_type"]):
                self.changes.append(f"{self._named(n)} is left out")
            del self.nodes[n]
        output = self.nodes[self.output]
        if output["class_type"] == "SaveImage":
            self.changes.append(f"{self._named(self.output)} previews instead of saving")
            self.nodes[self.output] = {"class_type": "PreviewImage", "inputs": {"images": output["inputs"]["images"]}}
        for n, node in self.nodes.items():
            size = node["inputs"].get("batch_size")
            if isinstance(size, int) and size > 1:
                node["inputs"]["batch_size"] = 1
                self.changes.append(f"{self._named(n)} makes one image instead of {size}: each has a seed of its own")

    def _insert(self):
        """The ids of the nodes that hold the interval: new ones before the samplers, or guiders that have it."""
        held, by_model = [], {}
        for n in self.samplers:
            inputs = self.nodes[n]["inputs"]
            if self.nodes[n]["class_type"] == GUIDER:
                self.changes.append(f"{self._named(n)} is given the intervals")
                held.append(n)
                continue
            for key, kind in self.types.inputs(self.nodes[n]["class_type"]).items():
                if kind != "MODEL" or not is_link(inputs.get(key)):
                    continue
                before, source = tuple(inputs[key]), self._without_interval(inputs[key])
                if source not in by_model:
                    by_model[source] = f"guidance-interval-{len(by_model) + 1}"
                inputs[key] = [by_model[source], 0]
                replaced = before != source
                self.changes.append(
                    f"{self._named(n)}: Guidance Interval "
                    + (f"replaces {self._named(str(before[0]))}" if replaced else f"goes before its {key}")
                )
        for source, n in by_model.items():
            self.nodes[n] = {"class_type": "GuidanceInterval", "inputs": {"model": list(source)}}
        return [*by_model.values(), *held]

    def _without_interval(self, link):
        """Where a model comes from, but for the intervals on its way, which are taken off; (node, slot)."""
        n, slot = str(link[0]), link[1]
        node = self.nodes.get(n)
        if node is None:
            return n, slot
        if node["class_type"] in PATCHES:
            return self._without_interval(node["inputs"]["model"])
        for key, kind in self.types.inputs(node["class_type"]).items():
            if kind == "MODEL" and is_link(node["inputs"].get(key)):
                node["inputs"][key] = list(self._without_interval(node["inputs"][key]))
        return n, slot

    # ------------------------------------------------------------------------
    # What is sent.

    def graph(self, setting, prompt, seed):
        """The prompt of the API for one image."""
        nodes = copy.deepcopy(self.nodes)
        limits = paste_comfyui(setting)["inputs"]
        for n in self.limits:
            nodes[n]["inputs"] |= limits
        if not setting.conditional_only:
            for n, key in self.weight_inputs:
                nodes[n]["inputs"][key] = setting.weight
        for n, key in self.texts:
            old = nodes[n]["inputs"][key]
            nodes[n]["inputs"][key] = old.replace(HERE, prompt) if HERE in old else prompt
        for n, key in self.seeds:
            nodes[n]["inputs"][key] = seed
        return nodes

    def probe(self):
        """`(graph, ids)` whose outputs are tables of the schedules that are sampled, or None where it is not known."""
        if not all(name in self.types for name in PROBE):
            return None
        nodes, ids = copy.deepcopy(self.nodes), []
        for i, n in enumerate(self.samplers):
            node = self.nodes[n]
            model = next(v for k, v in node["inputs"].items() if is_link(v)
                         and self.types.inputs(node["class_type"]).get(k) == "MODEL")  # fmt: skip
            sigmas = self._sigmas(n)
            if sigmas is None:
                inputs = {k: node["inputs"].get(k) for k in ("scheduler", "steps")}
                if None in inputs.values():
                    return None
                inputs |= {"model": model, "denoise": node["inputs"].get("denoise", 1.0)}
                nodes[f"probe-{i}-sigmas"] = {"class_type": "BasicScheduler", "inputs": inputs}
                sigmas = [f"probe-{i}-sigmas", 0]
            limit = {"class_type": "GuidanceInterval", "inputs": {"model": model, "sigma_lo": 0.0, "sigma_hi": -1.0}}
            nodes[f"probe-{i}-model"] = limit
            nodes[f"probe-{i}"] = {
                "class_type": "GuidanceIntervalSchedule",
                "inputs": {"model": [f"probe-{i}-model", 0], "sigmas": sigmas},
            }
            ids.append(f"probe-{i}-table")
            nodes[ids[-1]] = {"class_type": "PreviewAny", "inputs": {"source": [f"probe-{i}", 1]}}
        del nodes[self.output]
        for n in self.limits:
            if nodes[n]["class_type"] == "GuidanceInterval":
                nodes[n]["inputs"] |= {"sigma_lo": 0.0, "sigma_hi": -1.0}
        return nodes, ids

    def _sigmas(self, n):
        """The link of the schedule that a sampler, or the sampler of a guider, has as an input, or None."""
        for m in (n, *[m for m in self.nodes if [n, 0] in self.nodes[m]["inputs"].values()]):
            for key, kind in self.types.inputs(self.nodes[m]["class_type"]).items():
                if kind == "SIGMAS" and is_link(self.nodes[m]["inputs"].get(key)):
                    return self.nodes[m]["inputs"][key]
        return None


def schedule_levels(table):
    """The noise levels, in EDM units, of a table of *Guidance Interval Schedule*."""
    rows = [line.split() for line in table.splitlines()]
    return [math.inf if r[1] == "inf" else float(r[1]) for r in rows if len(r) == 4 and r[0].isdigit()]


def missing(graph, types):
    """What a server lacks of a workflow: `[words]`."""
    lacking = sorted({n["class_type"] for n in graph.values()} - set(types.info))
    found = [f"the node {name}" for name in lacking]
    if "GuidanceInterval" not in types:
        found.insert(0, "our node Guidance Interval (clone this repository into its custom_nodes and restart it)")
    for n, node in graph.items():
        kinds = types.inputs(node["class_type"])
        for key, value in node["inputs"].items():
            if isinstance(kinds.get(key), list) and isinstance(value, str) and value not in kinds[key]:
                found.append(f"{value!r} ({key} of {node['class_type']}, node {n})")
    return found


def _order(n):
    return (0, int(n), "") if n.isdigit() else (1, 0, n)

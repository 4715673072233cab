"""A ComfyUI workflow in API form: read, and made to render a setting, a prompt and a seed.

What is what in a graph is told by the server's /object_info: the types of inputs and outputs, not the names of nodes,
so that samplers of other packs are found too.
"""

import copy
import graphlib
import json
import math

from PIL import Image

from ...errors import UserError, plain
from ...files import content_of
from ...interval_text import COMPARE_NODE, GUIDER_NODE, PATCH_NODES, PRESET_NODE, SIGMA_NODE
from ...measure.folder import UNREADABLE, first_line
from .backend import paste_comfyui

WEIGHTS = ("cfg", "cfg_conds")
SEEDS = ("seed", "noise_seed")
TEXTS = ("text", "prompt", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "subgroup", "string", "value")
HERE = "{prompt}"
MOST_CFG = 1000.0
DEEPEST = 100  # Of what lies in each other in a workflow.
EXPORT = "open it in ComfyUI, choose Workflow > Export (API), and give that file"


def read(path):
    """The graph `{id: {"class_type", "inputs"}}` in a .json or .png; raises UserError, naming the file, without one."""
    content = content_of(path, "workflow")
    if content.startswith(b"\x89PNG"):
        content = _from_png(path)
    try:
        graph = json.loads(content, parse_constant=_no_number)
        _check_depth(graph)
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise UserError(f"workflow {str(path)!r} {e}") from e
        raise UserError(f"workflow {str(path)!r} is neither JSON nor a PNG that ComfyUI saved; {EXPORT}") from e
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict):
        graph = graph["prompt"]
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise UserError(f"workflow {str(path)!r} is in the editor's form, without what the API needs; {EXPORT}")
    nodes = list(graph.values()) if isinstance(graph, dict) else []
    if not nodes or not all(isinstance(n, dict) and isinstance(n.get("class_type"), str) for n in nodes):
        raise UserError(f"workflow {str(path)!r} is no workflow of ComfyUI; {EXPORT}")
    for n, node in graph.items():
        if not isinstance(node.get("inputs"), dict):
            told = plain(json.dumps(node.get("inputs")), 40)
            raise UserError(f"workflow {str(path)!r} has {told} for the inputs of {_named(n, node)}; {EXPORT}")
    return {str(k): {"class_type": n["class_type"], "inputs": dict(n["inputs"])} for k, n in graph.items()}


def _no_number(name):
    raise UserError(f"holds {name}, which is no number of JSON: type one in its place in ComfyUI")


def _check_depth(value):
    """Raise UserError where too much lies in each other, for what copies it."""
    level = [value]
    for _ in range(DEEPEST):
        if any(isinstance(x, float) and not math.isfinite(x) for x in level):
            _no_number("a number beyond all bounds")
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise UserError(f"is nested more than {DEEPEST} levels deep, as none of ComfyUI is")


def _from_png(path):
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {})
    except UNREADABLE as e:
        raise UserError(f"workflow {str(path)!r} is a PNG that cannot be read ({plain(first_line(e), 100)})") from e
    if "prompt" not in text:
        raise UserError(f"image {str(path)!r} holds no workflow: give one that ComfyUI itself saved, or {EXPORT}")
    return text["prompt"]


def _named(n, node):
    return plain(f"node {n} ({node['class_type']})", 80)


def is_link(value):
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and isinstance(value[1], int)
    )


class Types:
    """What a server's /object_info says of its nodes. Raises TypeError for what is no such answer."""

    def __init__(self, info):
        if not isinstance(info, dict):
            raise TypeError("it is no dict of nodes")
        self._nodes = {name: _declared(node) for name, node in info.items() if isinstance(node, dict)}

    def __contains__(self, name):
        return name in self._nodes

    def inputs(self, name):
        """`{input: type}`; of a choice its type is the list of choices."""
        return self._nodes.get(name, NOTHING)[0]

    def outputs(self, name):
        return self._nodes.get(name, NOTHING)[1]

    def is_output(self, name):
        return self._nodes.get(name, NOTHING)[2]


NOTHING = {}, [], False


def _declared(node):
    """`({input: type}, [type of an output], whether it is an output node)`; what is made otherwise is left out."""
    inputs, told = {}, node.get("input")
    for kind in ("required", "optional"):
        fields = told.get(kind) if isinstance(told, dict) else None
        for key, spec in (fields if isinstance(fields, dict) else {}).items():
            type_, *options = spec if isinstance(spec, list) and spec else [None]
            if type_ == "COMBO" and options and isinstance(options[0], dict):
                type_ = options[0].get("options", type_)
            inputs[key] = type_ if isinstance(type_, (str, list)) else None
    outputs = node.get("output")
    return inputs, outputs if isinstance(outputs, list) else [], bool(node.get("output_node"))


class Workflow:
    """A graph made ready: `graph(setting, prompt, seed)` renders one image on any server that has its nodes.

    types: of the nodes; output: the node whose image is taken, or None for the last one that is saved. Raises
    UserError, naming the file and what is wrong, if it has no sampler with a guidance weight, no prompt or seed that
    can be set, or no image.
    """

    def __init__(self, path, graph, types, output=None):
        self.path, self.types, self.nodes = str(path), types, copy.deepcopy(graph)
        self.changes = []
        self.samplers = self._samplers()
        self.output = self._output(output)
        self.samplers = [n for n in self.samplers if n in self._ancestors(self.output) | {self.output}]
        if not self.samplers:
            self._refuse("has no sampler whose image is saved")
        self._cut()
        self.weight = self._weight()
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
        raise UserError(f"workflow {self.path!r} {plain(what)}")

    def named(self, n):
        return _named(n, self.nodes[n])

    def _links(self, n, kind):
        """`{input: link}` of a node's inputs of that type."""
        kinds, inputs = self.types.inputs(self.nodes[n]["class_type"]), self.nodes[n]["inputs"]
        return {key: inputs[key] for key in kinds if kinds[key] == kind and is_link(inputs.get(key))}

    def _above(self, n):
        """The nodes that a node's inputs come from."""
        found = (str(value[0]) for value in self.nodes[n]["inputs"].values() if is_link(value))
        return dict.fromkeys(m for m in found if m in self.nodes)

    # ------------------------------------------------------------------------
    # What is what.

    def _samplers(self):
        """Nodes that guide: they take a model, have a weight, and give no model."""
        found, without = [], []
        for n, node in self.nodes.items():
            name, inputs = node["class_type"], self.types.inputs(node["class_type"])
            models = [k for k, kind in inputs.items() if kind == "MODEL"]
            if not models or "MODEL" in self.types.outputs(name) or name == COMPARE_NODE:
                continue
            if any(k in inputs for k in WEIGHTS):
                found.append(n)
            elif "GUIDER" in self.types.outputs(name):
                without.append(n)
        if not found:
            if without:
                self._refuse(
                    f"has no guidance to limit: {self.named(without[0])} has no cfg. Models that were distilled run "
                    "without an unconditional pass"
                )
            self._refuse("has no sampler: no node takes a model and a cfg")
        return sorted(found, key=_order)

    def _ancestors(self, n):
        found, todo = set(), [n]
        while todo:
            new = self._above(todo.pop()).keys() - found
            found |= new
            todo += new
        return found

    def _output(self, chosen):
        """The node that saves what the samplers made: a SaveImage before a preview before others, and the last one."""
        found = {}
        for n, node in self.nodes.items():
            if self.types.is_output(node["class_type"]) and self._links(n, "IMAGE"):
                above = self._ancestors(n)
                if samplers := above & set(self.samplers):
                    rank = {"SaveImage": 0, "PreviewImage": 1}.get(node["class_type"], 2)
                    found[n] = rank, samplers, above
        if not found:
            self._refuse("saves no image that a sampler made: add a Save Image node")
        listed = ", ".join(self.named(n) for n in sorted(found, key=_order))
        if chosen is not None:
            if chosen not in found:
                self._refuse(f"has no image of a sampler at --output-node {chosen}; there is {listed}")
            return chosen
        first = min(rank for rank, *_ in found.values())
        saved = {n: samplers for n, (rank, samplers, _) in found.items() if rank == first}
        last = [n for n in saved if not any(saved[n] < others for others in saved.values())]
        if any(saved[n] != saved[last[0]] for n in last):
            self._refuse(f"saves images of different samplers: name one with --output-node ID, of {listed}")
        best = min(last, key=lambda n: (-len(found[n][2]), _order(n)))  # Whatever else is done to an image comes later.
        if len(found) > 1:
            self.changes.append(f"{self.named(best)} has the image that is judged; --output-node ID names another one")
        return best

    def _in_order(self):
        """The nodes, each after those that it depends on; raises UserError for a circle."""
        try:
            return [*graphlib.TopologicalSorter({n: self._above(n) for n in self.nodes}).static_order()]
        except graphlib.CycleError as e:
            found = e.args[1]
            circle = found if len(found) <= 6 else [*found[:4], "…", found[-1]]
            self._refuse(f"goes in a circle, which ComfyUI does not render: from node {' to '.join(circle)}")

    def _weight(self):
        """The guidance weight of its samplers; those that have 1 do not guide, and are left alone."""
        found = {}
        for n in self.samplers:
            key = next(k for k in WEIGHTS if k in self.types.inputs(self.nodes[n]["class_type"]))
            value = self._literal(self.nodes[n]["inputs"].get(key))
            if value is None:
                self._refuse(f"has a cfg at {self.named(n)} that another node computes: type a number there")
            if not abs(value) <= MOST_CFG:
                self._refuse(f"has a cfg of {_short(value)} at {self.named(n)}: type one up to {MOST_CFG:g} there")
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
        """A number, or the one that a node of constants hands on, or None."""
        if not is_link(value):
            return value if _is_number(value) else None
        node = self.nodes.get(str(value[0]), {"inputs": {}})
        if node.get("class_type") == PRESET_NODE:
            from ...presets import get_preset

            try:
                return get_preset(node["inputs"].get("preset")).weight
            except ValueError:
                return None
        numbers = [v for v in node["inputs"].values() if _is_number(v)]
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
            where = ", ".join(self.named(n) for n in sorted(found, key=_order))
            self._refuse(
                f"has {len(found)} nodes with text for the positive prompt{': ' + where if where else ''}: write "
                f"{HERE} where the prompts are to go"
            )
        (n, keys) = next(iter(found.items()))
        return [(n, k) for k in keys]

    def _texts_above(self, link):
        """`{node: [inputs]}` of the texts that a conditioning comes from."""
        found, seen, todo = {}, set(), [(str(link[0]), link[1])]
        while todo:
            n, slot = todo.pop()
            if n not in self.nodes or (n, slot) in seen:
                continue
            seen.add((n, slot))
            node, kinds = self.nodes[n], self.types.inputs(self.nodes[n]["class_type"])
            if own := [k for k in TEXTS if isinstance(node["inputs"].get(k), str)]:
                found[n] = own
                continue
            linked = {k: v for k, v in node["inputs"].items() if is_link(v)}
            by_text = {k: v for k, v in linked.items() if k in TEXTS and kinds.get(k) in ("STRING", "*")}
            if by_text:
                ways = by_text
            elif "positive" in linked and "negative" in linked:
                ways = {"side": linked["negative" if slot == 1 else "positive"]}
            else:
                ways = {k: v for k, v in linked.items() if kinds.get(k) in ("CONDITIONING", "STRING", None)}
            todo += [(str(m), slot) for m, slot in ways.values()]
        return found

    # ------------------------------------------------------------------------
    # What is changed.

    def _cut(self):
        """Leave out what does not lead to the image, and the files of an evening in the server's output folder."""
        keep = self._ancestors(self.output) | {self.output}
        for n in [n for n in self.nodes if n not in keep]:
            if self.types.is_output(self.nodes[n]["class_type"]):
                self.changes.append(f"{self.named(n)} is left out")
            del self.nodes[n]
        output = self.nodes[self.output]
        if output["class_type"] == "SaveImage":
            self.changes.append(f"{self.named(self.output)} previews instead of saving")
            images = next(iter(self._links(self.output, "IMAGE").values()))
            self.nodes[self.output] = {"class_type": "PreviewImage", "inputs": {"images": images}}
        for n, node in self.nodes.items():
            size = node["inputs"].get("batch_size")
            if isinstance(size, int) and size > 1:
                node["inputs"]["batch_size"] = 1
                self.changes.append(f"{self.named(n)} makes one image instead of {size}: each has a seed of its own")

    def _insert(self):
        """The ids of the nodes that hold the interval: new ones before the samplers, or guiders that have it."""
        before = {n: self._links(n, "MODEL") for n in self.samplers}
        self._take_off()
        held, by_model = [], {}
        for n in self.samplers:
            if not before[n]:
                self._refuse(f"has no model at {self.named(n)}: connect one there")
            if self.nodes[n]["class_type"] == GUIDER_NODE:
                self.changes.append(f"{self.named(n)} is given the intervals")
                held.append(n)
                continue
            for key, (m, slot) in self._links(n, "MODEL").items():
                source = str(m), slot
                if source not in by_model:
                    by_model[source] = f"guidance-interval-{len(by_model) + 1}"
                self.nodes[n]["inputs"][key] = [by_model[source], 0]
                old = str(before[n][key][0])
                replaced = old in self.nodes and self.nodes[old]["class_type"] in PATCH_NODES
                self.changes.append(
                    f"{self.named(n)}: Guidance Interval "
                    + (f"replaces {self.named(old)}" if replaced else f"goes before its {key}")
                )
        for source, n in by_model.items():
            self.nodes[n] = {"class_type": SIGMA_NODE, "inputs": {"model": list(source)}}
        return [*by_model.values(), *held]

    def _take_off(self):
        """Lead every model past the intervals on its way."""
        for n in self._in_order():
            for key, (m, _) in self._links(n, "MODEL").items():
                patch = self.nodes.get(str(m))
                if patch is None or patch["class_type"] not in PATCH_NODES:
                    continue
                if not is_link(patch["inputs"].get("model")):
                    self._refuse(f"has no model at {self.named(str(m))}: connect one there")
                self.nodes[n]["inputs"][key] = patch["inputs"]["model"]  # Which is past those before it.

    # ------------------------------------------------------------------------
    # What is sent.

    def graph(self, setting, prompt=None, seed=None):
        """The prompt of the API for one image; where prompt or seed is None, with what the file has."""
        nodes = copy.deepcopy(self.nodes)
        limits = paste_comfyui(setting)["inputs"]
        for n in self.limits:
            nodes[n]["inputs"] |= limits
        if not setting.conditional_only:
            for n, key in self.weight_inputs:
                nodes[n]["inputs"][key] = setting.weight
        for n, key in self.texts if prompt is not None else ():
            old = nodes[n]["inputs"][key]
            nodes[n]["inputs"][key] = old.replace(HERE, prompt) if HERE in old else prompt
        for n, key in self.seeds if seed is not None else ():
            nodes[n]["inputs"][key] = seed
        return nodes

    def unforeseen(self, known):
        """Of its samplers and guiders those with which none of the `known` nodes samples."""
        guided = {str(link[0]) for n in known for link in self._links(n, "GUIDER").values()}
        return [n for n in self.samplers if n not in guided.union(known)]


def missing(graph, types):
    """What a server lacks of a workflow: `[words]`."""
    lacking = sorted({n["class_type"] for n in graph.values() if n["class_type"] not in types})
    found = [plain(f"the node {name}", 80) for name in lacking]
    if SIGMA_NODE not in types:
        found.insert(0, "our node Guidance Interval (clone this repository into its custom_nodes and restart it)")
    for n, node in graph.items():
        kinds = types.inputs(node["class_type"])
        for key, value in node["inputs"].items():
            if isinstance(kinds.get(key), list) and isinstance(value, str) and value not in kinds[key]:
                found.append(plain(f"{value!r} ({key} of {node['class_type']}, node {n})", 200))
    return found


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(number):
    """A number in few digits, which one of 400 has no float for."""
    text = str(number)
    return text if len(text) <= 24 else f"{text[:8]}… ({len(text)} digits)"


def _order(n):
    return (0, int(n), "") if n.isdigit() else (1, 0, n)

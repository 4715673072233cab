"""One node of a prompt: as the page sends it, and as its class declares it.

A prompt is what the front end sends to be executed: {node id: {"class_type": ..., "inputs": {name: value or link}}},
a link being [node id, output]. The page adds "types", {"inputs": {name: type}, "outputs": [type]}, for nodes that this
server does not have.
"""

import nodes as host_nodes  # ComfyUI's own, which this folder does not hide: imports here are relative.

from . import pure_nodes

# The host's nodes that hand on one of their inputs.
SWITCHES = ("ComfySwitchNode", "ComfySoftSwitchNode")
ANY = ("*", "COMFY_MATCHTYPE_V3")
HEAVY = {  # Types of links that the page does not send.
    *("CONDITIONING", "LATENT", "IMAGE", "MASK", "VAE", "CLIP", "CLIP_VISION", "CLIP_VISION_OUTPUT", "CONTROL_NET"),
    *("STYLE_MODEL", "UPSCALE_MODEL", "AUDIO", "VIDEO"),
}
PLAIN = HEAVY | {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "SIGMAS", "SAMPLER", "NOISE"}
# What is none of these may hold a model among other things, as contexts and pipes do.
NOT_SENT = ("seed", "noise_seed", "control_after_generate")  # By the page.


def is_link(value):
    """Whether an input's value is a link to an output of a node."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    key, slot = value
    return isinstance(key, str | int) and isinstance(slot, int) and not isinstance(slot, bool) and slot >= 0


def is_node(node):
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def read_node(node):
    """A node as it is read here: its class, and of its inputs the links and the values that are short."""

    def short(value):
        if isinstance(value, str):
            return len(value) <= pure_nodes.MOST_TEXT
        return pure_nodes.number(value) is not None

    inputs = {name: value for name, value in node["inputs"].items() if is_link(value) or short(value)}
    types = node.get("types")
    types = types if isinstance(types, dict) else {}
    of, outputs = types.get("inputs"), types.get("outputs")
    of = {name: kind for name, kind in of.items() if isinstance(kind, str)} if isinstance(of, dict) else {}
    outputs = [kind if isinstance(kind, str) else None for kind in outputs] if isinstance(outputs, list) else []
    return {"class_type": node["class_type"], "inputs": inputs, "types": (of, outputs)}


def declared_types(kind):
    cls = host_nodes.NODE_CLASS_MAPPINGS.get(kind)
    if cls is None and kind in SWITCHES:  # This host has none, but their like is known.
        return {"switch": "BOOLEAN", "on_false": "*", "on_true": "*"}, ["*"]
    if cls is None:
        return None, None
    try:
        declared = cls.INPUT_TYPES()
        fields = {**declared.get("required", {}), **declared.get("optional", {})}
        return {name: _plain(spec[0]) for name, spec in fields.items()}, [_plain(of) for of in cls.RETURN_TYPES]
    except Exception:  # Of any kind: a pack's class whose declaration asks for what is not there.
        return None, None


def _plain(kind):
    """A type by its name: packs have classes of text that equal every other."""
    return str.__str__(kind) if isinstance(kind, str) else "COMBO"


def may_carry(kind):
    """Whether a type, such as "MODEL,CLIP", is or may hold a model or a guider; None: it may."""
    return kind is None or any(part not in PLAIN for part in kind.split(","))

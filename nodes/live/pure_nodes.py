"""What a forecast may execute: nodes of the host that only calculate, and its own samplers and schedules.

A graph is opened before anyone has read it, and its forecast is asked for at once. So nothing is executed but what is
listed here: no node that reads or writes a file, loads weights, compiles, or matches an expression. A class counts when
it is the one that the host's own file defines, whoever registered it under that name. Its values must be what the node
declares, as the host would have them, and sizes are bounded.
"""

import ast
import functools
import inspect
import math
import operator
import os
import sys

import comfy.samplers
import nodes as host_nodes  # ComfyUI's own, which this folder does not hide: imports here are relative.
import torch

MOST_STEPS = 1000
MOST_TEXT = 2000  # Characters: as many as the page sends.

_NODES = {
    "nodes_custom_sampler": (
        "BasicScheduler KarrasScheduler ExponentialScheduler PolyexponentialScheduler LaplaceScheduler "
        "SDTurboScheduler BetaSamplingScheduler VPScheduler SplitSigmas SplitSigmasDenoise FlipSigmas SetFirstSigma "
        "ExtendIntermediateSigmas ManualSigmas SamplingPercentToSigma KSamplerSelect SamplerDPMPP_3M_SDE "
        "SamplerDPMPP_2M_SDE SamplerDPMPP_SDE SamplerDPMPP_2S_Ancestral SamplerEulerAncestral "
        "SamplerEulerAncestralCFGPP SamplerLMS SamplerDPMAdaptative SamplerER_SDE SamplerSASolver SamplerSEEDS2"
    ),
    "nodes_advanced_samplers": "SamplerEulerCFGpp SamplerLCM SamplerLCMUpscale",
    "nodes_ar_video": "SamplerARVideo",
    "nodes_void": "VOIDSampler",
    "nodes_align_your_steps": "AlignYourStepsScheduler",
    "nodes_gits": "GITSScheduler",
    "nodes_optimalsteps": "OptimalStepsScheduler",
    "nodes_flux": "Flux2Scheduler",
    "nodes_ideogram4": "Ideogram4Scheduler",
    "nodes_lt": "LTXVScheduler ModelSamplingLTXV",
    "nodes_model_advanced": (
        "ModelSamplingDiscrete ModelSamplingContinuousEDM ModelSamplingContinuousV ModelSamplingStableCascade "
        "ModelSamplingSD3 ModelSamplingAuraFlow ModelSamplingFlux ModelNoiseScale"
    ),
    "nodes_minimax_h3": "MiniMaxH3SigmaShift",
    "nodes_primitive": "PrimitiveInt PrimitiveFloat PrimitiveBoolean PrimitiveString PrimitiveStringMultiline",
    "nodes_number_convert": "ComfyNumberConvert",
    "nodes_resolution": "ResolutionSelector",
    "nodes_logic": "ComfyNotNode ComfyAndNode ComfyOrNode CustomCombo",
}
PURE = {name: file for file, names in _NODES.items() for name in names.split()}
# Of these, the ones that change a model's sampling.
PATCHES = {name for name, file in PURE.items() if file in ("nodes_model_advanced", "nodes_minimax_h3")} | {
    "ModelSamplingLTXV"
}
EXPRESSION = "ComfyMathExpression"  # Calculated here: the host's powers have no bound.
_HOST = os.path.dirname(os.path.realpath(host_nodes.__file__))


def host_class(class_type, file):
    """The class registered under that name if the host's comfy_extras/`file`.py, or nodes.py, defines it, else None."""
    cls = host_nodes.NODE_CLASS_MAPPINGS.get(class_type)
    module = sys.modules.get(getattr(cls, "__module__", None))
    own = os.path.join(_HOST, "nodes.py" if file == "nodes" else os.path.join("comfy_extras", f"{file}.py"))
    if cls is None or vars(module or os).get(cls.__name__) is not cls:
        return None
    return cls if _same(getattr(module, "__file__", None), own) else None


def pure_class(class_type):
    """The class of a node that may be executed, or None."""
    return host_class(class_type, PURE[class_type]) if class_type in PURE else None


def execute(cls, values):
    """The outputs of the node for `values`, {input: value}; raises ValueError for values that the host would refuse."""
    declared = cls.INPUT_TYPES()
    fields = {**declared.get("required", {}), **declared.get("optional", {})}
    given = {}
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        if outer not in fields:
            continue  # The host leaves it out too.
        if inner:  # One of a number of inputs that grow.
            given.setdefault(outer, {})[inner] = _checked(name, value, "*", {})
        else:
            kind, *options = fields[name]
            given[name] = _checked(name, value, kind, options[0] if options else {})
    check_size(given.get("steps", 1), given.get("denoise", 1.0))
    if hasattr(cls, "define_schema"):
        out = cls.execute(**given)
        return tuple(out.args) if hasattr(out, "args") else tuple(out)
    return tuple(getattr(cls(), cls.FUNCTION)(**given))


def check_size(steps, denoise):
    """Raise ValueError for a schedule that is not drawn: the host makes the whole of which `denoise` is a part."""
    if steps > MOST_STEPS or steps > 100 * MOST_STEPS * denoise > 0:
        raise ValueError(f"schedules of more than {MOST_STEPS} steps are not drawn")


def _checked(name, value, kind, options):
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices is not None:
        if value not in choices:
            raise ValueError(f"{name} is none of its choices: {value!r:.100}")
    elif kind in ("INT", "FLOAT"):
        value = number(value, kind, options.get("min", -(2**63)), options.get("max", 2**63))
        if value is None:
            raise ValueError(f"{name} is out of range")
    elif kind == "BOOLEAN":
        value = bool(value)
    elif kind == "SIGMAS":
        if not isinstance(value, torch.Tensor) or value.ndim != 1 or len(value) > MOST_STEPS + 1:
            raise ValueError(f"{name} is no schedule of up to {MOST_STEPS} steps")
    elif isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"{name} is longer than {MOST_TEXT} characters")
    elif isinstance(value, float | int) and number(value, "FLOAT") is None:
        raise ValueError(f"{name} is out of range")
    return value


def number(value, kind="FLOAT", low=-math.inf, high=math.inf):
    """`value` as a finite number within the limits, of the kind "INT" or "FLOAT", or None."""
    if not isinstance(value, int | float) or not abs(value) < 1e300:  # NaN fails too.
        return None
    value = int(value) if kind == "INT" else float(value)
    return value if low <= value <= high else None


# ----------------------------------------------------------------------------
# Samplers and schedules by name: node packs add theirs to the host's lists.


def host_sampler(name):
    """Whether the host has a sampler of that name, of its own code."""
    try:
        return name in comfy.samplers.KSampler.SAMPLERS and is_host_sampler(comfy.samplers.sampler_object(name))
    except Exception:  # Of any kind: lists of names that a pack has changed.
        return False


def is_host_sampler(sampler):
    """Whether a SAMPLER runs the host's own code."""
    if type(sampler) is comfy.samplers.KSAMPLER:
        return _of_host(sampler.sampler_function)
    return _of_host(getattr(type(sampler), "sample", None))


def host_scheduler(name):
    """Whether the host has a scheduler of that name, of its own code."""
    handler = comfy.samplers.SCHEDULER_HANDLERS.get(name) if isinstance(name, str) else None
    return handler is not None and _of_host(handler.handler)


def _of_host(fn):
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(inspect.unwrap(fn), "__code__", None) if callable(fn) else None
    path = os.path.realpath(code.co_filename) if code else ""
    return any(path.startswith(os.path.join(_HOST, folder, "")) for folder in ("comfy", "comfy_extras"))


def _same(path, other):
    return path is not None and os.path.normcase(os.path.realpath(path)) == os.path.normcase(other)


# ----------------------------------------------------------------------------
# Arithmetic.

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS = {"min": min, "max": max, "abs": abs, "round": round, "int": int, "float": float} | {
    name: getattr(math, name) for name in ("sqrt", "ceil", "floor", "log", "log2", "log10", "sin", "cos", "tan")
}
_LARGEST = 2**53  # Up to here whole numbers and floats are the same.
_DIGITS = 17  # Rounded to as many before the point, numbers up to there are 0.


def calculate(expression, values):
    """(float, int, bool) of the host's Math Expression over named numbers; raises ValueError for what is not read here.

    Read are numbers, names, + - * / // % **, comparisons, and, or, not, if and else, and the host's functions but sums
    over lists.
    """
    if not isinstance(expression, str) or len(expression) > 500:
        raise ValueError("no expression, or a long one")
    try:
        result = _calculate(ast.parse(expression.strip(), mode="eval").body, values)
    except (SyntaxError, RecursionError, MemoryError, ArithmeticError, TypeError) as error:
        raise ValueError(str(error)) from error
    return float(result), int(result), bool(result)


def _calculate(tree, values):
    def of(node):
        return _calculate(node, values)

    match tree:
        case ast.Constant(value=value):
            pass
        case ast.Name(id=name) if name in values:
            value = values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -of(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = of(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = not of(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = of(left), of(right)
            value = base**exponent if abs(exponent) <= 64 else float(base) ** exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](of(left), of(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            value = _COMPARE[type(op)](of(left), of(right))
        case ast.BoolOp(op=op, values=parts):
            for part in parts:
                value = of(part)
                if bool(value) == isinstance(op, ast.Or):
                    break
        case ast.IfExp(test=test, body=body, orelse=orelse):
            value = of(body if of(test) else orelse)
        case ast.Call(func=ast.Name(id="pow"), args=[base, exponent], keywords=[]):
            value = of(ast.BinOp(base, ast.Pow(), exponent))
        case ast.Call(func=ast.Name(id="sum"), args=parts, keywords=[]) if len(parts) > 1:
            value = sum(of(part) for part in parts)
        case ast.Call(func=ast.Name(id="round"), args=[number, digits], keywords=[]):
            value = round(of(number), max(of(digits), -_DIGITS))  # Python raises 10 to the power of their number.
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS and len(parts) < 9:
            value = _FUNCTIONS[name](*(of(part) for part in parts))
        case _:
            raise ValueError(f"{type(tree).__name__} is not read here")
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{type(tree).__name__} is no number up to 2^53")
    return value

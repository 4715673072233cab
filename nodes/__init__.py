"""ComfyUI's nodes: declarations alone. The patch is in model_patch.py, the second model's guider in guider.py."""

import functools
import reprlib

import comfy.samplers
from comfy_api.latest import ComfyExtension, io

from ..errors import UserError
from ..interval_text import CONDITIONAL_ONLY, LARGEST
from ..noise_level import steps_to_interval
from ..presets import all_presets, get_preset
from . import demo, live, model_patch
from .comparison import compare, parse_intervals, report
from .guider import TwoModelGuider
from .model_patch import OPEN, to_interval
from .schedule import describe_schedule

ALIASES = ["guidance interval", "guidance limiter", "cfg limiter", "limited interval", "skip uncond"]
SIGMA_TIP = (
    "Noise relative to the image, as k-diffusion and EDM count it; the same numbers mean the same for every model."
)


def _schema(**kwargs):
    if "search_aliases" in io.Schema.__dataclass_fields__:  # Newer hosts.
        kwargs["search_aliases"] = ALIASES
    return io.Schema(category="sampling/guidance interval", **kwargs)


LIVE = [io.Hidden.unique_id, io.Hidden.prompt]  # By which the page is told of a run.


def _advanced(node_input):
    node_input.extra_dict["advanced"] = True  # Older hosts have no parameter for it.
    return node_input


def _model(tooltip="The model to limit. Other patches may come before or after this node."):
    return io.Model.Input("model", tooltip=tooltip)


def _patched_model():
    return io.Model.Output(display_name="model", tooltip="The model, guided inside the interval alone.")


def _sigma(name, default, tip):
    # The front end keeps as many decimals of what is typed as the step has.
    tip = f"{tip} {SIGMA_TIP}"
    return io.Float.Input(name, default=default, min=OPEN, max=LARGEST, step=0.001, round=False, tooltip=tip)


def _sigma_lo():
    tip = "Guidance ends at this noise level: the last, low-noise steps run without it. 0 or -1: no lower bound."
    return _sigma("sigma_lo", 0.28, tip)


def _sigma_hi():
    tip = "Guidance begins at this noise level: the first, noisiest steps run without it. -1: no upper bound."
    return _sigma("sigma_hi", 5.42, tip)


def _units():
    return _advanced(
        io.Combo.Input(
            "units",
            options=["edm", "model"],
            default="edm",
            optional=True,
            tooltip="edm: noise relative to the image, the same for every model. model: the model's own sigma, which "
            "for flow models (SD3, Flux, Wan, ...) is a time from 0 to 1.",
        )
    )


def _outside():
    return _advanced(
        io.Combo.Input(
            "outside",
            options=list(model_patch.OUTSIDE),
            default=CONDITIONAL_ONLY,
            optional=True,
            tooltip="conditional only: outside the interval nothing but the positive prompt's prediction counts, and "
            "other guidance (PAG, SLG, APG, ...) is limited too. keep other patches: they go on outside, with CFG off.",
        )
    )


def _limited(node, model, sigma_lo, sigma_hi, units, outside):
    in_units = model_patch.in_edm_units if units == "edm" else model_patch.in_model_units
    return _patched(node, model, in_units(to_interval(sigma_lo, sigma_hi)), outside)


def _patched(node, model, resolve, outside=CONDITIONAL_ONLY):
    return model_patch.patch_model(model, resolve, outside, live.teller(node, model), live.stages(node))


CFG_TIP = "Guidance weight inside the interval; the best one is usually higher than without."


def _cfg(default=8.0, tooltip=CFG_TIP, optional=False):
    options = {"default": default, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
    return io.Float.Input("cfg", **options, optional=optional, tooltip=tooltip)


def _check(node, rule, **values):
    """True, or what is wrong with the values, for `validate_inputs`; a linked input is None until it runs.

    The host leaves the limits of inputs that `validate_inputs` names to it, and hands on what it could not convert.
    rule(*values) raises what else is wrong.
    """
    inputs = {i.id: i for i in node.define_schema().inputs}
    for name, value in values.items():
        low, high = getattr(inputs[name], "min", None), getattr(inputs[name], "max", None)
        if value is None or low is None:
            continue
        if not isinstance(value, (int, float)):
            return _Told(f"{name} must be a number, got {reprlib.repr(value)}")
        if not low <= value <= high:  # NaN fails too.
            return _Told(f"{name} must lie between {low:.7g} and {high:.7g}, got {reprlib.repr(value)}")
    if None in values.values():
        return True
    try:
        rule(*values.values())
    except (TypeError, ValueError) as error:
        return _Told(error)
    return True


class _Told(str):
    """What is wrong, told in full once: the host asks for it again for each input that was checked with the first."""

    asked = False

    def __str__(self):
        text, self.asked = "as told above" if self.asked else super().__str__(), True
        return text


def _refuse(verdict):
    """Raise what a `validate_inputs` found, for inputs that are linked and so known only when the node runs."""
    if verdict is not True:
        raise ValueError(str(verdict))


class SigmaInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceInterval",
            display_name="Guidance Interval",
            description="Applies CFG where sigma_lo < sigma <= sigma_hi and nowhere else. Outside, the unconditional "
            "pass is not evaluated: those steps cost half.",
            inputs=[_model(), _sigma_lo(), _sigma_hi(), _units(), _outside()],
            outputs=[_patched_model()],
            hidden=LIVE,
        )

    @classmethod
    def validate_inputs(cls, sigma_lo=None, sigma_hi=None):
        return _check(cls, to_interval, sigma_lo=sigma_lo, sigma_hi=sigma_hi)

    @classmethod
    def execute(cls, model, sigma_lo, sigma_hi, units="edm", outside=CONDITIONAL_ONLY):
        _refuse(cls.validate_inputs(sigma_lo, sigma_hi))
        return io.NodeOutput(_limited(cls, model, sigma_lo, sigma_hi, units, outside))


class PercentInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalPercent",
            display_name="Guidance Interval (percent)",
            description="The interval as a part of the sampling process, as in other nodes of ComfyUI. The same "
            "percent is another noise level for another model or shift; sigma is not.",
            inputs=[
                _model(),
                io.Float.Input(
                    "start_percent",
                    default=0.186,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Guidance begins here: 0 is the first step, pure noise. 0.186 is sigma 5.42 for SD1.5 "
                    "and SDXL.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.928,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Guidance ends here: 1 is the last step. 0.928 is sigma 0.28 for SD1.5 and SDXL.",
                ),
            ],
            outputs=[_patched_model()],
            hidden=LIVE,
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None):
        def rule(start, end):
            if start >= end:
                raise ValueError(f"start_percent must be below end_percent, got {start} and {end}")

        return _check(cls, rule, start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(cls, model, start_percent, end_percent):
        _refuse(cls.validate_inputs(start_percent, end_percent))
        return io.NodeOutput(_patched(cls, model, model_patch.in_percent(start_percent, end_percent)))


class StepsInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalSteps",
            display_name="Guidance Interval (steps)",
            description="The interval as the first and the last guided step of a schedule, as the paper's authors "
            "give it. Samplers that evaluate between the steps are judged by the noise level there.",
            inputs=[
                _model(),
                io.Sigmas.Input("sigmas", tooltip="The schedule that the steps are counted in."),
                io.Int.Input(
                    "first_step",
                    default=0,
                    min=-10000,
                    max=10000,
                    tooltip="The first guided step, counted from 0; negative counts from the end.",
                ),
                io.Int.Input(
                    "last_step",
                    default=-1,
                    min=-10000,
                    max=10000,
                    tooltip="The last guided step, itself guided; negative counts from the end, so -1 is the last.",
                ),
            ],
            outputs=[_patched_model()],
            hidden=LIVE,
        )

    @classmethod
    def validate_inputs(cls, first_step=None, last_step=None):
        def rule(first, last):
            if (first < 0) == (last < 0) and first > last:
                raise ValueError(f"first_step must not come after last_step, got {first} and {last}")

        return _check(cls, rule, first_step=first_step, last_step=last_step)

    @classmethod
    def execute(cls, model, sigmas, first_step, last_step):
        interval = steps_to_interval(sigmas, first_step, last_step)
        return io.NodeOutput(_patched(cls, model, model_patch.in_model_units(interval)))


class PresetInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalPreset",
            display_name="Guidance Interval (preset)",
            description="An interval that was published for a model, with its guidance weight and its source.",
            inputs=[
                _model(),
                io.Combo.Input(
                    "preset",
                    options=list(all_presets()),
                    tooltip="Each was published for one model, with a weight for its interval alone: at every step it "
                    "would be too much. The weight of sdxl was chosen by visual inspection, those of edm2 by a metric. "
                    "After them come those that `guidance-interval tune --save` measured for you.",
                ),
                _advanced(_cfg(7.0, "Handed on as cfg where the source names no weight for the interval.", True)),
            ],
            outputs=[
                _patched_model(),
                io.Float.Output(display_name="cfg", tooltip="The published guidance weight, for the sampler's cfg."),
                io.String.Output(display_name="source", tooltip="Where the interval was published."),
            ],
            hidden=LIVE,
        )

    @classmethod
    def validate_inputs(cls, preset=None):
        return _check(cls, get_preset, preset=preset)  # For one of the user's own that is gone, why it is.

    @classmethod
    def execute(cls, model, preset, cfg=7.0):
        preset = get_preset(preset)
        model = _patched(cls, model, model_patch.in_edm_units(preset.interval()))
        return io.NodeOutput(model, cfg if preset.weight is None else preset.weight, preset.source)


class IntervalGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalGuider",
            display_name="Guidance Interval Guider",
            description="CFG in an interval, as a guider for SamplerCustomAdvanced. With model_negative, guidance "
            "leads away from that weaker model (autoguidance).",
            inputs=[
                _model("The model to sample with."),
                io.Conditioning.Input("positive", tooltip="What the image is to show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What guidance leads away from. For autoguidance connect the positive prompt here too.",
                ),
                _cfg(),
                _sigma_lo(),
                _sigma_hi(),
                io.Model.Input(
                    "model_negative",
                    optional=True,
                    tooltip="A weaker model that evaluates the negative, with its own patches: an earlier or smaller "
                    "checkpoint of the same family, or the same one with or without a LoRA, which is copied in "
                    "memory. It is not run outside the interval.",
                ),
                _units(),
                _outside(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=LIVE,
        )

    @classmethod
    def validate_inputs(cls, sigma_lo=None, sigma_hi=None):
        return _check(cls, to_interval, sigma_lo=sigma_lo, sigma_hi=sigma_hi)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        cfg,
        sigma_lo,
        sigma_hi,
        model_negative=None,
        units="edm",
        outside=CONDITIONAL_ONLY,
    ):
        _refuse(cls.validate_inputs(sigma_lo, sigma_hi))
        model = _limited(cls, model, sigma_lo, sigma_hi, units, outside)
        if model_negative is None:
            guider = comfy.samplers.CFGGuider(model)
        else:
            guider = TwoModelGuider(model, model_patch.unpatch_model(model_negative))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class IntervalSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalSchedule",
            display_name="Guidance Interval Schedule",
            description="Shows which steps of a schedule an interval guides, before anything is sampled.",
            inputs=[
                _model("A model with a guidance interval."),
                io.Sigmas.Input("sigmas", tooltip="The schedule that is to be sampled, from a scheduler node."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Noise level by step; guided steps are filled."),
                io.String.Output(display_name="table", tooltip="The same as text, one step per line."),
                io.Int.Output(display_name="guided_steps", tooltip="How many steps are guided."),
                io.Float.Output(
                    display_name="rows",
                    tooltip="Rows that the network evaluates, as a share of CFG at every step: 1 = no saving, 0.5 = "
                    "no guidance.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, sigmas):
        return io.NodeOutput(*describe_schedule(model, sigmas))


class IntervalComparison(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalCompare",
            display_name="Guidance Interval Compare",
            description="Samples one seed with CFG everywhere, in each interval of a list, and with no guidance, and "
            "lays the images side by side with what each cost.",
            inputs=[
                _model("The model to sample with; an interval that it has is left out."),
                io.Conditioning.Input("positive", tooltip="What the image is to show."),
                io.Conditioning.Input("negative", tooltip="What guidance leads away from."),
                io.Vae.Input("vae", tooltip="Decodes the results."),
                io.Latent.Input("latent", tooltip="Where sampling starts; a batch gives one row of the grid each."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise, the same for every setting.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of each run."),
                _cfg(tooltip="Guidance weight inside the interval, the same for every setting."),
                io.Combo.Input("sampler", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Below 1 the latent is kept in part."
                ),
                io.String.Input(
                    "intervals",
                    multiline=True,
                    default="0.28, 5.42\n0.28, 2.5\n1, 5.42",
                    tooltip="One interval per line: sigma_lo, sigma_hi. inf or -1 as sigma_hi: no upper bound. What "
                    "follows # is a comment.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="One column per setting; of a video, 4 frames."),
                io.Image.Output(display_name="images", tooltip="The grid's images as a batch, setting by setting."),
                io.String.Output(display_name="report", tooltip="Rows and seconds as a table."),
            ],
        )

    @classmethod
    def validate_inputs(cls, intervals=None):
        return _check(cls, parse_intervals, intervals=intervals)

    @classmethod
    def execute(cls, model, positive, negative, vae, latent, seed, steps, cfg, sampler, scheduler, denoise, intervals):
        if denoise < 0.01:  # Linked: what the host has not checked.
            raise ValueError(f"denoise must be at least 0.01, got {denoise!r}: at 0 there is nothing to sample")
        from nodes import common_ksampler  # ComfyUI's own, which this folder does not hide: imports here are relative.

        def sample(model, cfg, positive, negative, latent):
            run = functools.partial(common_ksampler, denoise=denoise)
            return run(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent)[0]

        columns = compare(model, positive, negative, vae, latent, parse_intervals(intervals), sample, cfg)
        return io.NodeOutput(*report(columns))


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            node_id="GuidanceIntervalDemoModel",
            display_name="Guidance Interval Demo Model",
            description="A small model of colour emoji that comes with these nodes: nothing to download, and a "
            "CPU samples it in seconds. For trying out guidance before you sample a large model.",
            inputs=[
                io.Int.Input(
                    "batch_size", default=6, min=1, max=4096, tooltip="Images in the latent; each has its own noise."
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For every sampler, and for every node here. Prompts: Guidance Interval Demo Prompt.",
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="Shows each of the model's 32 x 32 pixels as a square of 8 x 8."
                ),
                io.Latent.Output(display_name="latent", tooltip="Empty images of the model's size."),
            ],
        )

    @classmethod
    def execute(cls, batch_size):
        return io.NodeOutput(*demo.demo_model(), demo.empty_latent(batch_size))


class DemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        try:
            options = demo.subgroups()
        except UserError:  # Told when a prompt with the node is queued.
            options = [demo.NONE]
        return _schema(
            node_id="GuidanceIntervalDemoPrompt",
            display_name="Guidance Interval Demo Prompt",
            description="A prompt for the demo model: what kind of emoji to draw.",
            inputs=[
                io.Combo.Input(
                    "subgroup",
                    options=options,
                    default="cat-face",
                    tooltip="A subgroup of Unicode's emoji. none, as the negative, makes plain CFG; another subgroup "
                    "there works as a negative prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For the positive or the negative of a sampler or guider."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, subgroup=None):
        return _check(cls, demo.check_subgroup, subgroup=subgroup)

    @classmethod
    def execute(cls, subgroup):
        _refuse(cls.validate_inputs(subgroup))
        return io.NodeOutput(demo.prompt(subgroup))


class GuidanceIntervalExtension(ComfyExtension):
    async def get_node_list(self):
        live.register_route()
        return [
            SigmaInterval,
            PercentInterval,
            StepsInterval,
            PresetInterval,
            IntervalGuider,
            IntervalSchedule,
            IntervalComparison,
            DemoModel,
            DemoPrompt,
        ]

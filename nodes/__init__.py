"""ComfyUI's nodes: declarations alone, each class named as its node. The patch is in model_patch.py."""

import functools

import comfy.samplers
from comfy_api.latest import ComfyExtension, io

from ..errors import UserError
from ..interval_text import CONDITIONAL_ONLY
from ..noise_level import steps_to_interval
from ..presets import all_presets, get_preset
from . import demo, inputs, model_patch
from .comparison import compare, parse_intervals, report
from .guider import TwoModelGuider
from .live import route
from .model_patch import to_interval
from .schedule import describe_schedule


class GuidanceInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceInterval",
            display_name="Guidance Interval",
            description="Applies CFG where sigma_lo < sigma <= sigma_hi and nowhere else. Outside, the unconditional "
            "pass is not evaluated: those steps cost half.",
            inputs=[
                inputs.model(),
                inputs.sigma_lo(),
                inputs.sigma_hi(),
                inputs.units(),
                inputs.outside(),
            ],
            outputs=[inputs.patched_model()],
            hidden=inputs.LIVE,
        )

    @classmethod
    def validate_inputs(cls, sigma_lo=None, sigma_hi=None):
        return inputs.check(cls, to_interval, sigma_lo=sigma_lo, sigma_hi=sigma_hi)

    @classmethod
    def execute(cls, model, sigma_lo, sigma_hi, units="edm", outside=CONDITIONAL_ONLY):
        inputs.refuse(cls.validate_inputs(sigma_lo, sigma_hi))
        return io.NodeOutput(inputs.limited(cls, model, sigma_lo, sigma_hi, units, outside))


class GuidanceIntervalPercent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalPercent",
            display_name="Guidance Interval (percent)",
            description="The interval as a part of the sampling process, as in other nodes of ComfyUI. The same "
            "percent is another noise level for another model or shift; sigma is not.",
            inputs=[
                inputs.model(),
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
            outputs=[inputs.patched_model()],
            hidden=inputs.LIVE,
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None):
        def rule(start, end):
            if start >= end:
                raise ValueError(f"start_percent must be below end_percent, got {start} and {end}")

        return inputs.check(cls, rule, start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(cls, model, start_percent, end_percent):
        inputs.refuse(cls.validate_inputs(start_percent, end_percent))
        return io.NodeOutput(inputs.patched(cls, model, model_patch.in_percent(start_percent, end_percent)))


class GuidanceIntervalSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalSteps",
            display_name="Guidance Interval (steps)",
            description="The interval as the first and the last guided step of a schedule, as the paper's authors "
            "give it. Samplers that evaluate between the steps are judged by the noise level there.",
            inputs=[
                inputs.model(),
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
            outputs=[inputs.patched_model()],
            hidden=inputs.LIVE,
        )

    @classmethod
    def validate_inputs(cls, first_step=None, last_step=None):
        def rule(first, last):
            if (first < 0) == (last < 0) and first > last:
                raise ValueError(f"first_step must not come after last_step, got {first} and {last}")

        return inputs.check(cls, rule, first_step=first_step, last_step=last_step)

    @classmethod
    def execute(cls, model, sigmas, first_step, last_step):
        interval = steps_to_interval(sigmas, first_step, last_step)
        return io.NodeOutput(inputs.patched(cls, model, model_patch.in_model_units(interval)))


class GuidanceIntervalPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalPreset",
            display_name="Guidance Interval (preset)",
            description="An interval that was published for a model, with its guidance weight and its source.",
            inputs=[
                inputs.model(),
                io.Combo.Input(
                    "preset",
                    options=list(all_presets()),
                    tooltip="Each was published for one model, with a weight for its interval alone: at every step it "
                    "would be too much. The weight of sdxl was chosen by visual inspection, those of edm2 by a metric. "
                    "After them come those that `guidance-interval tune --save` measured for you.",
                ),
            ],
            outputs=[
                inputs.patched_model(),
                io.Float.Output(display_name="cfg", tooltip="The published guidance weight, for the sampler's cfg."),
                io.String.Output(display_name="source", tooltip="Where the interval was published."),
            ],
            hidden=inputs.LIVE,
        )

    @classmethod
    def validate_inputs(cls, preset=None):
        return inputs.check(cls, get_preset, preset=preset)  # For one of the user's own that is gone, why it is.

    @classmethod
    def execute(cls, model, preset, cfg=None):  # Version 0.1 had cfg as an input: graphs may still link it.
        preset = get_preset(preset)
        model = inputs.patched(cls, model, model_patch.in_edm_units(preset.interval()))
        return io.NodeOutput(model, preset.weight, preset.source)


class GuidanceIntervalGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalGuider",
            display_name="Guidance Interval Guider",
            description="CFG in an interval, as a guider for SamplerCustomAdvanced. With model_negative, guidance "
            "leads away from that weaker model (autoguidance).",
            inputs=[
                inputs.model("The model to sample with."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What guidance leads away from. For autoguidance connect the positive prompt here too.",
                ),
                inputs.cfg(),
                inputs.sigma_lo(),
                inputs.sigma_hi(),
                io.Model.Input(
                    "model_negative",
                    optional=True,
                    tooltip="A weaker model that evaluates the negative, with its own patches: an earlier or smaller "
                    "checkpoint of the same family, or the same one with or without a LoRA, which is copied in "
                    "memory. It is not run outside the interval.",
                ),
                inputs.units(),
                inputs.outside(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=inputs.LIVE,
        )

    @classmethod
    def validate_inputs(cls, sigma_lo=None, sigma_hi=None):
        return inputs.check(cls, to_interval, sigma_lo=sigma_lo, sigma_hi=sigma_hi)

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
        inputs.refuse(cls.validate_inputs(sigma_lo, sigma_hi))
        model = inputs.limited(cls, model, sigma_lo, sigma_hi, units, outside)
        if model_negative is None:
            guider = comfy.samplers.CFGGuider(model)
        else:
            guider = TwoModelGuider(model, model_patch.unpatch_model(model_negative))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class GuidanceIntervalSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalSchedule",
            display_name="Guidance Interval Schedule",
            description="Shows which steps of a schedule an interval guides, before anything is sampled.",
            inputs=[
                inputs.model("A model with a guidance interval."),
                io.Sigmas.Input("sigmas", tooltip="The schedule that is to be sampled, from a scheduler node."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Noise level by step; guided steps are filled."),
                io.String.Output(display_name="table", tooltip="The same as text, one step per line."),
                io.Int.Output(display_name="guided_steps", tooltip="How many steps are guided."),
                io.Float.Output(
                    display_name="rows",
                    tooltip="Network evaluations, as a share of CFG everywhere: 1 = no saving, 0.5 = conditional only.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, sigmas):
        return io.NodeOutput(*describe_schedule(model, sigmas))


class GuidanceIntervalCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
            node_id="GuidanceIntervalCompare",
            display_name="Guidance Interval Compare",
            description="Samples one seed with CFG everywhere, in each interval of a list, and conditional only, and "
            "lays the images side by side with what each cost.",
            inputs=[
                inputs.model("The model to sample with; an interval that it has is left out."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
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
                inputs.cfg(tooltip="Guidance weight inside the interval, the same for every setting."),
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
                io.String.Output(display_name="report", tooltip="Network evaluations and seconds as a table."),
            ],
        )

    @classmethod
    def validate_inputs(cls, intervals=None):
        return inputs.check(cls, parse_intervals, intervals=intervals)

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


class GuidanceIntervalDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return inputs.schema(
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


class GuidanceIntervalDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        try:
            options = demo.subgroups()
        except UserError:  # Told when a prompt with the node is queued.
            options = [demo.NONE]
        return inputs.schema(
            node_id="GuidanceIntervalDemoPrompt",
            display_name="Guidance Interval Demo Prompt",
            description="A prompt for the demo model: what kind of emoji to draw.",
            inputs=[
                io.Combo.Input(
                    "subgroup",
                    options=options,
                    default="cat-face",
                    tooltip="A subgroup of Unicode's emoji. none, as the negative, makes ordinary CFG; another "
                    "subgroup there works as a negative prompt.",
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
        return inputs.check(cls, demo.check_subgroup, subgroup=subgroup)

    @classmethod
    def execute(cls, subgroup):
        inputs.refuse(cls.validate_inputs(subgroup))
        return io.NodeOutput(demo.prompt(subgroup))


class GuidanceIntervalExtension(ComfyExtension):
    async def get_node_list(self):
        route.register()
        return [
            GuidanceInterval,
            GuidanceIntervalPercent,
            GuidanceIntervalSteps,
            GuidanceIntervalPreset,
            GuidanceIntervalGuider,
            GuidanceIntervalSchedule,
            GuidanceIntervalCompare,
            GuidanceIntervalDemoModel,
            GuidanceIntervalDemoPrompt,
        ]

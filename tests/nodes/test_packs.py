"""Node packs that put functions of their own in the place of the host's: the mechanisms, and a real pack.

What is right outside is the pack's own answer at weight 1 (`unguided`), at the rows that it takes. The real pack is
AnimateDiff-Evolved, in the folder that ANIMATEDIFF_PATH names; a copy of it is loaded.
"""

import asyncio
import logging
import math
import os
import shutil
import sys
from pathlib import Path

import comfy_harness as harness
import pytest
import torch
from test_matrix import CFG, INTERVAL, OUTSIDE, STEPS, sigmas_of

BATCH = 4  # Frames, for packs that slide windows over them.


def guider_of(model, cfg=CFG):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(harness.conditioning(1), harness.conditioning(2))
    guider.set_cfg(cfg)
    return guider


# ----------------------------------------------------------------------------
# The mechanisms. Each: (model, weight) -> a model on which the pack acts, at the sampler's weight or its own.


def replaced_sampling_function(model, weight=None, pre_cfg=False, post_cfg=True, guidance=None):
    """For the time of a run, with a state of that run, from which its own calc_cond_batch has windows over the frames.

    weight: of a custom CFG, in place of the sampler's; guidance: model options that it adds for CFG.
    """
    import comfy.model_patcher
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options={}, seed=None):  # noqa: B006
        state = model_options["transformer_options"]["state_of_pack"]
        options = {**model_options, "transformer_options": {**model_options["transformer_options"], **state}}
        scale = cond_scale if weight is None else weight
        if math.isclose(scale, 1.0) and not options.get("disable_cfg1_optimization"):
            uncond = None
        out = comfy.samplers.calc_cond_batch(model, [cond, uncond], x, timestep, options)
        for fn in options.get("sampler_pre_cfg_function", []) if pre_cfg else ():
            args = {"conds": [cond, uncond], "conds_out": out, "cond_scale": scale, "timestep": timestep}
            out = fn({**args, "input": x, "sigma": timestep, "model": model, "model_options": options})
        for key, added in (guidance or {}).items():
            options[key] = [*options.get(key, []), *added] if isinstance(added, list) else added
        if not post_cfg:
            return out[1] + (out[0] - out[1]) * scale
        return comfy.samplers.cfg_function(model, *out, scale, x, timestep, options, cond, uncond)

    def outer_sample(executor, *args, **kwargs):
        guider, before = executor.class_obj, comfy.samplers.sampling_function
        guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
        state = {"windows_of_pack": [slice(0, 3), slice(1, 4)]}
        guider.model_options["transformer_options"]["state_of_pack"] = state
        comfy.samplers.sampling_function = sampling_function
        try:
            return executor(*args, **kwargs)
        finally:
            comfy.samplers.sampling_function = before

    def calc_cond_batch(executor, model, conds, x, timestep, model_options):
        windows = model_options["transformer_options"]["windows_of_pack"]
        out, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for window in windows:
            count[window] += 1
            for whole, part in zip(
                out, executor(model, conds, x[window], timestep[window], model_options), strict=True
            ):
                whole[window] += part
        return [whole / count for whole in out]

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "pack", outer_sample)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "pack", calc_cond_batch)
    return model


def replaced_with_pre_cfg(model, weight=None):
    return replaced_sampling_function(model, weight, pre_cfg=True)


def own_weight(model, weight=CFG):
    """A custom CFG: the sampler's weight is ignored, and so are pre-CFG functions."""
    return replaced_sampling_function(model, weight)


def regional_batch_function(model, weight=None):
    """sampler_calc_cond_batch_function: tiles, each with the positive of its region."""
    import comfy.samplers

    def batch_function(args):
        x, options = args["input"], args["model_options"]
        options = {k: v for k, v in options.items() if k != "sampler_calc_cond_batch_function"}
        half = x.shape[-1] // 2
        out = [torch.zeros_like(x) for _ in args["conds"]]
        for tile in (slice(0, half), slice(half, None)):
            part = comfy.samplers.calc_cond_batch(args["model"], args["conds"], x[..., tile], args["sigma"], options)
            for whole, piece in zip(out, part, strict=True):
                whole[..., tile] = piece
        return out

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(batch_function)
    return model


def own_conditional(model, weight=None):
    """Neither prediction is asked of calc_cond_batch: a CFG function evaluates the positive by itself."""
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options={}, seed=None):  # noqa: B006
        conds = [None, None]
        out = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
        for fn in model_options.get("sampler_pre_cfg_function", []):
            args = {"conds": conds, "conds_out": out, "cond_scale": cond_scale, "timestep": timestep}
            out = fn({**args, "input": x, "sigma": timestep, "model": model, "model_options": model_options})
        return comfy.samplers.cfg_function(model, *out, cond_scale, x, timestep, model_options, cond, uncond)

    def evaluate(args):
        conds = [args["input_cond"], None]
        out = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])
        return args["input"] - out[0]

    def outer_sample(executor, *args, **kwargs):
        before, comfy.samplers.sampling_function = comfy.samplers.sampling_function, sampling_function
        try:
            return executor(*args, **kwargs)
        finally:
            comfy.samplers.sampling_function = before

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "pack", outer_sample)
    model.set_model_sampler_cfg_function(evaluate)
    return model


MECHANISMS = {
    "sampling_function replaced, with a state": replaced_sampling_function,
    "sampling_function replaced, pre-CFG functions kept": replaced_with_pre_cfg,
    "custom CFG that ignores the sampler's": own_weight,
    "sampler_calc_cond_batch_function in tiles": regional_batch_function,
}


def judge(host, ours, pack, sampler, before, outside, keep=()):
    """The Verdict; keep: nodes beside the pack that act outside under 'keep other patches'."""
    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))

    def chain(weight):
        model = pack(harness.tiny_model("sd15"), **weight)
        for name, inputs in keep:
            model = harness.run_node(host, name, model=model, **inputs)[0]
        return model

    def stack(patch):
        limited = patch(harness.tiny_model("sd15")) if before else harness.tiny_model("sd15")
        model = pack(limited)
        for name, inputs in keep:
            model = harness.run_node(host, name, model=model, **inputs)[0]
        return guider_of(model if before else patch(model))

    own = interval(chain({}).get_model_object("model_sampling"))
    return harness.judge(
        stack,
        lambda model: ours.patch.patch_model(model, interval, outside),
        sampler,
        sigmas_of("sd15", STEPS),
        harness.empty_latent("sd15", BATCH),
        own.mask,
        outside,
        unguided=lambda: guider_of(chain({"weight": 1.0}), cfg=1.0),
    )


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms(host, ours, report, name, sampler, before, outside):
    verdict = judge(host, ours, MECHANISMS[name], sampler, before, outside)
    assert verdict.rows == [max(verdict.rows) // 2 * (1 + guided) for guided in verdict.guided]
    report.add("Node packs, imitated", f"{_order(name, before)}, {sampler}", outside, verdict)


@pytest.mark.parametrize("name", MECHANISMS)
def test_nodes_beside_a_mechanism_are_kept(host, ours, name):
    keep = [("Epsilon Scaling", {})] if "Epsilon Scaling" in host.nodes else [("PerturbedAttentionGuidance", {})]
    verdict = judge(host, ours, MECHANISMS[name], "euler", False, "keep other patches", keep)
    assert verdict.kind == harness.EXACT, verdict


ADDED = {
    "before its end": {"sampler_cfg_function": lambda args: 0.9 * args["cond"]},
    "after it": {"sampler_post_cfg_function": [lambda args: args["denoised"] + 0.3 * args["cond_denoised"]]},
}


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("where", ADDED)
def test_guidance_that_a_pack_adds_is_limited_too(host, ours, where, sampler):
    def pack(model, weight=CFG, guidance=ADDED[where]):
        return replaced_sampling_function(model, weight, guidance=guidance)

    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))
    verdict = harness.judge(
        lambda patch: guider_of(patch(pack(harness.tiny_model("sd15")))),
        lambda model: ours.patch.patch_model(model, interval),
        sampler,
        sigmas_of("sd15", STEPS),
        harness.empty_latent("sd15", BATCH),
        ours.Interval(*INTERVAL).mask,
        unguided=lambda: guider_of(pack(harness.tiny_model("sd15"), weight=1.0, guidance=None)),
    )
    assert verdict.kind == harness.EXACT, verdict


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_pack_that_evaluates_the_positive_by_itself(host, ours, sampler, before):
    verdict = judge(host, ours, own_conditional, sampler, before, "conditional only")
    assert verdict.kind == harness.EXACT and set(verdict.rows) == {BATCH}, verdict


def test_what_such_a_pack_evaluates_itself_is_not_evaluated_twice(host, ours, caplog):
    """Kept, its CFG function goes on: what it would be told of either prediction is not known before it has run."""
    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))
    plain = own_conditional(harness.tiny_model("sd15"))
    with caplog.at_level(logging.WARNING):
        limited = final(ours.patch.patch_model(plain, interval, "keep other patches"))
    assert torch.equal(limited, final(plain))
    (said,) = [r.getMessage() for r in caplog.records if "Guidance Interval" in r.getMessage()]
    assert "without the interval" in said


def test_the_guider_with_such_a_pack_on_the_second_model(host):
    """It has the pack's own answer for the negative, which is the conditional prediction for it."""
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": CFG}
    first, second = harness.tiny_model("sd15"), harness.loaded_again("sd15", seed=1)
    packed = harness.run_node(
        host, "GuidanceIntervalGuider", model=first, model_negative=own_conditional(second), **conds
    )[0]
    plain = harness.run_node(host, "GuidanceIntervalGuider", model=first, model_negative=second, **conds)[0]
    assert torch.equal(final(first, guider=packed), final(first, guider=plain))
    both = harness.run_node(
        host, "GuidanceIntervalGuider", model=own_conditional(first), model_negative=second, **conds
    )[0]
    with pytest.raises(ValueError, match="model_negative cannot be used with a node pack"):
        final(first, guider=both)


def final(model, cfg=CFG, guider=None):
    import comfy.samplers

    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), sigmas_of("sd15", STEPS)
        return harness.sample(guider or guider_of(model, cfg), sampler, sigmas, harness.empty_latent("sd15", BATCH))


def _order(name, before):
    return f"ours, {name}" if before else f"{name}, ours"


def test_a_pack_that_cannot_be_asked_is_left_alone_and_the_log_says_so(host, ours, caplog):
    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))
    plain = replaced_sampling_function(harness.tiny_model("sd15"), post_cfg=False)
    with caplog.at_level(logging.WARNING):
        limited = final(ours.patch.patch_model(plain, interval))
    assert torch.equal(limited, final(plain))
    (said,) = [r.getMessage() for r in caplog.records if "Guidance Interval" in r.getMessage()]
    assert __name__ in said and "without the interval" in said


# ----------------------------------------------------------------------------
# The real pack.


@pytest.fixture(scope="module")
def animatediff(host, tmp_path_factory):
    if "ANIMATEDIFF_PATH" not in os.environ:
        pytest.skip("no AnimateDiff-Evolved: set ANIMATEDIFF_PATH to a clone of it")
    import nodes

    copy = tmp_path_factory.mktemp("packs") / "animatediff-evolved"
    shutil.copytree(Path(os.environ["ANIMATEDIFF_PATH"]), copy, ignore=shutil.ignore_patterns(".git"))
    search_path = sys.path.copy()
    sys.path.insert(0, str(host.path))
    assert asyncio.run(nodes.load_custom_node(str(copy)))
    sys.path[:] = search_path
    return host


def evolved(host, sliding, custom_cfg, extras=None):
    def pack(model, weight=CFG):
        inputs = {}
        if sliding:
            context = harness.run_node(host, "ADE_StandardStaticContextOptions", context_length=3, context_overlap=2)
            inputs["context_options"] = context[0]
        if custom_cfg:
            options = {"cfg": weight} | ({} if extras is None else {"cfg_extras": extras})
            custom = harness.run_node(host, "ADE_CustomCFGSimple", **options)[0]
            inputs["sample_settings"] = harness.run_node(host, "ADE_AnimateDiffSamplingSettings", custom_cfg=custom)[0]
        return harness.run_node(host, "ADE_UseEvolvedSampling", model=model, **inputs)[0]

    return pack


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("custom_cfg", [False, True], ids=["cfg", "custom CFG"])
@pytest.mark.parametrize("sliding", [False, True], ids=["whole", "sliding"])
def test_animatediff_evolved(animatediff, ours, report, sliding, custom_cfg, sampler, before, outside):
    verdict = judge(animatediff, ours, evolved(animatediff, sliding, custom_cfg), sampler, before, outside)
    name = f"{'sliding context' if sliding else 'no context'}, {'custom CFG' if custom_cfg else 'CFG of the sampler'}"
    report.add("AnimateDiff-Evolved", f"{_order(name, before)}, {sampler}", outside, verdict)


def test_guidance_that_is_part_of_a_custom_cfg_is_left_out_though_it_was_evaluated(animatediff, ours):
    """Extra passes of a custom CFG are the pack's own: they cannot be left out, and count for nothing outside."""
    extras = harness.run_node(animatediff, "ADE_CFGExtrasPAGSimple", scale=3.0)[0]
    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))

    def stack(patch):
        return guider_of(patch(evolved(animatediff, False, True, extras)(harness.tiny_model("sd15"))))

    verdict = harness.judge(
        stack,
        lambda model: ours.patch.patch_model(model, interval),
        "euler",
        sigmas_of("sd15", STEPS),
        harness.empty_latent("sd15", BATCH),
        ours.Interval(*INTERVAL).mask,
        unguided=lambda: guider_of(evolved(animatediff, False, True)(harness.tiny_model("sd15"), 1.0), cfg=1.0),
    )
    assert verdict.error == 0
    assert verdict.rows == [BATCH * (3 if guided else 2) for guided in verdict.guided]

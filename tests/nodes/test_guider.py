"""The guider with a second model, against references from two models that share nothing.

Each case samples with clones of one checkpoint, as a graph gives them, then evaluates the same x with two models
loaded apart: the positive on the one, the negative on the other, each by the host at cfg 1.
"""

import functools
import gc
import logging
import types

import comfy_harness as harness
import pytest
import torch
from test_matrix import lora_hooks
from test_nodes import node, sigmas_of
from test_packs import BATCH, MECHANISMS

CFG = 3.0
EVERYWHERE = {"sigma_lo": 0.0, "sigma_hi": -1.0}
KEY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def lora(seed, model):
    model = model.clone()
    generator = torch.Generator().manual_seed(seed)
    model.add_patches({KEY: ("diff", (torch.randn(32, 48, generator=generator),))})
    return model


def attention_patch(model):
    """As PAG does it: the middle block's self-attention is its values."""
    model = model.clone()
    model.set_model_attn1_replace(lambda q, k, v, extra_options, mask=None: v, "middle", 0)
    return model


def unet_wrapper(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"]))
    return model


def wrapper(model):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.PREDICT_NOISE, "test", lambda executor, x, *args, **kwargs: 0.9 * executor(x, *args, **kwargs)
    )
    return model


def object_patch(model):
    model = model.clone()
    other = torch.nn.Linear(48, 32, bias=False)
    harness.randomize(other, seed=9)
    model.add_object_patch(KEY.removesuffix(".weight"), other.requires_grad_(False))
    return model


def same(model):
    return model


LORA_A, LORA_B = functools.partial(lora, 5), functools.partial(lora, 6)
SIDES = {  # (on model, on model_negative)
    "LoRA on model": (LORA_A, same),
    "LoRA on model_negative": (same, LORA_A),
    "another LoRA on each": (LORA_A, LORA_B),
    "the same LoRA from two nodes": (LORA_A, LORA_A),
    "attention patch on model": (attention_patch, same),
    "attention patch on model_negative": (same, attention_patch),
    "attention patch on one and LoRA on the other": (LORA_A, attention_patch),
    "function wrapper on model": (unet_wrapper, same),
    "function wrapper on model_negative": (same, unet_wrapper),
    "wrapper on model_negative": (same, wrapper),
    "object patch on model_negative": (same, object_patch),
    "object patch on model": (object_patch, same),
}


def guider_of(model, positive, cfg=1.0, negative=None):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    return guider


def check(
    host,
    on_model,
    on_negative,
    positive=None,
    negative=None,
    sampler="euler",
    cfg=CFG,
    batch=1,
    kind="sd15",
    references=None,
    rows=2,
):
    """Every evaluation of a run with the guider equals that of two models loaded apart.

    references: what is done to those two where it is not the same; rows: of an evaluation, for each of the batch.
    """
    rows_expected, apart_from = rows, {"on_model": on_model, "on_negative": on_negative, **(references or {})}
    import comfy.samplers

    positive = harness.conditioning(1) if positive is None else positive
    negative = harness.conditioning(2) if negative is None else negative
    base = harness.tiny_model(kind)
    sigmas, latent = sigmas_of(base, "simple" if kind in harness.FLOW else "karras"), harness.empty_latent(kind, batch)
    cfg_pp = "cfg_pp" in sampler
    with torch.inference_mode():
        models = {"model": on_model(base), "model_negative": on_negative(base)}
        conds = {"positive": positive, "negative": negative}
        guider = node(host, "GuidanceIntervalGuider", cfg=cfg, **models, **conds, **EVERYWHERE)[0]
        with harness.counted_rows(guider.model_patcher, guider.second.model_patcher) as rows:
            of_sampler = comfy.samplers.sampler_object(sampler)
            ours, final = harness.record(guider, of_sampler, sigmas, latent, rows, cfg_pp)
            ours = list(ours)
            _, final_again = harness.record(guider, of_sampler, sigmas, latent, rows, cfg_pp)
        found = []
        for change, cond in ((apart_from["on_model"], positive), (apart_from["on_negative"], negative)):
            apart = guider_of(change(harness.loaded_again(kind)), cond)
            with harness.counted_rows(apart.model_patcher) as rows:
                found.append(harness.replay(apart, harness.evaluate_stock, ours, sigmas, latent, rows))
    for e, cond, uncond in zip(ours, *found, strict=True):
        assert torch.equal(e.out, uncond.out + (cond.out - uncond.out) * cfg)
        assert rows_expected is None or e.rows == rows_expected * batch
        if cfg_pp:
            assert torch.equal(e.uncond, uncond.out)
    assert torch.equal(final, final_again)
    return ours, found


@pytest.mark.parametrize("name", SIDES)
def test_each_side_has_its_own_patches(host, name):
    _, (cond, uncond) = check(host, *SIDES[name])
    assert not torch.equal(cond[0].out, uncond[0].out)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_cfg_pp"])
def test_the_same_prompt_on_both_as_autoguidance_has_it(host, sampler):
    prompt = harness.conditioning(1)
    _, (cond, uncond) = check(host, LORA_A, same, prompt, prompt, sampler, batch=2)
    assert not torch.equal(cond[0].out, uncond[0].out)


@pytest.mark.parametrize("side", ["model", "model_negative"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_node_pack_on_one_side(host, name, side):
    """It acts on that model alone, and its weight, if it has one, is the weight."""
    pack, at_one = MECHANISMS[name], functools.partial(MECHANISMS[name], weight=1.0)
    if side == "model":
        weight = {"cfg": 7.0} if pack is MECHANISMS["custom CFG that ignores the sampler's"] else {}
        check(host, pack, LORA_A, batch=BATCH, references={"on_model": at_one}, rows=None, **weight)
    else:
        check(host, LORA_A, pack, batch=BATCH, references={"on_negative": at_one}, rows=None)


@pytest.mark.parametrize("side", ["positive", "negative", "both"])
@pytest.mark.parametrize("on_model", [same, LORA_A], ids=["weights shared", "weights copied"])
def test_hooks_on_either_prompt(host, side, on_model):
    positive, negative = harness.conditioning(1), harness.conditioning(2)
    if side != "negative":
        positive = lora_hooks(host, positive)
    if side != "positive":
        negative = lora_hooks(host, negative)
    check(host, on_model, same, positive, negative)


def test_a_flow_model(host):
    def change(model):
        model = model.clone()
        key = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
        weight = model.model.state_dict()[key]
        model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.01,))})
        return model

    check(host, change, same, kind="flow")


def test_the_shared_model_is_left_as_it_was(host):
    base = harness.tiny_model("sd15")
    key = KEY.removesuffix(".weight")
    plain = run(guider_of(base, harness.conditioning(1), CFG, harness.conditioning(2)), base)
    before = base.get_model_object(key).weight.clone()  # Till now another clone's patches may have lain on it.
    check(host, LORA_A, LORA_B)
    assert torch.equal(plain, run(guider_of(base, harness.conditioning(1), CFG, harness.conditioning(2)), base))
    assert torch.equal(before, base.get_model_object(key).weight)
    assert not base.get_additional_models()


def run(guider, model, sampler="euler", cfg_pp=False):
    import comfy.samplers

    with torch.inference_mode():
        return harness.sample(
            guider, comfy.samplers.sampler_object(sampler), sigmas_of(model), harness.empty_latent("sd15")
        )


def test_weights_are_copied_where_they_must_differ_and_nowhere_else(host, caplog):
    base = harness.tiny_model("sd15")
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}

    def second(on_model, on_negative):
        models = {"model": on_model(base), "model_negative": on_negative(base)}
        return node(host, "GuidanceIntervalGuider", **models, **conds)[0].second.model_patcher.model

    with caplog.at_level(logging.INFO):
        assert second(same, attention_patch) is base.model
        assert second(LORA_A, LORA_A) is not base.model  # Two nodes: the host cannot know that they are alike.
        assert second(LORA_A, same) is not base.model
    assert len([r for r in caplog.records if "share their weights: copying" in r.getMessage()]) == 2
    patched = LORA_A(base)
    both = node(host, "GuidanceIntervalGuider", model=patched, model_negative=patched, **conds)[0]
    assert both.second.model_patcher.model is base.model
    other = harness.loaded_again("sd15")
    apart = node(host, "GuidanceIntervalGuider", model=base, model_negative=other, **conds)[0]
    assert apart.second.model_patcher.model is other.model


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_only_one_of_them_injects_into_are_copied(host, side):
    """What is injected into a module (AnimateDiff's motion model) the other would find there."""
    from comfy.patcher_extension import PatcherInjection

    base = harness.tiny_model("sd15")
    models = [base.clone(), base.clone()]
    models[side].set_injections("pack", [PatcherInjection(inject=lambda patcher: None, eject=lambda patcher: None)])
    own = harness.our_module(host, "guider").with_own_weights(*models)
    assert own.model is not base.model


def test_what_is_copied_has_no_patches_of_clones_that_are_gone(host):
    """The host takes them off for a clone or its parent, but forgets both when they are collected as a cycle."""
    import comfy.model_management

    base, key = harness.tiny_model("sd15"), KEY.removesuffix(".weight")
    parent = object_patch(base)
    parent.child = patched = LORA_A(parent)
    comfy.model_management.load_models_gpu([patched])
    assert base.model.current_weight_patches_uuid == patched.patches_uuid
    pristine = harness.loaded_again("sd15").get_model_object(key).weight
    assert not torch.equal(base.model.get_submodule(key).weight, pristine)
    del parent, patched
    gc.collect()
    own = harness.our_module(host, "guider").with_own_weights(LORA_B(base), base)
    assert torch.equal(own.get_model_object(key).weight, pristine)
    assert torch.equal(base.get_model_object(key).weight, pristine)


def test_cfg_one_is_the_hosts_and_evaluates_one_model(host):
    """With what is set around CFG, which acts at cfg 1 too."""
    base = harness.tiny_model("sd15")
    base.set_model_sampler_cfg_function(lambda args: args["cond"] * 0.9)
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    models = {"model": base, "model_negative": LORA_A(base)}
    guider = node(host, "GuidanceIntervalGuider", cfg=1.0, **models, **conds, **EVERYWHERE)[0]
    with harness.counted_rows(base, guider.second.model_patcher) as rows:
        final = run(guider, base)
        assert rows[0] == len(sigmas_of(base)) - 1
    assert torch.equal(final, run(guider_of(base, harness.conditioning(1)), base))


def test_cfg_plus_plus_at_cfg_one_is_told_the_second_models_prediction(host):
    check(host, LORA_A, same, sampler="euler_cfg_pp", cfg=1.0)


def test_outside_the_interval_the_second_model_is_not_evaluated(host):
    base = harness.tiny_model("sd15")
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    guider = node(host, "GuidanceIntervalGuider", cfg=CFG, model=base, model_negative=LORA_A(base), **conds)[0]
    with harness.counted_rows(guider.second.model_patcher) as rows:
        run(guider, base)
    assert rows[0] == 2  # The two of six steps that are guided.


def test_an_interval_that_the_second_model_has_is_left_out(host, caplog):
    base = harness.tiny_model("sd15")
    limited = node(host, "GuidanceInterval", model=LORA_A(base), sigma_lo=0.5, sigma_hi=1.0)[0]
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": CFG, **EVERYWHERE}
    with_it = node(host, "GuidanceIntervalGuider", model=base, model_negative=limited, **conds)[0]
    without = node(host, "GuidanceIntervalGuider", model=base, model_negative=LORA_A(base), **conds)[0]
    with caplog.at_level(logging.INFO):
        assert torch.equal(run(with_it, base), run(without, base))
    assert not [r for r in caplog.records if "nothing to limit" in r.getMessage()]


def test_functions_around_cfg_see_both_predictions(host):
    base = harness.tiny_model("sd15")
    seen = []

    def post_cfg(args):
        seen.append((args["cond_denoised"].clone(), args["uncond_denoised"].clone()))
        return args["denoised"]

    def pre_cfg(args):
        seen.append(tuple(out.clone() for out in args["conds_out"]))
        return args["conds_out"]

    model = base.clone()
    model.set_model_sampler_post_cfg_function(post_cfg)
    model.set_model_sampler_pre_cfg_function(pre_cfg)
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": CFG, **EVERYWHERE}
    run(node(host, "GuidanceIntervalGuider", model=model, model_negative=LORA_A(base), **conds)[0], base)
    assert seen and all(
        torch.equal(c, d) for a, b in zip(seen[::2], seen[1::2], strict=True) for c, d in zip(a, b, strict=True)
    )
    assert not torch.equal(*seen[0])


def test_self_attention_guidance_is_left_out_and_the_log_says_so(host, caplog):
    """It takes its map from an unconditional pass of the first model, which is not made."""

    def sag(model):
        return node(host, "SelfAttentionGuidance", model=model)[0]

    with caplog.at_level(logging.INFO):
        check(host, sag, LORA_A, references={"on_model": same})
    assert [r for r in caplog.records if "Self-Attention Guidance" in r.getMessage()]


@pytest.mark.parametrize(("kind", "what"), [("flow", "latents"), ("video", "latents")])
def test_a_model_of_another_family_is_refused(host, kind, what):
    models = {"model": harness.tiny_model("sd15"), "model_negative": harness.tiny_model(kind)}
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    with pytest.raises(ValueError, match=f"must have the same {what}"):
        node(host, "GuidanceIntervalGuider", **models, **conds)


def test_a_flow_model_beside_one_of_as_many_channels_that_is_none_is_refused(host):
    """No two of the tiny models are so alike."""
    import comfy.model_sampling

    sigmas, flow = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.ModelSamplingDiscreteFlow
    const = type("Flow", (flow, comfy.model_sampling.CONST), {})
    latents = types.SimpleNamespace(latent_channels=4)
    one, other = (types.SimpleNamespace(latent_format=latents, model_sampling=s()) for s in (sigmas, const))
    check = harness.our_module(host, "guider")._check_kinship
    check(one, one)
    with pytest.raises(ValueError, match="must have the same noise levels"):
        check(one, other)


def test_weights_that_cannot_be_copied_are_refused_in_one_sentence(host):
    base = harness.loaded_again("sd15")
    base.model.lock = (step for step in range(2))  # What deepcopy cannot take.
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    with pytest.raises(ValueError, match="load model_negative from a copy of the file under another name"):
        node(host, "GuidanceIntervalGuider", model=base, model_negative=LORA_A(base), **conds)


def test_weights_that_the_host_streams_are_loaded_anew(host):
    """Newer hosts keep them where only they can copy them."""
    from comfy.model_patcher import ModelPatcher

    if not hasattr(ModelPatcher, "is_dynamic"):
        pytest.skip("this ComfyUI streams no weights")

    class Streamed(ModelPatcher):
        def is_dynamic(self):
            return True

    cpu, loads = torch.device("cpu"), []

    def load(disable_dynamic=False):
        loads.append(disable_dynamic)
        return harness.loaded_again("sd15")

    base = Streamed(harness.loaded_again("sd15").model, load_device=cpu, offload_device=cpu)
    base.cached_patcher_init = (load, ())
    own = harness.our_module(host, "guider").with_own_weights(LORA_A(base), base)
    assert loads == [True] and own.model is not base.model and list(own.patches) == [KEY]

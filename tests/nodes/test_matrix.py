"""The exactness contract, against the real ComfyUI: every evaluation of every cell, in value and in rows."""

import functools

import comfy_harness as harness
import pytest
import torch

INTERVAL = (0.28, 5.42)
STEPS = 6
OUTSIDE = ("conditional only", "keep other patches")
CFG = 7.0
# Those of ComfyUI 0.33; a host that lacks one skips it, and test_every_sampler_is_listed names new ones.
SAMPLERS = (  # noqa: SIM905 (readable)
    "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde "
    "dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde "
    "dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun "
    "dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep "
    "res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation "
    "gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2"
).split()
# On the models other than SD1.5: one of each kind.
KINDS_OF_SAMPLER = ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "euler_cfg_pp", "ddim", "uni_pc"]


def sigmas_of(kind, steps=STEPS):
    import comfy.samplers

    model_sampling = harness.tiny_model(kind).get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(model_sampling, "simple" if kind in harness.FLOW else "karras", steps)


class Case:
    """A chain of nodes and a guider, to be judged with the patch before or after the other nodes."""

    def __init__(self, ours, kind="sd15", nodes=(), before=False, guider=None, positive=None, negative=None):
        self.ours, self.kind, self.nodes, self.before = ours, kind, nodes, before
        self.guider = guider or cfg_guider
        self.positive = harness.conditioning(1) if positive is None else positive
        self.negative = harness.conditioning(2) if negative is None else negative

    def stack(self, patch):
        model = harness.tiny_model(self.kind)
        if self.before:
            model = patch(model)
        for node in self.nodes:
            model = node(model)
        if not self.before:
            model = patch(model)
        return self.guider(model, self.positive, self.negative)

    def judge(self, outside, sampler="euler", latent=None, steps=STEPS, reference=None, **kwargs):
        interval = self.ours.patch.in_edm_units(self.ours.Interval(*INTERVAL))
        own = interval(self.stack(lambda m: m).model_patcher.get_model_object("model_sampling"))

        def patch(model):
            return self.ours.patch.patch_model(model, interval, outside)

        latent = harness.empty_latent(self.kind) if latent is None else latent
        sigmas = sigmas_of(self.kind, steps)
        verdict = harness.judge(self.stack, patch, sampler, sigmas, latent, own.mask, reference or outside, **kwargs)
        assert any(verdict.guided) and not all(verdict.guided)
        return verdict


def cfg_guider(model, positive, negative):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    return guider


# ----------------------------------------------------------------------------
# Samplers.


def test_every_sampler_is_listed(host):
    import comfy.samplers

    assert not set(comfy.samplers.SAMPLER_NAMES) - set(SAMPLERS)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(host, ours, report, sampler, outside):
    import comfy.samplers

    if sampler not in comfy.samplers.SAMPLER_NAMES:
        pytest.skip("not in this ComfyUI")
    verdict = Case(ours).judge(outside, sampler)
    assert verdict.rows == [1 + guided for guided in verdict.guided]  # The floor, in plain numbers.
    report.add("Samplers, SD1.5", sampler, outside, verdict)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("sampler", KINDS_OF_SAMPLER)
@pytest.mark.parametrize("kind", [k for k in harness.MODELS if k != "sd15"])
def test_samplers_of_other_models(host, ours, report, kind, sampler, outside):
    verdict = Case(ours, kind).judge(outside, sampler)
    assert verdict.rows == [1 + guided for guided in verdict.guided]
    report.add("Samplers, other models", f"{kind}, {sampler}", outside, verdict)


@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype")
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampler", KINDS_OF_SAMPLER)
@pytest.mark.parametrize("kind", harness.TIMED)
def test_video_and_audio(host, ours, report, kind, sampler, batch, outside):
    latent = harness.empty_latent(kind, batch)
    verdict = Case(ours, kind).judge(outside, sampler, latent=latent)
    assert verdict.rows == [batch * (1 + guided) for guided in verdict.guided]
    report.add("Video (Wan 2.1) and audio (ACE-Step)", f"{kind}, batch of {batch}, {sampler}", outside, verdict)


# ----------------------------------------------------------------------------
# Guiders.


def dual_cfg(host, style, model, positive, negative):
    inputs = {"cond1": positive, "cond2": harness.conditioning(3), "negative": negative, "style": style}
    return harness.run_node(host, "DualCFGGuider", model=model, cfg_conds=5.0, cfg_cond2_negative=3.0, **inputs)[0]


def perp_neg(host, model, positive, negative):
    empty = harness.conditioning(3)
    inputs = {"positive": positive, "negative": negative, "empty_conditioning": empty, "cfg": CFG, "neg_scale": 0.8}
    return harness.run_node(host, "PerpNegGuider", model=model, **inputs)[0]


def two_models(host, node, model, positive, negative):
    inputs = {"positive": positive, "negative": negative, "cfg": CFG}
    weak = harness.tiny_model("sd15", seed=1)
    return harness.run_node(host, node, model=model, model_negative=weak, **inputs)[0]


def our_two_models(host, model, positive, negative):
    weak = harness.tiny_model("sd15", seed=1)
    guider = harness.our_module(host, "guider").TwoModelGuider(model, weak)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    return guider


GUIDERS = {
    "CFGGuider": lambda host, *args: cfg_guider(*args),
    "DualCFGGuider, regular": lambda host, *args: dual_cfg(host, "regular", *args),
    "DualCFGGuider, nested": lambda host, *args: dual_cfg(host, "nested", *args),
    "PerpNegGuider": perp_neg,
    "DualModelGuider": lambda host, *args: two_models(host, "DualModelGuider", *args),
    "GuidanceIntervalGuider, model_negative": our_two_models,
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(host, ours, report, name, sampler, outside):
    if name == "DualModelGuider" and name not in host.nodes:
        pytest.skip("not in this ComfyUI")
    verdict = Case(ours, guider=functools.partial(GUIDERS[name], host)).judge(outside, sampler)
    report.add("Guiders", f"{name}, {sampler}", outside, verdict)


# ----------------------------------------------------------------------------
# Other nodes on the same model, before and after ours.

UNET_NODES = {
    "RescaleCFG": {},
    "CFGZeroStar": {},
    "CFGNorm": {"strength": 0.9},
    "APG": {},
    "APG with momentum": {"momentum": -0.5},
    "TCFG": {},
    "FreSca": {},
    "PerturbedAttentionGuidance": {},
    "SelfAttentionGuidance": {},
    "NAGuidance": {},
    "Mahiro": {},
    "RenormCFG": {"renorm_cfg": 0.9},
    "Epsilon Scaling": {},
    "TemporalScoreRescaling": {},
    "FreeU_V2": {"b1": 1.3},
    "CFGOverride": {"cfg": 3.0, "start_percent": 0.3, "end_percent": 0.7},
    "EasyCache": {"reuse_threshold": 0.5},
    "LazyCache": {"reuse_threshold": 0.5},
}
DIT_NODES = {
    "SkipLayerGuidanceDiT": {"double_layers": "0", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1", "single_layers": "", "start_percent": 0.2},
    "SkipLayerGuidanceSD3": {"layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "CFGZeroStar": {},
    "RenormCFG": {"renorm_cfg": 0.9},
    "APG": {},
    "NAGuidance": {},
    "LazyCache": {"reuse_threshold": 0.5},
}
STACKS = [("sd15", name) for name in UNET_NODES] + [("flow", name) for name in DIT_NODES]

# Why a cell is neither exact nor exact up to rounding: {node: reason}.
CACHED = "a cache of the steps before, which were not the same steps: it may reuse at another step"
REASONS = {
    "EasyCache": CACHED,
    "LazyCache": CACHED,
    "APG with momentum": "a running mean over evaluations; those outside are not in it, or are conditional",
}
# It needs the unconditional pass, so that nothing of it is left outside: {(node, outside): reason}.
ACTS_INSIDE_ALONE = {("SelfAttentionGuidance", "keep other patches"): "reads the unconditional pass: acts inside alone"}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "name"), STACKS)
def test_stacks(host, ours, report, kind, name, before, outside):
    node = name.split(" with ")[0]
    if node not in host.nodes:
        pytest.skip("not in this ComfyUI")
    inputs = (UNET_NODES if kind == "sd15" else DIT_NODES)[name]

    def add(model):
        return harness.run_node(host, node, model=model, **inputs)[0]

    steps = 16 if "Cache" in name else STEPS  # Caches act on the steps in between.
    stated = ACTS_INSIDE_ALONE.get((name, outside))
    reference = "conditional only" if stated else outside
    latent = harness.empty_latent(kind, size=16)
    verdict = Case(ours, kind, [add], before).judge(outside, latent=latent, steps=steps, reference=reference)
    if "Cache" in name:
        assert 0 in verdict.rows  # It did act.
    reason = stated or REASONS.get(name)
    report.add(
        f"Other nodes, {kind}",
        f"{'ours, ' if before else ''}{name}{'' if before else ', ours'}",
        outside,
        verdict,
        reason,
        stated=bool(stated),
    )


# ----------------------------------------------------------------------------
# What conditionings and latents can carry.


def area(host, conds):
    part = harness.run_node(
        host, "ConditioningSetArea", conditioning=harness.conditioning(4), width=32, height=64, x=16, y=0, strength=0.8
    )[0]
    return harness.run_node(host, "ConditioningCombine", conditioning_1=conds, conditioning_2=part)[0]


def mask(host, conds):
    half = torch.zeros(1, 8, 8)
    half[:, :4] = 1.0
    part = harness.run_node(host, "ConditioningSetMask", conditioning=harness.conditioning(4), mask=half)[0]
    return harness.run_node(host, "ConditioningCombine", conditioning_1=conds, conditioning_2=part)[0]


def timestep_ranges(host, conds):
    first = harness.run_node(host, "ConditioningSetTimestepRange", conditioning=conds, start=0.0, end=0.6)[0]
    second = harness.run_node(
        host, "ConditioningSetTimestepRange", conditioning=harness.conditioning(4), start=0.4, end=1.0
    )[0]
    return harness.run_node(host, "ConditioningCombine", conditioning_1=first, conditioning_2=second)[0]


def lora_hooks(host, conds):
    import comfy.hooks

    generator = torch.Generator().manual_seed(5)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    lora = {
        f"{key}.lora_up.weight": torch.randn(32, 4, generator=generator),
        f"{key}.lora_down.weight": torch.randn(4, 48, generator=generator),
        f"{key}.alpha": torch.tensor(4.0),
    }
    hooks = comfy.hooks.create_hook_lora(lora, strength_model=1.0, strength_clip=0.0)
    frames = None
    for strength, start in ((1.0, 0.0), (0.3, 0.4), (0.0, 0.7)):
        inputs = {"strength_mult": strength, "start_percent": start, "prev_hook_kf": frames}
        frames = harness.run_node(host, "CreateHookKeyframe", **inputs)[0]
    hooks = harness.run_node(host, "SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]
    return harness.run_node(host, "ConditioningSetProperties", cond_NEW=conds, hooks=hooks)[0]


def control_net():
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    unet = {k: v for k, v in harness.UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **unet, operations=comfy.ops.disable_weight_init)
    harness.randomize(net, seed=6)
    return comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))


FEATURES = (
    "batch of 3",
    "area and ConditioningCombine",
    "mask conditioning",
    "ConditioningSetTimestepRange",
    "timestep range on the negative",
    "noise mask (inpaint)",
    "ControlNet",
    "LoRA hooks with a schedule",
    "context windows",
)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_cfg_pp"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(host, ours, report, name, sampler, outside):
    positive, negative = harness.conditioning(1), harness.conditioning(2)
    latent, noise_mask, nodes = harness.empty_latent("sd15"), None, []
    if name == "batch of 3":
        latent = harness.empty_latent("sd15", batch=3)
    elif name == "noise mask (inpaint)":
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        noise_mask = torch.zeros(1, 1, 8, 8)
        noise_mask[..., 3:] = 1.0
    elif name == "context windows":
        latent = harness.empty_latent("sd15", size=16)
        inputs = {"context_length": 8, "context_overlap": 2, "dim": 2}  # Of an image, windows over its rows.
        nodes = [lambda model: harness.run_node(host, "ContextWindowsManual", model=model, **inputs)[0]]
    elif name == "ControlNet":
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(8))
        inputs = {"positive": positive, "negative": negative, "control_net": control_net(), "image": image}
        positive, negative = harness.run_node(host, "ControlNetApplyAdvanced", **inputs, end_percent=0.8)[:2]
    elif name == "timestep range on the negative":
        negative = timestep_ranges(host, negative)
    else:
        make = {
            "area and ConditioningCombine": area,
            "mask conditioning": mask,
            "ConditioningSetTimestepRange": timestep_ranges,
            "LoRA hooks with a schedule": lora_hooks,
        }
        positive = make[name](host, positive)
    case = Case(ours, nodes=nodes, positive=positive, negative=negative)
    verdict = case.judge(outside, sampler, latent=latent, noise_mask=noise_mask)
    report.add("Features", f"{name}, {sampler}", outside, verdict)


# ----------------------------------------------------------------------------
# The judge itself: it must condemn what is wrong.


def post_cfg_limiter(interval):
    def patch(model):
        own = interval(model.get_model_object("model_sampling"))
        model = model.clone()
        model.set_model_sampler_post_cfg_function(
            lambda args: args["denoised"] if bool(own.mask(args["sigma"]).all()) else args["cond_denoised"]
        )
        return model

    return patch


def cfg_one(interval):
    """As core's CFGOverride does it."""
    from comfy.patcher_extension import WrappersMP

    def patch(model):
        own = interval(model.get_model_object("model_sampling"))

        def predict_noise(executor, x, sigma, *args, **kwargs):
            guider = executor.class_obj
            saved = guider.cfg
            if not bool(own.mask(sigma).all()):
                guider.cfg = 1.0
            try:
                return executor(x, sigma, *args, **kwargs)
            finally:
                guider.cfg = saved

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "naive", predict_noise)
        return model

    return patch


@pytest.mark.parametrize(
    ("naive", "kwargs", "sampler"),
    [
        (post_cfg_limiter, {}, "euler"),  # Saves no rows.
        (cfg_one, {}, "euler_cfg_pp"),  # Saves no rows for CFG++.
        (cfg_one, {"guider": "PerpNegGuider"}, "euler"),  # Not even the conditional prediction.
        (cfg_one, {"node": "PerturbedAttentionGuidance"}, "euler"),
    ],
)
def test_the_judge_condemns_naive_patches(host, ours, naive, kwargs, sampler):
    interval = ours.patch.in_edm_units(ours.Interval(*INTERVAL))
    nodes = [lambda m: harness.run_node(host, kwargs["node"], model=m)[0]] if "node" in kwargs else []
    guider = functools.partial(GUIDERS[kwargs.get("guider", "CFGGuider")], host)
    case = Case(ours, nodes=nodes, guider=guider)
    own = interval(harness.tiny_model("sd15").get_model_object("model_sampling"))
    latent = harness.empty_latent("sd15")
    verdict = harness.judge(case.stack, naive(interval), sampler, sigmas_of("sd15"), latent, own.mask)
    assert verdict.kind == harness.DIFFERENT


def test_an_interval_moved_by_one_step_is_seen(host, ours):
    case = Case(ours)
    wrong = ours.patch.in_edm_units(ours.Interval(0.28, 2.0))
    own = ours.Interval(*INTERVAL)
    verdict = harness.judge(
        case.stack,
        lambda m: ours.patch.patch_model(m, wrong),
        "euler",
        sigmas_of("sd15"),
        harness.empty_latent("sd15"),
        own.mask,
    )
    assert verdict.kind == harness.DIFFERENT

"""The nodes, one by one, in the real ComfyUI: what they set, what they say, what they refuse."""

import copy
import functools
import json
import logging
import re
import subprocess
import sys

import comfy_harness as harness
import pytest
import torch
from torch.overrides import TorchFunctionMode

KARRAS_STEPS = 6


def sigmas_of(model, scheduler="karras", steps=KARRAS_STEPS):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def rows_of(model, cfg=7.0, sampler="euler", sigmas=None, seed=0, kind="sd15", batch=1, guider=None):
    """(rows of each evaluation, final latent)."""
    import comfy.samplers

    if guider is None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(harness.conditioning(1), harness.conditioning(2))
        guider.set_cfg(cfg)
    sigmas = sigmas_of(model) if sigmas is None else sigmas
    with torch.inference_mode(), harness.counted_rows(model) as rows:
        latent = harness.empty_latent(kind, batch)
        evaluations, final = harness.record(
            guider, comfy.samplers.sampler_object(sampler), sigmas, latent, rows, seed=seed
        )
    return [e.rows for e in evaluations], final


def node(host, name, **inputs):
    return harness.run_node(host, name, **inputs)


# ----------------------------------------------------------------------------
# Import.


@pytest.mark.parametrize("folder", ["guidance-interval", "Some.Other Name"])
def test_the_package_imports_without_comfyui(tmp_path, folder):
    link = tmp_path / folder
    link.symlink_to(harness.ROOT, target_is_directory=True)
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("anything", {str(link / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["anything"] = module
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint)
heavy = {{"comfy", "nodes", "k_diffusion", "torchvision", "matplotlib", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ----------------------------------------------------------------------------
# What the nodes set.


def test_the_last_node_wins_and_the_models_are_left_alone(host):
    plain = harness.tiny_model("sd15")
    first = node(host, "GuidanceInterval", model=plain, sigma_lo=0.0, sigma_hi=1000.0)[0]
    second = node(host, "GuidanceInterval", model=first, sigma_lo=0.28, sigma_hi=5.42)[0]
    assert rows_of(second)[0] == [1, 1, 2, 2, 1, 1]
    assert rows_of(first)[0] == [2] * KARRAS_STEPS  # Clones: neither is changed by the other,
    assert rows_of(plain)[0] == [2] * KARRAS_STEPS  # nor by having been used.
    assert rows_of(second.clone())[0] == [1, 1, 2, 2, 1, 1]


def test_everything_guided_is_stock_and_nothing_guided_is_cfg_one(host):
    plain = harness.tiny_model("sd15")
    everything = node(host, "GuidanceInterval", model=plain, sigma_lo=0.0, sigma_hi=1000.0)[0]
    nothing = node(host, "GuidanceInterval", model=plain, sigma_lo=500.0, sigma_hi=1000.0)[0]
    assert torch.equal(rows_of(everything)[1], rows_of(plain)[1])
    assert torch.equal(rows_of(nothing)[1], rows_of(plain, cfg=1.0)[1])


def test_a_lora_on_the_patched_model(host):
    def add_lora(model):
        key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        model = model.clone()
        model.add_patches({key: ("diff", (torch.ones(32, 48),))})
        return model

    def limit(model):
        return node(host, "GuidanceInterval", model=model)[0]

    before, after = (
        rows_of(add_lora(limit(harness.tiny_model("sd15")))),
        rows_of(limit(add_lora(harness.tiny_model("sd15")))),
    )
    assert before[0] == after[0] == [1, 1, 2, 2, 1, 1]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[1], rows_of(limit(harness.tiny_model("sd15")))[1])


@pytest.mark.parametrize("kind", [*harness.MODELS, *harness.TIMED])
def test_edm_units_are_noise_relative_to_the_data(host, ours, kind):
    """By the host's own definition of noising, whatever the parameterization."""
    model_sampling = harness.tiny_model(kind).get_model_object("model_sampling")
    for sigma in (0.05, 0.28, 1.0, 5.42):
        own = torch.tensor([ours.patch.to_model_sigma(sigma, model_sampling)])
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        noise = model_sampling.noise_scaling(own, one.clone(), zero.clone())
        data = model_sampling.noise_scaling(own, zero.clone(), one.clone())
        assert (noise / data).item() == pytest.approx(sigma, rel=1e-5)
        assert ours.patch.from_model_sigma(own.item(), model_sampling) == pytest.approx(sigma, rel=1e-5)


def test_data_of_another_scale(host, ours):
    model = node(
        host,
        "ModelSamplingContinuousEDM",
        model=harness.tiny_model("sd15"),
        sampling="edm_playground_v2.5",
        sigma_max=120.0,
    )[0]
    model_sampling = model.get_model_object("model_sampling")
    assert ours.patch.to_model_sigma(2.0, model_sampling) == pytest.approx(2.0 * model_sampling.sigma_data)
    assert model_sampling.sigma_data == 0.5


def test_a_flow_model_whose_noise_is_scaled(host, ours):
    """x_t = (1 - t) x0 + t * 2 n, of newer hosts' ModelNoiseScale: at t = 1/3 there is as much noise as data."""
    import comfy.model_sampling

    scaled = type("Scaled", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    scaled.noise_scale = 2.0
    assert ours.patch.to_model_sigma(1.0, scaled) == pytest.approx(1 / 3)
    assert ours.patch.from_model_sigma(1 / 3, scaled) == pytest.approx(1.0)


def test_a_shift_after_our_node_changes_the_time_and_not_the_noise(host, ours):
    ours_first = node(host, "GuidanceInterval", model=harness.tiny_model("flow"))[0]
    shifted = node(host, "ModelSamplingSD3", model=ours_first, shift=7.0)[0]
    assert ours.patch.model_interval(shifted) == ours.patch.model_interval(ours_first)
    percent = node(
        host, "GuidanceIntervalPercent", model=harness.tiny_model("flow"), start_percent=0.2, end_percent=0.8
    )[0]
    shifted = node(host, "ModelSamplingSD3", model=percent, shift=7.0)[0]
    sampling = shifted.get_model_object("model_sampling")
    assert ours.patch.model_interval(shifted).sigma_hi == pytest.approx(sampling.percent_to_sigma(0.2))


def test_model_units(host):
    model = node(host, "GuidanceInterval", model=harness.tiny_model("flow"), sigma_lo=0.2, sigma_hi=0.8, units="model")[
        0
    ]
    sigmas = sigmas_of(model, "simple")
    expected = [1 + (0.2 < s <= 0.8) for s in sigmas[:-1].tolist()]
    assert rows_of(model, sigmas=sigmas, kind="flow")[0] == expected


def test_percent_defaults_are_the_sdxl_interval(host, ours):
    model = node(host, "GuidanceIntervalPercent", model=harness.tiny_model("sdxl"))[0]
    interval = ours.patch.model_interval(model)
    assert interval.sigma_hi == pytest.approx(5.42, rel=0.01)
    assert interval.sigma_lo == pytest.approx(0.28, rel=0.01)


def test_steps(host):
    plain = harness.tiny_model("sd15")
    sigmas = sigmas_of(plain)
    for first, last in ((2, 3), (-4, -3)):
        model = node(host, "GuidanceIntervalSteps", model=plain, sigmas=sigmas, first_step=first, last_step=last)[0]
        assert rows_of(model)[0] == [1, 1, 2, 2, 1, 1]
    model = node(host, "GuidanceIntervalSteps", model=plain, sigmas=sigmas)[0]
    assert rows_of(model)[0] == [2] * KARRAS_STEPS
    with pytest.raises(ValueError, match="last must be the index of a step"):
        node(host, "GuidanceIntervalSteps", model=plain, sigmas=sigmas, first_step=0, last_step=6)


def test_presets(host, ours):
    plain = harness.tiny_model("sdxl")
    for name in node_options(host, "GuidanceIntervalPreset", "preset"):
        model, cfg, source = node(host, "GuidanceIntervalPreset", model=plain, preset=name)
        preset = host.ours.get_preset(name)
        assert ours.patch.model_interval(model) == preset.interval()
        assert cfg == preset.weight
        assert source == preset.source


def test_a_graph_of_the_first_version_may_still_link_cfg_to_a_preset(host):
    given = {"model": harness.tiny_model("sdxl"), "preset": "edm2-xxl-fid", "cfg": 4.5}
    assert host.nodes["GuidanceIntervalPreset"].execute(**given).args[1] == 2.0


OWN = """
bad = 5
[good]
model = "m"
sigma_lo = 0.5
sigma_hi = 4
weight = 9
weight_everywhere = 7
[far]
model = "m"
sigma_lo = 0.5
sigma_hi = %s
weight = 9
weight_everywhere = 7
[deep]
model = %s
["\\u001b[31m"]
""" % ("9" * 400, "[" * 50_000 + "]" * 50_000)  # noqa: UP031


def test_a_file_of_presets_with_bad_entries_still_lists_the_good_ones(host, tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "presets.toml"))
    (tmp_path / "presets.toml").write_text(OWN)
    cls = host.nodes["GuidanceIntervalPreset"]
    told = json.dumps(cls.GET_NODE_INFO_V1())  # As /object_info answers.
    assert "good (measured by you)" in told and "bad (measured" not in told  # Newer hosts tell a "price_badge" too.
    assert node_options(host, cls.define_schema().node_id, "preset") == [*host.ours.PRESETS, "good (measured by you)"]
    for name in ("good (measured by you)", "SDXL", None):  # None: linked, and known when it runs.
        assert cls.validate_inputs(preset=name) is True
    assert "sigma_hi must be a number, got 999" in cls.validate_inputs(preset="far (measured by you)")
    assert "unknown preset 'gone (measured by you)'; there are sdxl, " in cls.validate_inputs(
        preset="gone (measured by you)"
    )


def test_the_presets_page_lists_them(host):
    page = (harness.ROOT / "web" / "docs" / "GuidanceIntervalPreset.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\S+)` \| .* \| (\(.*\]) \| .* \|$", page, re.M))
    assert rows == {name: str(preset.interval()) for name, preset in host.ours.PRESETS.items()}


def node_options(host, name, field):
    kind, options = host.nodes[name].INPUT_TYPES()["required"][field]
    return kind if isinstance(kind, list) else options["options"]


@pytest.mark.parametrize("name", ["KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"])
def test_sampler_nodes(host, name):
    """All of them sample 6 karras steps, 2 of them guided; KSamplerAdvanced in two stages."""
    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    latent = {"samples": harness.empty_latent("sd15")}
    common = {"model": model, "cfg": 7.0, **conds, "latent_image": latent}
    sampler = node(host, "KSamplerSelect", sampler_name="euler")[0]
    with torch.inference_mode(), harness.counted_rows(model) as rows:
        if name == "KSampler":
            node(host, name, **common, seed=1, steps=6, sampler_name="euler", scheduler="karras")
        elif name == "KSamplerAdvanced":
            common |= {"noise_seed": 1, "steps": 6, "sampler_name": "euler", "scheduler": "karras"}
            stage = {
                "add_noise": "enable",
                "start_at_step": 0,
                "end_at_step": 3,
                "return_with_leftover_noise": "enable",
            }
            common["latent_image"] = node(host, name, **common, **stage)[0]
            assert rows == [1 + 1 + 2]
            stage = {
                "add_noise": "disable",
                "start_at_step": 3,
                "end_at_step": 6,
                "return_with_leftover_noise": "disable",
            }
            node(host, name, **common, **stage)
        elif name == "SamplerCustom":
            node(host, name, **common, add_noise=True, noise_seed=1, sampler=sampler, sigmas=sigmas_of(model))
        else:
            guider = node(host, "CFGGuider", model=model, cfg=7.0, **conds)[0]
            noise = node(host, "RandomNoise", noise_seed=1)[0]
            inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas_of(model)}
            node(host, name, **inputs, latent_image=latent)
    assert rows == [6 + 2]


def test_guider_without_a_second_model_is_cfg(host):
    plain = harness.tiny_model("sd15")
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    guider = node(host, "GuidanceIntervalGuider", model=plain, cfg=7.0, **conds)[0]
    rows, final = rows_of(plain, guider=guider)
    assert rows == [1, 1, 2, 2, 1, 1]
    assert torch.equal(final, rows_of(node(host, "GuidanceInterval", model=plain)[0])[1])


def test_a_second_model_evaluates_the_negative(host):
    plain, weak = harness.tiny_model("sd15"), harness.tiny_model("sd15", seed=1)
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": 3.0}
    everywhere = {"model": plain, "sigma_lo": 0.0, "sigma_hi": 1000.0, **conds}

    def final(**inputs):
        return rows_of(plain, guider=node(host, "GuidanceIntervalGuider", **everywhere, **inputs)[0])[1]

    autoguided = final(model_negative=weak)
    assert torch.allclose(final(model_negative=plain), final(), rtol=1e-3, atol=1e-2)  # With itself it is CFG.
    assert not torch.allclose(autoguided, final(), rtol=1e-3, atol=1e-2)
    if "DualModelGuider" in host.nodes:
        core = node(host, "DualModelGuider", model=plain, model_negative=weak, **conds)[0]
        assert torch.equal(autoguided, rows_of(plain, guider=core)[1])


def test_the_patch_survives_the_copies_that_the_host_makes(host, ours):
    """Of a model for another GPU it deep-copies the wrappers."""
    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0].clone()
    interval = ours.patch.model_interval(model)
    model.wrappers = copy.deepcopy(model.wrappers)
    assert ours.patch.model_interval(model) == interval
    assert rows_of(model)[0] == [1, 1, 2, 2, 1, 1]


def test_rows_at_different_noise_levels_are_judged_each_by_its_own(host):
    """No sampler of the host mixes them; one of another node might."""
    import comfy.samplers

    def run(model, sigma, cfg=7.0):
        out = []

        def sampler(model, noise, sigmas, extra_args=None, callback=None, disable=None):
            x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
            out.append(model.inner_model(x, sigma, extra_args["model_options"], 0))
            return noise

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(harness.conditioning(1), harness.conditioning(2))
        guider.set_cfg(cfg)
        sigmas = torch.tensor([14.0, 1.0, 0.0])
        harness.sample(guider, comfy.samplers.KSAMPLER(sampler), sigmas, harness.empty_latent("sd15", 2))
        return out[0]

    plain = harness.tiny_model("sd15")
    model = node(host, "GuidanceInterval", model=plain)[0]
    sigma = torch.tensor([8.0, 1.0])
    with torch.inference_mode():
        mixed = run(model, sigma)
        assert torch.equal(mixed[1], run(plain, sigma)[1])
        assert torch.equal(mixed[0], run(plain, sigma, cfg=1.0)[0])


# ----------------------------------------------------------------------------
# Open ends.


@pytest.mark.parametrize("units", ["edm", "model"])
@pytest.mark.parametrize("name", ["GuidanceInterval", "GuidanceIntervalGuider"])
def test_an_open_upper_bound_guides_the_first_step_of_a_flow_model(host, name, units):
    """It is at t = 1, which is sigma = inf; the largest number that can be typed is below it."""
    plain = harness.tiny_model("flow")
    sigmas = sigmas_of(plain, "simple")
    assert sigmas[0] == 1.0

    def rows(sigma_hi):
        inputs = {"model": plain, "sigma_lo": 0.4, "sigma_hi": sigma_hi, "units": units}
        if name == "GuidanceInterval":
            return rows_of(node(host, name, **inputs)[0], sigmas=sigmas, kind="flow")[0]
        conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": 7.0}
        return rows_of(plain, sigmas=sigmas, kind="flow", guider=node(host, name, **inputs, **conds)[0])[0]

    assert rows(-1.0)[0] == 2
    assert rows(1000000.0 if units == "edm" else 0.999)[0] == 1


@pytest.mark.parametrize("kind", harness.MODELS)
def test_an_open_bound_is_open_in_the_models_own_noise_levels(host, ours, kind):
    interval = ours.patch.model_interval(
        node(host, "GuidanceInterval", model=harness.tiny_model(kind), sigma_hi=-1.0)[0]
    )
    assert interval.sigma_hi == float("inf")


def test_the_guider_has_the_units_and_the_outside_of_the_node(host, ours):
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2), "cfg": 7.0}
    inputs = {"model": harness.tiny_model("flow"), "sigma_lo": 0.2, "sigma_hi": 0.8, "units": "model"}
    guider = node(host, "GuidanceIntervalGuider", **inputs, **conds, outside="keep other patches")[0]
    patched = node(host, "GuidanceInterval", **inputs, outside="keep other patches")[0]
    assert (
        ours.patch.model_interval(guider.model_patcher) == ours.patch.model_interval(patched) == ours.Interval(0.2, 0.8)
    )
    wrappers = [m.get_wrappers("predict_noise", "guidance_interval") for m in (guider.model_patcher, patched)]
    assert [w.__self__.outside for (w,) in wrappers] == ["keep other patches"] * 2


def test_three_decimals_survive_the_front_end(host):
    """It cuts what is typed to as many decimals as the step has."""
    for name in ("GuidanceInterval", "GuidanceIntervalGuider"):
        for field in ("sigma_lo", "sigma_hi"):
            options = host.nodes[name].INPUT_TYPES()["required"][field][1]
            assert options["step"] == 0.001 and not options["round"]
            assert options["min"] == -1.0


def test_inputs_that_are_hidden_by_default_need_not_be_sent(host):
    for name in ("GuidanceInterval", "GuidanceIntervalGuider"):
        types = host.nodes[name].INPUT_TYPES()
        for field in ("units", "outside"):
            assert types["optional"][field][1]["advanced"] and "default" in types["optional"][field][1]
        assert not any(options[1].get("advanced") for options in types["required"].values() if len(options) > 1)


# ----------------------------------------------------------------------------
# Before or after other nodes that wrap the evaluation.


def wrap_evaluations(model, wrapper):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "another pack", wrapper)
    return model


def override_cfg(executor, *args, **kwargs):
    """As core's CFGOverride does it."""
    guider = executor.class_obj
    saved, guider.cfg = guider.cfg, 7.5
    try:
        return executor(*args, **kwargs)
    finally:
        guider.cfg = saved


def halve(executor, x, *args, **kwargs):
    return 0.5 * executor(x, *args, **kwargs)


@pytest.mark.parametrize("outside", ["conditional only", "keep other patches"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_cfg_that_another_node_sets_is_limited(host, before, outside):
    plain = harness.tiny_model("sd15")

    def limit(model):
        return node(host, "GuidanceInterval", model=model, outside=outside)[0]

    stack = wrap_evaluations(limit(plain), override_cfg) if before else limit(wrap_evaluations(plain, override_cfg))
    rows, final = rows_of(stack, cfg=1.0)
    assert rows == [1, 1, 2, 2, 1, 1]
    assert torch.equal(final, rows_of(limit(plain), cfg=7.5)[1])


def test_a_function_before_cfg_does_not_act_outside(host):
    plain = harness.tiny_model("sd15")
    model = plain.clone()
    model.set_model_sampler_pre_cfg_function(lambda args: [0.9 * out for out in args["conds_out"]])
    nothing = node(host, "GuidanceInterval", model=model, sigma_lo=500.0, sigma_hi=1000.0)[0]
    assert torch.equal(rows_of(nothing)[1], rows_of(plain, cfg=1.0)[1])
    assert not torch.equal(rows_of(model)[1], rows_of(plain)[1])


@pytest.mark.parametrize("outside", ["conditional only", "keep other patches"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_another_packs_wrapper_acts_at_every_step(host, before, outside):
    plain = harness.tiny_model("sd15")

    def limit(model):
        return node(host, "GuidanceInterval", model=model, outside=outside)[0]

    stack = wrap_evaluations(limit(plain), halve) if before else limit(wrap_evaluations(plain, halve))
    nothing = node(host, "GuidanceInterval", model=plain, sigma_lo=500.0, sigma_hi=1000.0, outside=outside)[0]
    nothing = wrap_evaluations(nothing, halve)
    assert rows_of(stack)[0] == [1, 1, 2, 2, 1, 1]
    assert torch.equal(rows_of(nothing)[1], rows_of(wrap_evaluations(plain, halve), cfg=1.0)[1])
    other = limit(wrap_evaluations(plain, halve)) if before else wrap_evaluations(limit(plain), halve)
    assert torch.equal(rows_of(stack)[1], rows_of(other)[1])


# ----------------------------------------------------------------------------
# What a run leaves behind.


def test_a_run_leaves_nothing_on_the_guider_or_the_model(host):
    import comfy.samplers

    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(harness.conditioning(1), harness.conditioning(2))
    guider.set_cfg(7.0)
    before = set(vars(guider))
    with torch.inference_mode():
        sample = harness.sample(
            guider, comfy.samplers.sampler_object("euler"), sigmas_of(model), torch.zeros(1, 4, 8, 8)
        )
    assert torch.isfinite(sample).all()
    assert "guidance_interval" not in set(vars(guider)) - before
    assert "guidance_interval" not in model.model_options


def test_a_guider_that_samples_in_its_own_way_leaves_the_models_options_alone(host):
    """It asks for evaluations on the model's own options, without the run that the host makes of it."""
    import comfy.sampler_helpers
    import comfy.samplers

    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(harness.conditioning(1), harness.conditioning(2))
    guider.set_cfg(7.0)
    conds = {k: [c.copy() for c in v] for k, v in guider.original_conds.items()}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), harness.counted_rows(model) as rows:
        guider.inner_model, conds, _ = comfy.sampler_helpers.prepare_sampling(model, noise.shape, conds, {})
        model.pre_run()
        guider.conds = comfy.samplers.process_conds(guider.inner_model, noise, conds, torch.device("cpu"))
        wrappers = model.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.update({k: dict(v) for k, v in model.wrappers.items()})
        for sigma, expected in ((8.0, 1), (1.0, 2), (0.1, 1)):
            before = rows[0]
            guider(noise, torch.tensor([sigma]), model.model_options, 0)
            assert rows[0] - before == expected
    assert "guidance_interval" not in model.model_options
    model.cleanup()


# ----------------------------------------------------------------------------
# A schedule that is known beforehand, as on a GPU.


@pytest.fixture
def waiting(ours, monkeypatch):
    """Of a device whose numbers are waited for: sigma of each evaluation that was read."""
    read = []
    guided_rows = ours.Interval.guided_rows
    levels = ours.patch.KnownSchedule.level
    monkeypatch.setattr(ours.patch, "reading_waits", lambda device: True)
    monkeypatch.setattr(
        ours.Interval, "guided_rows", lambda i, sigma: read.append(sigma[0].item()) or guided_rows(i, sigma)
    )
    # Those that are known are not read.
    monkeypatch.setattr(ours.patch.KnownSchedule, "level", lambda *args: read.append(None) or levels(*args))
    return read


def only_read(told):
    """Of the evaluations, the sigma of those that were not known."""
    return [s for before, s in zip([0.0, *told], told, strict=False) if s is not None and before is not None]


def euler(positions):
    """A sampler that evaluates the levels at `positions`, as the host's Euler evaluates each."""
    import comfy.k_diffusion.sampling

    @functools.wraps(comfy.k_diffusion.sampling.sample_euler)
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in positions:
            x = x + 0.1 * model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        return x

    return sample


@pytest.mark.parametrize("kind", harness.MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_euler_waits_for_no_sigma_and_gives_what_reading_it_gives(host, ours, waiting, monkeypatch, kind, batch):
    model = node(host, "GuidanceInterval", model=harness.tiny_model(kind))[0]
    sigmas = sigmas_of(model)
    known = rows_of(model, kind=kind, batch=batch, sigmas=sigmas)
    assert only_read(waiting) == [] and len(waiting) == 2 * KARRAS_STEPS
    monkeypatch.setattr(ours.patch, "reading_waits", lambda device: False)
    waiting.clear()
    read = rows_of(model, kind=kind, batch=batch, sigmas=sigmas)
    assert only_read(waiting) == sigmas[:-1].tolist()
    assert known[0] == read[0] and torch.equal(known[1], read[1])
    assert 0 < sum(r == 2 * batch for r in known[0]) < KARRAS_STEPS


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_of_other_samplers_each_sigma_is_read(host, waiting, sampler):
    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    rows, _ = rows_of(model, sampler=sampler)
    assert len(only_read(waiting)) == len(waiting) == len(rows)


def test_with_churn_each_sigma_is_read(host, waiting):
    import comfy.samplers

    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(harness.conditioning(1), harness.conditioning(2))
    guider.set_cfg(7.0)
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    with torch.inference_mode():
        harness.sample(guider, sampler, sigmas_of(model), harness.empty_latent("sd15"))
    assert len(only_read(waiting)) == len(waiting) == KARRAS_STEPS


class Reads(TorchFunctionMode):
    """Counts the numbers that are read from tensors: on a GPU each waits."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("__bool__", "__float__", "__int__", "item", "tolist", "cpu")
        return function(*args, **(kwargs or {}))


def test_the_hosts_other_samplers_wait_at_every_step(host):
    import comfy.samplers

    model = harness.tiny_model("sd15")
    sigmas = sigmas_of(model, steps=8)
    waiting = set()
    for name in comfy.samplers.KSampler.SAMPLERS:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(harness.conditioning(1), harness.conditioning(2))
        guider.set_cfg(7.0)
        with torch.inference_mode(), Reads() as reads:
            harness.sample(guider, comfy.samplers.sampler_object(name), sigmas, harness.empty_latent("sd15"))
        if reads.count >= 8:
            waiting.add(name)
    assert set(comfy.samplers.KSampler.SAMPLERS) - waiting == {"euler", "ddim", "dpm_fast", "uni_pc", "uni_pc_bh2"}


@pytest.mark.parametrize("positions", [(0, 0, 1, 2, 3, 4, 5), (0, 2, 4), (5, 4, 3, 2, 1, 0)])
def test_an_euler_that_leaves_its_schedule_samples_again_with_sigma_read(
    host, ours, waiting, monkeypatch, caplog, positions
):
    import comfy.k_diffusion.sampling
    import comfy.samplers

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", euler(positions))
    prepared, process_conds = [], comfy.samplers.process_conds

    def process(model, noise, conds, *args, **kwargs):
        prepared.append(any(c["model_conds"] for of in conds.values() for c in of))
        return process_conds(model, noise, conds, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "process_conds", process)
    told = []
    resolve = ours.patch.in_edm_units(ours.Interval(0.28, 5.42))
    model = ours.patch.patch_model(harness.tiny_model("sd15"), resolve, tell=told.append)
    strayed = rows_of(model)
    assert len(only_read(waiting)) == len(positions)
    assert caplog.text.count("left its schedule") == 1 and prepared == [False, False]
    assert told[0]["evaluations"] == len(positions) and told[0]["rows"] == sum(strayed[0][len(positions) :])
    monkeypatch.setattr(ours.patch, "reading_waits", lambda device: False)
    read = rows_of(model)
    assert strayed[0][len(positions) :] == read[0] and torch.equal(strayed[1], read[1])


# ----------------------------------------------------------------------------
# What is said.


def test_nothing_to_limit_runs_untouched_and_says_so_once(host, caplog):
    plain = harness.tiny_model("sd15")
    pag = node(host, "PerturbedAttentionGuidance", model=plain)[0]
    limited = node(host, "GuidanceInterval", model=pag)[0]
    with caplog.at_level(logging.INFO):
        rows, final = rows_of(limited, cfg=1.0)
    stock_rows, stock = rows_of(pag, cfg=1.0)
    assert rows == stock_rows
    assert torch.equal(final, stock)
    assert [r.getMessage() for r in caplog.records if "nothing to limit" in r.getMessage()] == [
        "Guidance Interval: cfg is 1: nothing to limit"
    ]
    caplog.clear()
    basic = node(host, "BasicGuider", model=limited, conditioning=harness.conditioning(1))[0]
    with caplog.at_level(logging.INFO):
        rows_of(limited, guider=basic)
    assert len([r for r in caplog.records if "has no unconditional pass: nothing to limit" in r.getMessage()]) == 1


def told_of(ours, model, **run):
    """What the page is told of a run that an open interval limits."""
    told = []
    limited = ours.patch.patch_model(model, ours.patch.in_edm_units(ours.Interval()), tell=told.append)
    if "guider" in run:
        run["guider"] = run["guider"](limited)
    rows, _ = rows_of(limited, **run)
    return told, sum(rows)


def past_all_wrappers(model):
    """As ComfyUI-NAG's: evaluations go past the wrappers, and so past the interval."""
    import comfy.samplers

    class PastAll(comfy.samplers.CFGGuider):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    guider = PastAll(model)
    guider.set_conds(harness.conditioning(1), harness.conditioning(2))
    guider.set_cfg(7.0)
    return guider


def test_a_guider_that_goes_past_the_interval_is_told_of(host, ours, caplog):
    import comfy.samplers

    def final(model):
        with torch.inference_mode(), harness.counted_rows(model) as rows:
            euler = comfy.samplers.sampler_object("euler")
            out = harness.sample(past_all_wrappers(model), euler, sigmas_of(model), harness.empty_latent("sd15"))
        return out, rows[0]

    told, plain = [], harness.tiny_model("sd15")
    limited = ours.patch.patch_model(plain, ours.patch.in_edm_units(ours.Interval(0.28, 5.42)), tell=told.append)
    with caplog.at_level(logging.WARNING):
        out, rows = final(limited)
    assert torch.equal(out, final(plain)[0])
    (said,) = [r.getMessage() for r in caplog.records if "Guidance Interval" in r.getMessage()]
    assert "PastAll evaluates the model past" in said and "without the interval" in said
    (run,) = told
    assert run["left"] == ("past", "PastAll") and run["rows"] == rows == 2 * KARRAS_STEPS and run["rows_cfg"] is None


def test_the_page_is_told_why_a_run_was_left_as_it_is(host, ours):
    def basic(model):
        return node(host, "BasicGuider", model=model, conditioning=harness.conditioning(1))[0]

    model = harness.tiny_model("sd15")
    for left, run in ((("cfg_one", ""), {"cfg": 1.0}), (("no_uncond", "Guider_Basic"), {"guider": basic})):
        (told,), rows = told_of(ours, model, **run)
        assert (told["left"], told["rows"], told["rows_cfg"]) == (left, rows, None)
    (told,), rows = told_of(ours, model)
    assert (told["left"], told["rows"], told["rows_cfg"]) == (None, rows, rows)


def test_a_run_that_a_pack_makes_impossible_to_limit_is_told_without_a_saving(host, ours):
    from test_packs import replaced_sampling_function

    told = []
    pack = replaced_sampling_function(harness.tiny_model("sd15"), post_cfg=False)
    limited = ours.patch.patch_model(pack, ours.patch.in_edm_units(ours.Interval(0.28, 5.42)), tell=told.append)
    rows_of(limited, batch=4)
    assert told[0]["left"] == ("pack", "test_packs") and told[0]["rows_cfg"] is None


def test_a_run_of_no_steps_is_not_said_to_go_past_the_interval(host, ours, caplog):
    told, _ = told_of(ours, harness.tiny_model("sd15"), sigmas=torch.tensor([1.0]))
    assert not told and not [r for r in caplog.records if "Guidance Interval" in r.getMessage()]


def test_cfg_plus_plus_at_cfg_one_is_limited_all_the_same(host):
    """Its step uses the unconditional prediction at any cfg."""
    model = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    assert rows_of(model, cfg=1.0, sampler="euler_cfg_pp")[0] == [1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("kind", ["sd15", "flow"])
def test_an_unused_interval_gives_one_warning_with_the_range(host, caplog, kind):
    model = node(host, "GuidanceInterval", model=harness.tiny_model(kind), sigma_lo=500.0, sigma_hi=600.0)[0]
    sigmas = sigmas_of(model, "simple" if kind == "flow" else "karras")
    with caplog.at_level(logging.WARNING):
        rows_of(model, kind=kind, sigmas=sigmas)
    said = [r.getMessage() for r in caplog.records if "lies in the interval" in r.getMessage()]
    assert len(said) == 1
    assert f"sigma {sigmas[0].item():.4g} to {sigmas[-2].item():.4g}" in said[0]


def test_sag_under_keep_says_that_it_acts_inside_alone(host, caplog):
    sag = node(host, "SelfAttentionGuidance", model=harness.tiny_model("sd15"))[0]
    model = node(host, "GuidanceInterval", model=sag, outside="keep other patches")[0]
    with caplog.at_level(logging.INFO):
        rows_of(model)
    assert len([r for r in caplog.records if "Self-Attention Guidance" in r.getMessage()]) == 1


# ----------------------------------------------------------------------------
# What is refused.

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("GuidanceInterval", {"sigma_lo": NAN, "sigma_hi": 1.0}, "sigma_lo must lie between -1 and 1000000, got nan"),
        ("GuidanceInterval", {"sigma_lo": 2.0, "sigma_hi": 1.0}, "sigma_lo must be below sigma_hi"),
        ("GuidanceInterval", {"sigma_lo": 1.0, "sigma_hi": 1.0}, "sigma_lo must be below sigma_hi"),
        ("GuidanceInterval", {"sigma_lo": -2.0, "sigma_hi": 1.0}, "sigma_lo must lie between -1"),
        ("GuidanceInterval", {"sigma_lo": 0.28, "sigma_hi": -0.5}, "sigma_hi must be 0 or above, or -1 for none"),
        ("GuidanceInterval", {"sigma_lo": 0.28, "sigma_hi": 1000001.0}, "sigma_hi must lie between"),
        ("GuidanceInterval", {"sigma_hi": 2000000.0}, "sigma_hi must lie between"),  # The other is linked.
        ("GuidanceIntervalGuider", {"sigma_lo": 2.0, "sigma_hi": NAN}, "sigma_hi must lie between"),
        ("GuidanceIntervalPercent", {"start_percent": 0.5, "end_percent": 0.5}, "start_percent must be below"),
        (
            "GuidanceIntervalPercent",
            {"start_percent": NAN, "end_percent": 0.5},
            "start_percent must lie between 0 and 1",
        ),
        ("GuidanceIntervalPercent", {"start_percent": 0.1, "end_percent": 1.5}, "end_percent must lie between 0 and 1"),
        ("GuidanceIntervalSteps", {"first_step": 5, "last_step": 4}, "first_step must not come after last_step"),
        ("GuidanceIntervalSteps", {"first_step": 5, "last_step": 10001}, "last_step must lie between"),
        ("GuidanceIntervalCompare", {"intervals": "0.3, 5\n5, 0.3"}, "line 2: sigma_lo must be below"),
        ("GuidanceIntervalCompare", {"intervals": "0.3, x"}, "inf or -1 leaves sigma_hi open"),
        ("GuidanceIntervalCompare", {"intervals": "0.3"}, "line 1: give sigma_lo and sigma_hi"),
        ("GuidanceIntervalCompare", {"intervals": " # none\n"}, "at least one interval"),
    ],
)
def test_refused(host, name, inputs, message):
    assert message in host.nodes[name].validate_inputs(**inputs)


def test_linked_inputs_are_refused_when_they_are_known(host):
    plain = harness.tiny_model("sd15")
    with pytest.raises(ValueError, match="sigma_lo must be below") as refused:
        node(host, "GuidanceInterval", model=plain, sigma_lo=2.0, sigma_hi=1.0)
    assert str(refused.value) == str(refused.value)  # However often the host asks.
    with pytest.raises(ValueError, match="start_percent must be below"):
        node(host, "GuidanceIntervalPercent", model=plain, start_percent=0.9, end_percent=0.1)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("GuidanceInterval", {"sigma_lo": 0.0, "sigma_hi": 5.0}),
        ("GuidanceInterval", {"sigma_hi": 5.0}),  # sigma_lo is linked: known when it runs.
        ("GuidanceIntervalPercent", {"start_percent": 0.0, "end_percent": 1.0}),
        ("GuidanceIntervalSteps", {"first_step": 5, "last_step": -1}),
        ("GuidanceIntervalCompare", {"intervals": "(0.28, 5.42]  # SDXL\n\n0 1\n0.28, inf\n-1, -1"}),
        ("GuidanceInterval", {"sigma_lo": -1.0, "sigma_hi": -1.0}),
        ("GuidanceInterval", {"sigma_lo": 0.0, "sigma_hi": 1000000.0}),
    ],
)
def test_accepted(host, name, inputs):
    assert host.nodes[name].validate_inputs(**inputs) is True


# ----------------------------------------------------------------------------
# The schedule.


@pytest.mark.parametrize("kind", ["sd15", "flow"])
def test_schedule(host, kind):
    model = node(host, "GuidanceInterval", model=harness.tiny_model(kind))[0]
    sigmas = sigmas_of(model, "simple" if kind == "flow" else "karras", 12)
    plot, table, guided, rows = node(host, "GuidanceIntervalSchedule", model=model, sigmas=sigmas)
    counted = rows_of(model, sigmas=sigmas, kind=kind)[0]
    assert guided == counted.count(2)
    assert rows == pytest.approx(sum(counted) / (2 * len(counted)))
    assert table.count("yes") == guided
    assert plot.ndim == 4 and plot.shape[-1] == 3 and plot.dtype == torch.float32
    assert 0 <= plot.min() < plot.max() <= 1


def test_schedule_without_an_interval(host):
    plain = harness.tiny_model("sd15")
    with pytest.raises(ValueError, match="no guidance interval"):
        node(host, "GuidanceIntervalSchedule", model=plain, sigmas=sigmas_of(plain))


@pytest.mark.parametrize(
    ("sigmas", "guided"),
    [([1.0, 0.0], 1), ([1.0, 0.5, 0.0, 0.0], 2), ([0.5, 0.0, 0.5, 0.0], 2), ([1.0, 1.0, 0.0], 2)],
    ids=["one step", "an inner 0", "a restart", "twice at 1"],
)
def test_schedules_at_the_limits(host, sigmas, guided):
    model = node(host, "GuidanceInterval", model=harness.tiny_model("flow"), sigma_lo=0.28, sigma_hi=-1.0)[0]
    plot, table, count, rows = node(host, "GuidanceIntervalSchedule", model=model, sigmas=torch.tensor(sigmas))
    steps = len(sigmas) - 1
    assert count == guided and rows == pytest.approx((steps + guided) / (2 * steps))
    assert torch.isfinite(plot).all() and plot.min() < plot.max()
    assert "(0.28, inf]" in table


# ----------------------------------------------------------------------------
# The comparison.


def compare(host, kind="sd15", latent=None, **inputs):
    model = harness.tiny_model(kind)
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    latent = {"samples": harness.empty_latent(kind)} if latent is None else latent
    inputs = {
        "model": model,
        "vae": harness.tiny_vae(kind),
        "latent": latent,
        "steps": 6,
        "scheduler": "karras",
    } | inputs
    with torch.inference_mode():
        return node(host, "GuidanceIntervalCompare", **conds, **inputs)


def rows_told(report):
    return [int(line[18:].split()[0]) for line in report.splitlines()[1:] if "frames" not in line]


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
def test_the_last_column_is_what_an_interval_does_outside(host, sampler):
    _, images, report = compare(host, sampler=sampler, cfg=7.0, intervals="0.28, 5.42\n500, 1000")
    assert rows_told(report) == [12, 8, 6, 6]
    assert torch.equal(images[2], images[3])  # An interval without a step, and none at all.
    assert not torch.equal(images[1], images[3])


def test_the_comparison_takes_an_open_bound_and_an_interval_off_the_model(host):
    limited = node(host, "GuidanceInterval", model=harness.tiny_model("sd15"))[0]
    _, images, report = compare(host, model=limited, sampler="euler", cfg=7.0, intervals="0, inf\n-1 -1")
    assert rows_told(report) == [12, 12, 12, 6]
    assert report.count("(0, inf]") == 2
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_the_comparison_says_nothing_of_an_interval_that_guides_nothing(host, caplog):
    with caplog.at_level(logging.WARNING):
        compare(host, sampler="euler", cfg=7.0, intervals="0.28, 5.42")
    assert not [r for r in caplog.records if "nothing will be guided" in r.getMessage()]


def test_of_a_video_a_few_frames_are_shown(host):
    """9 latent frames are 33 pictures."""
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    inputs = {"latent": latent, "sampler": "euler", "scheduler": "simple", "steps": 2, "intervals": "0.28, 5.42"}
    grid, images, report = compare(host, "video", **inputs)
    assert images.shape == (3 * 4, 64, 64, 3)
    assert grid.shape == (1, 44 + 4 * 64, 3 * 200, 3)
    assert "4 of 33 frames are shown" in report
    assert not torch.equal(images[0], images[3])


def test_sound_is_refused_before_it_is_sampled(host):
    latent = {"samples": harness.empty_latent("sd15"), "type": "audio"}
    with harness.counted_rows(harness.tiny_model("sd15")) as rows, pytest.raises(ValueError, match="is for sound"):
        compare(host, latent=latent)
    assert rows == [0]


def test_a_linked_denoise_of_zero_is_refused(host):
    with pytest.raises(ValueError, match=r"denoise must be at least 0\.01, got 0\.0"):
        compare(host, denoise=0.0)
    assert host.nodes["GuidanceIntervalCompare"].INPUT_TYPES()["required"]["denoise"][1]["min"] == 0.01


@pytest.mark.parametrize(
    ("count", "batch", "size"), [(3, 2, 64), (30, 1, 512), (4, 8, 1024), (2, 1, 5000), (100, 4, 256), (5, 64, 512)]
)
def test_a_grid_is_of_a_size_that_can_be_looked_at(host, count, batch, size):
    pictures = harness.our_module(host, "pictures")
    shades = torch.linspace(0.05, 0.95, count)
    columns = [(f"{i}", shade.expand(batch, size, size, 3)) for i, shade in enumerate(shades)]
    grid = pictures.label_grid(columns)
    assert max(grid.size) <= 1.5 * pictures.MAX_SIDE and grid.width * grid.height <= 2.5 * pictures.MAX_PIXELS
    found = {value[0] for _, value in grid.convert("RGB").getcolors(1 << 24)}
    assert {round(float(shade) * 255) for shade in shades} <= found  # Every column is there.
    if count == 3:
        assert grid.size == (3 * 200, 44 + 2 * 64)  # As it is where it fits.

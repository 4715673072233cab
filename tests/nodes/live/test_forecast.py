"""The forecast of a run against the run: what the live picture counts is what the network evaluates."""

import json
import math
import re
import types

import comfy_harness as harness
import pytest
import torch


def prompt_of(kind="sd15", interval=None, **sampler):
    """A KSampler behind an interval node, behind a loader that this server has no file for."""
    interval = interval or {"class_type": "GuidanceInterval", "inputs": {"sigma_lo": 0.28, "sigma_hi": 5.42}}
    interval["inputs"]["model"] = ["1", 0]
    inputs = {"seed": 3, "steps": 6, "cfg": 5.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{kind}.ckpt"}},
        "2": interval,
        "3": {"class_type": "KSampler", "inputs": {**inputs, **sampler, "model": ["2", 0]}},
    }


def remembered(live, prompt, kind):
    """As after a first run of that prompt: the sampling of the model is known."""
    hidden = types.SimpleNamespace(unique_id="2", prompt=prompt)
    live.events.teller(types.SimpleNamespace(hidden=hidden), harness.tiny_model(kind))


def chart(live, prompt, node="2"):
    drawn = live.route.describe(prompt, node)
    assert "error" not in drawn, drawn
    return json.loads(json.dumps(drawn, allow_nan=False))


def rows_of_run(host, prompt, kind, node="KSampler"):
    model = harness.tiny_model(kind)
    limited = {k: v for k, v in prompt["2"]["inputs"].items() if k != "model"}
    (model,) = harness.run_node(host, prompt["2"]["class_type"], model=model, **limited)[:1]
    inputs = {k: v for k, v in prompt["3"]["inputs"].items() if k != "model"}
    latent = {"samples": harness.empty_latent(kind)}
    conds = {"positive": harness.conditioning(0), "negative": harness.conditioning(1)}
    with torch.inference_mode(), harness.counted_rows(model) as rows:
        harness.run_node(host, node, model=model, latent_image=latent, **conds, **inputs)
    return rows[0]


@pytest.mark.parametrize("kind", ["sd15", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpm_2_ancestral"])
def test_rows_are_those_of_the_run_for_every_scheduler(host, live, kind, sampler):
    import comfy.samplers

    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        prompt = prompt_of(kind, sampler_name=sampler, scheduler=scheduler)
        remembered(live, prompt, kind)
        drawn = chart(live, prompt)
        assert drawn["rows"] == rows_of_run(host, prompt, kind), (sampler, scheduler)
        assert drawn["notes"] == [] and drawn["scheduler"] == scheduler
        assert drawn["rows_everywhere"] == 2 * drawn["evaluations"]
        assert sum(p[2] for p in drawn["points"] if p[3]) == drawn["guided"]


def test_rows_are_those_of_the_run_for_every_sampler(host, live):
    import comfy.samplers

    for sampler in comfy.samplers.KSampler.SAMPLERS:
        prompt = prompt_of(sampler_name=sampler, steps=5)
        remembered(live, prompt, "sd15")
        torch.manual_seed(7)
        before = torch.get_rng_state()
        drawn = chart(live, prompt)
        assert torch.equal(before, torch.get_rng_state()), f"{sampler}: a run in another thread would notice"
        codes = {code for code, _ in drawn["notes"]}
        if sampler == "dpm_adaptive":
            assert codes == {"adaptive"} and "rows" not in drawn
            continue
        if codes:  # A sampler for a model of its own kind.
            assert sampler == "ar_video" and codes == {"one_evaluation"}, (sampler, codes)
            continue
        assert drawn["rows"] == rows_of_run(host, prompt, "sd15"), sampler


@pytest.mark.parametrize("kind", ["sd15", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_level_of_each_evaluation_is_told_in_edm_units(live, kind, sampler):
    prompt = prompt_of(kind, sampler_name=sampler, scheduler="simple")
    remembered(live, prompt, kind)
    run = live.forecast.forecast(prompt, "2")
    sampling = run.model.get_model_object("model_sampling")
    told = [math.inf if s is None else s for s in chart(live, prompt)["sigmas"]]
    assert told == [live.model_patch.from_model_sigma(s, sampling) for s in run.evaluated]
    assert len(told) == (6 if sampler == "euler" else 11) and (told[0] == math.inf) == (kind == "flow")


def test_where_the_image_decides_no_level_is_told(live):
    prompt = prompt_of(sampler_name="dpm_adaptive")
    remembered(live, prompt, "sd15")
    assert chart(live, prompt)["sigmas"] is None
    assert chart(live, prompt_of(steps=6, denoise=0.0))["sigmas"] == []


def test_each_of_several_samplers_can_be_asked_for(live):
    prompt = prompt_of(steps=6)
    advanced = {k: v for k, v in prompt["3"]["inputs"].items() if k != "denoise"}
    prompt["4"] = {"class_type": "KSamplerAdvanced", "inputs": {**advanced, "steps": 9, "start_at_step": 4}}
    remembered(live, prompt, "sd15")
    first, second = (live.route.describe(prompt, "2", sampler) for sampler in ("3", "4"))
    assert (first["sampler_id"], len(first["sigmas"]), second["sampler_id"], len(second["sigmas"])) == ("3", 6, "4", 5)
    assert first["samplers"] == second["samplers"] == ["3", "4"] and first["notes"] == second["notes"] == []
    assert live.route.describe(prompt, "2")["notes"] == [["samplers", "KSampler #3"]]
    for other in ("1", "2", "9", "x" * 9999):
        answer = live.route.describe(prompt, "2", other)
        assert answer.keys() == {"error"} and "samples nothing that node '2' limits" in answer["error"]
        assert len(answer["error"]) < 200


@pytest.mark.parametrize(
    ("interval", "edges"),
    [
        ({"class_type": "GuidanceIntervalPercent", "inputs": {"start_percent": 0.2, "end_percent": 0.8}}, True),
        ({"class_type": "GuidanceIntervalPreset", "inputs": {"preset": "sdxl"}}, False),
        ({"class_type": "GuidanceInterval", "inputs": {"sigma_lo": 0.2, "sigma_hi": 0.8, "units": "model"}}, True),
        ({"class_type": "GuidanceInterval", "inputs": {"sigma_lo": -1, "sigma_hi": -1}}, True),
    ],
)
@pytest.mark.parametrize("kind", ["sd15", "flow"])
def test_every_way_to_give_an_interval(host, live, kind, interval, edges):
    prompt = prompt_of(kind, json.loads(json.dumps(interval)))
    remembered(live, prompt, kind)
    drawn = chart(live, prompt)
    assert drawn["rows"] == rows_of_run(host, prompt, kind)
    for side in ("lo", "hi"):
        edge = drawn["edges"][side]
        assert (edge is not None) == edges
        if edges:
            # Each stop, typed into the node, is drawn where it was: values and picture are in step.
            for y, value in edge["stops"][:: max(1, len(edge["stops"]) // 7)]:
                other = {"sigma_lo": -1, "sigma_hi": -1, "start_percent": 0.0, "end_percent": 1.0}
                inputs = {k: other.get(k, v) for k, v in prompt["2"]["inputs"].items()} | {edge["widget"]: value}
                moved = live.route.describe({**prompt, "2": {**prompt["2"], "inputs": inputs}}, "2")
                if "error" not in moved:  # At the other end nothing would be left.
                    assert moved["band"][side == "hi"] == pytest.approx(y, abs=0.02)


def test_steps_and_custom_samplers(host, live):
    """A schedule that nodes make, in parts; a sampler with settings; steps that count in it."""
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.ckpt"}},
        "4": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "karras", "steps": ["9", 0], "denoise": 1.0},
        },
        "5": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["4", 0], "step": 2}},
        "6": {
            "class_type": "SamplerDPMPP_SDE",
            "inputs": {"eta": 1.0, "s_noise": 1.0, "r": 0.5, "noise_device": "cpu"},
        },
        "2": {
            "class_type": "GuidanceIntervalSteps",
            "inputs": {"model": ["1", 0], "sigmas": ["5", 1], "first_step": 1, "last_step": -3},
        },
        "7": {"class_type": "CFGGuider", "inputs": {"model": ["2", 0], "cfg": 4.0}},
        "3": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"guider": ["7", 0], "sampler": ["6", 0], "sigmas": ["5", 1]},
        },
        "9": {"class_type": "PrimitiveInt", "inputs": {"value": 10}},
    }
    drawn = chart(live, prompt)
    assert (drawn["steps"], drawn["guided"], drawn["evaluations"]) == (8, 5, 15)
    assert drawn["notes"] == [["model", "CheckpointLoaderSimple"]]
    assert [value for _, value in drawn["edges"]["hi"]["stops"]] == list(reversed(range(8)))
    assert [value for _, value in drawn["edges"]["lo"]["stops"]] == list(range(-1, -9, -1))
    prompt["2"]["inputs"]["first_step"] = 0  # Counted from the start too.
    assert [value for _, value in chart(live, prompt)["edges"]["hi"]["stops"]] == list(reversed(range(8)))
    # Nodes of others are not run; what they would have given is assumed.
    prompt["4"]["class_type"] = "SomebodysScheduler"
    codes = dict(chart(live, prompt)["notes"])
    assert codes["unknown_sigmas"] == "SomebodysScheduler"


def test_start_and_end_step(host, live):
    for start, end, leftover in ((0, 3, "enable"), (2, 10000, "disable"), (1, 4, "disable")):
        advanced = {"start_at_step": start, "end_at_step": end, "return_with_leftover_noise": leftover}
        prompt = prompt_of(**advanced, noise_seed=1, add_noise="enable")
        for name in ("denoise", "seed"):
            del prompt["3"]["inputs"][name]
        prompt["3"]["class_type"] = "KSamplerAdvanced"
        remembered(live, prompt, "sd15")
        drawn = chart(live, prompt)
        assert drawn["rows"] == rows_of_run(host, prompt, "sd15", "KSamplerAdvanced")
        assert drawn["guided"] == drawn["evaluations_guided"]  # Not the level where it ends, guided or not.
        end = live.forecast.forecast(prompt, "2").levels[-1]
        assert (end > 0) == (leftover == "enable")  # What is left for a next stage.
    part = prompt_of(denoise=0.5)
    remembered(live, part, "sd15")
    assert chart(live, part)["rows"] == rows_of_run(host, part, "sd15")


def test_a_stage_that_only_ends_in_the_interval_is_not_guided(live):
    for end, guided in ((2, False), (3, True)):  # The levels are 14.6, 6.1, 2.2, ...; the interval begins at 5.42.
        prompt = prompt_of(start_at_step=0, end_at_step=end, return_with_leftover_noise="enable")
        prompt["3"]["class_type"] = "KSamplerAdvanced"
        assert live.forecast.guides_a_stage(prompt) == guided


def test_what_is_behind_the_interval_node(host, live):
    """Patches of the model's sampling act wherever they are; another interval takes over; a cfg of 1 saves nothing."""
    shifted = prompt_of("flow")
    remembered(live, shifted, "flow")
    plain = chart(live, shifted)
    shifted["8"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["2", 0], "shift": 12.0}}
    shifted["3"]["inputs"]["model"] = ["8", 0]
    after = chart(live, shifted)
    assert after["points"] != plain["points"] and after["notes"] == []
    shifted["8"]["inputs"]["model"], shifted["2"]["inputs"]["model"] = ["1", 0], ["8", 0]
    shifted["3"]["inputs"]["model"] = ["2", 0]
    assert chart(live, shifted)["steps"] == 6

    unknown = prompt_of()
    unknown["8"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 12.0}}
    unknown["2"]["inputs"]["model"] = ["8", 0]
    drawn = chart(live, unknown)  # A flow model, whatever the file holds.
    assert drawn["notes"] == [] and drawn["points"] == after["points"]

    again = prompt_of()
    again["4"] = {"class_type": "GuidanceInterval", "inputs": {"model": ["2", 0], "sigma_lo": 1.0, "sigma_hi": 2.0}}
    again["3"]["inputs"]["model"] = ["4", 0]
    assert ["replaced", "GuidanceInterval"] in chart(live, again)["notes"]

    weightless = chart(live, prompt_of(cfg=1.0))
    assert weightless["saved"] == 0 and weightless["nothing"] == "cfg"
    assert chart(live, prompt_of(cfg=1.0, sampler_name="euler_cfg_pp"))["saved"] > 0


def test_wrong_values_are_said_as_the_node_says_them(live):
    prompt = prompt_of(interval={"class_type": "GuidanceInterval", "inputs": {"sigma_lo": 5, "sigma_hi": 1}})
    assert live.route.describe(prompt, "2")["error"].startswith("sigma_lo must be below sigma_hi")
    assert "failed" not in live.route.describe(prompt, "2")
    assert "no guidance interval" in live.route.describe(prompt, "3")["error"]
    assert "1000 steps" in live.route.describe(prompt_of(steps=5000), "2")["error"]


# ----------------------------------------------------------------------------
# Models, from the header of their file.


def write_header(path, shapes, small=()):
    """A safetensors file of those shapes: the header, and a hole where the weights would be."""
    entries, offset = {}, 0
    for name, shape in [*shapes.items(), *((name, [1]) for name in small)]:
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)


def shapes(module, prefix="model.diffusion_model."):
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_a_checkpoint_is_known_by_its_header(host, live, tmp_path, monkeypatch):
    import comfy.model_sampling as ms
    import comfy.ops
    import folder_paths
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors", ".ckpt"})
    )
    folder_paths.filename_list_cache.pop("checkpoints", None)
    sdxl = {
        **harness.UNET,
        "model_channels": 320,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_head_channels": 64,
    }
    sdxl |= {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10]}
    sdxl |= {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    sdxl |= {"use_linear_in_transformer": True, "num_classes": "sequential"}
    with torch.device("meta"):
        unet = UNetModel(**sdxl, device="meta", operations=comfy.ops.disable_weight_init)
    write_header(tmp_path / "sdxl.safetensors", shapes(unet))
    write_header(tmp_path / "v.safetensors", shapes(unet), small=["v_pred", "ztsnr"])
    write_header(tmp_path / "alone.safetensors", shapes(unet, prefix=""))  # As diffusion models are given away.
    assert (tmp_path / "sdxl.safetensors").stat().st_size > 5e9  # Of which a few kilobytes are written or read.
    (tmp_path / "old.ckpt").write_bytes(b"a pickle")
    (tmp_path / "broken.safetensors").write_bytes(bytes(40))

    def of(name):
        prompt = prompt_of()
        prompt["1"]["inputs"]["ckpt_name"] = name
        notes = []
        model = live.prompt_graph.Graph(prompt, "2").model(["2", 0], notes)
        return model.get_model_object("model_sampling"), notes

    for name in ("sdxl.safetensors", "alone.safetensors"):
        sampling, notes = of(name)
        assert isinstance(sampling, ms.EPS) and not isinstance(sampling, ms.V_PREDICTION) and notes == []
        assert float(sampling.sigma_max) == pytest.approx(14.61, abs=0.01)
    sampling, notes = of("v.safetensors")
    assert isinstance(sampling, ms.V_PREDICTION) and notes == [] and float(sampling.sigma_max) > 1000
    for name in ("old.ckpt", "broken.safetensors", "absent.safetensors", "../../etc/passwd"):
        sampling, notes = of(name)
        assert notes == [["model", "CheckpointLoaderSimple"]] and float(sampling.sigma_max) < 15


def test_the_demo_model_is_its_own(live):
    prompt = prompt_of()
    prompt["1"] = {"class_type": "GuidanceIntervalDemoModel", "inputs": {"batch_size": 2}}
    drawn = chart(live, prompt)
    assert drawn["notes"] == [] and max(tick for _, tick in drawn["ticks"]) == 100


# ----------------------------------------------------------------------------
# After a run.


def told(host, live, kind="sd15", batch=1, **sampler):
    """(what the page is told of a run, rows that the network evaluated)."""
    said = []
    model = live.model_patch.patch_model(
        harness.tiny_model(kind),
        live.model_patch.in_edm_units(live.model_patch.to_interval(0.28, 5.42)),
        tell=said.append,
    )
    inputs = {
        "seed": 3,
        "steps": 8,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "karras",
        "denoise": 1.0,
        **sampler,
    }
    conds = {"positive": harness.conditioning(0), "negative": harness.conditioning(1)}
    latent = {"samples": harness.empty_latent(kind, batch)}
    with torch.inference_mode(), harness.counted_rows(model) as rows:
        out = harness.run_node(host, "KSampler", model=model, latent_image=latent, **conds, **inputs)
    return said, rows[0], out[0]["samples"]


def test_a_run_is_told_as_it_was(host, live):
    (report,), rows, _ = told(host, live, batch=3)
    assert report["rows"] == rows == 3 * (8 + report["guided"])
    assert report["evaluations"] == 8 and report["rows_cfg"] == 48
    assert 0 < report["seconds"] <= report["seconds_cfg"]


@pytest.mark.parametrize("guided", [[False] * 4 + [True] * 3 + [False] * 3, [False, False, True, True, False]])
def test_seconds_are_estimated_from_evaluations_that_tell(live, guided):
    """Evaluations of 1 s, or 2 s where guided; the first of a kind takes 10 s more, or 60 s."""
    run, clock = live.model_patch.SamplingRun(live.model_patch.GuidanceInterval(1.0, 2.0)), 0.0
    for i, g in enumerate(guided):
        run.evaluations.append((g, run.rows, clock))
        run.rows += 2 if g else 1
        clock += (2.0 if g else 1.0) + (0.0 if g in guided[:i] else 60.0 if g else 10.0)
    report = run.report(clock, (run.rows, clock))
    steps, rows = len(guided), len(guided) + sum(guided)
    assert (report["rows"], report["rows_cfg"]) == (rows, 2 * steps)
    assert (report["seconds"], report["seconds_cfg"]) == (rows + 70.0, 2 * steps + 70.0)
    short = live.model_patch.SamplingRun(run.interval, rows=3, evaluations=[(False, 0, 0.0), (True, 1, 1.0)])
    assert short.report(3.0, (3, 3.0))["seconds_cfg"] is None


def test_of_a_run_that_was_not_limited_the_reason_is_told(host, live):
    (run,), _, _ = told(host, live, cfg=1.0)
    assert run["left"] == ("cfg_one", "") and run["rows"] == 8 and run["rows_cfg"] is None


def test_telling_changes_nothing(host, live):
    _, _, samples = told(host, live)
    prompt = prompt_of(steps=8)
    model = harness.tiny_model("sd15")
    (model,) = harness.run_node(host, "GuidanceInterval", model=model)
    inputs = {k: v for k, v in prompt["3"]["inputs"].items() if k != "model"}
    conds = {"positive": harness.conditioning(0), "negative": harness.conditioning(1)}
    with torch.inference_mode():
        out = harness.run_node(
            host, "KSampler", model=model, latent_image={"samples": harness.empty_latent("sd15")}, **conds, **inputs
        )
    assert torch.equal(out[0]["samples"], samples)


def test_a_second_model_is_counted_too(host, live):
    import comfy.samplers

    said = []
    resolve = live.model_patch.in_edm_units(live.model_patch.to_interval(0.28, 5.42))
    model = live.model_patch.patch_model(harness.tiny_model("sd15"), resolve, tell=said.append)
    guider = harness.our_module(host, "guider").TwoModelGuider(model, harness.loaded_again("sd15", seed=1))
    guider.set_conds(harness.conditioning(0), harness.conditioning(1))
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 8)
    with torch.inference_mode():
        harness.sample(guider, comfy.samplers.sampler_object("euler"), sigmas, harness.empty_latent("sd15"))
    (report,) = said
    assert report["rows"] == 8 + report["guided"] and report["guided"] > 0


# ----------------------------------------------------------------------------
# Words.


def test_each_language_says_the_same():
    def leaves(tree, path=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, (*path, key))
            else:
                yield (*path, key), set(re.findall(r"\{\w+\}", value))

    def of(language, name):
        path = harness.ROOT / "locales" / language / name
        return dict(leaves(json.loads(path.read_text(encoding="utf-8"))))

    for name in ("main.json", "settings.json"):
        assert of("en", name) == of("ja", name)
    sources = (harness.ROOT / "nodes" / "live" / f"{name}.py" for name in ("forecast", "prompt_graph"))
    codes = {c for path in sources for c in re.findall(r'notes\.append\(\["(\w+)"', path.read_text(encoding="utf-8"))}
    assert codes == {path[-1] for path in of("en", "main.json") if "notes" in path}
    page = (harness.ROOT / "web" / "live.js").read_text(encoding="utf-8")
    used = set(re.findall(r"strings\.(\w+)", page))
    assert used == {path[1] for path in of("en", "main.json")}

"""End to end: a stock ComfyUI server on loopback, our folder in its custom_nodes, every shipped workflow run in it.

Small random checkpoints, made here, stand in for the real ones; the workflows are the files that users open.
"""

import io
import json
import shutil
import string
import urllib.error
import urllib.request
import uuid

import comfy_harness as harness
import numpy as np
import pytest
import torch
from comfy_server import FOLDER, NODES, load_workflow, new_base, node_inputs, running, to_prompt
from PIL import Image

WORKFLOWS = sorted(path.stem for path in (harness.ROOT / "workflows").glob("*.json"))
SMALL = {"steps": 4, "width": 64, "height": 64, "length": 5, "seconds": 1.0}


# ----------------------------------------------------------------------------
# Stand-ins.


def half(module, prefix=""):
    return {prefix + k: v.half().contiguous() for k, v in module.state_dict().items()}


def save_models(host, folder):
    """Checkpoints sd, weak (SD1.5's keys and widths, one level deep), flow (SD3's) and audio; the parts of video."""
    import comfy.model_base as mb
    import comfy.sd1_clip
    import comfy.supported_models as sm
    from comfy.ldm.wan.vae import WanVAE
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import save_file

    clip = comfy.sd1_clip.SDClipModel(dtype=torch.float32).transformer
    harness.randomize(clip, seed=0)
    unet = {**harness.UNET, "model_channels": 320, "context_dim": 768, "num_res_blocks": [1], "channel_mult": [1]}
    unet |= {"transformer_depth": [1], "transformer_depth_output": [1, 1], "dtype": torch.float32}
    for name, seed in (("sd", 0), ("weak", 1)):
        model = mb.BaseModel(sm.SD15(dict(unet)), mb.ModelType.EPS)
        harness.randomize(model.diffusion_model, seed)
        vae = TAESD(latent_channels=4)
        harness.randomize(vae, seed=2)
        weights = half(model.diffusion_model, "model.diffusion_model.") | half(vae, "first_stage_model.")
        weights |= half(clip, "cond_stage_model.transformer.")
        save_file(weights, folder / "checkpoints" / f"{name}.safetensors")
    shutil.copy(folder / "checkpoints" / "sd.safetensors", folder / "checkpoints" / "sd-copy.safetensors")
    save_file(small_lora(), folder / "loras" / "small.safetensors")

    mmdit = {**harness.MMDIT, "adm_in_channels": 2048, "dtype": torch.float32}
    mmdit["context_embedder_config"] = {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 128},
    }
    model = mb.SD3(sm.SD3(mmdit))
    harness.randomize(model.diffusion_model, seed=0)
    vae = TAESD(latent_channels=16)
    harness.randomize(vae, seed=2)
    weights = half(model.diffusion_model, "model.diffusion_model.") | half(vae, "first_stage_model.")
    weights |= half(clip, "text_encoders.clip_l.transformer.")
    save_file(weights, folder / "checkpoints" / "flow.safetensors")

    # Wan's encoder is 5.7 billion weights, and always; SD3's CLIP-L, alone and padded, is as wide.
    save_file(half(clip), folder / "text_encoders" / "video.safetensors")
    wan = {**harness.WAN, "dim": 128, "num_heads": 1, "freq_dim": 256, "text_dim": 4096, "dtype": torch.float32}
    model = mb.WAN21(sm.WAN21_T2V(wan))
    harness.randomize(model.diffusion_model, seed=0)
    save_file(half(model.diffusion_model), folder / "diffusion_models" / "video.safetensors")
    vae = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    harness.randomize(vae, seed=2, biases=0.1)
    save_file(half(vae), folder / "vae" / "video.safetensors")

    if "VAEDecodeAudio" in host.nodes:
        save_file(ace_step(), folder / "checkpoints" / "audio.safetensors")


def small_lora():
    generator = torch.Generator().manual_seed(3)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    up, down = torch.randn(320, 4, generator=generator), torch.randn(4, 768, generator=generator)
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(4.0)}


def ace_step():
    """A small checkpoint of it; the vocabulary is the letters."""
    import comfy.model_base as mb
    import comfy.supported_models as sm
    import small_ace_step as small
    from comfy.ldm.ace.vae.music_dcae_pipeline import MusicDCAE
    from sentencepiece import SentencePieceTrainer

    model = mb.ACEStep(sm.ACEStep({**small.NETWORK, "dtype": torch.float32}))
    parts = {
        "model.diffusion_model.": model.diffusion_model,
        "text_encoders.umt5base.transformer.": small.TextEncoder(dtype=torch.float32).transformer,
        "vae.": MusicDCAE(source_sample_rate=44100),
    }
    weights = {}
    for prefix, part in parts.items():
        harness.randomize(part, seed=0, biases=0.1)
        weights |= half(part, prefix)
    letters = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(string.ascii_lowercase),
        model_writer=letters,
        model_type="char",
        vocab_size=29,
        minloglevel=2,
    )
    weights["text_encoders.spiece_model"] = torch.frombuffer(bytearray(letters.getvalue()), dtype=torch.uint8)
    return weights


# ----------------------------------------------------------------------------
# The server.


@pytest.fixture(scope="module")
def server(host, comfyui_path, tmp_path_factory):
    base = new_base(tmp_path_factory.mktemp("server"))
    shutil.copy(harness.ROOT / "tests" / "nodes" / "small_ace_step.py", base / "custom_nodes")
    save_models(host, base / "models")
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGBA")
    picture.paste((0, 0, 0, 0), (16, 16, 48, 48))  # What the mask editor leaves: transparent where to paint.
    picture.save(base / "input" / "example.png")
    with running(comfyui_path, base) as server:
        yield server


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


# ----------------------------------------------------------------------------
# Workflows, small.


def shrink(prompt):
    """The same prompt with stand-ins for the models, few steps and small pictures."""
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {k: v for k, v in SMALL.items() if k in inputs and not isinstance(inputs[k], list)}
        if "ckpt_name" in inputs:
            name = inputs["ckpt_name"]
            kinds = {"sd3": "flow", "0.9": "weak", "ace": "audio"}
            inputs["ckpt_name"] = next((v for k, v in kinds.items() if k in name), "sd") + ".safetensors"
        inputs |= {k: "video.safetensors" for k in ("unet_name", "clip_name", "vae_name") if k in inputs}
        if inputs.get("type") == "wan":
            inputs["type"] = "sd3"  # See save_models.
    return prompt


def results(server, prompt):
    """All that a run saves."""
    outputs = server.run(prompt).values()
    entries = [entry for output in outputs for kind in ("images", "audio") for entry in output.get(kind, ())]
    return [array for entry in entries for array in server.read(entry)]


# ----------------------------------------------------------------------------


def test_nodes_are_listed_with_tooltips(object_info):
    assert set(object_info) >= NODES
    for name in NODES:
        info = object_info[name]
        assert info["category"] == "sampling/guidance interval"
        assert info["description"]
        for field, _, options in node_inputs(info):
            assert options.get("tooltip"), f"{name}.{field}"


def test_templates_help_and_locales_are_served(server):
    assert sorted(server.get("/workflow_templates")[FOLDER]) == WORKFLOWS
    folder = urllib.request.quote(FOLDER)
    for name in WORKFLOWS:
        served = server.get(f"/api/workflow_templates/{folder}/{name}.json")
        assert any(node["type"] == "MarkdownNote" for node in served["nodes"])
        uuid.UUID(served["id"])  # The front end warns of any other.
        assert (harness.ROOT / "workflows" / f"{name}.jpg").exists()
    for name in NODES:
        with urllib.request.urlopen(f"{server.url}/extensions/{folder}/docs/{name}.md", timeout=30) as response:
            assert response.read().startswith(b"#")
    translations = server.get("/i18n")
    for language in ("en", "ja"):
        assert set(translations[language]["nodeDefs"]) >= NODES


def test_locales_name_what_exists(object_info):
    for language in ("en", "ja"):
        path = harness.ROOT / "locales" / language / "nodeDefs.json"
        for name, texts in json.loads(path.read_text(encoding="utf-8")).items():
            fields = {field for field, _, _ in node_inputs(object_info[name])}
            assert set(texts.get("inputs", {})) == fields, (language, name)
            assert len(texts["outputs"]) == len(object_info[name]["output"]), (language, name)


def test_english_says_the_same_in_the_node_its_locale_and_its_help(object_info):
    english = json.loads((harness.ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name in NODES:
        assert english[name]["display_name"] == object_info[name]["display_name"]
        assert english[name]["description"] == object_info[name]["description"]
        help_page = (harness.ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for field, _, options in node_inputs(object_info[name]):
            assert english[name]["inputs"][field]["tooltip"] == options["tooltip"], (name, field)
            assert f"| `{field}` | {options['tooltip']} |".replace("\n", "<br>") in help_page, (name, field)


def small_prompt(name, object_info):
    if name == "11_ace_step_audio" and "VAEDecodeAudio" not in object_info:
        pytest.skip("a ComfyUI without torchaudio has no audio nodes")
    return shrink(to_prompt(load_workflow(name), object_info))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows(server, object_info, name):
    prompt = small_prompt(name, object_info)
    assert any(node["class_type"] in NODES for node in prompt.values())
    saved = results(server, prompt)
    assert len(saved) == SMALL["length"] if name == "10_wan_video" else saved
    for array in saved:
        values = array.reshape(-1, array.shape[-1])
        assert np.isfinite(values).all()
        assert values.std(axis=0).max() > 0.01 * np.abs(values).max()  # Not one colour, not silence.


@pytest.mark.parametrize("name", ["03_sdxl_ksampler", "10_wan_video", "11_ace_step_audio"])
def test_an_open_interval_gives_the_same_as_plain_cfg(server, object_info, name):
    def saved(plain=False, **bounds):
        prompt = small_prompt(name, object_info)
        (ours,) = (key for key, node in prompt.items() if node["class_type"] == "GuidanceInterval")
        (sampler,) = (node for node in prompt.values() if node["class_type"] == "KSampler")
        prompt[ours]["inputs"] |= bounds
        if plain:
            sampler["inputs"]["model"] = prompt.pop(ours)["inputs"]["model"]
        return [array.tobytes() for array in results(server, prompt)]

    stock = saved(plain=True)
    assert saved(sigma_lo=0.0, sigma_hi=-1.0, units="model") == stock
    assert saved() != stock


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"sigma_lo": 5.0, "sigma_hi": 1.0}, "sigma_lo must be below sigma_hi"),
        ({"sigma_lo": -0.5, "sigma_hi": 1.0}, "sigma_lo must be 0 or above, or -1 for none"),
        ({"sigma_lo": float("nan"), "sigma_hi": 1.0}, "sigma_lo must lie between -1 and 1000000, got nan"),
        ({"sigma_lo": 0.0, "sigma_hi": float("inf")}, "sigma_hi must lie between -1 and 1000000, got inf"),
        ({"sigma_lo": "abc", "sigma_hi": 1.0}, "sigma_lo must be a number, got 'abc'"),
        ({"sigma_lo": 10**400, "sigma_hi": 1.0}, "sigma_lo must lie between -1 and 1000000, got 1000"),
        ({"sigma_lo": 0.0, "sigma_hi": [1, 2, 3]}, "sigma_hi must be a number, got [1, 2, 3]"),
        ({"sigma_lo": 0.0, "sigma_hi": {}}, "sigma_hi must be a number, got {}"),
    ],
)
def test_bad_bounds_are_refused_before_anything_is_queued(server, object_info, bounds, message):
    prompt = shrink(to_prompt(load_workflow("03_sdxl_ksampler"), object_info))
    for node in prompt.values():
        if node["class_type"] == "GuidanceInterval":
            node["inputs"] |= bounds
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/prompt", {"prompt": prompt})
    assert refused.value.code == 400
    told = refused.value.read().decode()
    assert told.count(message) == 1 and "not supported between" not in told and len(told) < 5000


def test_hidden_inputs_need_not_be_sent(server, object_info):
    prompt = small_prompt("03_sdxl_ksampler", object_info)
    (ours,) = (node for node in prompt.values() if node["class_type"] == "GuidanceInterval")
    complete = [array.tobytes() for array in results(server, prompt)]
    assert ours["inputs"].pop("units") == "edm" and ours["inputs"].pop("outside") == "conditional only"
    assert [array.tobytes() for array in results(server, prompt)] == complete


@pytest.mark.parametrize("side", ["model", "model_negative"])
def test_a_lora_on_one_side_of_the_guider(server, object_info, side):
    """One checkpoint gives what two files give, of which nothing is shared."""

    def saved(second_file, lora=True):
        prompt = small_prompt("09_autoguidance_two_models", object_info)
        (guider,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "GuidanceIntervalGuider")
        first, second = guider["model"][0], guider["model_negative"][0]
        prompt[first]["inputs"]["ckpt_name"] = "sd.safetensors"
        prompt[second]["inputs"]["ckpt_name"] = second_file
        if lora:
            inputs = {"model": guider[side], "lora_name": "small.safetensors", "strength_model": 1.0}
            prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
            guider[side] = ["lora", 0]
        guider |= {"sigma_lo": -1.0, "sigma_hi": -1.0}
        return [array.tobytes() for array in results(server, prompt)]

    shared = saved("sd.safetensors")
    assert shared == saved("sd-copy.safetensors")
    assert shared != saved("sd.safetensors", lora=False)


def test_what_the_comparison_cannot_do_is_refused(server, object_info):
    prompt = small_prompt("05_compare_intervals", object_info)
    (ours,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "GuidanceIntervalCompare")
    for field, value, message in (
        ("denoise", 0.0, "smaller than min of 0.01"),
        ("intervals", "0.28, much", "line 1: give sigma_lo and sigma_hi"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/prompt", {"prompt": {**prompt, **with_input(prompt, ours, field, value)}})
        assert message in refused.value.read().decode()


def with_input(prompt, inputs, field, value):
    """The node of those inputs with another value."""
    return {
        key: {**node, "inputs": {**inputs, field: value}} for key, node in prompt.items() if node["inputs"] is inputs
    }


def test_the_nodes_are_found_by_what_users_call_them(object_info):
    """Where the host knows aliases; others search the names alone."""
    for name in NODES:
        info = object_info[name]
        assert "guidance interval" in info["display_name"].lower()
        if "search_aliases" in info:
            assert "cfg limiter" in info["search_aliases"]


# ----------------------------------------------------------------------------
# Stages: samplers that share the steps of a run.


def two_stages(bounds, seed, own_node=False):
    """8 steps from sigma 80, 4 for each of two samplers, behind one interval node or behind one each."""
    prompt = {"1": {"class_type": "GuidanceIntervalDemoModel", "inputs": {"batch_size": 1}}}
    for key, subgroup in (("2", "cat-face"), ("3", "none")):
        prompt[key] = {"class_type": "GuidanceIntervalDemoPrompt", "inputs": {"subgroup": subgroup}}
    limits = dict(zip(("sigma_lo", "sigma_hi"), bounds, strict=True))
    for key in ("4", "5"):
        prompt[key] = {"class_type": "GuidanceInterval", "inputs": {"model": ["1", 0], **limits}}
    same = {"positive": ["2", 0], "negative": ["3", 0], "noise_seed": seed, "steps": 8, "cfg": 4.0}
    same |= {"sampler_name": "euler", "scheduler": "karras"}
    first = {"start_at_step": 0, "end_at_step": 4, "add_noise": "enable", "return_with_leftover_noise": "enable"}
    second = {"start_at_step": 4, "end_at_step": 99, "add_noise": "disable", "return_with_leftover_noise": "disable"}
    for key, model, latent, steps in (("6", "4", ["1", 2], first), ("7", "5" if own_node else "4", ["6", 0], second)):
        inputs = {**same, **steps, "model": [model, 0], "latent_image": latent}
        prompt[key] = {"class_type": "KSamplerAdvanced", "inputs": inputs}
    prompt["8"] = {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 1]}}
    prompt["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "stages"}}
    return prompt


@pytest.mark.parametrize("own_node", [False, True], ids=["one node", "a node each"])
def test_a_stage_without_guided_steps_is_no_reason_to_warn(server, own_node):
    """While another stage has some; a warning is only for a prompt in which no sampler has."""

    def said(*args):
        before = len((server.folder / "log.txt").read_text())
        server.run(two_stages(*args, own_node=own_node))
        return (server.folder / "log.txt").read_text()[before:]

    for bounds in ((0.005, 1.0), (20.0, 100.0)):  # Steps of the second, and of the first.
        log = said(bounds, 1)
        assert log.count("none of this stage is guided") == 1 and "nothing will be guided" not in log
    log = said((20.0, 100.0), 1)  # Nothing is executed again: nothing to say.
    assert "Guidance Interval" not in log
    log = said((500.0, 600.0), 2)
    assert log.count("nothing will be guided") == 2 and "none of this stage" not in log


# ----------------------------------------------------------------------------
# The demo model, whole.


def test_the_workflow_that_needs_no_download_runs_as_it_is(server, object_info):
    (grid,) = results(server, to_prompt(load_workflow("01_try_it"), object_info))
    assert grid.shape == (44 + 6 * 256, 3 * 256, 3)
    everywhere, interval, none = (grid[44:, 256 * i : 256 * (i + 1)] for i in range(3))
    assert all(np.abs(a.astype(int) - b).mean() > 3 for a, b in ((everywhere, interval), (interval, none)))


@pytest.mark.parametrize(("weight", "interval"), [(1.5, None), (2.5, (0.1, 5.0))])
def test_images_of_the_demo_model_measure_as_the_labs_do(server, weight, interval):
    """500 images, saved by the server, against 500 of other noise that the lab samples, of the same classes."""
    from guidance_interval import GuidanceInterval
    from guidance_interval.lab import scores
    from guidance_interval.toy import data, model, sampling

    lab = model.load(model.SHIPPED.with_name("emoji.safetensors"))
    setting = sampling.Guidance("", weight, interval and GuidanceInterval(*interval))
    drawn = sampling.sample(lab, setting, 500, "euler", steps=8, seed=1)
    counts = drawn.labels.bincount().tolist()

    prompt = {
        "model": {"class_type": "GuidanceIntervalDemoModel", "inputs": {"batch_size": 1}},
        "none": {"class_type": "GuidanceIntervalDemoPrompt", "inputs": {"subgroup": "none"}},
    }
    source = ["model", 0]
    if interval:  # The nodes count noise relative to the image, whose standard deviation is 0.5 on the lab's scale.
        bounds = {"sigma_lo": interval[0] / 0.5, "sigma_hi": interval[1] / 0.5}
        prompt["limited"] = {"class_type": "GuidanceInterval", "inputs": {"model": source, **bounds}}
        source = ["limited", 0]
    fixed = {"cfg": weight, "steps": 8, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    classes = [(label, count) for label, count in enumerate(counts) if count]
    for label, count in classes:
        size, text, sample, image, save = (f"{kind}-{label}" for kind in ("size", "text", "sample", "image", "save"))
        linked = {"model": source, "positive": [text, 0], "negative": ["none", 0], "latent_image": [size, 2]}
        subgroup = lab.config["classes"][label]
        prompt |= {
            size: {"class_type": "GuidanceIntervalDemoModel", "inputs": {"batch_size": count}},
            text: {"class_type": "GuidanceIntervalDemoPrompt", "inputs": {"subgroup": subgroup}},
            sample: {"class_type": "KSampler", "inputs": {"seed": 1000 + label, **fixed, **linked}},
            image: {"class_type": "VAEDecode", "inputs": {"samples": [sample, 0], "vae": ["model", 1]}},
            save: {"class_type": "PreviewImage", "inputs": {"images": [image, 0]}},
        }
    outputs = server.run(prompt)
    images, labels = [], []
    for label, count in classes:
        files = outputs[f"save-{label}"]["images"]
        assert len(files) == count
        images += [server.read(file)[0][::8, ::8] for file in files]
        labels += [label] * count
    x = torch.from_numpy(np.stack(images)).movedim(-1, 1)
    x = data.to_model(x, lab.config["pixel_mean"], lab.config["pixel_std"])
    served = scores.judge_samples(lab, x, torch.tensor(labels))[0]
    # As the server saves them: pixels that were clipped and rounded.
    mean, std = lab.config["pixel_mean"], lab.config["pixel_std"]
    pixels = ((drawn.x * (std / data.SIGMA_DATA) + mean) * 255).round().clamp(0, 255)
    of_lab = scores.judge_samples(lab, data.to_model(pixels, mean, std), drawn.labels)[0]
    assert served.fd_low <= of_lab.fd <= served.fd_high, (served, of_lab)
    assert of_lab.fd_low <= served.fd <= of_lab.fd_high, (served, of_lab)
    p = (served.accuracy + of_lab.accuracy) / 2
    assert abs(served.accuracy - of_lab.accuracy) < 1.96 * (2 * p * (1 - p) / 500) ** 0.5, (served, of_lab)

"""A real web UI in this process, with tiny random checkpoints in a scratch folder and this repository as extension.

A1111_PATH names a checkout of Automatic1111 (with its `repositories/`), FORGE_PATH one of Forge, reForge, Forge Neo or
Forge Classic; run pytest with a Python that has the web UI's requirements, and one of the two at a time. Nothing is
written into the checkout.
"""

import contextlib
import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
torch.set_num_threads(1)  # Of tiny models.
# Attributes of `p` that the host's own scripts take from their controls.
HOST_SCRIPTS_SET = ("sampler_name", "scheduler", "steps", "seed", "refiner_checkpoint", "refiner_switch_at")

PATHS = {"a1111": os.environ.get("A1111_PATH"), "forge": os.environ.get("FORGE_PATH")}
ARGS = (
    "--skip-version-check --skip-python-version-check --skip-torch-cuda-test --no-download-sd-model "
    "--do-not-download-clip --disable-safe-unpickle --no-hashing --api"
)
A1111_ARGS = " --use-cpu all --no-half --no-half-vae --precision full"
FORGE_ARGS = " --always-cpu --all-in-fp32"
NEO_ARGS = " --cpu --force-fp32"  # And Forge Classic's.


def pytest_collection_modifyitems(items):
    """Skip what needs a web UI that is not there; with both variables set, Automatic1111 is the one."""
    for item in items:
        wanted = {m.name for m in item.iter_markers()} & PATHS.keys()  # Not keywords: those hold folder names.
        running = "a1111" if PATHS["a1111"] else "forge"
        if not wanted:
            continue
        if not PATHS[running]:
            variables = " or ".join(f"{host.upper()}_PATH" for host in sorted(wanted))
            item.add_marker(pytest.mark.skip(reason=f"needs {variables}: the path of a checkout of the web UI"))
        elif running not in wanted:
            item.add_marker(pytest.mark.skip(reason=f"is not for {running}, the web UI of this run"))


@pytest.fixture(scope="session")
def webui(tmp_path_factory):
    """The running web UI: `host` ("a1111" or "forge"), `data` folder, `api` test client."""
    host = "a1111" if PATHS["a1111"] else "forge"
    path = Path(PATHS[host]).resolve()
    data = tmp_path_factory.mktemp("webui")
    (data / "extensions").mkdir()
    (data / "extensions" / "guidance-interval").symlink_to(ROOT)
    (data / "tmp").mkdir()  # Where Forge Neo and Forge Classic keep the images that are not saved.
    (data / "models" / "Stable-diffusion").mkdir(parents=True)
    os.chdir(path)
    sys.path.insert(0, str(path))
    args = f"{ARGS}{_own_args(host, path)} --data-dir {data}"
    sys.argv = ["webui.py", *args.split()]
    os.environ.update(IGNORE_CMD_ARGS_ERRORS="1", GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    boot = _boot_a1111 if host == "a1111" else _boot_forge
    boot(data)
    from modules import call_queue, script_callbacks, scripts, shared, ui

    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from modules.api.api import Api

    app = FastAPI()
    Api(app, call_queue.queue_lock)
    shared.opts.data.update(samples_save=False, grid_save=False, live_previews_enable=False, save_init_img=False)
    assert any(s.title() == "Guidance Interval" for s in scripts.scripts_txt2img.alwayson_scripts)
    return types.SimpleNamespace(host=host, data=data, api=TestClient(app))


def _own_args(host, path):
    if host == "a1111":
        return A1111_ARGS
    known = path / "backend" / "args.py"
    return NEO_ARGS if known.is_file() and "--always-cpu" not in known.read_text() else FORGE_ARGS


# ----------------------------------------------------------------------------
# Automatic1111.


def _boot_a1111(data):
    import webui  # noqa: F401  Imports everything; the models are made with its own classes, then it is started.
    from modules import initialize, sd_models

    models = data / "models" / "Stable-diffusion"
    clip = _clip_folder(data / "clip")
    from ldm.util import instantiate_from_config
    from modules.paths import script_path
    from omegaconf import OmegaConf

    kinds = {
        "tiny": ("v1-inference", {}, 0),
        "refiner": ("v1-inference", {}, 1),
        "inpainting": ("v1-inpainting-inference", {}, 2),
        "pix2pix": ("instruct-pix2pix", {}, 3),
    }
    for name, (config_name, _, seed) in kinds.items():
        config = OmegaConf.load(Path(script_path) / "configs" / f"{config_name}.yaml")
        config.pop("data", None)
        params = config.model.params
        params.pop("scheduler_config", None)
        params.unet_config.params.update(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, num_heads=2)
        params.unet_config.params.update(attention_resolutions=[1, 2], context_dim=32)
        params.first_stage_config.params.ddconfig.update(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)
        params.cond_stage_config.params = {"version": str(clip), "device": "cpu"}
        OmegaConf.save(config, models / f"{name}.yaml")
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(None):
            model = instantiate_from_config(config.model)
        _randomize(model)
        torch.save({"state_dict": model.state_dict()}, models / f"{name}.ckpt")
    from modules import shared

    shared.cmd_opts.ckpt = str(models / "tiny.ckpt")
    shared.cmd_opts.skip_load_model_at_start = True
    initialize.initialize()
    shared.opts.data["sd_model_checkpoint"] = "tiny.ckpt"
    sd_models.list_models()
    assert shared.sd_model is not None


def _randomize(model):
    """No weight is 0, so that every condition shows in the output."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def _clip_folder(folder):
    """A CLIP text encoder of width 32 with the tokenizer that open_clip ships, in transformers' form."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir()
    encoder = open_clip.tokenizer.SimpleTokenizer().encoder
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    encoder = {renamed.get(k, k): v for k, v in encoder.items()}
    packed = (Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")
    (folder / "vocab.json").write_text(json.dumps(encoder))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[1 : 49152 - 256 - 2 + 1]]))
    special = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77}))
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(5)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------
# Forge and reForge.


def _boot_forge(data):
    """Both find the kind of model by its weights: channels and text encoder are SD1's, blocks are few."""
    from modules_forge.initialization import initialize_forge

    initialize_forge()
    import safetensors.torch
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 1],
        "num_res_blocks": [1, 1],
        "use_spatial_transformer": True,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
    }
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    make = _forge_parts if Path("backend").is_dir() else _reforge_parts
    parts = {**make(unet), "cond_stage_model.transformer.": CLIPTextModel(CLIPTextConfig(**clip))}
    weights = {}
    for prefix, model in parts.items():
        _randomize(model)
        weights |= {prefix + k: v.contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(weights, data / "models" / "Stable-diffusion" / "tiny.safetensors")
    del parts, weights
    (data / "config.json").write_text(json.dumps({"show_progress_type": "Approx cheap"}))  # The others download.
    import threading

    import webui  # noqa: F401  Starts it.
    from modules import sd_models, shared
    from modules_forge import main_thread

    threading.Thread(target=main_thread.loop, daemon=True).start()
    info = next(iter(sd_models.checkpoints_list.values()))
    shared.opts.data["sd_model_checkpoint"] = info.title
    if hasattr(sd_models, "forge_model_reload"):
        parameters = {"checkpoint_info": info, "additional_modules": [], "unet_storage_dtype": None}
        sd_models.model_data.forge_loading_parameters = parameters
        sd_models.forge_model_reload()
    else:
        assert shared.sd_model is not None  # Loads it.


def _forge_parts(unet):
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.nn.vae import IntegratedAutoencoderKL

    vae = IntegratedAutoencoderKL.load_config("backend/huggingface/runwayml/stable-diffusion-v1-5/vae")
    return {
        "model.diffusion_model.": IntegratedUNet2DConditionModel.from_config(unet),
        "first_stage_model.": IntegratedAutoencoderKL.from_config(vae),
    }


def _reforge_parts(unet):
    from ldm_patched.ldm.models.autoencoder import AutoencoderKL
    from ldm_patched.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from ldm_patched.modules.ops import disable_weight_init

    vae = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    vae.update(ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], dropout=0.0)
    parts = {
        "model.diffusion_model.": UNetModel(image_size=32, operations=disable_weight_init, **unet),
        "first_stage_model.": AutoencoderKL(ddconfig=vae, embed_dim=4),
    }
    for part in parts.values():  # Made without initial values.
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return parts


# ----------------------------------------------------------------------------
# Every denoiser call of a generation, judged against the unpatched host on the same x.


class Judge:
    """Wraps the host's CFGDenoiser.forward; `calls` holds one dict a call, `check()` asserts all of them.

    A guided call must be the unpatched host's, bit for bit, with as many rows. An unguided one must have sent
    only cond rows to the UNet and be the conditional prediction: bit for bit the one evaluated alone, or for
    prompts joined by AND the mean of theirs by weight.
    """

    def __init__(self, webui, settings):
        self.host = webui.host
        self.settings = settings
        self.calls = []
        self.rows = 0
        self.preds = None

    def forward(self, real):
        def forward(denoiser, x, sigma, **kwargs):
            step = denoiser.step
            out, rows, last = self.evaluate(real, denoiser, x, sigma, kwargs)
            hires = getattr(denoiser.p, "is_hr_pass", False)
            kwargs.update({k: denoiser.sampler.sampler_extra_args[k] for k in ("cond", "uncond")})  # The refiner's.
            after, params = denoiser.step, dict(denoiser.p.extra_generation_params)
            run = denoiser.p.__dict__.pop("guidance_interval", None)
            denoiser.step = step
            stock, stock_rows, _ = self.evaluate(real, denoiser, x, sigma, kwargs)
            level = self.level(denoiser, sigma)
            interval = self.settings.interval
            guided = interval is not None and interval.sigma_lo < level <= interval.sigma_hi
            guided = guided or not self.settings.covers(hires)
            if guided:
                good = rows == stock_rows and torch.equal(out, stock)
                error = float((out - stock).abs().max())
            else:
                denoiser.step = step
                expected, cond_rows, exact = self.conditional(real, denoiser, x, sigma, kwargs)
                error = float((out - expected).abs().max())
                same = torch.equal(out, expected) if exact else error <= 1e-5 * max(1.0, float(expected.abs().max()))
                good = rows == cond_rows and same
                if denoiser.need_last_noise_uncond and Path("ldm_patched").is_dir() is False:
                    good = good and (torch.equal(last, out) if exact else torch.allclose(last, out, atol=1e-5))
            call = {"sigma": level, "guided": guided, "rows": rows, "stock": stock_rows, "error": error, "good": good}
            self.calls.append({**call, "hires": hires, "nan": bool(x.isnan().any())})
            denoiser.step, denoiser.last_noise_uncond = after, last
            denoiser.p.extra_generation_params.clear()
            denoiser.p.extra_generation_params.update(params)
            if run is not None:
                denoiser.p.guidance_interval = run
            return out

        return forward

    def evaluate(self, real, denoiser, x, sigma, kwargs):
        self.rows = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.calls))
            out = real(denoiser, x, sigma, **kwargs).clone()
        last = denoiser.last_noise_uncond
        return out, self.rows, None if last is None else last.clone()

    def level(self, denoiser, sigma):
        if hasattr(denoiser, "alphas") and self.host == "a1111":
            import numpy as np

            alphas = denoiser.alphas.double().numpy()
            return float(np.exp(np.interp(float(sigma[0]), range(1000), 0.5 * np.log((1 - alphas) / alphas))))
        if getattr(denoiser, "classic_ddim_eps_estimation", False):
            alphas = denoiser.inner_model.inner_model.alphas_cumprod
            return float(((1 - alphas) / alphas).sqrt()[int(sigma[0].round())])
        return float(sigma[0])

    def conditional(self, real, denoiser, x, sigma, kwargs):
        """`(the conditional prediction, its rows, whether it is exact)`, found without our code."""
        from modules import prompt_parser, shared

        prompts, cond = prompt_parser.reconstruct_multicond_batch(kwargs["cond"], denoiser.step)
        count = sum(map(len, prompts))
        if (
            self.host == "a1111" and shared.sd_model.model.conditioning_key != "crossattn"
        ):  # The host's own skip fails on these models.
            if denoiser.mask is not None and denoiser.mask_before_denoising:
                x = x * denoiser.nmask + denoiser.init_latent * denoiser.mask
            cond = {"c_crossattn": [cond], "c_concat": [kwargs["image_cond"]]}
            pred = denoiser.inner_model(x, sigma, cond=cond)
            if denoiser.mask is not None and not denoiser.mask_before_denoising:
                pred = pred * denoiser.nmask + denoiser.init_latent * denoiser.mask
            return pred, count, True
        # The host's own skips: cond alone, but not the mean for AND. The first never acts at step 0 of Forge Neo.
        own = {"skip_early_cond": 1e9, "s_min_uncond_all": True}
        before = {name: shared.opts.data.get(name, 0.0) for name in own}
        shared.opts.data.update(own)
        if "model_options" in kwargs:  # CFG++ samplers of Forge Neo insist there on uncond, which they are told.
            alone = {"disable_cfg1_optimization": False, "sampler_post_cfg_function": []}
            kwargs = {**kwargs, "model_options": {**kwargs["model_options"], **alone}}
        try:
            out, rows, _ = self.evaluate(real, denoiser, x, sigma, {**kwargs, "s_min_uncond": 1e9})
        finally:
            shared.opts.data.update(before)
        assert rows == count or self.host == "forge"  # Where a patch of the unet may add rows of its own.
        formula = self.host == "forge" and "sampler_cfg_function" in unet_of(denoiser).model_options
        if all(len(p) == 1 for p in prompts) and not formula:
            return out, rows, True
        if self.host == "forge":  # The mean is the host's own cond, as noise for its timestep samplers.
            if not denoiser.classic_ddim_eps_estimation:
                return self.preds, rows, True
            level = self.level(denoiser, sigma)
            return (x * (level**2 + 1) ** 0.5 - self.preds) / level, rows, False
        means = [sum(self.preds[i] * w for i, w in p) / sum(w for _, w in p) for p in prompts]
        return torch.stack(means), count, False

    def check(self, both=False):
        """Raise if a call differs, or with `both` if not both kinds of call occurred."""
        assert self.calls
        assert not both or {c["guided"] for c in self.calls} == {True, False}
        bad = [c for c in self.calls if not c["good"]]
        assert not bad, f"{len(bad)} of {len(self.calls)} calls differ: {bad[:3]}"

    @property
    def total(self):
        return sum(c["rows"] for c in self.calls), sum(c["stock"] for c in self.calls)


def unet_of(denoiser):
    return denoiser.inner_model.inner_model.forge_objects.unet


@pytest.fixture
def judge(webui, monkeypatch):
    """`judge(settings)` judges the calls of the generations that follow."""
    from modules import script_callbacks, shared
    from modules.sd_samplers_cfg_denoiser import CFGDenoiser

    real = CFGDenoiser.forward
    current = []

    def count(module, args, kwargs):
        x = args[0] if args else kwargs["x"]
        current[-1].rows += len(x)

    handles = []
    forward_of_unet = torch.nn.Module.__call__

    def start(settings):
        current.append(Judge(webui, settings))
        monkeypatch.setattr(CFGDenoiser, "forward", current[-1].forward(real))
        return current[-1]

    def is_unet(module):
        return type(module).__name__ in ("UNetModel", "UNetModelWrapper", "IntegratedUNet2DConditionModel")

    def call(module, *args, **kwargs):
        if current and is_unet(module):
            count(module, args, kwargs)
        return forward_of_unet(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", call)

    def denoised(params):
        if current:
            current[-1].preds = params.x

    if webui.host == "forge":
        if Path("backend").is_dir():
            from backend.sampling import sampling_function as sampling

            name = "calc_cond_uncond_batch"
        else:
            from ldm_patched.modules import samplers as sampling

            name = "calc_cond_batch"
        calc = getattr(sampling, name)

        def calc_and_keep(*args, **kwargs):
            out = calc(*args, **kwargs)
            if current:
                current[-1].preds = out[0].clone()
            return out

        monkeypatch.setattr(sampling, name, calc_and_keep)
    script_callbacks.on_cfg_denoised(denoised, name="judge")
    yield start
    for handle in handles:
        handle.remove()
    script_callbacks.remove_callbacks_for_function(denoised)
    shared.state.interrupted = shared.state.skipped = False


@pytest.fixture
def generate(webui):
    """`generate(accordion=[...], script=[...], image=..., **p)` -> `(p, Processed)` through the host's own entry."""
    from modules import processing, scripts, shared

    def run(accordion=None, script=None, image=None, xyz=None, others=(), **kwargs):
        runner = scripts.scripts_txt2img if image is None else scripts.scripts_img2img
        kind = (
            processing.StableDiffusionProcessingTxt2Img
            if image is None
            else processing.StableDiffusionProcessingImg2Img
        )
        args = [c.value if hasattr(c, "value") else 0 for c in runner.inputs]
        args[0] = 0

        def fill(found, values):
            args[found.args_from : found.args_from + len(values)] = values

        ours = [s for s in runner.scripts if s.title() == "Guidance Interval"]
        if accordion is not None:
            fill(next(s for s in ours if s.alwayson), accordion)
        for found, values in others:
            fill(found, values)
        for title, values in (("Guidance Interval", script), ("X/Y/Z plot", xyz)):
            if values is not None:
                found = next(s for s in runner.selectable_scripts if s.title() == title)
                args[0] = runner.selectable_scripts.index(found) + 1
                fill(found, values)
        defaults = {"prompt": "a photo of a cat", "negative_prompt": "blurry", "seed": 1, "steps": 8, "cfg_scale": 7.0}
        defaults.update(width=64, height=64, sampler_name="DPM++ 2M", do_not_save_samples=True, do_not_save_grid=True)
        if image is not None:
            defaults.update(init_images=[image], denoising_strength=0.8)
        p = kind(sd_model=shared.sd_model, **{**defaults, **kwargs})
        p.scripts = runner
        p.script_args = args
        for name, value in {**defaults, **kwargs}.items():
            if name in HOST_SCRIPTS_SET:
                setattr(p, name, value)
        shared.state.begin()
        try:
            processed = runner.run(p, *args)
            if processed is None:
                processed = processing.process_images(p)
        finally:
            shared.state.end()
        return p, processed

    return run


@pytest.fixture
def image(webui):
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def mask(webui):
    from PIL import Image

    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    return mask


@pytest.fixture
def checkpoint(webui):
    """`checkpoint("inpainting")` loads another of the tiny models; the first comes back afterwards."""
    from modules import sd_models, shared

    def load(name):
        shared.opts.data["sd_model_checkpoint"] = f"{name}.ckpt"
        sd_models.reload_model_weights()

    yield load
    if hasattr(sd_models, "reload_model_weights"):  # Forge Neo has another way, and one checkpoint.
        load("tiny")


@pytest.fixture
def hires(webui):
    """`hires(steps=5)`: what of `p` asks for a second pass of hires fix, in this host."""
    from modules import shared
    from modules.processing import StableDiffusionProcessingTxt2Img

    def second_pass(**more):
        upscaler = "Latent" if "Latent" in shared.latent_upscale_modes else "None"  # Forge Neo has no latent ones.
        known = StableDiffusionProcessingTxt2Img.__dataclass_fields__
        forges = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 7.0}
        kwargs = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": upscaler}
        return kwargs | {k: v for k, v in forges.items() if k in known} | more

    return second_pass


@pytest.fixture
def need_sampler(webui):
    """`need_sampler("DPM fast")` skips the test where the host has no such sampler."""
    from modules import sd_samplers

    def need(name):
        if name not in sd_samplers.all_samplers_map:
            pytest.skip(f"this host has no sampler {name!r}")

    return need


# ----------------------------------------------------------------------------
# The table of docs/a1111.md.

_table, _facts = {}, {}


@pytest.fixture(scope="session")
def report():
    """`report(row, column, judge or text)` notes a cell of the tables that the run ends with."""

    def note(row, column, judged):
        if isinstance(judged, str):
            _facts.setdefault(row, {})[column] = judged
            return
        rows, stock = judged.total
        good = sum(c["good"] for c in judged.calls)
        _table.setdefault(row, {})[column] = f"{good}/{len(judged.calls)}, {rows} of {stock}"

    return note


def pytest_terminal_summary(terminalreporter):
    titles = {
        "calls judged right / calls, network evaluations of those with CFG everywhere": _table,
        "network evaluations of those with CFG everywhere, or what happened": _facts,
    }
    write = terminalreporter.write_line
    for title, table in titles.items():
        if not table:
            continue
        columns = list(dict.fromkeys(c for row in table.values() for c in row))
        write(title)
        write("| | " + " | ".join(columns) + " |")
        write("|---" * (len(columns) + 1) + "|")
        for name, row in table.items():
            write(f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |")

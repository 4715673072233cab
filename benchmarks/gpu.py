"""What the interval saves on a GPU, at the sizes of real models with random weights: seconds, syncs, kernels, graphs.

    python benchmarks/gpu.py [--minutes 8] [--json out/performance.json]    measure; nothing is downloaded
    python benchmarks/gpu_report.py                                         docs/performance.md from the JSON

ComfyUI is the one that COMFYUI_PATH names, or else the one that `make test` installs. The settings of a configuration
run in turn, in an order that rotates, and ours is compared with the floor of its own round: what the run would take if
each evaluation cost what its rows cost, from whole runs of CFG and of the conditional prediction. A configuration that
fails costs its row alone; the JSON is written after each. --pack FOLDER:NODE[:JSON] adds a node of a custom node pack.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE = ROOT / "docs" / "results" / "performance.json"
INTERVAL = (0.28, 5.42)
WEIGHT = 7.0
EAGER, COMPILED, GRAPHS = "eager", "compiled", "CUDA graphs"
CFG, COND, OURS = "CFG", "conditional only", "ours"
OVERRIDE, READ = "the host's CFG Override", "ours, reading sigma"


@dataclass(frozen=True)
class Config:
    """One row. network: a key of NETWORKS; through: "ComfyUI" or "CFGDenoiser"; seconds: what it may take."""

    network: str
    batch: int
    sampler: str = "dpmpp_2m"
    form: str = EAGER
    steps: int = 20
    through: str = "ComfyUI"
    curve: bool = False  # Also measured at other shares of guided steps.
    seconds: float = 40
    size: tuple = ()  # Of the latent, other than the network's own.


# By network, and what compiles for minutes last: what the time does not reach is left out, and named.
PLAN = (
    Config("sdxl", 4, curve=True, seconds=90),
    Config("sdxl", 1, "euler", curve=True, seconds=60),
    Config("sdxl", 4, "euler", steps=10, seconds=30),
    Config("sdxl", 8, steps=6, seconds=40),
    Config("sdxl", 4, "heun", steps=6, seconds=30),
    Config("sdxl", 4, "dpmpp_2m_sde", steps=10, seconds=25),
    Config("sdxl", 1, through="CFGDenoiser", seconds=20),
    Config("sdxl", 64, steps=6, through="CFGDenoiser", seconds=15, size=(32, 32)),
    Config("sdxl", 1024, steps=4, through="CFGDenoiser", seconds=30, size=(16, 16)),
    Config("flow", 2, "euler", seconds=45),
    Config("video", 1, "euler", seconds=45),
    Config("sd15", 4, seconds=20),
    Config("demo", 1, through="CFGDenoiser", seconds=10),
    Config("demo", 64, through="CFGDenoiser", seconds=10),
    Config("demo", 1024, through="CFGDenoiser", seconds=10),
    Config("demo", 64, form=COMPILED, through="CFGDenoiser", seconds=50),
    Config("demo", 1, form=COMPILED, through="CFGDenoiser", seconds=50),
    Config("demo", 1, form=GRAPHS, through="CFGDenoiser", seconds=50),
    Config("sdxl", 1, "euler", COMPILED, seconds=300),
    Config("sdxl", 4, "dpmpp_2m", COMPILED, seconds=60),
    Config("sdxl", 1, form=GRAPHS, through="CFGDenoiser", seconds=300),
    Config("sdxl", 1, "euler", GRAPHS, steps=10, seconds=60),
)
PLAN_TINY = tuple(
    Config(c.network, min(c.batch, 2), c.sampler, c.form, 6, c.through, c.curve, c.seconds, c.size and (8, 8))
    for c in PLAN
)

# ----------------------------------------------------------------------------
# Networks: those of the models of that name, in size and in nothing else.

SDXL = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "adm_in_channels": 2816,
    "num_classes": "sequential", "use_linear_in_transformer": True,
}  # fmt: skip
SD15 = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1, "num_heads": 8, "num_head_channels": -1,
    "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768, "adm_in_channels": None,
    "use_linear_in_transformer": False,
}  # fmt: skip
ALL_UNETS = {
    "image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False,
    "use_temporal_attention": False,
}  # fmt: skip
TINY_UNET = {
    "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 4, "num_heads": -1, "num_head_channels": 16,
}  # fmt: skip
MMDIT = {
    "in_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048, "qk_norm": "rms",
    "num_patches": 147456, "pos_embed_max_size": 384, "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": list(range(13)),
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}  # fmt: skip
TINY_MMDIT = {
    "depth": 2, "num_patches": 256, "pos_embed_max_size": 16, "x_block_self_attn_layers": [0],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
}  # fmt: skip
WAN = {
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096,
    "num_heads": 12, "num_layers": 30,
}  # fmt: skip
TINY_WAN = {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "num_heads": 4, "num_layers": 2}


@dataclass(frozen=True)
class Network:
    """title; config: its size, and tiny: the changes to it; latent: [C, ...] of one row; tokens: context [N, D]."""

    title: str
    config: dict
    tiny: dict
    latent: tuple
    tokens: tuple
    dtype: torch.dtype = torch.float16
    scheduler: str = "karras"


NETWORKS = {
    "sdxl": Network("SDXL's UNet, 1024 x 1024", ALL_UNETS | SDXL, TINY_UNET, (4, 128, 128), (77, 2048)),
    "sd15": Network("SD1.5's UNet, 512 x 512", ALL_UNETS | SD15, TINY_UNET, (4, 64, 64), (77, 768)),
    "flow": Network(
        "SD3.5 medium's MMDiT, 1024 x 1024", MMDIT, TINY_MMDIT, (16, 128, 128), (154, 4096), torch.bfloat16, "simple"
    ),
    "video": Network(
        "Wan 2.1 1.3B's DiT, 832 x 480, 17 frames", WAN, TINY_WAN, (16, 5, 60, 104), (512, 4096), torch.bfloat16,
        "simple",
    ),
    "demo": Network("the emoji model that ships, 32 x 32", {}, {}, (3, 32, 32), ()),
}  # fmt: skip


def random_weights(module):
    """Of a size that keeps activations of order 1; made where the parameters are."""
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if not p.is_floating_point():
                continue
            if p.ndim > 1:
                p.normal_(0, 0.5 / (p.numel() // len(p)) ** 0.5)
            elif name.endswith("weight"):
                p.fill_(1)
            else:
                p.zero_()
    return module.eval().requires_grad_(False)


class Networks:
    """Builds them, and keeps the one of the moment."""

    def __init__(self, device, tiny):
        self.device, self.tiny, self.kept = device, tiny, {}

    def latent(self, config):
        channels, *size = NETWORKS[config.network].latent
        size = config.size or ([3, 8, 8] if self.tiny and len(size) == 3 else [16, 16] if self.tiny else size)
        return (config.batch, channels, *size)

    def model(self, name):
        """The host's BaseModel."""
        if name not in self.kept:
            self.drop()
            self.kept[name] = self.build(name)
        return self.kept[name]

    def build(self, name):
        import comfy.model_base as mb
        import comfy.supported_models as sm

        network = NETWORKS[name]
        dtype = torch.float32 if self.tiny else network.dtype
        unet = network.config | (network.tiny if self.tiny else {})
        of, base = {
            "sdxl": (sm.SDXL, lambda c: mb.SDXL(c, device=self.device)),
            "sd15": (sm.SD15, lambda c: mb.BaseModel(c, mb.ModelType.EPS, device=self.device)),
            "flow": (sm.SD3, lambda c: mb.SD3(c, device=self.device)),
            "video": (sm.WAN21_T2V, lambda c: mb.WAN21(c, device=self.device)),
        }[name]
        made = of({**unet, "dtype": dtype})
        made.unet_config |= {k: unet[k] for k in ("num_heads", "num_head_channels") if k in unet}
        model = base(made)
        random_weights(model.diffusion_model.to(self.device))
        return model.eval()

    def drop(self):
        if self.kept:
            import comfy.model_management

            comfy.model_management.current_loaded_models.clear()
        self.kept.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------
# A run: a function that samples once, and what it counts.


class Counter:
    """Rows and evaluations of a network, and host syncs within its evaluations."""

    def __init__(self):
        self.rows = self.evaluations = self.syncs = 0
        self.caught = None

    @contextlib.contextmanager
    def evaluation(self):
        before = len(self.caught or ())
        yield
        self.evaluations += 1
        self.syncs += sum("synchroniz" in str(w.message) for w in (self.caught or ())[before:])


class ComfyRuns:
    """The settings of a configuration in ComfyUI: {name: run}; run() samples and returns what the sampler returns."""

    def __init__(self, networks, packs):
        self.networks, self.packs, self.count = networks, packs, Counter()

    def settings(self, config):
        import comfy.samplers
        from comfy.model_patcher import ModelPatcher
        from comfy.patcher_extension import WrappersMP
        from comfy_extras import nodes_custom_sampler, nodes_torch_compile
        from guidance_interval.nodes import model_patch as patch

        device = self.networks.device
        plain = ModelPatcher(self.networks.model(config.network), load_device=device, offload_device=device)

        def rows(executor, x, *args, **kwargs):
            self.count.rows += len(x)
            return executor(x, *args, **kwargs)

        if config.form != EAGER:
            backend = {COMPILED: "inductor", GRAPHS: "cudagraphs"}[config.form]
            if device.type == "cpu":
                backend = "eager" if config.form == COMPILED else "aot_eager"
            (plain,) = nodes_torch_compile.TorchCompileModel.execute(plain, backend).args
        plain.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", rows)
        sampling = plain.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, NETWORKS[config.network].scheduler, config.steps)
        own = patch.in_edm_units(patch.GuidanceInterval(*INTERVAL))(sampling)
        levels = sigmas[:-1]
        guided = own.mask(levels)
        self.guided_steps = int(guided.sum())

        def ours(interval):
            return patch.patch_model(plain, patch.in_model_units(interval))

        def run(model, cfg=WEIGHT, guider=None, sampler=None):
            sampler = sampler or comfy.samplers.sampler_object(config.sampler)

            def sample(steps=None):
                return self.sample(config, model, cfg, sampler, sigmas if steps is None else steps, guider)

            return sample

        found = {COND: run(plain, 1.0), CFG: run(plain), OURS: run(ours(own))}
        if hasattr(nodes_custom_sampler, "CFGOverride") and 0 < self.guided_steps < len(levels):
            found[OVERRIDE] = run(override(nodes_custom_sampler.CFGOverride, plain, sampling, levels, guided))
        if config.form == EAGER and config.sampler == "euler":
            found[READ] = run(ours(own), sampler=euler_that_is_not_known())
        for pack in self.packs if config.form == EAGER and config.network != "video" else ():
            found[pack.name] = run(*pack.apply(plain, *self.conds(config)))
        self.own, self.sigmas = own, sigmas
        self.curve = {}
        if config.curve:
            for k in sorted({round(config.steps * share) for share in (0, 0.25, 0.5, 0.75, 1)}):
                self.curve[k] = run(ours(middle_steps(levels, k, patch)))
        return found

    def short(self):
        """Two evaluations' worth of schedule, the second guided."""
        levels = self.sigmas[:-1]
        guided = self.own.mask(levels)
        return torch.stack([levels[~guided][0], levels[guided][0], self.sigmas[-1]])

    def conds(self, config):
        tokens, width = NETWORKS[config.network].tokens
        return [
            [
                [
                    torch.randn(1, tokens if not self.networks.tiny else 7, width),
                    {"pooled_output": torch.randn(1, pooled)},
                ]
            ]
            for pooled in [2048 if config.network == "flow" else 1280] * 2
        ]

    def sample(self, config, model, cfg, sampler, sigmas, guider=None):
        import comfy.samplers

        if guider is None:
            torch.manual_seed(1)
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(*self.conds(config))
            guider.set_cfg(cfg)
        predict = guider.outer_predict_noise if hasattr(guider, "outer_predict_noise") else guider.predict_noise
        name = "outer_predict_noise" if hasattr(guider, "outer_predict_noise") else "predict_noise"

        def counted(*args, **kwargs):
            with self.count.evaluation():
                return predict(*args, **kwargs)

        setattr(guider, name, counted)
        shape = self.networks.latent(config)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            return guider.sample(noise, torch.zeros(shape), sampler, sigmas, disable_pbar=True, seed=0)
        finally:
            vars(guider).pop(name, None)


def euler_that_is_not_known():
    """The host's Euler as a pack might wrap it: our node reads the sigma of each evaluation."""
    import comfy.samplers
    from comfy.k_diffusion.sampling import sample_euler

    return comfy.samplers.KSAMPLER(lambda *args, **kwargs: sample_euler(*args, **kwargs))


def middle_steps(levels, k, patch):
    """An interval that guides `k` steps in the middle of the schedule `levels`."""
    if k == 0:
        return patch.NOWHERE
    first = (len(levels) - k) // 2
    hi = levels[first].item() * 1.0001 + 1e-9
    after = levels[first + k].item() if first + k < len(levels) else 0.0
    return patch.GuidanceInterval(after * 1.0001, max(hi, after * 1.0002))


def override(node, model, sampling, levels, guided):
    """The host's node, twice: weight 1 above the guided steps, and below them."""
    first = guided.nonzero()[0].item()
    last = guided.nonzero()[-1].item()

    def percent_between(high, low):
        target, lo, hi = (float(high) * float(low)) ** 0.5, 0.0, 1.0
        for _ in range(60):
            mid = (lo + hi) / 2
            lo, hi = (mid, hi) if float(sampling.percent_to_sigma(mid)) > target else (lo, mid)
        return lo

    if first > 0:
        (model,) = node.execute(model, 1.0, 0.0, percent_between(levels[first - 1], levels[first])).args
    if last + 1 < len(levels):
        (model,) = node.execute(model, 1.0, percent_between(levels[last], levels[last + 1]), 1.0).args
    return model


class Pack:
    """A node of a pack: FOLDER:NODE[:JSON of its inputs]."""

    def __init__(self, text):
        folder, node, *inputs = text.split(":", 2)
        self.name = f"{Path(folder).name}: {node}"
        self.inputs = json.loads(inputs[0]) if inputs else {"sigma_start": INTERVAL[1], "sigma_end": INTERVAL[0]}
        self.folder, self.node = Path(folder).resolve(), node

    def load(self):
        name = "pack_" + self.folder.name.replace("-", "_")
        if name not in sys.modules:
            where = [str(self.folder)]
            spec = importlib.util.spec_from_file_location(
                name, self.folder / "__init__.py", submodule_search_locations=where
            )
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        module = sys.modules[name]
        if hasattr(module, "comfy_entrypoint"):
            nodes = {n.GET_SCHEMA().node_id: n for n in asyncio.run(self.listed(module))}
        else:
            nodes = module.NODE_CLASS_MAPPINGS
        if self.node not in nodes:
            raise KeyError(f"{self.folder} has no node {self.node!r}; it has {', '.join(sorted(nodes))}")
        return nodes[self.node]

    @staticmethod
    async def listed(module):
        return await (await module.comfy_entrypoint()).get_node_list()

    def apply(self, model, positive, negative):
        """(model, weight, guider or None)"""
        node = self.load()
        types = node.INPUT_TYPES()
        known = {"model": model, "positive": positive, "negative": negative, "cfg": WEIGHT, **self.inputs}
        inputs = {k: v for k, v in known.items() if k in {**types["required"], **types.get("optional", {})}}
        made = getattr(node() if node.FUNCTION != "EXECUTE_NORMALIZED" else node, node.FUNCTION)(**inputs)
        made = getattr(made, "args", made)[0]  # Of the host's third kind of nodes, or of the first.
        return (model, WEIGHT, made) if hasattr(made, "sample") else (made, WEIGHT, None)


class DenoiserRuns:
    """The settings of a configuration through CFGDenoiser and k-diffusion."""

    curve = {}  # noqa: RUF012

    def __init__(self, networks):
        self.networks, self.count = networks, Counter()

    def settings(self, config):
        from guidance_interval import CFGDenoiser, GuidanceInterval
        from k_diffusion import sampling

        device = self.networks.device
        model, cond, uncond, sigma_min, sigma_max = (self.demo if config.network == "demo" else self.unet)(config)
        if config.form != EAGER:
            mode = "reduce-overhead" if config.form == GRAPHS else "default"  # The former makes CUDA graphs.
            how = {"mode": mode} if device.type == "cuda" else {"backend": "eager"}
            model = torch.compile(model, dynamic=False, **how)

        def counted(x, sigma, **kwargs):
            self.count.rows += len(x)
            if config.form != GRAPHS:
                return model(x, sigma, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            return model(x, sigma, **kwargs).clone()  # The next call overwrites it.

        def alone(x, sigma, cond, uncond, cond_scale):
            return counted(x, sigma, **cond)

        def cfg(x, sigma, cond, uncond, cond_scale):
            both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
            c, u = counted(torch.cat([x, x]), torch.cat([sigma, sigma]), **both).chunk(2)
            return u + (c - u) * cond_scale

        interval = GuidanceInterval(*((0.1, 3.5) if config.network == "demo" else INTERVAL))
        self.sigmas = sampling.get_sigmas_karras(config.steps, sigma_min, sigma_max, device=device)
        guided = interval.mask(self.sigmas[:-1])
        self.guided_steps = int(guided.sum())
        self.two = torch.stack([self.sigmas[:-1][~guided][0], self.sigmas[:-1][guided][0], self.sigmas[-1]])
        ours = CFGDenoiser(counted, interval)
        x = torch.randn(self.networks.latent(config), generator=torch.Generator().manual_seed(0)).to(device)
        extra = {"cond": cond, "uncond": uncond, "cond_scale": WEIGHT}

        def run(denoiser):
            def evaluate(*args, **kwargs):
                with self.count.evaluation():
                    return denoiser(*args, **kwargs)

            def sample(steps=None):
                sigmas = self.sigmas if steps is None else steps
                sampler = getattr(sampling, f"sample_{config.sampler}")
                return sampler(evaluate, x * sigmas[0], sigmas, extra_args=extra, disable=True)

            return sample

        return {COND: run(alone), CFG: run(cfg), OURS: run(ours)}

    def short(self):
        return self.two

    def demo(self, config):
        from guidance_interval.toy import model as lab_model

        lab = lab_model.load(lab_model.SHIPPED.parent / "emoji.safetensors", self.networks.device)
        labels = torch.arange(config.batch, device=self.networks.device) % lab.denoiser.null_class
        null = torch.full_like(labels, lab.denoiser.null_class)
        return lab.denoiser, {"class_cond": labels}, {"class_cond": null}, 0.01, 40.0

    def unet(self, config):
        from k_diffusion import external

        network = NETWORKS[config.network]
        model = self.networks.model(config.network)

        class EpsUNet(external.DiscreteEpsDDPMDenoiser):
            def get_eps(self, x, t, **kwargs):
                return self.inner_model(x.to(dtype), t.to(dtype), **kwargs).float()

        dtype, device = next(model.diffusion_model.parameters()).dtype, self.networks.device
        sampling = model.model_sampling
        alphas = 1 / (1 + sampling.sigmas.float() ** 2)
        wrapped = EpsUNet(model.diffusion_model, alphas, quantize=False).to(device)
        tokens = 7 if self.networks.tiny else network.tokens[0]
        cond, uncond = (
            {
                "context": torch.randn(config.batch, tokens, network.tokens[1], device=device, dtype=dtype),
                "y": torch.randn(config.batch, network.config["adm_in_channels"], device=device, dtype=dtype),
            }
            for _ in range(2)
        )
        return wrapped, cond, uncond, float(sampling.sigmas[0]), float(sampling.sigmas[-1])


# ----------------------------------------------------------------------------
# Measuring.


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def timed(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def counts(run, count, device):
    """Of a run: syncs within evaluations, kernels (on a CPU: operators) and peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count.caught, count.syncs, count.evaluations = caught, 0, 0
            run()
    finally:
        count.caught = None
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    found = {"evaluations": count.evaluations, "syncs": count.syncs if device.type == "cuda" else None}
    found["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        if cuda:
            torch.cuda.synchronize()
    on = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    names = [e.name for e in profile.events() if e.device_type == on]
    skip = ("Memcpy", "Memset", "ProfilerStep") if cuda else ()
    found["kernels"] = sum(not n.startswith(skip) and (cuda or n.startswith("aten::")) for n in names)
    found["copies"] = sum(n.startswith("Memcpy") for n in names)
    return found


def measure(config, runs, device, until):
    """The row of a configuration. until: time.monotonic() after which no more rounds begin."""
    start_graphs, began = graphs_compiled(), time.monotonic()
    settings = runs.settings(config)
    row = {"guided_steps": runs.guided_steps, "settings": {}, "failed": {}}
    order = [OURS, COND, CFG, *(n for n in settings if n not in (OURS, COND, CFG))]
    for name in order:  # Warm; ours first, so that the graphs are those that it needs.
        try:
            before, rows = graphs_compiled(), runs.count.rows
            evaluations = runs.count.evaluations
            seconds, out = timed(settings[name], device)
            made = graphs_compiled() - before
            row["settings"][name] = {
                "rows": runs.count.rows - rows,
                "evaluations": runs.count.evaluations - evaluations,
                "first_run": seconds,
                "graphs": made,
                "finite": bool(torch.isfinite(out).all()),
                "seconds": [],
            }
        except Exception as e:
            if name in (OURS, COND, CFG):
                raise
            row["failed"][name] = f"{type(e).__name__}: {str(e)[:200]}"
    row["graphs_first"] = graphs_compiled() - start_graphs
    before = graphs_compiled()
    row["same_bits"], expected = {}, None  # After the warm runs: the first run of a process may have other bits.
    names = [n for n in order if n in row["settings"]]
    curve = {k: [] for k in runs.curve}
    for i in range(9):
        if i >= 3 and time.monotonic() - began > 0.6 * config.seconds:
            break
        if i >= 1 and time.monotonic() > until:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:  # A slow moment of the machine falls on all.
            seconds, out = timed(settings[name], device)
            row["settings"][name]["seconds"].append(seconds)
            if name in (OURS, READ):
                expected = out if expected is None else expected  # Ours comes first.
                row["same_bits"][name] = row["same_bits"].get(name, True) and torch.equal(out, expected)
        if i < 2:
            for k, run in runs.curve.items():
                curve[k].append(timed(run, device)[0])
    row["graphs_later"] = graphs_compiled() - before
    row["curve"] = {str(k): v for k, v in curve.items()}
    if config.form == EAGER or config.form == COMPILED:
        short = runs.short()
        for name in (OURS, CFG):
            try:
                settings[name](short)
                row["settings"][name]["counts"] = counts(lambda n=name: settings[n](short), runs.count, device)
            except Exception as e:
                row["failed"][f"counts of {name}"] = f"{type(e).__name__}: {str(e)[:200]}"
    return row


def compared(row, steps):
    """Each round of each setting over the floor of that round."""
    s, guided = row["settings"], row["guided_steps"]
    # The share of guided evaluations by rows, which holds for Heun's too.
    share = (s[OURS]["rows"] - s[COND]["rows"]) / (s[CFG]["rows"] - s[COND]["rows"])
    floors = [f * share + c * (1 - share) for f, c in zip(s[CFG]["seconds"], s[COND]["seconds"], strict=True)]
    row |= {"share": share, "steps": steps, "floor": statistics.median(floors), "guided": guided}
    for setting in s.values():
        ratios = [t / f for t, f in zip(setting["seconds"], floors, strict=True)]
        setting["over_floor"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        setting["median"] = statistics.median(setting["seconds"])
    return row


@contextlib.contextmanager
def limited(seconds):
    """TimeoutError in what takes longer, where there is an alarm."""
    if not hasattr(signal, "SIGALRM") or seconds <= 0:
        yield
        return

    def ring(*_):
        raise TimeoutError(f"not done in {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ----------------------------------------------------------------------------
# The machine, and the whole.


def machine(device, host):
    found = {"torch": torch.__version__, "python": platform.python_version(), "comfyui": host, "card": "CPU"}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
        try:
            smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
            found["driver"], found["power"] = [s.strip() for s in smi.split(",")][1:3]
        except (OSError, IndexError, subprocess.SubprocessError) as e:
            found["driver"] = f"unknown ({type(e).__name__})"
        found |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        from importlib.metadata import version

        found["k_diffusion"] = version("k-diffusion")
    except ImportError:
        found["k_diffusion"] = None
    return found


def start_comfyui(scratch, cpu):
    """ComfyUI's version, its modules importable from here on."""
    path = os.environ.get("COMFYUI_PATH")
    if path is None:
        sys.path.insert(0, str(ROOT / "tests" / "nodes"))
        import comfy_harness

        path = comfy_harness.find_comfyui(scratch)
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = cpu  # As on a GPU: the other one asks for free memory, which breaks graphs.
    import comfyui_version

    return comfyui_version.__version__


def own_package():
    """`import guidance_interval` is this repository, installed or not."""
    if importlib.util.find_spec("guidance_interval") is None:
        spec = importlib.util.spec_from_file_location(
            "guidance_interval", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["guidance_interval"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["guidance_interval"])


def run_plan(plan, runs_of, device, minutes, save):
    """Rows of the plan in its order; save(rows) after each. What fails or is not reached has an "error"."""
    end = time.monotonic() + 60 * minutes
    rows = []
    for config in plan:
        left = end - time.monotonic()
        name = f"{config.through}, {config.network}, B = {config.batch}, {config.sampler}, {config.form}"
        row = {"config": asdict(config)}
        began = time.monotonic()
        if left < 0.6 * config.seconds:
            row["error"] = "not reached in the time given"
        else:
            try:
                with limited(min(left, 3 * config.seconds) + 5), torch.inference_mode():
                    row |= compared(measure(config, runs_of(config), device, end), config.steps)
            except Exception as e:
                row["error"] = f"{type(e).__name__}: {str(e)[:300]}".splitlines()[0]
                traceback.print_exc()  # Not into the file, which is published.
                if device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
        row["took"] = time.monotonic() - began
        rows.append(row)
        save(rows)
        ratio = row["settings"][OURS]["over_floor"]["median"] if "settings" in row else row["error"]
        said = ratio if isinstance(ratio, str) else f"{ratio:.4f} of the floor"
        print(f"{row['took']:6.1f} s  {name}: {said}", flush=True)
    return rows


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no configuration that would take longer")
    parser.add_argument("--json", type=Path, default=JSON_FILE)
    parser.add_argument("--only", default="", help="configurations whose name has this, as `CFGDenoiser` or `compiled`")
    parser.add_argument("--pack", action="append", default=[], type=Pack, metavar="FOLDER:NODE[:JSON]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU: to see that it works")
    args = parser.parse_args()
    own_package()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no CUDA GPU here; --tiny runs small networks on the CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    if args.tiny:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        host = start_comfyui(scratch, args.tiny)
        networks = Networks(device, args.tiny)
        made = {"ComfyUI": lambda: ComfyRuns(networks, args.pack), "CFGDenoiser": lambda: DenoiserRuns(networks)}

        last = None

        def runs_of(config):
            nonlocal last
            same = last and (config.network, config.form) == (last.network, last.form)
            if config.form != EAGER and not (same and config.through == last.through == "ComfyUI"):
                torch._dynamo.reset()  # What the host has compiled is kept for another batch, as it is in the host.
            last = config
            return made[config.through]()

        plan = [c for c in (PLAN_TINY if args.tiny else PLAN) if args.only in f"{c.through} {c.network} {c.form}"]
        content = {"machine": machine(device, host), "interval": INTERVAL, "weight": WEIGHT, "tiny": args.tiny}
        run_plan(plan, runs_of, device, args.minutes, lambda rows: write_json(args.json, content | {"rows": rows}))


if __name__ == "__main__":
    main()

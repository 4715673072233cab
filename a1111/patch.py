"""One denoiser call of Automatic1111 or of a Forge: judged, and cut to its conditional rows outside the interval.

Forge, reForge, Forge Neo and Forge Classic are patched in one way, Automatic1111 in another.

The hosts announce each call to `on_cfg_denoiser` callbacks, just before they evaluate the network. What is put
in place there lasts for that call; the settings stand on the processing object `p`. So an error, an
interrupt or the refiner's change of model leaves nothing behind, and no two generations share anything.

Outside, the denoised output is the conditional prediction D(x; sigma, c). For prompts joined by AND it is the
mean of theirs, by weight: sum(w c) / sum(w).
"""

import torch

from ..noise_level import Timesteps, alpha_bar_to_sigma, flow_time_to_sigma

ATTRIBUTE = "guidance_interval"  # Where a Generation stands on `p`.


class Generation:
    """One generation: its Settings, and what was counted.

    calls: denoiser calls that were judged. rows: batch rows that the network evaluated in them.
    unknown: why the calls could not be patched, or None.
    """

    def __init__(self, settings):
        self.settings = settings
        self.calls = self.rows = 0
        self.unknown = None
        self._inner = self._noise_levels = None

    def noise_levels(self, inner, sigma):
        """`noise_levels_of(inner)(sigma)`; what the model is like is looked up once, and again when it changes."""
        if inner is not self._inner:
            self._inner, self._noise_levels = inner, noise_levels_of(inner)
        return self._noise_levels(sigma)


def on_cfg_denoiser(params):
    """The callback, for any generation; does nothing unless a Generation stands on its `p`."""
    denoiser = getattr(params, "denoiser", None)
    p = getattr(denoiser, "p", None)
    generation = getattr(p, ATTRIBUTE, None)
    if generation is None or generation.unknown is not None:
        return
    inner = getattr(denoiser, "inner_model", None)  # Made anew when the refiner takes over: looked up at every call.
    patch = _patch_for(params, inner)
    if patch is None:
        generation.unknown = f"{type(denoiser).__name__} evaluates its model in a way that is not known"
        return
    generation.calls += 1
    settings = generation.settings
    guided = True
    if params.text_uncond is not None and settings.covers(getattr(p, "is_hr_pass", False)):
        try:
            guided = settings.guides_any(generation.noise_levels(inner, params.sigma))
        except (AttributeError, TypeError, ValueError) as e:
            generation.unknown = f"its noise levels cannot be read: {type(e).__name__}: {e}"
            return
    patch(params, inner, generation, guided)


def _patch_for(params, inner):
    """By what the host offers: Forge's unet patcher, or A1111's module that takes cond and uncond as rows."""
    if forge_objects_of(inner) is not None:
        return _patch_forge
    if isinstance(inner, torch.nn.Module) and hasattr(params.denoiser, "combine_denoised"):
        cond, uncond = num_rows(params.text_cond), num_rows(params.text_uncond)
        if params.x.shape[0] in (cond + uncond, cond + 2 * uncond):  # 2: InstructPix2Pix
            return _patch_a1111
    return None


def forge_objects_of(inner):
    """What the Forges keep behind a denoiser's inner model, or None on Automatic1111."""
    return getattr(getattr(inner, "inner_model", None), "forge_objects", None)


def predictor_of(objects):
    """What of a Forge's model knows its noise levels."""
    model = objects.unet.model
    return getattr(model, "predictor", None) or model.model_sampling


# ----------------------------------------------------------------------------
# Noise levels.


def noise_levels_of(inner):
    """The function from the `sigma` that the host passes with this inner model to noise levels.

    Both are tensors [rows]; noise levels are in the units of k-diffusion, x = x0 + sigma n, for data of unit
    scale. A1111's timestep samplers (DDIM, PLMS, UniPC) pass a timestep, flow-matching models a time in [0, 1],
    and EDM models of the Forges (Playground 2.5) a sigma for data of another scale.
    """
    objects = forge_objects_of(inner)
    if objects is not None:
        sampling = predictor_of(objects)
    else:
        sampling = inner
        if not hasattr(inner, "sigmas"):
            timesteps = Timesteps(alpha_bar_to_sigma(inner.inner_model.alphas_cumprod))
            return timesteps.sigma
    # Flow matching ends at 1, or a rounding of its shift above it, and no model of another kind so low.
    if float(sampling.sigmas[-1]) < 2:
        return lambda t: flow_time_to_sigma(t.double().clamp(0, 1))
    sigma_data = 1.0 if objects is None else getattr(sampling, "sigma_data", 1.0)
    return (lambda sigma: sigma) if sigma_data == 1 else (lambda sigma: sigma / sigma_data)


# ----------------------------------------------------------------------------
# Automatic1111. The host asks its inner model for the rows of cond, then of uncond, in one batch or several.


def _patch_a1111(params, inner, generation, guided):
    forward = getattr(inner.forward, "before_guidance_interval", inner.forward)  # An interrupted call left its own.
    inner.forward = _Rows(forward, inner, params, generation, guided)
    left = vars(params.denoiser).get("combine_denoised")
    if isinstance(left, _CombinedAtScale1):
        left.remove()
    if not guided:
        params.denoiser.combine_denoised = _CombinedAtScale1(params.denoiser)


class _CombinedAtScale1:
    """Stands for the denoiser's `combine_denoised` during one unguided call, and has it combine with weight 1.

    Extensions recombine the predictions there by region (Regional Prompter) or by direction (Neutral Prompt), so that
    what they make of uncond = cond still moves with the weight. The hook that one has set is asked, and stays.
    """

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.hook = vars(denoiser).get("combine_denoised")
        self.combine = denoiser.combine_denoised
        self.done = False

    def __call__(self, x_out, conds_list, uncond, cond_scale):
        cond_scale = cond_scale if self.done else 1.0  # Done: an extension has wrapped this one, and goes on asking it.
        self.remove()
        return self.combine(x_out, conds_list, uncond, cond_scale)

    def remove(self):
        self.done = True
        if vars(self.denoiser).get("combine_denoised") is self:
            del self.denoiser.combine_denoised
            if self.hook is not None:
                self.denoiser.combine_denoised = self.hook


class _Rows:
    """Stands for `inner.forward` during one denoiser call, which it counts and, if unguided, cuts."""

    def __init__(self, forward, inner, params, generation, guided):
        self.before_guidance_interval = forward
        self.inner = inner
        self.params = params
        self.generation = generation
        self.guided = guided
        self.seen = 0
        self.conds = []

    def __call__(self, x, sigma, **kwargs):
        num_cond = num_rows(self.params.text_cond)  # Read late: another extension may have changed it.
        batch = x.shape[0]
        keep = batch if self.guided else min(max(num_cond - self.seen, 0), batch)
        out = [self.before_guidance_interval(x, sigma, **kwargs)] if keep == batch else []
        if 0 < keep < batch:
            out = [self.before_guidance_interval(x[:keep], sigma[:keep], **take_rows(kwargs, keep, batch))]
        self.generation.rows += keep
        if not self.guided:
            self.conds += out
            out = out + [self.conditional(row - num_cond) for row in range(self.seen + keep, self.seen + batch)]
        self.seen += batch
        if self.seen >= self.params.x.shape[0]:
            self.remove()
        return torch.cat(out) if len(out) > 1 else out[0]

    def conditional(self, row):
        """The conditional prediction [1, ...] of the image that this row, counted from the first uncond, is for."""
        weights = prompt_weights(self.params)
        image = row % len(weights)
        first = sum(len(w) for w in weights[:image])
        return weighted_mean(torch.cat(self.conds)[first : first + len(weights[image])], weights[image])

    def remove(self):
        if self.inner.__dict__.get("forward") is self:
            del self.inner.forward
            if self.inner.forward != self.before_guidance_interval:
                self.inner.forward = self.before_guidance_interval


def num_rows(cond):
    """Rows of a cond: a tensor [rows, ...], or a dict of them (SDXL)."""
    return 0 if cond is None else len(next(iter(cond.values())) if isinstance(cond, dict) else cond)


def take_rows(value, keep, batch):
    """The first `keep` rows of every tensor [batch, ...] in nested dicts, lists and tuples; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value[:keep] if value.shape[:1] == (batch,) else value
    if isinstance(value, dict):
        return {k: take_rows(v, keep, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_rows(v, keep, batch) for v in value)
    return value


def prompt_weights(params):
    """The weights of the prompts that AND joins, `[[w, ...] of each image]`."""
    conds = params.denoiser.sampler.sampler_extra_args["cond"]
    return [[prompt.weight for prompt in prompts] for prompts in conds.batch]


def weighted_mean(preds, weights):
    """sum(w preds) / sum(w), [1, ...], of predictions [prompts, ...].

    One prompt gives its prediction, to the bit. Where the weights do not add up to more than 0 there is no
    mean: the prompts of positive weight have one, and without any the first prompt stands.
    """
    if len(weights) == 1:
        return preds
    if sum(weights) <= 0:
        weights = [max(w, 0.0) for w in weights]
    if sum(weights) <= 0:
        return preds[:1]
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return (preds * w.to(preds).view(-1, *[1] * (preds.ndim - 1))).sum(0, keepdim=True)


# ----------------------------------------------------------------------------
# The Forges. The unet patcher's last conditioning modifier has the last word on cond, uncond and weight.


def _patch_forge(params, inner, generation, guided):
    objects = forge_objects_of(inner)
    # An error that stopped the last call before its modifiers ran left its own.
    unet = vars(objects.unet).get("before_guidance_interval", objects.unet)

    def modifier(model, x, timestep, uncond, cond, cond_scale, model_options, seed):
        objects.unet = unet
        if not guided:
            cond_scale = 1.0  # With which the host leaves uncond out.
            model_options = conditional_only(model_options, unet.model_options)
        evaluates_uncond = uncond is not None and (
            abs(cond_scale - 1) > 1e-9 or model_options.get("disable_cfg1_optimization", False)
        )
        generation.rows += x.shape[0] * (len(cond) + (len(uncond) if evaluates_uncond else 0))
        return model, x, timestep, uncond, cond, cond_scale, model_options, seed

    modifiers = unet.model_options.get("conditioning_modifiers", [])
    objects.unet = _OneCall(unet, {**unet.model_options, "conditioning_modifiers": [*modifiers, modifier]})


class _OneCall:
    """A unet patcher with other model_options; its clone() would deep-copy what other extensions keep there."""

    def __init__(self, unet, model_options):
        self.before_guidance_interval = unet
        self.model_options = model_options

    def __getattr__(self, name):
        return getattr(self.before_guidance_interval, name)


def conditional_only(model_options, unet_options):
    """`model_options` for an unguided call, whose own functions after CFG start from the conditional prediction.

    They are kept, since masks work through them, and take uncond = cond. A patch of the unet that insists on
    uncond (SAG) gets it evaluated; a CFG++ sampler of reForge, which asks through its own options, does not.
    """
    options = {**model_options}
    options.pop("sampler_cfg_function", None)  # Another formula for guidance, and there is none.
    insists = unet_options.get("disable_cfg1_optimization", False)
    options["disable_cfg1_optimization"] = insists

    def start(args):
        uncond = args["uncond_denoised"]
        if uncond is not None and not insists:
            uncond.copy_(args["cond_denoised"])  # In place: DDIM CFG++ reads it after the last function.
        return args["cond_denoised"]

    options["sampler_post_cfg_function"] = [start, *options.get("sampler_post_cfg_function", [])]
    return options

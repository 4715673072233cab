"""A guider whose unconditional prediction comes from a second model: autoguidance (Karras et al. 2024)."""

import contextlib
import copy
import logging
import math

import comfy.model_management
import comfy.model_sampling
import comfy.samplers

from . import host
from .model_patch import count_rows

log = logging.getLogger(__name__)


class TwoModelGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance away from `model_negative`, a weaker version of the model.

    The positive is evaluated on `model`, the negative on `model_negative` with all that is patched on it; both must
    share the latent space and the noise levels, or ValueError is raised. Autoguidance gives both the same prompt.
    The second model has a guider of its own, within whose run this one's takes place: the host loads, patches and
    cleans up both as it does each.
    """

    def __init__(self, model, model_negative):
        _check_kinship(model.model, model_negative.model)
        super().__init__(model.clone())
        around_cfg = self.model_options.get(host.POST_CFG, [])
        kept = [fn for fn in around_cfg if not host.reads_uncond_pass(fn)]
        if len(kept) < len(around_cfg):
            log.info("Guidance Interval: Self-Attention Guidance needs the model's own unconditional pass: left out")
            self.model_options[host.POST_CFG] = kept
        self.second = _OneCondGuider(with_own_weights(model_negative, model))

    def set_conds(self, positive, negative):
        super().set_conds(positive, negative)
        self.second.inner_set_conds({"positive": negative})

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        if sigmas.shape[-1] == 0:
            return latent_image
        second = self.second.model_patcher
        if not second.is_clone(self.model_patcher):  # Loaded together, neither drives out the other.
            self.model_patcher.set_additional_models(host.KEY, [second])
        rest = (denoise_mask, callback, disable_pbar, seed)
        samples, outside = [], comfy.samplers.sampling_function

        def within(denoiser, noise_, sigmas_, extra_args, callback=None, disable=None):
            of_second = comfy.samplers.sampling_function

            def predict_negative(x, sigma):
                options, run = extra_args["model_options"], getattr(self, host.KEY, None)
                with _in_force(of_second):
                    return self.second(x, sigma, options if run is None else count_rows(options, run), seed)

            self.predict_negative = predict_negative
            with _in_force(outside):
                samples.append(super(TwoModelGuider, self).sample(noise, latent_image, sampler, sigmas, *rest))
            return noise_

        try:
            within_run = comfy.samplers.KSAMPLER(within)
            self.second.sample(noise, latent_image, within_run, sigmas, denoise_mask, None, True, seed)
        finally:
            self.predict_negative = None
        return samples[0]

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        if math.isclose(self.cfg, 1.0) and not model_options.get("disable_cfg1_optimization"):
            return super().predict_noise(x, timestep, model_options, seed)
        uncond = self.predict_negative(x, timestep)
        positive = self.conds["positive"]
        denoised = host.sampling_function(
            self.inner_model, x, timestep, positive, self.cfg, model_options, seed, uncond=uncond
        )
        if denoised is None:
            raise ValueError(
                "model_negative cannot be used with a node pack that replaces ComfyUI's sampling function by one "
                "that takes no unconditional prediction but its own: disconnect it, or leave out that pack's node"
            )
        return denoised


class _OneCondGuider(comfy.samplers.CFGGuider):
    """The prediction for one cond, with what is patched on the model, at weight 1 whatever a node pack has set."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        told = host.sampling_function(self.inner_model, x, timestep, self.conds["positive"], 1.0, model_options, seed)
        return super().predict_noise(x, timestep, model_options, seed) if told is None else told


@contextlib.contextmanager
def _in_force(sampling_function):
    """Node packs replace it for a run: what one of the two models has, the other must not meet."""
    before, comfy.samplers.sampling_function = comfy.samplers.sampling_function, sampling_function
    try:
        yield
    finally:
        comfy.samplers.sampling_function = before


def _check_kinship(model, model_negative):
    for what, of in (("latents", _latents), ("noise levels", _noise)):
        one, other = of(model), of(model_negative)
        if one != other:
            raise ValueError(
                f"model and model_negative must have the same {what}, but have {one} and {other}: connect a "
                "checkpoint of the same family, or the same one with or without a LoRA"
            )


def _latents(model):
    return f"{model.latent_format.latent_channels} channels"


def _noise(model):
    return "flow matching's" if isinstance(model.model_sampling, comfy.model_sampling.CONST) else "sigmas"


# ----------------------------------------------------------------------------
# Weights: models that come from one loader share them, and what one has patched the other finds.


def with_own_weights(model, other):
    """`model` as it is, or a clone of it with a copy of the weights where it shares them with `other` and patches
    them otherwise, as with a LoRA on one of the two. The copy takes the memory of a second checkpoint.
    """
    if not model.is_clone(other) or _patched_alike(model, other):
        return model
    megabytes = model.model_size() / 2**20
    log.info("Guidance Interval: model and model_negative share their weights: copying %.0f MB", megabytes)
    if getattr(model, "is_dynamic", bool)():  # Weights that the host streams: it has them loaded anew.
        return model.clone(disable_dynamic=True)
    comfy.model_management.unload_all_models()  # Off the GPU,
    model.detach()  # and unpatched, even if a clone that is gone has left its patches.
    own = model.clone()
    config = getattr(model.model, "model_config", None)  # Read alone, and not made to be copied.
    try:
        own.model = copy.deepcopy(model.model, {id(config): config})
    except Exception as error:
        raise ValueError(
            "model and model_negative share their weights, and these cannot be copied "
            f"({type(error).__name__}: {error}): load model_negative from a copy of the file under another name"
        ) from error
    # What the clone remembers of the shared weights is not true of the copy.
    own.backup, own.object_patches_backup, own.hook_backup, own.pinned = {}, {}, {}, set()
    if hasattr(own, "backup_buffers"):
        own.backup_buffers = {}
    return own


def _patched_alike(model, other):
    """Whether two clones leave the weights and the modules of their model alike."""

    def same(a, b):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)

    return (
        model.patches_uuid == other.patches_uuid
        and same(model.object_patches, other.object_patches)
        and same(model.weight_wrapper_patches, other.weight_wrapper_patches)
        and not model.injections
        and not other.injections
    )

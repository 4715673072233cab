"""A guider whose unconditional prediction comes from a second model: autoguidance (Karras et al. 2024)."""

import math

import comfy.sampler_helpers
import comfy.samplers
import torch


class TwoModelGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance away from `model_negative`, a weaker version of the model.

    The positive is evaluated on `model`, the negative on `model_negative`; both must share the latent space and
    the noise levels. Autoguidance gives both the same prompt.
    """

    def __init__(self, model, model_negative):
        super().__init__(model)
        self.model_negative = model_negative

    def outer_sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        self.negative = None
        if math.isclose(self.cfg, 1.0):
            return super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        conds = {"negative": [cond.copy() for cond in self.conds["negative"]]}
        inner_model, conds, loaded = comfy.sampler_helpers.prepare_sampling(
            self.model_negative, noise.shape, conds, self.model_negative.model_options
        )
        self.negative = inner_model, conds["negative"]
        self.model_negative.pre_run()
        try:
            return super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.model_negative.cleanup()
            comfy.sampler_helpers.cleanup_models(conds, loaded)
            self.negative = None

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
    ):
        if self.negative is not None:
            inner_model, negative = self.negative
            latent = latent_image
            if latent is not None and torch.count_nonzero(latent) > 0:
                latent = inner_model.process_latent_in(latent)
            conds = comfy.samplers.process_conds(
                inner_model, noise, {"negative": negative}, device, latent, denoise_mask, seed, **kwargs
            )
            self.negative = inner_model, conds["negative"]
        return super().inner_sample(
            noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
        )

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        positive = self.conds["positive"]
        (cond,) = comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, timestep, model_options)
        if self.negative is None:
            return cond
        inner_model, negative = self.negative
        options = {k: v for k, v in model_options.items() if k != "multigpu_clones"}  # Those are of the first model.
        (uncond,) = comfy.samplers.calc_cond_batch(inner_model, [negative], x, timestep, options)
        return comfy.samplers.cfg_function(
            self.inner_model, cond, uncond, self.cfg, x, timestep, model_options, cond=positive, uncond=negative
        )

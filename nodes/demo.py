"""The colour emoji model that ships, as the host's own kind of model, VAE and conditioning: nothing to download."""

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.pixel_space_convert
import comfy.sd
import comfy.supported_models_base
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..toy import model as lab_model
from ..toy.sampling import SIGMA_MAX, SIGMA_MIN

EMOJI = lab_model.SHIPPED.with_name("emoji.safetensors")
NONE = "none"  # The prompt without a subgroup.
SUBGROUP = "guidance_interval_demo_subgroup"
ENLARGE = 8  # Pixels of a decoded image for each of the model's: what a latent and its image are to most models.


def _read(read):
    """read(EMOJI), with a hint for the users of a node pack in its UserError."""
    try:
        return read(EMOJI)
    except UserError as error:
        raise UserError(f"{error}. The demo model is part of this node pack: install the pack again") from error


def subgroups():
    """The prompts that there are: none, and the classes of the model in Unicode's order."""
    config = _read(lab_model.read_config)
    return [NONE, *config["classes"]]


# ----------------------------------------------------------------------------
# Model.


def demo_model():
    """`(model, vae)`: a ModelPatcher, and a VAE whose latents are pixels, from -1 to 1."""
    lab = _read(lab_model.load)
    model = DemoModel(lab)
    load_device, offload_device = (
        comfy.model_management.get_torch_device(),
        comfy.model_management.unet_offload_device(),
    )
    return comfy.model_patcher.ModelPatcher(model, load_device, offload_device), DemoVAE()


def empty_latent(batch_size):
    """A LATENT of `batch_size` empty images, [B, 3, 32, 32]."""
    size = _read(lab_model.read_config)["image_size"]
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(batch_size, 3, size, size, device=device)}


class DemoModel(comfy.model_base.BaseModel):
    """EDM's preconditioning is the host's; the network and what a prompt is to it are the lab's."""

    def __init__(self, lab):
        config = _Config({"disable_unet_model_creation": True})
        config.sampling_settings = {
            "sigma_min": SIGMA_MIN,
            "sigma_max": SIGMA_MAX,
            "sigma_data": lab.config["sigma_data"],
        }
        config.latent_format = _Pixels(lab.config["pixel_mean"], lab.config["pixel_std"] / lab.config["sigma_data"])
        super().__init__(config, comfy.model_base.ModelType.EDM)
        self.model_sampling = _ModelSampling(config)
        self.diffusion_model = _Network(lab.denoiser.inner_model)
        self.multiple = 2 ** len(lab.config["unet"]["channels"])  # Of the sides: the network halves them as often.

    def extra_conds(self, **kwargs):
        if SUBGROUP not in kwargs["model_conds"]:
            raise ValueError(
                "the Guidance Interval Demo Model reads no text: connect Guidance Interval Demo Prompt nodes to the "
                "positive and the negative instead of another model's prompts"
            )
        shape = list(kwargs["noise"].shape)
        if len(shape) != 4 or shape[1] != 3 or any(side % self.multiple for side in shape[2:]):
            raise ValueError(
                f"the Guidance Interval Demo Model samples latents of [batch, 3, 32, 32], or other multiples of "
                f"{self.multiple} as sides, got {shape}: connect the latent that its own node gives"
            )
        return {SUBGROUP: comfy.conds.CONDCrossAttn(kwargs["cross_attn"])}


class _Config(comfy.supported_models_base.BASE):
    memory_usage_factor = 0.02  # About 1 MB for each row, measured.


class _Pixels(comfy.latent_formats.LatentFormat):
    """Latents are pixels from -1 to 1; the model's scale has mean 0."""

    latent_channels = 3
    spacial_downscale_ratio = ENLARGE

    def __init__(self, mean, std):
        self.mean, self.std = 2 * mean - 1, 2 * std
        self.latent_rgb_factors = (self.std * torch.eye(3)).tolist()  # Previews are of the model's scale.
        self.latent_rgb_factors_bias = [self.mean] * 3

    def process_in(self, latent):
        return (latent - self.mean) / self.std

    def process_out(self, latent):
        return latent * self.std + self.mean


class _ModelSampling(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        # The host would start at sqrt(1 + sigma_max^2), for data of unit scale. EDM starts at sigma_max.
        return super().noise_scaling(sigma, noise, latent_image)


class _Network(nn.Module):
    """The U-Net under the host's names: the class is a vector, relative to that of no class."""

    dtype = torch.float32

    def __init__(self, unet):
        super().__init__()
        self.register_buffer("no_class", unet.emb_class.weight[-1].clone())
        unet.emb_class = nn.Identity()
        self.unet = unet

    def forward(self, x, timesteps, **kwargs):
        # [B, tokens, emb]: a prompt has one token, prompts that were concatenated have several.
        return self.unet(x, timesteps, self.no_class + kwargs[SUBGROUP].mean(1))


# ----------------------------------------------------------------------------
# Prompt.


def check_subgroup(subgroup):
    """Raise UserError, naming what there is, for a subgroup that the model does not know."""
    if subgroup not in (names := subgroups()):
        raise UserError(f"subgroup must be one of {', '.join(names)}; got {subgroup!r}")


def prompt(subgroup):
    """The CONDITIONING of a subgroup, or of none: the class's vector relative to that of no class, [1, 1, emb].

    So zeroed out it is none, the average of two lies between them, and two concatenated are their mean.
    """
    table = _read(lab_model.load).denoiser.inner_model.emb_class.weight
    row = subgroups().index(subgroup) - 1  # The table's last row is no class, and that of NONE is -1.
    vector = table[row] - table[-1]
    options = {"pooled_output": torch.zeros(1, 1), "model_conds": {SUBGROUP: _ForTheDemoModel(vector)}}
    return [[vector[None, None], options]]


class _ForTheDemoModel(comfy.conds.CONDRegular):
    """Stands in a prompt until the demo model puts its own in its place; another model does not."""

    def process_cond(self, *args, **kwargs):
        raise ValueError(
            "this prompt is from Guidance Interval Demo Prompt, which only the Guidance Interval Demo Model can read: "
            "connect that model, or prompts of this one's own text encoder"
        )


# ----------------------------------------------------------------------------
# VAE.


class DemoVAE(comfy.sd.VAE):
    """The host's VAE of pixels, with images enlarged."""

    def __init__(self):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        enlarged = self.first_stage_model = _Enlarged()
        self.patcher = comfy.model_patcher.ModelPatcher(enlarged, self.patcher.load_device, self.patcher.offload_device)
        self.upscale_ratio = self.downscale_ratio = ENLARGE
        self.memory_used_decode = lambda shape, dtype: 12 * ENLARGE**2 * shape[2] * shape[3]
        self.memory_used_encode = lambda shape, dtype: 12 * shape[2] * shape[3]


class _Enlarged(comfy.pixel_space_convert.PixelspaceConversionVAE):
    def encode(self, pixels, *args, **kwargs):
        return F.avg_pool2d(pixels, ENLARGE)

    def decode(self, samples, *args, **kwargs):
        return F.interpolate(samples, scale_factor=ENLARGE, mode="nearest")

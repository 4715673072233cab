"""The model that ships: a class-conditional EDM denoiser of 28x28 digits, and the classifier that judges it.

One safetensors file holds the denoiser (fp16), the classifier and the reference statistics of its features
(fp32); the configuration and the training record are JSON in the file's metadata.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..files import atomic_path
from .data import NUM_CLASSES, SIGMA_DATA

SHIPPED = Path(__file__).parent / "digits.safetensors"
FORMAT = "guidance-interval-lab/1"
REFERENCE = ("mean", "cov", "spread")

# ----------------------------------------------------------------------------
# Denoiser network.


class Block(nn.Module):
    """Pre-activation residual block; the embedding scales and shifts its second normalization."""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over all positions, residual."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # [B, heads, HW, C / heads]
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """Two levels, 14x14 and 7x7 for 28x28 images, behind a 2x2 pixel unshuffle: small enough for two CPU cores.

    The side of the images must be a multiple of 4; the frames of a clip are channels.
    """

    def __init__(
        self, channels=(32, 128), mid_blocks=2, emb=128, num_classes=NUM_CLASSES, dropout=0.1, image_channels=1
    ):
        super().__init__()
        c1, c2 = channels
        self.register_buffer("freqs", torch.exp(torch.linspace(0, math.log(32), 16)), persistent=False)
        self.emb_noise = nn.Sequential(nn.Linear(32, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.emb_class = nn.Embedding(num_classes + 1, emb)  # The last row is "no class".
        self.conv_in = nn.Conv2d(4 * image_channels, c1, 3, padding=1)
        self.enc = Block(c1, c1, emb, dropout)
        self.down = nn.Conv2d(c1, c2, 2, stride=2)
        self.mid = nn.ModuleList(Block(c2, c2, emb, dropout) for _ in range(mid_blocks))
        self.attn = nn.ModuleList(Attention(c2) for _ in range(mid_blocks - 1))
        self.up = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.dec = Block(2 * c1, c1, emb, dropout)
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 4 * image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x, c_noise, class_cond):
        phase = c_noise[:, None] * self.freqs  # [B, 16]
        emb = self.emb_noise(torch.cat([phase.cos(), phase.sin()], dim=1))
        emb = F.silu(emb + self.emb_class(class_cond))
        h = skip = self.enc(self.conv_in(F.pixel_unshuffle(x, 2)), emb)
        h = self.down(h)
        for i, block in enumerate(self.mid):
            h = block(h, emb)
            if i < len(self.attn):
                h = self.attn[i](h)
        h = self.dec(torch.cat([self.up(h), skip], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)


class Denoiser(nn.Module):
    """EDM preconditioning (Karras et al. 2022, table 1) behind k-diffusion's protocol.

    `model(x, sigma, class_cond=labels)` returns D(x; sigma, c): x is [B, C, H, W] at the noise level
    sigma [B], labels int64 [B], where `null_class` means "no class" (uncond).
    """

    def __init__(self, inner_model, sigma_data=SIGMA_DATA):
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data

    @property
    def null_class(self):
        return self.inner_model.emb_class.num_embeddings - 1

    def get_scalings(self, sigma):
        var = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / var, sigma * self.sigma_data / var.sqrt(), 1 / var.sqrt()

    def loss(self, x, noise, sigma, **kwargs):
        """Denoising loss of each image, [B], weighted to be 1 at initialization for every sigma (eq. 8)."""
        c_skip, c_out, c_in = (c[:, None, None, None] for c in self.get_scalings(sigma))
        noised = x + noise * sigma[:, None, None, None]
        output = self.inner_model(noised * c_in, sigma.log() / 4, **kwargs)
        return (output - (x - c_skip * noised) / c_out).square().flatten(1).mean(1)

    def forward(self, x, sigma, **kwargs):
        c_skip, c_out, c_in = (c[:, None, None, None] for c in self.get_scalings(sigma))
        return self.inner_model(x * c_in, sigma.log() / 4, **kwargs) * c_out + x * c_skip


# ----------------------------------------------------------------------------
# Classifier: the features that distances are measured in, and the judge of adherence.


class Classifier(nn.Module):
    """Small convolutional classifier; `forward(x)` returns features [B, 64] and logits [B, 10].

    The features are spatial means of the middle map, as FID's are of an Inception layer. Later ones keep the
    class and forget stroke and slant, the very variety that guidance takes away.
    """

    def __init__(
        self,
        channels=(32, 64, 64),
        hidden=64,
        num_classes=NUM_CLASSES,
        dropout=0.3,
        image_channels=1,
        image_size=28,
        stride=2,
    ):
        super().__init__()
        c1, c2, c3 = channels
        side = math.ceil(math.ceil(math.ceil(image_size / stride) / 2) / 2)
        self.lower = nn.Sequential(
            nn.Conv2d(image_channels, c1, 5, padding=2, stride=stride),
            nn.SiLU(),
            nn.Conv2d(c1, c2, 3, padding=1, stride=2),
            nn.GroupNorm(8, c2),
            nn.SiLU(),
        )
        self.upper = nn.Sequential(
            nn.Conv2d(c2, c3, 3, padding=1, stride=2),
            nn.GroupNorm(8, c3),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(c3 * side**2, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        middle = self.lower(x)  # [B, 64, 7, 7] of 28x28 images.
        return middle.mean((2, 3)), self.upper(middle)


# ----------------------------------------------------------------------------
# The file.


@dataclass
class Lab:
    """What one model file holds, ready to use.

    `denoiser` and `classifier` are modules in eval mode; `reference` holds the statistics of the real
    images' features: mean [64], cov [64, 64] and spread [10], the mean distance between two images of a class.
    `config` and `record` are the JSON of the metadata. `check_lab` says what a lab of one's own has to have of this.
    """

    denoiser: Denoiser
    classifier: Classifier
    reference: dict
    config: dict
    record: dict


def save(path, denoiser, classifier, reference, config, record):
    """Write a model file, whole or not at all; raises UserError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"denoiser.{k}": v.half() for k, v in denoiser.inner_model.state_dict().items()}
    tensors |= {f"classifier.{k}": v for k, v in classifier.state_dict().items()}
    tensors |= {f"reference.{k}": v for k, v in reference.items()}
    tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(config), "record": json.dumps(record)}
    with atomic_path(path) as tmp:
        try:
            save_file(tensors, tmp, metadata)
        except SafetensorError as e:  # Its own kind, for a full disk too.
            raise OSError(str(e)) from e


def load(path=SHIPPED, device="cpu"):
    """Read a model file that `lab/train.py` wrote and return a `Lab`.

    Raises UserError, naming the path, if there is none or it is corrupt or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not os.path.isfile(path):
        what = (
            "is a folder or a device, not a file" if os.path.exists(path) else "does not exist; `make train` writes one"
        )
        raise UserError(f"model file {str(path)!r} {what}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"model file {str(path)!r} is not a readable safetensors file ({e})") from e
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"model file {str(path)!r} has format {metadata.get('format')!r}, not {FORMAT!r}; "
            "give a file that `make train` wrote"
        )
    try:
        config, record = json.loads(metadata["config"]), json.loads(metadata["record"])
        denoiser = Denoiser(UNet(**config["unet"]), config["sigma_data"])
        classifier = Classifier(**config["classifier"])
        denoiser.inner_model.load_state_dict(_part(tensors, "denoiser."))
        classifier.load_state_dict(_part(tensors, "classifier."))
        reference = {k: _part(tensors, "reference.")[k].to(device) for k in REFERENCE}
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(
            f"model file {str(path)!r} says {FORMAT!r} but its contents do not fit ({e}); "
            "give a file that `make train` wrote"
        ) from e
    for module in (denoiser, classifier):
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Lab(denoiser, classifier, reference, config, record)


def _part(tensors, prefix):
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


# ----------------------------------------------------------------------------
# A lab of one's own.


@torch.inference_mode()
def check_lab(lab, source):
    """Return `lab`, what the function `source` gave, if it can be sampled and judged as a `Lab` can.

    Two images are denoised and classified. Raises UserError, naming what is missing or does not fit.
    """

    def refuse(what):
        raise UserError(
            f"model {source!r} returned {type(lab).__name__!r}, {what}; docs/command-line.md has an example"
        )

    if missing := [name for name in ("denoiser", "classifier", "reference", "config") if not hasattr(lab, name)]:
        refuse(f"which has no {', '.join(missing)}: return a guidance_interval.lab.model.Lab")
    for name in ("denoiser", "classifier"):
        if not isinstance(getattr(lab, name), nn.Module) or not any(True for _ in getattr(lab, name).parameters()):
            refuse(f"whose {name} is no torch.nn.Module with parameters")
    if not hasattr(lab.denoiser, "null_class"):
        refuse("whose denoiser has no null_class, the label that means no class")
    for name, keys in (("config", ("image_size", "num_classes")), ("reference", REFERENCE)):
        if missing := [key for key in keys if key not in getattr(lab, name)]:
            refuse(f"whose {name} has no {', '.join(missing)}")

    classes, size = lab.config["num_classes"], lab.config["image_size"]
    device = next(lab.denoiser.parameters()).device
    x = torch.zeros(2, lab.config.get("image_channels", 1), size, size, device=device)
    labels = torch.tensor([0, lab.denoiser.null_class], device=device)
    denoised = lab.denoiser(x, x.new_ones(2), class_cond=labels)
    if getattr(denoised, "shape", None) != x.shape:
        refuse(f"whose denoiser gives {_shape(denoised)} for x {list(x.shape)}")
    judged = lab.classifier(x)
    if not isinstance(judged, tuple) or len(judged) != 2 or any(_shape(part)[:1] != [2] for part in judged):
        refuse("whose classifier does not give (features [B, D], logits [B, classes]) for x [B, C, H, W]")
    (_, dim), (_, logits) = map(_shape, judged)
    fits = {"mean": [dim], "cov": [dim, dim], "spread": [classes]}
    for key, shape in fits.items():
        if _shape(lab.reference[key]) != shape:
            refuse(f"whose reference {key} has the shape {_shape(lab.reference[key])}, not {shape}")
    if logits != classes:
        refuse(f"whose classifier knows {logits} classes, not {classes}")
    return lab


def _shape(value):
    return list(getattr(value, "shape", []))

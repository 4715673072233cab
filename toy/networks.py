"""The networks of the models that ship: denoisers behind EDM's preconditioning, and the classifiers that judge."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .data import NUM_CLASSES, SIGMA_DATA

# ----------------------------------------------------------------------------
# Denoisers.


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


class LevelUNet(nn.Module):
    """Residual blocks at each level behind a 2 x 2 pixel unshuffle, `forward(x, c_noise, class_cond)`.

    channels: of each level, the first at half the resolution of the images, each further one at half the level
    above. blocks: residual blocks of each level on the way down; as many on the way up, and twice as many in the
    last. attention: levels, counted from 0, whose blocks are followed by self-attention. The side of the images
    must be a multiple of 2 ** len(channels).
    """

    def __init__(self, channels, blocks, attention, emb, num_classes, dropout, image_channels):
        super().__init__()
        self.register_buffer("freqs", torch.exp(torch.linspace(0, math.log(32), 16)), persistent=False)
        self.emb_noise = nn.Sequential(nn.Linear(32, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.emb_class = nn.Embedding(num_classes + 1, emb)  # The last row is "no class".
        self.conv_in = nn.Conv2d(4 * image_channels, channels[0], 3, padding=1)
        self.levels = _Level(list(zip(channels, blocks, strict=True)), 0, attention, emb, dropout)
        self.norm_out = nn.GroupNorm(8, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 4 * image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x, c_noise, class_cond):
        phase = c_noise[:, None] * self.freqs  # [B, 16]
        emb = self.emb_noise(torch.cat([phase.cos(), phase.sin()], dim=1))
        emb = F.silu(emb + self.emb_class(class_cond))
        h = self.levels(self.conv_in(F.pixel_unshuffle(x, 2)), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)


class _Level(nn.Module):
    """Blocks, the levels below, and blocks again on what comes up beside what went down."""

    def __init__(self, levels, depth, attention, emb, dropout):
        super().__init__()
        (c, blocks), *below = levels
        attend = depth in attention

        def stage(first):
            parts = []
            for i in range(blocks):
                parts.append(Block(first if i == 0 else c, c, emb, dropout))
                if attend:
                    parts.append(Attention(c))
            return nn.ModuleList(parts)

        self.enc = stage(c)
        if below:
            self.down = nn.Conv2d(c, below[0][0], 2, stride=2)
            self.below = _Level(below, depth + 1, attention, emb, dropout)
            self.up = nn.ConvTranspose2d(below[0][0], c, 2, stride=2)
            self.dec = stage(2 * c)
        else:
            self.below = None
            self.dec = stage(c)

    def forward(self, x, emb):
        h = _run(self.enc, x, emb)
        if self.below is not None:
            h = torch.cat([self.up(self.below(self.down(h), emb)), h], dim=1)
        return _run(self.dec, h, emb)


def _run(stage, h, emb):
    for part in stage:
        h = part(h, emb) if isinstance(part, Block) else part(h)
    return h


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
# The features that distances are measured in, and the judge of adherence.


class Features(nn.Module):
    """The lower half of a small convolutional classifier; `forward(x)` returns features [B, channels[1]].

    They are spatial means of the middle map, as FID's are of an Inception layer. Later ones keep the class and
    forget stroke and slant, the very variety that guidance takes away.
    """

    def __init__(self, channels, image_channels=1, stride=2):
        super().__init__()
        self.lower = nn.Sequential(
            nn.Conv2d(image_channels, channels[0], 5, padding=2, stride=stride),
            nn.SiLU(),
            nn.Conv2d(channels[0], channels[1], 3, padding=1, stride=2),
            nn.GroupNorm(8, channels[1]),
            nn.SiLU(),
        )

    def forward(self, x):
        return self.lower(x).mean((2, 3))


class Classifier(Features):
    """Small convolutional classifier; `forward(x)` returns `Features` [B, channels[1]] and logits [B, num_classes]."""

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
        super().__init__(channels, image_channels, stride)
        side = math.ceil(math.ceil(math.ceil(image_size / stride) / 2) / 2)
        self.upper = nn.Sequential(
            nn.Conv2d(channels[1], channels[2], 3, padding=1, stride=2),
            nn.GroupNorm(8, channels[2]),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(channels[2] * side**2, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        middle = self.lower(x)  # [B, 64, 7, 7] of 28x28 images.
        return middle.mean((2, 3)), self.upper(middle)

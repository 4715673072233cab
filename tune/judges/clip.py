"""The judge of images with text prompts: CLIP."""

import contextlib
import hashlib
import math

import torch
from tqdm.auto import tqdm

from ...errors import UserError
from ...measure.features import CLIP, Pixels
from ...measure.folder import Folder
from ...measure.metrics import clip_score, cmmd, kernel_mean

BATCH = 16
KEPT = 4096  # Images whose features are kept.


@contextlib.contextmanager
def _options():
    """The extractor's errors, with the options of this command."""
    try:
        yield
    except UserError as e:
        text = str(e).replace("--features clip=FOLDER", "--clip FOLDER").replace("features clip=", "--clip ")
        raise UserError(text.replace("features clip:", "CLIP, which judges the images:")) from e


class ClipJudge:
    """Adherence by CLIP score, variety by CLIP's features, and with a folder of images CMMD to them.

    source: a folder of CLIP's weights, where they are not in the hub's cache. Raises UserError when they are neither
    there nor to be had.
    """

    adherence = "Adherence (CLIP score)"
    margin, digits = 0.5, 2
    distance_name = "Distance to the reference (CMMD)"

    def __init__(self, device="cpu", reference=None, source=None):
        with _options():
            self.clip, self.reference = CLIP(device, source), reference
            self.identity = self.clip.text_identity
        self._texts, self._seen, self._real, self._kernel = {}, {}, None, math.nan

    def check(self, prompts):
        """Load what is needed now, so that nothing is missing after the first image."""
        with _options():
            self.clip.load()
            for text in dict.fromkeys(prompts):
                self._texts[text] = self.clip.text_rows([text])[0]
        if self.reference is not None and self._real is None:
            folder = Folder(self.reference)
            with tqdm(unit="image", desc="reference", leave=False) as bar:
                folder.compute(Pixels(), [self.clip], bar)
            if len(folder.keys) < 2:
                raise UserError(
                    f"--reference {self.reference!r} holds {len(folder.keys)} images; give a folder of many"
                )
            self._real = folder.rows(self.clip)
            self._kernel = kernel_mean(self._real)
            self.identity += f", reference of {len(folder.keys)} images, {self._kernel.item():.3g}"

    def look(self, image):
        """Work ahead: called with each image as it comes, while servers render others."""
        self._features([image])

    def _features(self, images):
        """Float32 [N, D]; those of images that were seen lately are kept, as a race looks at them again."""
        keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        if new:
            rows = self.clip.rows([self.clip.preprocess(image.convert("RGB")) for image in new.values()])
            self._seen |= dict(zip(new, rows, strict=True))
        found = torch.stack([self._seen[key] for key in keys])
        for key in list(self._seen)[:-KEPT]:
            del self._seen[key]
        return found

    def measure(self, images, prompts):
        """`(features [N, D] of norm 1, adherence [N])` of PIL images and their prompts, float64."""
        parts = [self._features(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        features = torch.nn.functional.normalize(torch.cat(parts).double(), dim=1)
        return features, clip_score(features, torch.stack([self._texts[p] for p in prompts]))

    def distance(self, features):
        """`(value, influence [N])` of the distance to the reference."""
        return cmmd(features.float(), self._real, influence=True, y_kernel=self._kernel)

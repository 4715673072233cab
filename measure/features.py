"""The networks whose features images are compared in, behind one small protocol.

An extractor has
- `name`, as `--features` takes it, and `dim`, the number of features;
- `identity`, which changes with the weights and the preprocessing, and is known before the network is loaded;
- `load()`, which loads the network, or raises UserError with the file that is not right;
- `preprocess(image)`: one PIL image in RGB, upright, to a tensor, in any thread;
- `classes`: names of the classes whose logits it appends to each row, if it is a classifier, else ();
- `rows(tensors)`: a list of B of them to float32 [B, dim + len(classes)] on the CPU.

Weights are where the ecosystem keeps them, or in a local file or folder that is given as the source.
"""

import hashlib
import importlib.util
import json
import os
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from .folder import first_line
from .metrics import pixel_statistics

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def get_extractor(spec, device="cpu", more=()):
    """The extractor for `name` or `name=PATH`, of `EXTRACTORS` or of the classes in `more`.

    Raises UserError for another name and without its weights, ImportError without its package.
    """
    name, _, source = spec.partition("=")
    known = {cls.name: cls for cls in (*more, *EXTRACTORS)}
    if name not in known:
        raise UserError(f"unknown features {name!r}; there are {', '.join(known)}, each with =PATH if need be")
    if importlib.util.find_spec(known[name].needs) is None:  # Now, not when the first batch has been read.
        raise ModuleNotFoundError(f"features {name} need {known[name].needs}")
    return known[name](device, source or None)


class Pixels:
    """No network: the statistics that show first when guidance is too strong (`metrics.pixel_statistics`)."""

    name, dim, identity, classes = "pixels", 3, "pixels/1", ()

    def load(self):
        """There is no network."""

    def preprocess(self, image):
        step = max(1, 2**20 // image.width)  # In stripes, or a large photo would be in memory several times.
        tops = range(0, image.height, step)
        stripes = (image.crop((0, top, image.width, min(top + step, image.height))) for top in tops)
        return pixel_statistics(map(np.asarray, stripes))

    def rows(self, tensors):
        return torch.stack(tensors)


class Inception:
    """Inception of the original FID (Heusel et al. 2017): torch-fidelity's port of the TensorFlow graph."""

    name, dim, needs, classes = "inception", 2048, "torch_fidelity", ()

    def __init__(self, device="cpu", source=None):
        self.path, self.device = Path(source or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE), device
        if source and not os.path.isfile(self.path):
            raise UserError(f"features inception={source}: no such file; give torch-fidelity's {INCEPTION_FILE}")
        if not self.path.is_file():
            self._download()
        self.identity = f"inception/1 {file_hash(self.path)}"

    def _download(self):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(self.path), INCEPTION_FILE[-12:-4])
        except (OSError, RuntimeError) as e:  # RuntimeError: what came has another hash.
            raise UserError(
                f"features inception: {self.path} is missing and cannot be downloaded ({first_line(e)}); "
                f"put {URL_INCEPTION_V3} there, or name it: --features inception=PATH"
            ) from e

    def load(self):
        return self.network

    @cached_property
    def network(self):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(self.path, map_location="meta", weights_only=True)  # Refuses what torch-fidelity would run.
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(self.path))
        except Exception as e:  # Of many kinds, from torch's unpickler.
            raise UserError(f"features inception: {self.path} is not torch-fidelity's {INCEPTION_FILE}") from e
        return network.eval().to(self.device)  # torch-fidelity 0.3 leaves that to its caller.

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # The network resizes, as TensorFlow 1 did.

    @torch.inference_mode()
    def rows(self, tensors):
        rows, by_shape = torch.empty(len(tensors), self.dim), {}
        for i, tensor in enumerate(tensors):
            by_shape.setdefault(tensor.shape, []).append(i)
        for shape, members in by_shape.items():
            for index in torch.tensor(members).split(max(1, 2**25 // shape.numel())):  # Photos, one by one.
                batch = torch.stack([tensors[i] for i in index]).to(self.device)
                rows[index] = self.network(batch)[0].float().cpu()
        return rows


class _HubModel:
    """A network of transformers: from the Hugging Face cache, which is filled at the first use, or a folder."""

    needs, classes = "transformers", ()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, device="cpu", source=None):
        self.device, self.revision = device, None
        if source:
            self.source, config = Path(source), Path(source) / "config.json"
            if not os.path.isfile(config):
                raise UserError(f"features {self.name}={source}: no config.json there; give a folder of {self.hub}")
            weights = sorted(p for pattern in ("*.safetensors", "*.bin") for p in self.source.glob(pattern))
            if not weights:
                raise UserError(f"features {self.name}={source}: no weights there (*.safetensors or *.bin)")
            which = file_hash(config, *weights)
        else:
            self.source, config = self.hub, self._cached_config()
            self.revision = which = config.parent.name
        try:
            self.config = json.loads(config.read_text(encoding="utf-8"))
            found = self.config.get("model_type")
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"features {self.name}: {config} cannot be read ({first_line(e)})") from e
        if found != self.model_type:
            raise UserError(f"features {self.name}: {config} is of a {found!r} model, not {self.model_type!r}")
        self.identity = f"{self.name}/1 {which}"

    def _cached_config(self):
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache, utils

        cached = try_to_load_from_cache(self.hub, "config.json")
        if isinstance(cached, str):
            return Path(cached)  # No look at the hub: the same weights as the last time.
        print(f"note: {self.hub} is not in {constants.HF_HUB_CACHE} yet; asking the hub for it", file=sys.stderr)
        utils.logging.set_verbosity_error()  # Else it tells of every one of its attempts.
        try:
            return Path(hf_hub_download(self.hub, "config.json"))
        except Exception as e:  # Of httpx, of the hub, of the file system.
            raise self._missing(e) from e

    def _missing(self, error):
        from huggingface_hub.constants import HF_HUB_CACHE

        return UserError(
            f"features {self.name}: {self.hub} is not in {HF_HUB_CACHE} and cannot be downloaded "
            f"({first_line(error)}); run `hf download {self.hub}` with a network, or name a copy: "
            f"--features {self.name}=FOLDER"
        )

    def _load(self, cls):
        try:
            network, info = cls.from_pretrained(self.source, revision=self.revision, output_loading_info=True)
        except OSError as e:
            raise self._missing(e) from e
        except Exception as e:  # Of many kinds: of safetensors, of torch's unpickler, for weights of another shape.
            raise UserError(f"features {self.name}: the weights of {self.source} do not load ({first_line(e)})") from e
        if info["missing_keys"]:  # transformers would leave these random, and the numbers with them.
            raise UserError(f"features {self.name}: {self.source} lacks the weights {sorted(info['missing_keys'])[:3]}")
        return network.float().eval().requires_grad_(False).to(self.device)

    def load(self):
        return self.network

    def _normalized(self, image):  # In numpy, which starts no threads of its own in those of the loader.
        x = (np.asarray(image, np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))


class DINOv2(_HubModel):
    """DINOv2 ViT-L/14, as in FD_DINOv2 (Stein et al. 2023, their code): the class token after the last norm."""

    name, hub, model_type = "dinov2", "facebook/dinov2-large", "dinov2"

    @property
    def dim(self):
        return self.config.get("hidden_size", 768)  # A config may leave out what is the default.

    @cached_property
    def network(self):
        from transformers import AutoModel

        return self._load(AutoModel)

    def preprocess(self, image):
        return self._normalized(image.resize((224, 224), Image.Resampling.BICUBIC))  # Whatever its proportions.

    @torch.inference_mode()
    def rows(self, tensors):
        return self.network(torch.stack(tensors).to(self.device)).pooler_output.cpu()


class CLIP(_HubModel):
    """CLIP ViT-L/14 at 336 pixels, as in CMMD (Jayasumana et al. 2024, their code): the projected embedding."""

    name, hub, model_type = "clip", "openai/clip-vit-large-patch14-336", "clip"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    @property
    def dim(self):
        return self.config.get("projection_dim", 512)

    @cached_property
    def network(self):
        from transformers import CLIPModel

        return self._load(CLIPModel)

    def preprocess(self, image):
        size, short = self.config["vision_config"].get("image_size", 224), min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.crop((left, top, left + short, top + short))
        return self._normalized(square.resize((size, size), Image.Resampling.BICUBIC))

    @torch.inference_mode()
    def rows(self, tensors):
        pooled = self.network.vision_model(torch.stack(tensors).to(self.device)).pooler_output
        return self.network.visual_projection(pooled).cpu()

    @property
    def text_identity(self):
        """As `identity`, for the embeddings of prompts; raises UserError when the tokenizer's files are missing."""
        if self.revision:
            return self.identity
        for names in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
            files = [self.source / name for name in names]
            if all(file.is_file() for file in files):
                return f"{self.identity} {file_hash(*files)}"
        raise UserError(
            f"features {self.name}: {self.source} has no tokenizer, which prompts need: copy tokenizer.json, or "
            f"vocab.json and merges.txt, there from {self.hub}, or use its own folder"
        )

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, revision=self.revision)
        except Exception as e:  # Of many kinds, from its files' parsers.
            raise UserError(
                f"features {self.name}: the tokenizer of {self.source} does not load ({first_line(e)})"
            ) from e
        if len(tokenizer) <= 4:  # transformers makes one of its own, without words, when files are missing.
            raise UserError(f"features {self.name}: the tokenizer of {self.source} has no vocabulary")
        return tokenizer

    @torch.inference_mode()
    def text_rows(self, prompts):
        """Embeddings of B prompts, float32 [B, dim]; what is longer than the model takes is cut off."""
        length = self.config["text_config"].get("max_position_embeddings", 77)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {k: tokens[k].to(self.device) for k in ("input_ids", "attention_mask")}
        return self.network.text_projection(self.network.text_model(**tokens).pooler_output).cpu()


EXTRACTORS = (Inception, DINOv2, CLIP)


def file_hash(*paths, pieces=32, size=2**16):
    """A hash of files by their sizes and evenly spaced pieces: no two trained networks agree in all of those."""
    digest = hashlib.sha256()
    for path in paths:
        end = path.stat().st_size
        digest.update(f"{path.name} {end};".encode())
        with open(path, "rb") as f:
            for start in np.linspace(0, max(0, end - size), pieces, dtype=int).tolist():
                f.seek(start)
                digest.update(f.read(size))
    return digest.hexdigest()[:16]

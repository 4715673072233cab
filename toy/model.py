"""The model files that ship: a denoiser, the networks that judge its samples, and what they say of the real images.

One safetensors file each: the denoiser (fp16), the judges, and the reference; the configuration and the training
record are JSON in the file's metadata.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..files import atomic_path
from .networks import Classifier, Denoiser, Features, LevelUNet, UNet

SHIPPED = Path(__file__).parent / "digits.safetensors"
FORMAT = "guidance-interval-lab/1"
REFERENCE = ("mean", "cov", "spread")

# ----------------------------------------------------------------------------
# The file.


@dataclass
class Lab:
    """What one model file holds, ready to use. Modules are in eval mode.

    denoiser: what is sampled. classifier: features [B, D] and logits, the judge of adherence. ruler: features [B, D]
    of a network that never saw the classes, in which distances are measured; None for the classifier's own.
    reference: of the real images' features mean [D], cov [D, D] and spread [classes], the mean distance between two
    images of a class; with a ruler also class_mean and class_cov, in the classifier's features, `features` and
    `class_features` [M, D] of some of the images, labels [N] of all, in an order for sampling, and thumbnails uint8
    [classes, 3, H, W]. config and record: the JSON of the metadata. `check_lab` says what a lab of one's own needs.
    """

    denoiser: Denoiser
    classifier: Classifier
    reference: dict
    config: dict
    record: dict
    ruler: Features | None = None


def save(path, denoiser, classifier, reference, config, record, ruler=None):
    """Write a model file, whole or not at all; raises UserError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"denoiser.{k}": v.half() for k, v in denoiser.inner_model.state_dict().items()}
    tensors |= {f"classifier.{k}": v for k, v in classifier.state_dict().items()}
    if ruler is not None:
        tensors |= {f"ruler.{k}": v for k, v in ruler.state_dict().items()}
    tensors |= {f"reference.{k}": v for k, v in reference.items()}
    tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(config), "record": json.dumps(record)}
    with atomic_path(path) as tmp:
        try:
            save_file(tensors, tmp, metadata)
        except SafetensorError as e:  # Its own kind, for a full disk too.
            raise OSError(str(e)) from e


def shipped():
    """`{name: path}` of the models that ship."""
    return {path.stem: path for path in sorted(SHIPPED.parent.glob("*.safetensors"))}


def read_config(path=SHIPPED):
    """The configuration of a model file, from its head alone; raises UserError as `load` does."""
    with _opened(path) as (metadata, _):
        try:
            return json.loads(metadata["config"])
        except (KeyError, ValueError) as e:
            raise _misfit(path, e) from e


def load(path=SHIPPED, device="cpu"):
    """Read a model file that `lab/train.py` wrote and return a `Lab`.

    Raises UserError, naming the path, if there is none or it is corrupt or of another kind.
    """
    path = Path(path)
    with _opened(path) as (metadata, f):
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    try:
        config, record = json.loads(metadata["config"]), json.loads(metadata["record"])
        network = LevelUNet if "blocks" in config["unet"] else UNet
        denoiser = Denoiser(network(**config["unet"]), config["sigma_data"])
        classifier = Classifier(**config["classifier"])
        ruler = Features(**config["ruler"]) if "ruler" in config else None
        modules = {"denoiser.": denoiser.inner_model, "classifier.": classifier, "ruler.": ruler}
        for prefix, module in modules.items():
            if module is not None:
                module.load_state_dict(_part(tensors, prefix))
        reference = {k: v.to(device) for k, v in _part(tensors, "reference.").items()}
        if missing := {*REFERENCE, *(("class_mean", "class_cov", "labels") if ruler else ())} - reference.keys():
            raise KeyError(f"reference lacks {', '.join(sorted(missing))}")
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise _misfit(path, e) from e
    for module in filter(None, (denoiser, classifier, ruler)):
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Lab(denoiser, classifier, reference, config, record, ruler)


@contextlib.contextmanager
def _opened(path):
    """`(metadata, open safetensors file)`; raises UserError, naming the path, for what is not a model file."""
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
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"model file {str(path)!r} has format {metadata.get('format')!r}, not {FORMAT!r}; "
                    "give a file that `make train` wrote"
                )
            yield metadata, f
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"model file {str(path)!r} is not a readable safetensors file ({e})") from e


def _misfit(path, error):
    return UserError(
        f"model file {str(path)!r} says {FORMAT!r} but its contents do not fit ({error}); "
        "give a file that `make train` wrote"
    )


def _part(tensors, prefix):
    part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v.float() if v.is_floating_point() else v for k, v in part.items()}


def fingerprint(lab):
    """16 hex digits of the weights that sample and judge."""
    digest = hashlib.sha256()
    for module in filter(None, (lab.denoiser, lab.classifier, getattr(lab, "ruler", None))):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        refuse(f"which has no {', '.join(missing)}: return a guidance_interval.toy.model.Lab")
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

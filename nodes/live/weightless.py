"""What a model's sampling is, without its weights: a ModelPatcher that has no network, for schedules alone.

A checkpoint of gigabytes is known by the names and shapes in its file's header, from which the host itself finds the
kind of model. What the file does not tell (pickles, GGUF) is known once a run has loaded it (`remember`).
"""

import atexit
import contextlib
import copy
import functools
import logging
import os
import threading

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch
from safetensors import safe_open

from ...interval_text import DEMO_MODEL_NODE
from .. import demo

MOST_TENSORS = 20000
SMALL = 2**16  # Bytes: detection looks into small tensors now and then, and at the shapes of the others.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FILES = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models"}  # Inputs of loaders, and their folders.

_CPU = torch.device("cpu")
_lock = threading.Lock()
_watched = threading.local()
_remembered = {}
changes = 0  # Of what is remembered: an answer from before may be another now.


def loaded_by(class_type, inputs):
    """The weightless ModelPatcher of what a loader node would load, or None where that is not known.

    inputs: its own values, by name.
    """
    if class_type == DEMO_MODEL_NODE:
        return _demo()
    for name, folder in FILES.items():
        file = file_of(folder, inputs.get(name))
        if file is not None:
            with _lock, _quiet():
                return _from_file(*file)
    return None


def file_of(folder, name):
    """(path, modified [ns], size) of a model that the host lists under that name, or None."""
    if not isinstance(name, str):
        return None
    file = None
    if name in folder_paths.get_filename_list(folder):
        with contextlib.suppress(OSError, TypeError, ValueError):  # Gone, since it was listed.
            path = folder_paths.get_full_path(folder, name)
            stat = os.stat(path)
            file = path, stat.st_mtime_ns, stat.st_size
    if getattr(_watched, "files", None) is not None:
        _watched.files.append((folder, name, file))
    return file


@contextlib.contextmanager
def looked_up():
    """[(folder, name, what `file_of` gives)] of each model that is looked up meanwhile, in this thread."""
    _watched.files = files = []
    try:
        yield files
    finally:
        _watched.files = None


def assumed():
    """SDXL's, of which many models are."""
    return _sdxl()


def remember(key, model):
    """Keep the sampling of a loaded `model` (a ModelPatcher) under what led to it in the graph."""
    sampling = copy.deepcopy(model.get_model_object("model_sampling")).to(_CPU)
    _remembered[key] = _without_network(model.model.model_config, sampling)
    while len(_remembered) > 64:
        _remembered.pop(next(iter(_remembered)))
    global changes
    changes += 1


def remembered(key):
    return _remembered.get(key)


# ----------------------------------------------------------------------------


def _patcher(model):
    return comfy.model_patcher.ModelPatcher(model, _CPU, _CPU)


@functools.lru_cache(maxsize=1)
def _demo():
    return demo.demo_model()[0]


@functools.lru_cache(maxsize=1)
def _sdxl():
    with _quiet():
        config = comfy.supported_models.SDXL({"disable_unet_model_creation": True})
        return _patcher(comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS))


def _without_network(config, model_sampling):
    stand_in = comfy.supported_models.SDXL({"disable_unet_model_creation": True})
    with _quiet():
        model = comfy.model_base.BaseModel(stand_in, comfy.model_base.ModelType.EPS)
    model.model_config, model.model_sampling = config, model_sampling
    return _patcher(model)


@functools.lru_cache(maxsize=64)
def _from_file(path, _mtime, _size):
    if not path.endswith((".safetensors", ".sft")):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = _Header(file)
            prefix = comfy.model_detection.unet_prefix_from_state_dict(header)
            if not any(key.startswith(prefix) for key in header):
                prefix = ""
            config = comfy.model_detection.model_config_from_unet(header, prefix, metadata=file.metadata())
            if config is None and not prefix:
                config = comfy.model_detection.model_config_from_diffusers_unet(header)
            if config is None:
                return None
            config.unet_config["disable_unet_model_creation"] = True
            return _patcher(config.get_model(header, prefix, device=_CPU))
    except Exception as error:  # Of any kind: the host's detection meets files that it was not written for.
        logging.getLogger(__name__).debug("Guidance Interval: the header of %s: %s", path, error)
        return None


@atexit.register  # ModelPatchers that outlive the host's modules complain.
def _forget():
    _remembered.clear()
    for made in (_demo, _sdxl, _from_file):
        made.cache_clear()


class _Header(dict):
    """The state dict of an open safetensors file: tensors without data, but small ones are read when looked up."""

    def __init__(self, file):
        keys = file.keys()
        if len(keys) > MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS} tensors")
        self.file = file
        parts = ((key, file.get_slice(key)) for key in keys)
        super().__init__(
            (key, torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta"))
            for key, part in parts
        )

    def __getitem__(self, key):
        tensor = super().__getitem__(key)
        return self.file.get_tensor(key) if 0 < tensor.nbytes <= SMALL else tensor

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401 (dict.get would not read)


@contextlib.contextmanager
def _quiet():
    """The host logs the kind of each model that it makes; nobody has loaded one here."""
    thread, root = threading.get_ident(), logging.getLogger()

    def others(record):
        return record.thread != thread or record.levelno >= logging.CRITICAL

    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)

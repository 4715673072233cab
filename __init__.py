"""Guidance in a limited interval for k-diffusion, ComfyUI, A1111 and Forge.

The repository root is this package and, at once, a ComfyUI custom node folder and an A1111 extension.
"""

from .presets import PRESETS, Preset, get_preset
from .sampler_patch import CFGDenoiser, GuidanceInterval

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CFGDenoiser",
    "GuidanceInterval",
    "Preset",
    "__version__",
    "get_preset",
]


# ----------------------------------------------------------------------------
# ComfyUI looks for these two when it imports the folder; nothing of ComfyUI is imported before it asks.

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import GuidanceIntervalExtension

    return GuidanceIntervalExtension()

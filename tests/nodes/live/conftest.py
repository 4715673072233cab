import types

import comfy_harness as harness
import pytest

NAMES = (
    "chart",
    "desk",
    "events",
    "forecast",
    "prompt_graph",
    "prompt_node",
    "pure_nodes",
    "route",
    "trace",
    "weightless",
)


@pytest.fixture(scope="session")
def live(host):
    """The modules of the live picture, and the patch, as the host imported them."""
    modules = {name: harness.our_module(host, f"live.{name}") for name in NAMES}
    return types.SimpleNamespace(**modules, model_patch=harness.our_module(host, "model_patch"))

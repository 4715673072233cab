import gc
from types import SimpleNamespace

import comfy_harness as harness
import pytest
import torch
from comfy_report import Report


def pytest_addoption(parser):
    parser.addoption(
        "--write-compatibility", action="store_true", help="write what the ComfyUI matrix measured to docs/"
    )


@pytest.fixture(scope="session")
def comfyui_path(tmp_path_factory):
    return harness.find_comfyui(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def host(comfyui_path):
    """ComfyUI in this process, with our nodes loaded by its loader."""
    host = harness.start_comfyui(comfyui_path)
    gc.freeze()  # The host collects garbage at every run: not over all that it imported.
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # The models are too small for more: two threads waiting for each other take 10 times as long.
    yield host
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture(scope="session")
def ours(host):
    """Our modules as the host imported them."""
    patch = harness.our_module(host, "model_patch")
    return SimpleNamespace(patch=patch, Interval=patch.GuidanceInterval)


@pytest.fixture(scope="session")
def report(host, request):
    """Collects what the matrix measures, and checks it against docs/compatibility.md or writes it there."""
    writing = request.config.getoption("--write-compatibility")
    report = Report(host.version, writing)
    yield report
    if writing:
        report.write()

"""Shared by all tests: the model that ships, loaded once; and how Hypothesis tries its examples."""

import contextlib
import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # Begun in the background: what tests start would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # The web UIs' environments need not have it.
    import hypothesis

    # One profile for all: without a deadline, which a busy machine misses.
    hypothesis.settings.register_profile("guidance-interval", deadline=None)
    hypothesis.settings.load_profile("guidance-interval")


@pytest.fixture(scope="session")
def lab():
    from guidance_interval.lab import model

    return model.load()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
